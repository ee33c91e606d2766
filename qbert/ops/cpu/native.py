"""CPU kernels of the compiled extension `qbert._cpu` (csrc/cpu): allocate, take addresses, call.

What a kernel relies on was checked before (`operations`, `checks`): shapes and types there, numbers that say where to read
(ids, bounds, outliers) in C++, which is one pass and no tensors. A weight becomes the extension's own struct once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, Format, PerGroup, PerRow, PerTensor, Scheme
from qbert.ops import checks
from qbert.ops.abi import (
    FLOAT_TYPES,
    WeightFormat,
    dense,
    inverse_scale,
    out_type,
    pointer,
    require_same_enums,
)
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operations import AddNorm, Attention, Embedding, EmbedNorm, Linear, Norm, QuantizeRows, Table
from qbert.target import ISAS, Target, native_cpu
from qbert.weight import Layout, Weight

_cpu: Any = native_cpu()  # None where it was not built: then nobody calls what follows
if _cpu is not None:
    require_same_enums(_cpu)

_PANELS = {
    (INT8, Layout.INT8_PANELS): WeightFormat.INT8_PANELS,
    (INT4, Layout.INT4_PANELS): WeightFormat.INT4_PANELS,
    (DICT4, Layout.INT4_PANELS): WeightFormat.DICT4_PANELS,
    (DICT3, Layout.INT3_PANELS): WeightFormat.DICT3_PANELS,
}
# An integer product takes an expanded operand for what it is, an int8 matrix with a scale per row, and int8 rows as they are.
_INTEGER = {
    **_PANELS,
    (INT8, Layout.PLAIN): WeightFormat.INT8_ROWS,
    (INT4, Layout.INT8_EXPANDED): WeightFormat.INT8_ROWS,
}
_ROWS = {
    (INT8, Layout.PLAIN): WeightFormat.INT8_ROWS,
    (INT4, Layout.PLAIN): WeightFormat.INT4_ROWS,
    (DICT4, Layout.PLAIN): WeightFormat.DICT4_ROWS,
    (DICT3, Layout.PLAIN): WeightFormat.DICT3_ROWS,
}
_LAYOUTS: dict[Format, Layout] = dict(_PANELS.keys())
# What shares a scale in the weights that the kernels are written for.
_GRANULARITY: dict[Format, type] = {INT8: PerRow, INT4: PerGroup, DICT4: PerTensor, DICT3: PerTensor}
# Input channels in a row of int4 panels, where a group ends with a row; and whose products weight-only kernels sum up first.
_GROUP_MULTIPLE, _FLOAT_GROUP_MULTIPLE = 8, 32

_GATED_MULTIPLE = 32  # rows of a gated weight: whole panels of 16 in each half


class _Held(NamedTuple):
    """The extension's struct of a weight, and the tensors whose addresses it has."""

    struct: Any
    tensors: list[Tensor]


def _held(formats: dict[tuple[Format, Layout], WeightFormat], weight: Weight) -> _Held:
    tensors = {name: dense(tensor) for name, tensor in weight.tensors.items()}
    fmt = formats[weight.scheme.weight, weight.layout]
    groups = tensors.get("group_scale")
    if weight.scheme.group_size is not None and weight.scheme.activation is None:
        groups = tensors["scale"]
    if weight.layout is Layout.INT8_EXPANDED:
        groups = None
    column = tensors.get("outlier_col")
    struct = _cpu.Weight(
        format=fmt,
        n=weight.n,
        k=weight.k,
        codes=pointer(tensors["qdata"]),
        codebook=pointer(tensors.get("codebook")),
        matrices=weight.matrices,
        group_scale=pointer(groups),
        groups=0 if groups is None else groups.shape[1],
        scale=pointer(tensors.get("scale")) if groups is not tensors.get("scale") else 0,
        outlier_rowptr=pointer(tensors.get("outlier_rowptr")),
        outlier_col=pointer(column),
        outlier_col_wide=column is not None and column.dtype == torch.int32,
        outlier_delta=pointer(tensors.get("outlier_delta")),
        outliers=weight.outliers,
    )
    return _Held(struct, list(tensors.values()))


def _product(weight: Weight) -> _Held:
    return _held(_INTEGER if weight.scheme.activation is not None else _PANELS, weight)


def _table(weight: Weight) -> _Held:
    return _held(_ROWS, weight)


def _float_table(rows: Tensor) -> _Held:
    rows = dense(rows)
    struct = _cpu.float_rows(rows.shape[0], rows.shape[1], rows.data_ptr(), FLOAT_TYPES[rows.dtype])
    return _Held(struct, [rows])


def _rows_of(table: Table) -> _Held:
    return _float_table(table) if isinstance(table, Tensor) else table.prepared(_table)


# ---- linears --------------------------------------------------------------------------------------------------------


