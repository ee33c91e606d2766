"""L5. Launchers of the row kernels: quantization, norms and look-ups, one program a token.

Ids are not looked at: the host would have to wait for the GPU. One that is outside of its table reads nothing and makes its
token NaN (a fused norm's scale NaN, its codes 0); CPU implementations raise. Rows too long for registers, tables in other
layouts than PLAIN and rows without columns give `NotImplemented`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert import reference
from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, Format, Role, get_scheme
from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.triton.launch import require_operands, target_for

_MIN_BLOCK = 32  # one element a thread of a warp
_MAX_BLOCK = 32_768
_WARP_ELEMENTS = 1024  # of a row that one warp holds in registers: eight 16-byte loads of float32 in flight a thread
_PLAIN = Layout.PLAIN.value
_Normed = tuple[Tensor, Tensor, Tensor]


# ---- quantization and norms -----------------------------------------------------------------------------------------


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` by `kernels/quantize_per_token.py`."""
    from qbert.kernels.quantize_per_token import quantize_per_token_kernel

    checks.activations(x)
    target_for(x)
    t, k = x.shape
    if k > _MAX_BLOCK:
        return NotImplemented
    codes, scale = _codes_and_scales(x, t, k)
    if k == 0:
        scale.fill_(reference.MIN_ABSMAX / INT8.qmax)
    elif t:
        x = _with_dense_rows(x)
        quantize_per_token_kernel[(t,)](x, codes, scale, k, x.stride(0), **row_options(k))
    return codes, scale


