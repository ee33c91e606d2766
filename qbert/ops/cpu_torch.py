"""L5. CPU implementations by what torch itself offers: they run in every layout and on every CPU.

Integer sums are exact, so all of them give the reference's bits up to the float epilogue.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert import reference
from qbert.dispatch import COMPOSED
from qbert.formats import DICT3, DICT4, INT8, SCHEMES
from qbert.layout import Layout, read_rows
from qbert.ops import checks
from qbert.ops.composed import COMPOSITIONS
from qbert.reference import OUT_SCALE_AT, requantized
from qbert.target import cpu_target

# int8 products are at most 2**14, so this many of them stay below 2**24, where float32 is still exact.
EXACT_FLOAT32_TERMS = 1024
# The same for products of 8-bit probabilities (0 ... 255) with int8 values.
EXACT_PROBABILITY_TERMS = 512


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    checks.activations(x)
    x = x.to(torch.float32)
    absmax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    if not bool(finite.all()):  # rare: the reference's order of operations, which costs three more passes
        return reference.quantize_per_token(x)
    absmax.clamp_(min=reference.MIN_ABSMAX)
    qmax = torch.full_like(absmax, INT8.qmax)
    codes = (x * (qmax / absmax)[:, None]).round_().clamp_(-INT8.qmax, INT8.qmax)
    return codes.to(torch.int8), absmax / qmax


# ---- linears --------------------------------------------------------------------------------------------------------


def integer_product(q: Tensor, operand: Tensor) -> Tensor:
    """(t, k) int8 times (n, k) int8 transposed as float32 (t, n), from exact int32 sums."""
    if cpu_target().int_mm_exact:
        return torch._int_mm(q, operand.t()).to(torch.float32)
    return _float32_product(q, operand.t(), EXACT_FLOAT32_TERMS)


def _float32_product(a: Tensor, b: Tensor, exact_terms: int) -> Tensor:
    """(..., m, k) times (..., k, n), integers of any type, as float32, from sums that are exact in chunks of k."""
    k = a.shape[-1]
    if k <= exact_terms:
        return a.to(torch.float32) @ b.to(torch.float32)
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.int32)
    for start in range(0, k, exact_terms):
        chunk = slice(start, start + exact_terms)
        total += (a[..., chunk].to(torch.float32) @ b[..., chunk, :].to(torch.float32)).to(torch.int32)
    return total.to(torch.float32)


def _w8a8(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
    layout: str,
) -> Tensor:  # fmt: skip
    n = checks.w8a8_linear(q, s, qdata, scale, bias, layout)
    operand = reference.expand_int8(qdata, n, q.shape[1], layout)
    return _row_scaled(q, s, operand, scale, bias, activation, out_dtype)


def _w4a8(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    checks.w4a8_linear(q, s, qdata, group_scale, scale, bias, layout)
    operand = reference.expand_int4(qdata, group_scale, q.shape[1], layout)
    return _row_scaled(q, s, operand, scale, bias, activation, out_dtype)


def _row_scaled(
    q: Tensor, s: Tensor, operand: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    checks.out_type(out_dtype)
    y = integer_product(q, operand).mul_(scale).mul_(s[:, None])
    return reference.finish(y, bias, activation, out_dtype)


def _gobo(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    n = checks.gobo_linear(q, s, qdata, codebook, scale, outlier_rowptr, outlier_col, outlier_delta, bias, layout)
    checks.out_type(out_dtype)
    operand = reference.expand_dictionary(qdata, codebook, n, q.shape[1], layout)
    y = integer_product(q, operand).mul_(reference.matrix_scales(scale, n))
    y = _add_outliers(y, q, outlier_rowptr, outlier_col, outlier_delta)
    return reference.finish(y.mul_(s[:, None]), bias, activation, out_dtype)


def _add_outliers(y: Tensor, q: Tensor, rowptr: Tensor, col: Tensor, delta: Tensor) -> Tensor:
    """y (t, n) float32 plus (t, k) int8 times sparse rows (n, k) transposed.

    In float64 a float32 times an int8 is exact, and so is the sum of a row's few of them: the order in which MKL adds,
    which depends on the batch and on the threads, does not matter. In float32 it would show in the last bit.
    """
    if delta.numel() == 0 or q.shape[0] == 0:
        return y
    size = (y.shape[1], q.shape[1])
    wide = q.to(torch.float64)
    if not torch.backends.mkl.is_available():
        dense = reference.dense_outliers(rowptr, col, delta, *size)
        return y.add_((wide @ dense.to(torch.float64).t()).to(torch.float32))
    _silence_sparse_csr_warning()
    rows = torch.sparse_csr_tensor(rowptr, col.to(torch.int32), delta.to(torch.float64), size, check_invariants=False)
    correction = torch.addmm(torch.zeros(y.shape, dtype=torch.float64), wide, rows.t())
    return y.add_(correction.to(torch.float32))


@functools.cache
def _silence_sparse_csr_warning() -> None:
    """Torch says once a process that sparse CSR is in beta; users of this package cannot act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = torch.nn.functional.linear(x, weight.to(x.dtype))
    return reference.finish(y.to(torch.float32), bias, activation, x.dtype)


