"""L5. Native CPU implementations of the row operations and of attention: check, allocate, call `qbert._cpu`.

They have exactly the operators' arguments. Everything a kernel relies on is checked before an address is taken: shapes,
types and contiguity here, numbers that say where to read (ids, bounds, outliers) in C++, which is one pass and no tensors.
Layouts and types that have no kernel return `NotImplemented`, so that torch's implementation runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert import reference
from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, Format, Role, get_scheme
from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES, dense
from qbert.target import native_cpu

_cpu: Any = native_cpu()  # None where it was not built: then nobody calls what follows

_INT8_OUT = -1  # in place of a float type
# TableFormat of csrc/cpu/kernels.h.
_FLOAT_ROWS = 0
_TABLE_FORMATS = {INT8.name: 1, INT4.name: 2, DICT4.name: 3, DICT3.name: 4}
_PLAIN = Layout.PLAIN.value


# ---- one tensor -----------------------------------------------------------------------------------------------------


def _float_type(what: str, tensor: Tensor) -> int:
    found = FLOAT_TYPES.get(tensor.dtype)
    if found is None:
        checks.float_dtype(what, tensor.dtype)
    return found  # type: ignore[return-value]


def _floats(name: str, tensor: Tensor) -> Tensor:
    """A vector of gains or scales as float32, whichever of the float types it has."""
    if tensor.dtype != torch.float32:
        checks.float_dtype(f"{name} is", tensor.dtype)
    return dense(tensor, torch.float32)


def _ids(ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        checks.ids_in_range(ids, 0)  # says what is allowed
    return dense(ids, torch.int64)


def _codes_and_scales(like: Tensor, t: int, k: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(t, k, dtype=torch.int8), like.new_empty(t, dtype=torch.float32)


# ---- quantization and norms -----------------------------------------------------------------------------------------


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    checks.activations(x)
    t, k = x.shape
    if x.stride(1) != 1:
        x = dense(x)
    codes, scale = _codes_and_scales(x, t, k)
    _cpu.quantize_rows(
        x.data_ptr(), x.stride(0), FLOAT_TYPES[x.dtype], codes.data_ptr(), scale.data_ptr(), t, k, torch.get_num_threads()
    )  # fmt: skip
    return codes, scale


def add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    checks.add_layer_norm_quantize(y, residual, gamma, beta)
    if y.dim() != 2:
        raise QBertError(f"y must be (t, k), got {tuple(y.shape)}")
    y_type, residual_type = _float_type("y is", y), _float_type("residual is", residual)
    t, k = y.shape
    if k == 0:
        return NotImplemented
    y, residual = dense(y), dense(residual)
    gamma, beta = _floats("gamma", gamma), _floats("beta", beta)
    out, (codes, scale) = residual.new_empty(t, k), _codes_and_scales(residual, t, k)
    _cpu.add_norm_rows(
        y.data_ptr(), y_type, residual.data_ptr(), residual_type, gamma.data_ptr(), beta.data_ptr(), eps,
        out.data_ptr(), codes.data_ptr(), scale.data_ptr(), t, k, torch.get_num_threads(),
    )  # fmt: skip
    return out, codes, scale


# ---- look-ups -------------------------------------------------------------------------------------------------------


def _table(fmt: Format | None, tensors: list[Tensor], rows: int, k: int) -> tuple[Any, list[Tensor]] | None:
    """A checked table as kernels read it, with the tensors that must outlive the call; None if it has no kernel."""
    held = [dense(each) for each in tensors]
    data, second, *outlier_pointers = [each.data_ptr() for each in held] + [0] * (5 - len(held))
    if fmt is None:
        return _cpu.Table(rows, k, _FLOAT_ROWS, data, FLOAT_TYPES[held[0].dtype], 0, 0, 0, 0, 0, False, 0, 0), held
    if fmt is DICT3 or fmt is DICT4:
        rowptr, col, delta = outlier_pointers
        wide, outliers = held[3].dtype == torch.int32, held[3].numel()
        return _cpu.Table(
            rows, k, _TABLE_FORMATS[fmt.name], data, 0, 0, 0, second, rowptr, col, wide, delta, outliers
        ), held
    groups = 0
    if fmt is INT8:
        held[1] = _floats("scale", held[1])
    else:
        groups = held[1].shape[1]
        if groups == 0 or k // groups % 2:
            return None  # torch's implementation says what is wrong with them
    return _cpu.Table(
        rows, k, _TABLE_FORMATS[fmt.name], data, 0, held[1].data_ptr(), groups, 0, 0, 0, False, 0, 0
    ), held


def _say_what_is_outside(*looked_up: tuple[Tensor, int]) -> None:
    """Raises for the ids, or else the outliers, for which a kernel has done nothing."""
    for ids, rows in looked_up:
        checks.ids_in_range(ids, rows)
    raise QBertError(
        "an embedding table's outliers are damaged: outlier_rowptr must ascend within 0 ... outliers, and outlier_col lie "
        "within the row"
    )


def _embedding(ids: Tensor, fmt: Format, tensors: list[Tensor], rows: int, k: int, out_dtype: torch.dtype) -> Tensor:
    out_type = FLOAT_TYPES.get(out_dtype)
    made = None if out_type is None else _table(fmt, tensors, rows, k)
    if made is None:
        return NotImplemented
    table, held = made
    flat = _ids(ids)
    out = flat.new_empty(*ids.shape, k, dtype=out_dtype)
    if not _cpu.look_up_rows(table, flat.data_ptr(), out.data_ptr(), out_type, flat.numel(), torch.get_num_threads()):
        _say_what_is_outside((ids, rows))
    del held
    return out


def w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    k = qdata.shape[-1]
    rows = checks.table([qdata, scale], "w8", _PLAIN, k)
    return _embedding(ids, INT8, [qdata, scale], rows, k, out_dtype)


def w4_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype, k: int, layout: str) -> Tensor:
    if layout != _PLAIN:
        return NotImplemented
    rows = checks.table([qdata, scale], "w4", layout, k)
    return _embedding(ids, INT4, [qdata, scale], rows, k, out_dtype)


def gobo_embedding(
    ids: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    out_dtype: torch.dtype, k: int, layout: str,
) -> Tensor:  # fmt: skip
    if layout != _PLAIN:
        return NotImplemented
    fmt = DICT3 if codebook.shape[-1] == DICT3.codes else DICT4
    tensors = [qdata, codebook, outlier_rowptr, outlier_col, outlier_delta]
    rows = checks.table(tensors, "gobo3" if fmt is DICT3 else "gobo4", layout, k)
    return _embedding(ids, fmt, tensors, rows, k, out_dtype)


def embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = checks.embed_layer_norm_quantize(
        ids, position_ids, token_type_ids, words, scheme, layout, positions, token_types, gamma, beta
    )
    if ids.dim() != 1 or positions.dim() != 2:
        raise QBertError(f"ids must be (t,) and positions (p, k), got {tuple(ids.shape)} and {tuple(positions.shape)}")
    positions_type, types_type = _float_type("positions are", positions), _float_type("token_types are", token_types)
    fmt = None if scheme == reference.FLOAT_TABLE else get_scheme(scheme, Role.EMBEDDING).weight
    t, k = ids.shape[0], positions.shape[1]
    made = _table(fmt, words, rows, k) if k and (fmt is None or layout == _PLAIN) else None
    if made is None:
        return NotImplemented
    table, held = made
    flat, flat_positions, flat_types = _ids(ids), _ids(position_ids), _ids(token_type_ids)
    positions, token_types = dense(positions), dense(token_types)
    gamma, beta = _floats("gamma", gamma), _floats("beta", beta)
    out, (codes, scale) = positions.new_empty(t, k), _codes_and_scales(positions, t, k)
    inside = _cpu.embed_norm_rows(
        table, flat.data_ptr(), flat_positions.data_ptr(), flat_types.data_ptr(), positions.data_ptr(), positions.shape[0],
        positions_type, token_types.data_ptr(), token_types.shape[0], types_type, gamma.data_ptr(), beta.data_ptr(), eps,
        out.data_ptr(), codes.data_ptr(), scale.data_ptr(), t, torch.get_num_threads(),
    )  # fmt: skip
    if not inside:
        _say_what_is_outside((ids, rows), (position_ids, positions.shape[0]), (token_type_ids, token_types.shape[0]))
    del held
    return out, codes, scale


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype,
    out_type: int, inverse_out_scale: float,
) -> Tensor:  # fmt: skip
    checks.attention(qkv, scales, cu_seqlens, num_heads)
    if not (0 < softmax_scale < math.inf):
        raise QBertError(f"softmax_scale is {softmax_scale}; allowed: finite and above 0")
    t, width = qkv.shape[0], qkv.shape[1] // 3
    _check_terms(cu_seqlens, t, width // num_heads)
    qkv, scales, cu_seqlens = dense(qkv), dense(scales), dense(cu_seqlens)
    out = qkv.new_empty(t, width, dtype=out_dtype)
    covers = _cpu.attention(
        qkv.data_ptr(), scales.data_ptr(), scales.dim() == 2, cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, t, num_heads,
        width // num_heads, softmax_scale, out.data_ptr(), out_type, inverse_out_scale, torch.get_num_threads(),
    )  # fmt: skip
    if not covers:
        checks.bounds_cover(cu_seqlens.tolist(), t)
    return out


def _check_terms(cu_seqlens: Tensor, t: int, head_dim: int) -> None:
    most = _cpu.MAX_ATTENTION_TERMS
    longest = int(cu_seqlens.diff().max()) if t > most and cu_seqlens.numel() > 1 else 0
    if longest > most or head_dim > most:
        raise QBertError(
            f"attention over {longest or t} tokens with heads of {head_dim}; above {most} of either an int32 sum could overflow"
        )


def attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype
) -> Tensor:
    checks.out_type(out_dtype)
    out_type = FLOAT_TYPES[out_dtype]
    return _attention(qkv, scales, cu_seqlens, num_heads, softmax_scale, out_dtype, out_type, 1.0)


def attention_int8_requant(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_scale: float
) -> Tensor:
    return _attention(qkv, scales, cu_seqlens, num_heads, softmax_scale, torch.int8, _INT8_OUT, 1.0 / out_scale)


NATIVE_ROWS: dict[str, Callable[..., Any]] = {
    "quantize_per_token": quantize_per_token,
    "w8_embedding": w8_embedding,
    "w4_embedding": w4_embedding,
    "gobo_embedding": gobo_embedding,
    "attention_int8": attention_int8,
    "attention_int8_requant": attention_int8_requant,
    "add_layer_norm_quantize": add_layer_norm_quantize,
    "embed_layer_norm_quantize": embed_layer_norm_quantize,
}