def add_layer_norm_quantize(y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> _Normed:
    """`add_layer_norm_quantize` by `kernels/add_layer_norm_quantize.py`."""
    from qbert.kernels.add_layer_norm_quantize import add_layer_norm_quantize_kernel

    checks.add_layer_norm_quantize(y, residual, gamma, beta)
    if y.dim() != 2:
        raise QBertError(f"y must be (t, k), got {tuple(y.shape)}")
    _require_floats(y=y, residual=residual, gamma=gamma, beta=beta)
    target_for(y)
    y, residual = _with_dense_rows(y), _with_dense_rows(residual)
    require_operands("add_layer_norm_quantize", y.device, gamma=gamma, beta=beta)
    _require_device("add_layer_norm_quantize", y.device, residual=residual)
    t, k = y.shape
    if k == 0 or k > _MAX_BLOCK:
        return NotImplemented
    out, (codes, scale) = residual.new_empty(t, k), _codes_and_scales(residual, t, k)
    if t:
        add_layer_norm_quantize_kernel[(t,)](
            y, residual, gamma, beta, out, codes, scale, k, y.stride(0), residual.stride(0), eps, **row_options(k)
        )
    return out, codes, scale


def embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> _Normed:  # fmt: skip
    """`embed_layer_norm_quantize` by `kernels/embed_layer_norm_quantize.py`."""
    from qbert.kernels.embed_layer_norm_quantize import embed_layer_norm_quantize_kernel

    rows = checks.embed_layer_norm_quantize(
        ids, position_ids, token_type_ids, words, scheme, layout, positions, token_types, gamma, beta
    )
    if ids.dim() != 1 or positions.dim() != 2:
        raise QBertError(f"ids must be (t,) and positions (p, k), got {tuple(ids.shape)} and {tuple(positions.shape)}")
    _require_floats(positions=positions, token_types=token_types, gamma=gamma, beta=beta)
    t, k = ids.shape[0], positions.shape[1]
    if (scheme != reference.FLOAT_TABLE and layout != _PLAIN) or k == 0 or k > _MAX_BLOCK:
        return NotImplemented
    fmt = None if scheme == reference.FLOAT_TABLE else get_scheme(scheme, Role.EMBEDDING).weight
    table = _table("embed_layer_norm_quantize", ids.device, fmt, words, rows, k)
    require_operands(
        "embed_layer_norm_quantize", ids.device, positions=positions, token_types=token_types, gamma=gamma, beta=beta
    )
    looked_up = [_ids(each, ids.device) for each in (ids, position_ids, token_type_ids)]
    out, (codes, scale) = positions.new_empty(t, k), _codes_and_scales(positions, t, k)
    if t:
        embed_layer_norm_quantize_kernel[(t,)](
            *looked_up, positions, token_types, gamma, beta, out, codes, scale, rows, positions.shape[0],
            token_types.shape[0], table.outliers, k, eps, *table.tensors, BITS=table.bits, GROUP=table.group,
            **row_options(k),
        )  # fmt: skip
    return out, codes, scale


# ---- look-ups -------------------------------------------------------------------------------------------------------


def w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`w8_embedding` by `kernels/embedding.py`."""
    return _embedding("w8_embedding", ids, INT8, [qdata, scale], out_dtype, qdata.shape[-1])


def w4_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype, k: int, layout: str) -> Tensor:
    """`w4_embedding`, likewise."""
    if layout != _PLAIN:
        return NotImplemented
    return _embedding("w4_embedding", ids, INT4, [qdata, scale], out_dtype, k)


def gobo_embedding(
    ids: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    out_dtype: torch.dtype, k: int, layout: str,
) -> Tensor:  # fmt: skip
    """`gobo_embedding`, likewise."""
    if layout != _PLAIN:
        return NotImplemented
    tensors = [qdata, codebook, outlier_rowptr, outlier_col, outlier_delta]
    return _embedding("gobo_embedding", ids, _dictionary_format(codebook), tensors, out_dtype, k)


def _embedding(
    operation: str, ids: Tensor, fmt: Format, tensors: list[Tensor], out_dtype: torch.dtype, k: int
) -> Tensor:
    from qbert.kernels.embedding import embedding_kernel

    checks.float_dtype("out_dtype is", out_dtype)
    rows = checks.table(tensors, _SCHEME_OF_TABLE[fmt.name], _PLAIN, k)
    if k > _MAX_BLOCK:
        return NotImplemented
    flat, table = _ids(ids, ids.device), _table(operation, ids.device, fmt, tensors, rows, k)
    out = flat.new_empty(*ids.shape, k, dtype=out_dtype)
    if out.numel():
        embedding_kernel[(flat.numel(),)](
            flat, out, rows, table.outliers, k, *table.tensors, BITS=table.bits, GROUP=table.group, **row_options(k)
        )
    return out


class _Table(NamedTuple):
    """An embedding table as `kernels.embedding.table_row` takes it.

    Attributes:
        tensors: codes or floats; scales or dictionary; row pointers, columns and deltas of outliers. None where there is none.
        bits: of a packed code, 0 where a value is a whole element.
        group: codes that share a scale, 0 where a row or none has one.
        outliers: of the whole table.
    """

    tensors: list[Tensor | None]
    bits: int
    group: int
    outliers: int


_SCHEME_OF_TABLE = {INT8.name: "w8", INT4.name: "w4", DICT4.name: "gobo4", DICT3.name: "gobo3"}


def _table(
    operation: str, device: torch.device, fmt: Format | None, tensors: list[Tensor], rows: int, k: int
) -> _Table:
    """A table that `checks.table` has seen."""
    names = ("qdata", "scale or codebook", "outlier_rowptr", "outlier_col", "outlier_delta")
    require_operands(operation, device, **dict(zip(names, tensors, strict=False)))
    bits = 0 if fmt is None or fmt is INT8 else fmt.bits
    group = _group_size(k, tensors[1]) if fmt is INT4 else 0
    padded = [*tensors, *[None] * (len(names) - len(tensors))]
    return _Table(padded, bits, group, tensors[4].numel() if len(tensors) == len(names) else 0)


def _group_size(k: int, scale: Tensor) -> int:
    groups = scale.shape[1]
    if groups == 0 or k // groups % 2:
        raise QBertError(f"k is {k}, which {groups} groups of an even size do not make")
    return k // groups


def _dictionary_format(codebook: Tensor) -> Format:
    return DICT3 if codebook.shape[-1] == DICT3.codes else DICT4


def _ids(ids: Tensor, device: torch.device) -> Tensor:
    """(t,) contiguous, of a type that indexing takes."""
    if ids.dtype not in (torch.int64, torch.int32):
        checks.ids_in_range(ids, 0)  # says what is allowed
    target_for(ids)
    _require_device("a look-up", device, ids=ids)
    return ids.reshape(-1).contiguous()


# ---- rows -----------------------------------------------------------------------------------------------------------


def row_options(k: int) -> dict[str, Any]:
    """The block that holds a row of k values, and its warps."""
    block = max(_MIN_BLOCK, 1 << (k - 1).bit_length())
    return {"BLOCK": block, "num_warps": max(1, block // _WARP_ELEMENTS), "enable_fp_fusion": False}


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _codes_and_scales(like: Tensor, t: int, k: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(t, k, dtype=torch.int8), like.new_empty(t, dtype=torch.float32)


def _require_floats(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        checks.float_dtype(f"{name} is", tensor.dtype)


def _require_device(operation: str, device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise QBertError(f"{operation}: {name} is on {tensor.device}; allowed: {device}, where the others are")


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_per_token": quantize_per_token,
    "w8_embedding": w8_embedding,
    "w4_embedding": w4_embedding,
    "gobo_embedding": gobo_embedding,
    "add_layer_norm_quantize": add_layer_norm_quantize,
    "embed_layer_norm_quantize": embed_layer_norm_quantize,
}