def _w8a16(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    n = checks.w8a16_linear(x, qdata, scale, bias, layout)
    values = reference.expand_int8(qdata, n, x.shape[1], layout)
    return _float_linear(x, values.to(torch.float32) * scale[:, None], bias, activation)


def _w4a16(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    checks.w4a16_linear(x, qdata, scale, bias, layout)
    return _float_linear(x, reference.dequantize_int4(qdata, scale, x.shape[1], layout), bias, activation)


def _gobo_a16(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str,
) -> Tensor:  # fmt: skip
    outliers = (outlier_rowptr, outlier_col, outlier_delta)
    checks.gobo_a16_linear(x, qdata, codebook, *outliers, bias, layout)
    weight = reference.dequantize_dictionary(qdata, codebook, *outliers, x.shape[1], layout)
    return _float_linear(x, weight, bias, activation)


# ---- look-ups -------------------------------------------------------------------------------------------------------


def _w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    checks.ids_in_range(ids, checks.table([qdata, scale], "w8", Layout.PLAIN.value, qdata.shape[1]))
    return reference.w8_embedding(ids, qdata, scale, out_dtype)


def _w4_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype, k: int, layout: str) -> Tensor:
    checks.ids_in_range(ids, checks.table([qdata, scale], "w4", layout, k))
    return reference.w4_embedding(ids, qdata, scale, out_dtype, k, layout)


def _gobo_embedding(
    ids: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    out_dtype: torch.dtype, k: int, layout: str,
) -> Tensor:  # fmt: skip
    """Unpacks and patches the rows that are asked for, not the table."""
    fmt = DICT3 if codebook.shape[-1] == DICT3.codes else DICT4
    held = [qdata, codebook, outlier_rowptr, outlier_col, outlier_delta]
    checks.ids_in_range(ids, checks.table(held, "gobo3" if fmt is DICT3 else "gobo4", layout, k))
    flat = ids.reshape(-1).to(torch.int64)
    codes = read_rows(qdata, flat, fmt, k, Layout(layout))
    rows = codebook[codes.to(torch.int32)]
    starts = outlier_rowptr[flat].to(torch.int64)
    counts = outlier_rowptr[flat + 1].to(torch.int64) - starts
    token = torch.arange(flat.numel()).repeat_interleave(counts)
    within = torch.arange(token.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    source = starts.repeat_interleave(counts) + within
    rows[token, outlier_col[source].to(torch.int64)] += outlier_delta[source]
    return rows.view(*ids.shape, k).to(out_dtype)


# ---- attention and norms --------------------------------------------------------------------------------------------


def _attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype
) -> Tensor:
    """One sequence at a time in float32: its result cannot depend on its neighbours."""
    checks.attention(qkv, scales, cu_seqlens, num_heads)
    checks.out_type(out_dtype)
    t, width = qkv.shape
    bounds = cu_seqlens.tolist()
    checks.bounds_cover(bounds, t)
    head_dim = width // (3 * num_heads)
    query, key, value = qkv.view(t, 3, num_heads, head_dim).to(torch.float32).permute(1, 2, 0, 3)
    scales = scales.expand(t, 3)
    out = torch.empty(t, num_heads, head_dim)
    for start, stop in itertools.pairwise(bounds):
        span = slice(start, stop)
        products = _float32_product(query[:, span], key[:, span].transpose(1, 2), EXACT_FLOAT32_TERMS)
        weights, factor = reference.attention_weights(products, scales[span], softmax_scale)
        sums = _float32_product(weights.round_(), value[:, span], EXACT_PROBABILITY_TERMS)
        out[span] = (sums * factor).transpose(0, 1)
    return out.view(t, width // 3).to(out_dtype)


def _add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    checks.add_layer_norm_quantize(y, residual, gamma, beta)
    return reference.add_layer_norm_quantize(y, residual, gamma, beta, eps)


def _embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows_of_words = checks.embed_layer_norm_quantize(
        ids, position_ids, token_type_ids, words, scheme, layout, positions, token_types, gamma, beta
    )
    tables = (rows_of_words, positions.shape[0], token_types.shape[0])
    for which, rows in zip((ids, position_ids, token_type_ids), tables, strict=True):
        checks.ids_in_range(which, rows)
    k = positions.shape[1]
    if scheme != reference.FLOAT_TABLE and SCHEMES[scheme].has_dictionary:  # the reference would unpack the whole table
        qdata, codebook, rowptr, col, delta = words
        looked_up = _gobo_embedding(ids, qdata, codebook, rowptr, col, delta, torch.float32, k, layout)
    else:
        looked_up = reference.lookup_rows(ids, words, scheme, layout, k)
    return reference.norm_of_rows(looked_up, position_ids, token_type_ids, positions, token_types, gamma, beta, eps)


CPU_TORCH: dict[str, Callable[..., Any]] = {
    "quantize_per_token": _quantize_per_token,
    "w8a8_linear": _w8a8,
    "w4a8_linear": _w4a8,
    "gobo_linear": _gobo,
    "w8a16_linear": _w8a16,
    "w4a16_linear": _w4a16,
    "gobo_a16_linear": _gobo_a16,
    "w8_embedding": _w8_embedding,
    "w4_embedding": _w4_embedding,
    "gobo_embedding": _gobo_embedding,
    "attention_int8": _attention_int8,
    "add_layer_norm_quantize": _add_layer_norm_quantize,
    "embed_layer_norm_quantize": _embed_layer_norm_quantize,
}
CPU_TORCH |= {name: COMPOSITIONS[name](*(CPU_TORCH[part] for part in parts)) for name, parts in COMPOSED.items()}
CPU_TORCH |= {name: requantized(CPU_TORCH[name.removesuffix("_requant")], at) for name, at in OUT_SCALE_AT.items()}
