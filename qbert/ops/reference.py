"""What every kernel must compute: one plain-torch function per operation.

Integer sums are exact (float64 holds every int8 dot product below 2**53). The float epilogue of an integer product is float32
in the order written here; sums of floats (weight-only products, outliers, softmax) are float64 and rounded once, so that a
kernel's error can be told from the reference's. Slow on purpose: read it, compare with it, do not run a model on it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.formats import INT8
from qbert.ops.abi import Activation, Keeps
from qbert.ops.operations import (
    AddNorm,
    Attention,
    Embedding,
    EmbedNorm,
    Linear,
    LinearAddNorm,
    Norm,
    Out,
    QuantizeRows,
    Table,
)
from qbert.weight import codec
from qbert.weight.codec import MIN_ABSMAX

# Largest 8-bit code of an attention probability: unsigned, so that the largest of a row is exact.
PROBABILITY_MAX = 255


def quantize_rows(a: QuantizeRows) -> tuple[Tensor, Tensor]:
    """See `QuantizeRows`."""
    return codes_and_scales(a.x)


def codes_and_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """Floats (t, k) to int8 codes and float32 scales (t,)."""
    x = x.to(torch.float32)
    absmax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = absmax.isfinite()
    absmax = torch.where(finite, absmax.clamp(min=MIN_ABSMAX), torch.ones_like(absmax))
    # Two divisions a token, then products only: every step is an IEEE operation, so all targets give the same codes. Torch
    # divides a number by a tensor, and on CUDA a tensor by a number, as a product with a rounded reciprocal: hence `qmax`.
    qmax = torch.full_like(absmax, INT8.qmax)
    codes = torch.round(x * (qmax / absmax)[:, None]).clamp(-INT8.qmax, INT8.qmax)
    codes = torch.where(finite[:, None], codes, torch.zeros_like(codes))
    scale = torch.where(finite, absmax / qmax, torch.full_like(absmax, torch.nan))
    return codes.to(torch.int8), scale


def integer_product(q: Tensor, operand: Tensor) -> Tensor:
    """(t, k) int8 times (n, k) int8 transposed: (t, n) int32, exact."""
    return (q.to(torch.float64) @ operand.to(torch.float64).t()).to(torch.int32)


def linear(a: Linear) -> Tensor:
    """See `Linear`."""
    if a.s is None:
        y = a.x.to(torch.float64) @ codec.decode(a.weight, torch.float64).t()
        return finish(y, a)
    y = integer_product(a.x, codec.operand(a.weight)).to(torch.float32) * codec.row_scales(a.weight)
    if a.weight.sparse is not None:
        delta = codec.dense_outliers(a.weight.sparse, *a.weight.shape).to(torch.float64)
        y = y + (a.x.to(torch.float64) @ delta.t()).to(torch.float32)
    return finish(y * a.s[:, None], a)


def finish(y: Tensor, a: Linear) -> Tensor:
    """The end of every linear, of sums y (t, rows of the weight): bias, activation and gate in float32 (or wider), then one
    rounding to the result's type."""
    if a.bias is not None:
        y = y + a.bias.to(y.dtype)
    return to_out(activated(y, a.activation, a.gated), a.out, a.zero)


def activated(y: Tensor, activation: Activation, gated: bool) -> Tensor:
    """activation(y), or of y's halves activation(first) * second, in y's type."""
    first, gate = y.chunk(2, dim=1) if gated else (y, None)
    if activation is not Activation.NONE:
        first = _FUNCTIONS[activation](first)
    return first if gate is None else first * gate


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.GELU: torch.nn.functional.gelu,
    Activation.GELU_TANH: functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    Activation.RELU: torch.relu,
    Activation.SILU: torch.nn.functional.silu,
}


def to_out(y: Tensor, out: Out, zero: int = 0) -> Tensor:
    """Floats to a result's type: rounded to it, or to int8 codes with one static scale, that of 0 being `zero`. NaN is as 0."""
    if isinstance(out, torch.dtype):
        return y.to(out)
    steps = torch.round(y.to(torch.float32) * (1.0 / out)).nan_to_num(0.0)
    return (steps.clamp(-INT8.qmax - zero, INT8.qmax - zero) + zero).to(torch.int8)


def embedding(a: Embedding) -> Tensor:
    """See `Embedding`."""
    return codec.decode_rows(a.weight, a.ids.reshape(-1)).view(*a.ids.shape, a.weight.k).to(a.out)


def attention(a: Attention) -> Tensor:
    """See `Attention`."""
    if a.queries is not None:
        return rows_of_first(a, attention(with_all_queries(a)))
    t, width = a.qkv.shape[0], a.qkv.shape[1] // 3
    codes, scales = attention_codes(a)
    query, key, value = codes.to(torch.float64)
    out = torch.zeros_like(query)
    for start, stop in itertools.pairwise(a.cu_seqlens.tolist()):
        span = slice(start, stop)
        products = query[:, span] @ key[:, span].transpose(1, 2)
        weights, factor = attention_weights(a, products, scales[..., span])
        out[:, span] = weights.round() @ value[:, span] * factor
    return to_out(out.transpose(0, 1).reshape(t, width), a.out)


def with_all_queries(a: Attention) -> Attention:
    """Attention of first tokens alone as one of all tokens, of which only their rows have a meaning."""
    assert a.queries is not None
    (t, width), (there, first) = (a.qkv.shape[0], a.queries.shape[1]), _first_tokens(a.cu_seqlens)
    qkv, scales = torch.cat((a.qkv.new_zeros(t, width), a.qkv), dim=1), a.scales
    qkv[first, :width] = a.queries[there]
    if a.query_scales is not None:
        assert scales is not None
        scales = torch.cat((scales.new_ones(t, 1), scales), dim=1)
        scales[first, 0] = a.query_scales[there]
    return a._replace(qkv=qkv, scales=scales, queries=None, query_scales=None)


