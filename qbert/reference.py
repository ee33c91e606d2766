"""L4. What every kernel must compute: one plain-torch function per operation of the instruction set.

Integer sums are exact (float64 holds every int8 dot product below 2**53). The float epilogue of an integer product is float32
in the order written here; sums of floats (weight-only products, outliers, softmax) are float64 and rounded once, so that a
kernel's error can be told from the reference's. Slow on purpose: read it, compare with it, do not run a model on it.

Shapes: t tokens, n output channels, k input channels. Weights come in any layout of their scheme.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, SCHEMES, Format
from qbert.layout import Layout, look_up, read_codes
from qbert.qtensor import QuantizedTensor

# A row whose largest magnitude is below this gets this row's scale: its codes are 0 and its scale stays a normal float32.
MIN_ABSMAX = 2.0**-100
ACTIVATIONS = ("none", "gelu")
# Largest 8-bit code of an attention probability: unsigned, so that the largest of a row is exact.
PROBABILITY_MAX = 255
# In place of an embedding scheme's name: the word table stayed float.
FLOAT_TABLE = "float"


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes with one scale per token (ZeroQuant, Yao et al., 2022).

    Args:
        x: (t, k) float32, bfloat16 or float16.

    Returns:
        codes (t, k) int8 in -127 ... 127 and scales (t,) float32 with x ~ codes * scale. A token with NaN or infinity in it
        gets scale NaN and codes 0, so that it comes out as NaN whatever it is multiplied with, and no other token does.
    """
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


def w8a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
    layout: str,
) -> Tensor:  # fmt: skip
    """y[t, n] = activation(s[t] * scale[n] * (q @ weight.T)[t, n] + bias[n]).

    Args:
        q, s: (t, k) int8 and (t,) float32 from `quantize_per_token`.
        qdata, scale: int8 weight (n, k) in `layout`, and (n,) float32.
        bias: (n,) float or None.
        activation: ``"none"`` or ``"gelu"`` (exact, by the error function).
        out_dtype: of y (t, n).
    """
    operand = expand_int8(qdata, scale.numel(), q.shape[1], layout)
    return _row_scaled(q, s, operand, scale, bias, activation, out_dtype)


def w4a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """`w8a8_linear` whose int8 operand is code * group_scale: group_scale (n, k / group) uint8, `qdata` in `layout`."""
    operand = expand_int4(qdata, group_scale, q.shape[1], layout)
    return _row_scaled(q, s, operand, scale, bias, activation, out_dtype)


