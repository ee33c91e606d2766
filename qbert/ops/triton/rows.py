"""Launchers of the row kernels: quantization, norms and look-ups, one program a token.

Ids are not looked at: the host would have to wait for the GPU. One that is outside of its table reads nothing and makes its
token NaN (a fused norm's scale NaN, its codes 0); CPU implementations raise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8
from qbert.ops import checks
from qbert.ops.abi import Keeps
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import AddNorm, Embedding, EmbedNorm, QuantizeRows
from qbert.ops.triton.arguments import Normed, Table, TableMeta
from qbert.ops.triton.launch import layout_obstacle, require_weight, target_for
from qbert.weight import Layout, Weight, codec

_MIN_BLOCK = 32  # one element a thread of a warp
_MAX_BLOCK = 32_768
_WARP_ELEMENTS = 1024  # of a row that one warp holds in registers: eight 16-byte loads of float32 in flight a thread
_TABLE_LAYOUTS, _TABLE_FORMATS = frozenset({Layout.PLAIN}), (INT8, INT4, DICT3, DICT4)


# ---- quantization and norms -----------------------------------------------------------------------------------------


def quantize_rows(a: QuantizeRows) -> tuple[Tensor, Tensor]:
    """`kernels/quantize_per_token.py`."""
    from qbert.kernels.quantize_per_token import quantize_per_token_kernel

    x = a.x
    target_for(x)
    t, k = x.shape
    codes, scale = _codes_and_scales(x, t, k)
    if k == 0:
        scale.fill_(codec.MIN_ABSMAX / INT8.qmax)
    elif t:
        x = _with_dense_rows(x)
        quantize_per_token_kernel[(t,)](x, codes, scale, k, x.stride(0), block_of(k), **row_options(k))
    return codes, scale


def add_norm(a: AddNorm) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels/add_layer_norm_quantize.py`."""
    from qbert.kernels.add_layer_norm_quantize import add_layer_norm_quantize_kernel

    target_for(a.y)
    y, residual = _with_dense_rows(a.y), _with_dense_rows(a.residual)
    require_operands("add_norm", y.device, gamma=a.norm.gamma, beta=a.norm.beta)
    _require_device("add_norm", y.device, residual=residual)
    t, k = y.shape
    normed = _normed(residual, t, k)
    if t:
        strides = y.stride(0), residual.stride(0)
        add_layer_norm_quantize_kernel[(t,)](
            y, residual, a.norm, normed, k, strides, block_of(k), a.keeps is Keeps.SUM, **row_options(k)
        )
    return normed


def embed_norm(a: EmbedNorm) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels/embed_layer_norm_quantize.py`."""
    from qbert.kernels.embed_layer_norm_quantize import embed_layer_norm_quantize_kernel

    (t,), k, device = a.ids.shape, a.positions.shape[1], a.ids.device
    table, bits, group = _table_of("embed_norm", device, a.words)
    require_operands(
        "embed_norm", device, positions=a.positions, token_types=a.token_types, gamma=a.norm.gamma, beta=a.norm.beta
    )
    tables = table, _float_table(a.positions).table, _float_table(a.token_types).table
    looked_up = tuple(_ids(each, device) for each in (a.ids, a.position_ids, a.token_type_ids))
    normed = _normed(a.positions, t, k)
    if t:
        meta = TableMeta(bits, group, block_of(k))
        embed_layer_norm_quantize_kernel[(t,)](looked_up, tables, a.norm, normed, k, META=meta, **row_options(k))
    return normed


# ---- look-ups -------------------------------------------------------------------------------------------------------


def embedding(a: Embedding) -> Tensor:
    """`kernels/embedding.py`."""
    from qbert.kernels.embedding import embedding_kernel

    k, flat = a.weight.k, _ids(a.ids, a.ids.device)
    table, bits, group = _table_of("embedding", a.ids.device, a.weight)
    out = flat.new_empty(*a.ids.shape, k, dtype=a.out)
    if out.numel():
        meta = TableMeta(bits, group, block_of(k))
        embedding_kernel[(flat.numel(),)](flat, out, table, k, META=meta, **row_options(k))
    return out


class _Held(NamedTuple):
    """A table, bits of its packed codes and codes that share a scale: 0 where a value is a whole element, where none do."""

    table: Table
    bits: int
    group: int


def _table_of(operation: str, device: torch.device, table: Weight | Tensor) -> _Held:
    if isinstance(table, Tensor):
        require_operands(operation, device, words=table)
        return _float_table(table)
    require_weight(operation, device, table)
    return table.prepared(_quantized_table)


def _float_table(rows: Tensor) -> _Held:
    return _Held(Table(rows, None, None, rows.shape[0], 0), 0, 0)


def _quantized_table(weight: Weight) -> _Held:
    bits, scale = weight.scheme.weight_bits, weight.codebook if weight.scheme.has_dictionary else weight.scale
    table = Table(weight.qdata, scale, weight.sparse, weight.n, weight.outliers)
    return _Held(table, 0 if bits == 8 else bits, weight.scheme.group_size or 0)


def _ids(ids: Tensor, device: torch.device) -> Tensor:
    """(t,) contiguous, of a type that indexing takes."""
    if ids.dtype not in (torch.int64, torch.int32):
        checks.ids_in_range(ids, 0)  # says what is allowed
    target_for(ids)
    _require_device("a look-up", device, ids=ids)
    return ids.reshape(-1).contiguous()


# ---- rows -----------------------------------------------------------------------------------------------------------


def block_of(k: int) -> int:
    """The block that holds a row of k values."""
    return max(_MIN_BLOCK, 1 << (k - 1).bit_length())


def row_options(k: int) -> dict[str, Any]:
    """Of a launch for rows of k values."""
    return {"num_warps": max(1, block_of(k) // _WARP_ELEMENTS), "enable_fp_fusion": False}


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _codes_and_scales(like: Tensor, t: int, k: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(t, k, dtype=torch.int8), like.new_empty(t, dtype=torch.float32)


def _normed(like: Tensor, t: int, k: int) -> Normed:
    return Normed(like.new_empty(t, k), *_codes_and_scales(like, t, k))


def _require_device(operation: str, device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise QBertError(f"{operation}: {name} is on {tensor.device}; allowed: {device}, where the others are")


# ---- why not a problem on a GPU that the kernels run on; None where they compute it ---------------------------------


def width_obstacle(problem: Problem) -> str | None:
    """Of what takes any rows that registers hold."""
    return f"rows of {problem.k}; it takes up to {_MAX_BLOCK}" if problem.k > _MAX_BLOCK else None


def norm_obstacle(problem: Problem) -> str | None:
    """Of a norm, which must have something to divide by."""
    return width_obstacle(problem) if problem.k else "rows without columns"


def embedding_obstacle(problem: Problem) -> str | None:
    """Of a quantized table."""
    scheme = problem.scheme
    assert scheme is not None
    if scheme.weight not in _TABLE_FORMATS:
        return (
            f"it does not read {scheme.weight.name} codes; it reads {', '.join(each.name for each in _TABLE_FORMATS)}"
        )
    if (scheme.group_size is not None) != (scheme.weight == INT4):
        return f"{scheme.weight.name} tables with scales of {scheme.granularity}"
    return width_obstacle(problem) or layout_obstacle(problem, _TABLE_LAYOUTS)


def embed_norm_obstacle(problem: Problem) -> str | None:
    """Of a norm of looked-up rows, whose table may be float."""
    return norm_obstacle(problem) or (None if problem.scheme is None else embedding_obstacle(problem))