def rows_of_first(a: Attention, out: Tensor) -> Tensor:
    """The rows of each sequence's first token, (sequences, heads * head_dim); zeros for sequences without tokens."""
    there, first = _first_tokens(a.cu_seqlens)
    rows = out.new_zeros(len(there), out.shape[1])
    rows[there] = out[first]
    return rows


def _first_tokens(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequences (sequences,) have tokens, and the first token of each of those."""
    there = cu_seqlens.diff() > 0
    return there, cu_seqlens[:-1][there].to(torch.int64)


def attention_codes(a: Attention) -> tuple[Tensor, Tensor]:
    """Int8 queries, keys and values (3, heads, t, head_dim), and their float32 scales (3, heads, t), or (3, 1, t) where the
    heads share them. Float queries, keys and values are rotated and rounded here."""
    t = a.qkv.shape[0]
    parts = a.qkv.view(t, 3, a.heads, a.head_dim).permute(1, 2, 0, 3)
    if a.qkv.dtype == torch.int8:
        assert a.scales is not None
        return parts, a.scales.expand(t, 3).t()[:, None]
    parts = parts.to(torch.float32)
    if a.rotary is not None:
        parts = torch.cat((rotated(parts[:2], a.rotary, a.cu_seqlens), parts[2:]))
    if a.scales is None:
        codes, scales = codes_and_scales(parts.reshape(-1, a.head_dim))
        return codes.view(parts.shape), scales.view(parts.shape[:3])
    inverse = torch.ones_like(a.scales) / a.scales
    codes = torch.round(parts * inverse[:, None, None, None]).nan_to_num(0.0).clamp(-INT8.qmax, INT8.qmax)
    return codes.to(torch.int8), a.scales.expand(t, 3).t()[:, None]


def rotated(x: Tensor, rotary: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Float32 rows (..., t, head_dim), each turned by the angles of its position in its sequence."""
    lengths = cu_seqlens.diff().tolist()
    rows = torch.cat([rotary[:length] for length in lengths]) if lengths else rotary[:0]
    cosine, sine = rows.chunk(2, dim=1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def attention_weights(a: Attention, products: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of one sequence of t tokens, in the type of `products`.

    Args:
        products: (heads, t, t) float, sums of query times key.
        scales: (3, heads, t) of queries, keys and values, or (3, 1, t).

    Returns:
        p (heads, t, t) in 0 ... 255 before it is rounded, and the factor (heads, t, 1) on the sum of round(p) times value.
    """
    if products.numel() == 0:
        return products, products.new_zeros(*products.shape[:2], 1)
    s_query, s_key, s_value = scales.to(products.dtype)
    scores = products * (s_query[:, :, None] * s_key[:, None] * a.softmax_scale)
    distance = _distances(products)  # of a key from the query
    if a.bias is not None:
        reach = a.bias.shape[1] // 2
        scores = scores + a.bias.to(scores.dtype)[:, distance.clamp(-reach, reach) + reach]
    if a.window is not None:
        scores = scores.masked_fill(distance.abs() > a.window, -torch.inf)
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    weights = powers * s_value[:, None]
    if a.window is not None:
        weights = weights.masked_fill(distance.abs() > a.window, 0.0)  # a scale that is NaN is not seen either
    largest = weights.amax(dim=-1, keepdim=True)
    factor = largest / PROBABILITY_MAX / powers.sum(dim=-1, keepdim=True)
    return weights * (PROBABILITY_MAX / largest), factor


def _distances(products: Tensor) -> Tensor:
    """(t, t): of key j from query i, j - i."""
    at = torch.arange(products.shape[-1], device=products.device)
    return at - at[:, None]


def add_norm(a: AddNorm) -> tuple[Tensor, Tensor, Tensor]:
    """See `AddNorm`."""
    total = a.y.to(torch.float32) + a.residual.to(torch.float32)
    normed, codes, scales = _normed(total, a.norm, a.residual.dtype)
    return total.to(a.residual.dtype) if a.keeps is Keeps.SUM else normed, codes, scales


def embed_norm(a: EmbedNorm) -> tuple[Tensor, Tensor, Tensor]:
    """See `EmbedNorm`."""
    total = (
        table_rows(a.words, a.ids)
        + a.token_types[a.token_type_ids].to(torch.float32)
        + a.positions[a.position_ids].to(torch.float32)
    )
    return _normed(total, a.norm, a.positions.dtype)


def table_rows(table: Table, ids: Tensor) -> Tensor:
    """Float32 rows (t, k) of a table, quantized or float."""
    return table[ids].to(torch.float32) if isinstance(table, Tensor) else codec.decode_rows(table, ids)


def linear_add_norm(a: LinearAddNorm) -> tuple[Tensor, Tensor, Tensor]:
    """See `LinearAddNorm`."""
    return add_norm(AddNorm(linear(a.linear), a.residual, a.norm, a.keeps))


def _normed(total: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gamma, beta = norm.gamma.to(total.dtype), norm.beta.to(total.dtype)
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], gamma, beta, norm.eps)
    return normed.to(dtype), *codes_and_scales(normed)


# Operation -> its reference, which takes the operation's record.
REFERENCES: dict[str, Callable[[Any], Any]] = {
    "quantize_rows": quantize_rows,
    "linear": linear,
    "embedding": embedding,
    "attention": attention,
    "add_norm": add_norm,
    "embed_norm": embed_norm,
    "linear_add_norm": linear_add_norm,
}