def gobo_linear(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """y = activation(s * (scale * (q @ codebook[codes].T) + q @ outliers.T) + bias), outliers exact.

    Args:
        qdata: codes of the dictionary in `layout`, or the int8 operand itself.
        codebook, scale: (2**bits,) int8 centroids, ascending, and (1,) float32 of the whole matrix; or (m, 2**bits) and (m,)
            of m matrices of n / m rows each, stacked: row r has number r * m // n.
        outlier_rowptr, outlier_col, outlier_delta: (n + 1,), (outliers,), (outliers,): compressed sparse rows of the
            difference between the exact weight and its centroid.
    """
    n, k = outlier_rowptr.numel() - 1, q.shape[1]
    operand = expand_dictionary(qdata, codebook, n, k, layout)
    product = integer_product(q, operand).to(torch.float32) * matrix_scales(scale, n)
    delta = dense_outliers(outlier_rowptr, outlier_col, outlier_delta, n, k).to(torch.float64)
    correction = (q.to(torch.float64) @ delta.t()).to(torch.float32)
    return finish((product + correction) * s[:, None], bias, activation, out_dtype)


def requantize(y: Tensor, out_scale: float) -> Tensor:
    """(t, n) float32 to int8 codes with one static scale. NaN becomes code 0: the residual stream, not this, carries it."""
    codes = torch.round(y * (1.0 / out_scale)).nan_to_num(0.0).clamp(-INT8.qmax, INT8.qmax)
    return codes.to(torch.int8)


def w8a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    """Float activations x (t, k), int8 weights with a scale per row; y (t, n) of x's type."""
    values = expand_int8(qdata, scale.numel(), x.shape[1], layout)
    return _float_linear(x, values.to(torch.float64) * scale.to(torch.float64)[:, None], bias, activation)


def w4a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    """Float activations x (t, k), int4 weights with a scale (n, k / group) per group; y (t, n) of x's type."""
    return _float_linear(x, dequantize_int4(qdata, scale, x.shape[1], layout).to(torch.float64), bias, activation)


def gobo_a16_linear(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str,
) -> Tensor:  # fmt: skip
    """Float activations x (t, k), dictionary weights with exact outliers; y (t, n) of x's type."""
    weight = dequantize_dictionary(qdata, codebook, outlier_rowptr, outlier_col, outlier_delta, x.shape[1], layout)
    return _float_linear(x, weight.to(torch.float64), bias, activation)


def w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Rows `ids` (any shape) of an int8 table (rows, k) with a scale per row: (*ids.shape, k) of `out_dtype`."""
    return (qdata[ids].to(torch.float32) * scale[ids].unsqueeze(-1)).to(out_dtype)


def w4_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype, k: int, layout: str) -> Tensor:
    """Rows `ids` of an int4 table of width k with a scale (rows, k / group) per group."""
    rows = dequantize_int4(qdata[ids.reshape(-1)], scale[ids.reshape(-1)], k, layout)
    return rows.view(*ids.shape, k).to(out_dtype)


def gobo_embedding(
    ids: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    out_dtype: torch.dtype, k: int, layout: str,
) -> Tensor:  # fmt: skip
    """Rows `ids` of a dictionary table of width k, outliers exact."""
    weight = dequantize_dictionary(qdata, codebook, outlier_rowptr, outlier_col, outlier_delta, k, layout)
    return weight[ids].to(out_dtype)


def attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype
) -> Tensor:
    """Self-attention of packed sequences on int8 queries, keys and values; tokens attend within their sequence only.

    Both products are of integers: the probabilities are rounded to 8 bits, with a scale for each row. For query i and the
    keys j of its sequence, W_i being the largest of w_ij = exp(score_ij - max_j score_ij) * s_value[j]:

        p_ij = round(w_ij * (255 / W_i))        out_i = (sum_j p_ij * value_j) * (W_i / 255 / sum_j exp(...))

    A token whose scale is NaN makes its own sequence NaN and no other: its row if the query's is, every row otherwise.

    Args:
        qkv: (t, 3 * num_heads * d) int8: all queries, then all keys, then all values of a token.
        scales: float32 scales of queries, keys and values, above 0: static (3,), or (t, 3) for each token.
        cu_seqlens: (sequences + 1,) int32, ascending from 0 to t: sequence i is tokens cu_seqlens[i] ... cu_seqlens[i + 1] - 1.
        softmax_scale: factor on the scores, usually d**-0.5.

    Returns:
        (t, num_heads * d) of `out_dtype`.
    """
    t, width = qkv.shape[0], qkv.shape[1] // 3
    query, key, value = qkv.view(t, 3, num_heads, width // num_heads).to(torch.float64).permute(1, 2, 0, 3)
    scales = scales.expand(t, 3)
    out = torch.zeros_like(query)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        span = slice(start, stop)
        weights, factor = attention_weights(query[:, span] @ key[:, span].transpose(1, 2), scales[span], softmax_scale)
        out[:, span] = weights.round() @ value[:, span] * factor
    return out.transpose(0, 1).reshape(t, width).to(out_dtype)


def attention_weights(products: Tensor, scales: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """The softmax of one sequence of t tokens, in the type of `products`.

    Args:
        products: (heads, t, t) float, sums of query times key.
        scales: (t, 3) of queries, keys and values.

    Returns:
        p (heads, t, t) in 0 ... 255 before it is rounded, and the factor (heads, t, 1) on the sum of round(p) times value.
    """
    if products.numel() == 0:
        return products, products.new_zeros(*products.shape[:2], 1)
    s_query, s_key, s_value = scales.to(products.dtype).unbind(1)
    scores = products * (s_query[:, None] * s_key * softmax_scale)
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    weights = powers * s_value
    largest = weights.amax(dim=-1, keepdim=True)
    factor = largest / PROBABILITY_MAX / powers.sum(dim=-1, keepdim=True)
    return weights * (PROBABILITY_MAX / largest), factor


def add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(y + residual) as float (t, k) of residual's type, and its `quantize_per_token` codes and scales.

    The codes are those of the float32 norm before it is rounded to the residual's type.
    """
    total = y.to(torch.float32) + residual.to(torch.float32)
    normed = _layer_norm(total, gamma, beta, eps)
    return normed.to(residual.dtype), *quantize_per_token(normed)


def w8a8_linear_add_norm(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor,
    beta: Tensor, eps: float, layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`add_layer_norm_quantize` of what `w8a8_linear` gives in residual's type: rounded to it, as if it had been stored."""
    y = w8a8_linear(q, s, qdata, scale, bias, "none", residual.dtype, layout)
    return add_layer_norm_quantize(y, residual, gamma, beta, eps)


def embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LayerNorm of word + token type + position rows: float (t, k) of `positions`' type, with codes and scales.

    Args:
        ids, position_ids, token_type_ids: (t,) integers.
        words, scheme, layout: the word table's tensors in the order of `plain_specs`, its scheme and its layout; or one
            float table (rows, k) and ``"float"``.
        positions, token_types: (p, k) and (types, k) float tables: small, so they stay float.
    """
    rows = lookup_rows(ids, words, scheme, layout, positions.shape[1])
    return norm_of_rows(rows, position_ids, token_type_ids, positions, token_types, gamma, beta, eps)


def norm_of_rows(
    rows: Tensor, position_ids: Tensor, token_type_ids: Tensor, positions: Tensor, token_types: Tensor, gamma: Tensor,
    beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The rest of `embed_layer_norm_quantize`, from looked-up word rows (t, k) float32."""
    total = rows + token_types[token_type_ids].to(torch.float32) + positions[position_ids].to(torch.float32)
    normed = _layer_norm(total, gamma, beta, eps)
    return normed.to(positions.dtype), *quantize_per_token(normed)


def lookup_rows(ids: Tensor, words: list[Tensor], scheme: str, layout: str, k: int) -> Tensor:
    """Float32 rows (t, k) of an embedding table of any embedding scheme, or of a float one."""
    if scheme == FLOAT_TABLE:
        return words[0][ids].to(torch.float32)
    if SCHEMES[scheme].has_dictionary:
        qdata, codebook, rowptr, col, delta = words
        return gobo_embedding(ids, qdata, codebook, rowptr, col, delta, torch.float32, k, layout)
    qdata, scale = words
    if SCHEMES[scheme].weight is INT4:
        return w4_embedding(ids, qdata, scale, torch.float32, k, layout)
    return w8_embedding(ids, qdata, scale, torch.float32)


def expand_int8(qdata: Tensor, n: int, k: int, layout: str) -> Tensor:
    """The int8 operand (n, k) of w8a8, and the codes of w8a16."""
    return read_codes(qdata, INT8, n, k, Layout(layout))


def expand_int4(qdata: Tensor, group_scale: Tensor, k: int, layout: str) -> Tensor:
    """The int8 operand (n, k) of w4a8: code * group_scale."""
    if Layout(layout) is Layout.INT8_EXPANDED:
        return qdata
    codes = read_codes(qdata, INT4, group_scale.shape[0], k, Layout(layout))
    return codes * group_scale.to(torch.int8).repeat_interleave(_group_size(k, group_scale), dim=1)


def expand_dictionary(qdata: Tensor, codebook: Tensor, n: int, k: int, layout: str) -> Tensor:
    """codebook[code] (n, k), in gobo3a8 and gobo4a8 the int8 operand.

    Args:
        codebook: (2**bits,), or (m, 2**bits) of m stacked matrices: row r has dictionary r * m // n.
    """
    if Layout(layout) is Layout.INT8_EXPANDED:
        return qdata
    return look_up(codebook, read_codes(qdata, _dictionary_format(codebook), n, k, Layout(layout)))


def matrix_scales(scale: Tensor, n: int) -> Tensor:
    """Scales (m,) of m matrices that are stacked to n rows, as one for each row (n,)."""
    return scale.expand(n) if scale.numel() == 1 else scale.repeat_interleave(n // scale.numel())


def dequantize_int4(qdata: Tensor, scale: Tensor, k: int, layout: str) -> Tensor:
    """Float32 (n, k) of int4 codes with a scale per group."""
    codes = read_codes(qdata, INT4, scale.shape[0], k, Layout(layout)).to(torch.float32)
    groups = codes.view(codes.shape[0], scale.shape[1], _group_size(k, scale))
    return (groups * scale.to(torch.float32).unsqueeze(2)).view(codes.shape)


def dequantize_dictionary(
    qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor, k: int, layout: str
) -> Tensor:  # fmt: skip
    """Float32 (n, k) of dictionary codes; outliers come back bit for bit."""
    weight = expand_dictionary(qdata, codebook, outlier_rowptr.numel() - 1, k, layout)
    rows, columns = outlier_positions(outlier_rowptr, outlier_col)
    weight[rows, columns] += outlier_delta
    return weight


def dequantize(weight: QuantizedTensor) -> Tensor:
    """Float32 (n, k) that a quantized tensor of any scheme stands for."""
    tensors, (n, k), layout = weight.tensors, weight.shape, weight.layout.value
    scheme = weight.scheme
    if scheme.has_dictionary and scheme.activation is None:
        return dequantize_dictionary(**tensors, k=k, layout=layout)
    if scheme.has_dictionary:
        operand = expand_dictionary(tensors["qdata"], tensors["codebook"], n, k, layout)
        weight_float = operand.to(torch.float32) * matrix_scales(tensors["scale"], n)[:, None]
        rows, columns = outlier_positions(tensors["outlier_rowptr"], tensors["outlier_col"])
        weight_float[rows, columns] += tensors["outlier_delta"]
        return weight_float
    if "group_scale" in tensors:
        operand = expand_int4(tensors["qdata"], tensors["group_scale"], k, layout)
        return operand.to(torch.float32) * tensors["scale"][:, None]
    if scheme.weight.bits == INT4.bits:
        return dequantize_int4(tensors["qdata"], tensors["scale"], k, layout)
    return expand_int8(tensors["qdata"], n, k, layout).to(torch.float32) * tensors["scale"][:, None]


def outlier_positions(outlier_rowptr: Tensor, outlier_col: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column (outliers,) int64 of each outlier of compressed sparse rows."""
    counts = outlier_rowptr.diff().to(torch.int64)
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=outlier_col.numel())
    return rows, outlier_col.to(torch.int64)


def dense_outliers(outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor, n: int, k: int) -> Tensor:
    """Float32 (n, k) of compressed sparse rows, zero elsewhere."""
    dense = torch.zeros(n, k, device=outlier_delta.device)
    dense[outlier_positions(outlier_rowptr, outlier_col)] = outlier_delta
    return dense


def finish(y: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype) -> Tensor:
    """The end of every linear: bias and activation in float32 (or wider), then one rounding to `out_dtype`."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if activation == "gelu":
        y = torch.nn.functional.gelu(y)
    elif activation != "none":
        raise QBertError(f"unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    return y.to(out_dtype)


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return finish(x.to(torch.float64) @ weight.t(), bias, activation, x.dtype)


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma.to(x.dtype), beta.to(x.dtype), eps)


def _row_scaled(
    q: Tensor, s: Tensor, operand: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    y = integer_product(q, operand).to(torch.float32) * scale * s[:, None]
    return finish(y, bias, activation, out_dtype)


def _group_size(k: int, scale: Tensor) -> int:
    """Codes that share one of the scales (n, groups): an even number, for packed rows of k and k + 1 codes look alike."""
    size = k // max(1, scale.shape[1])
    if size * scale.shape[1] != k or size % 2:
        raise QBertError(f"k is {k}, which {scale.shape[1]} groups of an even size do not make")
    return size


def _dictionary_format(codebook: Tensor) -> Format:
    return DICT3 if codebook.shape[-1] == DICT3.codes else DICT4


def requantized(operation: Callable[..., Tensor], out_scale_at: int) -> Callable[..., Tensor]:
    """The int8-out variant of an operation: float32 out, then one static scale, at the place of `out_dtype`."""

    @functools.wraps(operation)
    def int8_out(*args: Any) -> Tensor:
        float_args = (*args[:out_scale_at], torch.float32, *args[out_scale_at + 1 :])
        return requantize(operation(*float_args), args[out_scale_at])

    return int8_out


# Where `*_requant` take `out_scale` and their float twins take `out_dtype`.
OUT_SCALE_AT = {
    "w8a8_linear_requant": 6, "w4a8_linear_requant": 7, "gobo_linear_requant": 10, "attention_int8_requant": 5,
}  # fmt: skip

# Operation -> its reference, with exactly the operator's arguments.
REFERENCES: dict[str, Callable[..., Any]] = {
    "quantize_per_token": quantize_per_token,
    "w8a8_linear": w8a8_linear,
    "w4a8_linear": w4a8_linear,
    "gobo_linear": gobo_linear,
    "w8a16_linear": w8a16_linear,
    "w4a16_linear": w4a16_linear,
    "gobo_a16_linear": gobo_a16_linear,
    "w8_embedding": w8_embedding,
    "w4_embedding": w4_embedding,
    "gobo_embedding": gobo_embedding,
    "attention_int8": attention_int8,
    "add_layer_norm_quantize": add_layer_norm_quantize,
    "w8a8_linear_add_norm": w8a8_linear_add_norm,
    "embed_layer_norm_quantize": embed_layer_norm_quantize,
}
REFERENCES |= {name: requantized(REFERENCES[name.removesuffix("_requant")], at) for name, at in OUT_SCALE_AT.items()}