def integer_linear(a: Linear) -> Tensor:
    x, s, weight, bias, activation, gated, out, zero = a
    assert s is not None
    # Kept in names: a temporary would be freed before the kernel reads it.
    x, s = dense(x), dense(s)
    bias = None if bias is None else dense(bias, torch.float32)
    y = x.new_empty(x.shape[0], a.n, dtype=checks.out_type(out))
    _cpu.linear(
        weight.prepared(_product).struct, x.data_ptr(), s.data_ptr(), x.shape[0], pointer(bias), activation, gated,
        y.data_ptr(), out_type(out), inverse_scale(out), zero, torch.get_num_threads(),
    )  # fmt: skip
    return y


def float_linear(a: Linear) -> Tensor:
    x, weight, bias = a.x if a.x.stride(1) == 1 else a.x.contiguous(), a.weight, a.bias
    if bias is not None:
        bias = dense(bias, None if bias.dtype in FLOAT_TYPES else torch.float32)
    y = x.new_empty(x.shape[0], weight.n)
    _cpu.weight_only(
        weight.prepared(_product).struct, x.data_ptr(), x.stride(0), FLOAT_TYPES[x.dtype], x.shape[0], pointer(bias),
        FLOAT_TYPES[bias.dtype] if bias is not None else 0, a.activation, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def linear(a: Linear) -> Tensor:
    """Integer products of int8 tokens, weight-only products of floats."""
    return integer_linear(a) if a.s is not None else float_linear(a)


# ---- quantization and norms -----------------------------------------------------------------------------------------


def quantize_rows(a: QuantizeRows) -> tuple[Tensor, Tensor]:
    x = a.x if a.x.stride(1) == 1 else dense(a.x)
    t, k = x.shape
    codes, scale = _codes_and_scales(x, t, k)
    _cpu.quantize_rows(
        x.data_ptr(),
        x.stride(0),
        FLOAT_TYPES[x.dtype],
        codes.data_ptr(),
        scale.data_ptr(),
        t,
        k,
        torch.get_num_threads(),
    )
    return codes, scale


def _codes_and_scales(like: Tensor, t: int, k: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(t, k, dtype=torch.int8), like.new_empty(t, dtype=torch.float32)


def _vectors(norm: Norm) -> tuple[Tensor, Tensor, float]:
    return dense(norm.gamma, torch.float32), dense(norm.beta, torch.float32), norm.eps


def add_norm(a: AddNorm) -> tuple[Tensor, Tensor, Tensor]:
    y, residual = dense(a.y), dense(a.residual)
    gamma, beta, eps = _vectors(a.norm)
    t, k = y.shape
    out, (codes, scale) = residual.new_empty(t, k), _codes_and_scales(residual, t, k)
    _cpu.add_norm_rows(
        y.data_ptr(), FLOAT_TYPES[y.dtype], residual.data_ptr(), FLOAT_TYPES[residual.dtype], gamma.data_ptr(),
        beta.data_ptr(), eps, a.keeps, out.data_ptr(), codes.data_ptr(), scale.data_ptr(), t, k, torch.get_num_threads(),
    )  # fmt: skip
    return out, codes, scale


# ---- look-ups -------------------------------------------------------------------------------------------------------


def _ids(ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        checks.ids_in_range(ids, 0)  # says what is allowed
    return dense(ids, torch.int64)


def _say_what_is_outside(*looked_up: tuple[Tensor, int]) -> None:
    """Raises for the ids, or else the outliers, for which a kernel has done nothing."""
    for ids, rows in looked_up:
        checks.ids_in_range(ids, rows)
    raise QBertError(
        "an embedding table's outliers are damaged: outlier_rowptr must ascend within 0 ... outliers, and outlier_col lie "
        "within the row"
    )


def embedding(a: Embedding) -> Tensor:
    ids, table = _ids(a.ids), a.weight.prepared(_table)
    rows = ids.new_empty(*ids.shape, a.weight.k, dtype=a.out)
    threads = torch.get_num_threads()
    if not _cpu.look_up_rows(table.struct, ids.data_ptr(), rows.data_ptr(), FLOAT_TYPES[a.out], ids.numel(), threads):
        _say_what_is_outside((a.ids, a.weight.n))
    return rows


def embed_norm(a: EmbedNorm) -> tuple[Tensor, Tensor, Tensor]:
    words, positions, token_types = _rows_of(a.words), _float_table(a.positions), _float_table(a.token_types)
    ids, position_ids, token_type_ids = _ids(a.ids), _ids(a.position_ids), _ids(a.token_type_ids)
    gamma, beta, eps = _vectors(a.norm)
    t, k = ids.shape[0], a.positions.shape[1]
    out, (codes, scale) = a.positions.new_empty(t, k), _codes_and_scales(a.positions, t, k)
    inside = _cpu.embed_norm_rows(
        words.struct, positions.struct, token_types.struct, ids.data_ptr(), position_ids.data_ptr(),
        token_type_ids.data_ptr(), gamma.data_ptr(), beta.data_ptr(), eps, out.data_ptr(), codes.data_ptr(),
        scale.data_ptr(), t, torch.get_num_threads(),
    )  # fmt: skip
    if not inside:
        tables = ((a.ids, a.words), (a.position_ids, a.positions), (a.token_type_ids, a.token_types))
        _say_what_is_outside(*((each, table.shape[0]) for each, table in tables))
    return out, codes, scale


# ---- attention ------------------------------------------------------------------------------------------------------


_CODES, _WHOLE = -1, -1  # in place of a float type, and of a window


def attention(a: Attention) -> Tensor:
    qkv, cu_seqlens = dense(a.qkv), dense(a.cu_seqlens)
    scales, bias, rotary, queries, query_scales = (
        None if each is None else dense(each) for each in (a.scales, a.bias, a.rotary, a.queries, a.query_scales)
    )
    t, head_dim = qkv.shape[0], a.head_dim
    _check_terms(cu_seqlens, t, head_dim)
    dtype, width = checks.out_type(a.out), a.heads * head_dim
    context = qkv.new_empty(t, width, dtype=dtype) if queries is None else torch.zeros(queries.shape, dtype=dtype)
    covers = _cpu.attention(
        qkv.data_ptr(), FLOAT_TYPES.get(qkv.dtype, _CODES), pointer(scales), scales is not None and scales.dim() == 2,
        pointer(queries), pointer(query_scales), cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, t, a.heads, head_dim,
        a.softmax_scale, _WHOLE if a.window is None else a.window, pointer(bias), 0 if bias is None else bias.shape[1] // 2,
        pointer(rotary), 0 if rotary is None else rotary.shape[0], context.data_ptr(), out_type(a.out), inverse_scale(a.out),
        torch.get_num_threads(),
    )  # fmt: skip
    if not covers:
        bounds = cu_seqlens.tolist()
        checks.bounds_cover(bounds, t)
        checks.positions_cover(rotary, bounds)
    return context


def _check_terms(cu_seqlens: Tensor, t: int, head_dim: int) -> None:
    most = _cpu.MAX_ATTENTION_TERMS
    longest = int(cu_seqlens.diff().max()) if t > most and cu_seqlens.numel() > 1 else 0
    if longest > most or head_dim > most:
        raise QBertError(
            f"attention over {longest or t} tokens with heads of {head_dim}; above {most} of either an int32 sum could overflow"
        )


# ---- the rows of the table ------------------------------------------------------------------------------------------


def _known(scheme: Scheme) -> bool:
    return type(scheme.granularity) is _GRANULARITY.get(scheme.weight)


def _linear_obstacle(problem: Problem) -> str | None:
    scheme, layout = problem.scheme, problem.layout
    assert scheme is not None
    if problem.gated and scheme.activation is None:
        return "it does not gate products of floats"
    if problem.gated and problem.n % _GATED_MULTIPLE:
        return f"a gated linear with a weight of {problem.n} rows; it takes multiples of {_GATED_MULTIPLE}"
    if not _known(scheme):
        return f"it is not written for weights as {scheme.name} stores them"
    formats, multiple = (
        (_INTEGER, _GROUP_MULTIPLE) if scheme.activation is not None else (_PANELS, _FLOAT_GROUP_MULTIPLE)
    )
    if layout is None or (scheme.weight, layout) not in formats:
        return f"it does not read {scheme.name} weights in layout {None if layout is None else layout.value}"
    if (scheme.weight, layout) in _PANELS and scheme.group_size is not None and scheme.group_size % multiple:
        return f"groups of {scheme.group_size}; it takes multiples of {multiple}"
    return None


def _table_obstacle(problem: Problem) -> str | None:
    if problem.scheme is None:
        return None
    if not _known(problem.scheme):
        return f"it is not written for tables as {problem.scheme.name} stores them"
    readable = problem.layout is not None and (problem.scheme.weight, problem.layout) in _ROWS
    return None if readable else f"it does not read {problem.scheme.name} tables in that layout"


def _row_obstacle(problem: Problem) -> str | None:
    return None if problem.k else "rows without columns"


_CALLS: dict[str, tuple[Callable[[Any], Any], Callable[[Problem], str | None]]] = {
    "linear": (linear, _linear_obstacle),
    "quantize_rows": (quantize_rows, lambda problem: None),
    "embedding": (embedding, lambda problem: _row_obstacle(problem) or _table_obstacle(problem)),
    "attention": (attention, lambda problem: None),
    "add_norm": (add_norm, _row_obstacle),
    "embed_norm": (embed_norm, lambda problem: _row_obstacle(problem) or _table_obstacle(problem)),
}


def _layout(scheme: Scheme, target: Target) -> Layout | None:
    return _LAYOUTS[scheme.weight] if target.device == "cpu" and target.native and _known(scheme) else None


def _row(operation: str, isa: str) -> Kernel:
    call, obstacle_of = _CALLS[operation]

    def obstacle(problem: Problem, target: Target) -> str | None:
        if target.device != "cpu" or not target.native:
            return "the native extension is missing, or this is no CPU"
        return obstacle_of(problem) if target.isa == isa else f"it is for CPUs with {isa}"

    return Kernel(
        operation,
        f"native {isa}",
        call,
        obstacle,
        reason=lambda problem, target: "compiled kernel for this CPU",
        layout=_layout if operation == "linear" else lambda scheme, target: None,
    )


KERNELS = tuple(_row(operation, isa) for operation in _CALLS for isa in ISAS)
