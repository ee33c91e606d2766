"""L4. What every kernel must compute: one plain-torch function per operation of the instruction set.

Integer sums are exact (float64 holds every int8 dot product below 2**53). The float epilogue of an integer product is float32
in the order written here; sums of floats (weight-only products, outliers, attention) are float64 and rounded once, so that a
kernel's error can be told from the reference's. Slow on purpose: read it, compare with it, do not run a model on it.

Shapes: t tokens, n output channels, k input channels. Weights come in any layout of their scheme.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert import layout as _layout
from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, SCHEMES, Format, Kind
from qbert.layout import Layout
from qbert.qtensor import QuantizedTensor

# A row whose largest magnitude is below this gets this row's scale: its codes are 0 and its scale stays a normal float32.
MIN_ABSMAX = 2.0**-100
ACTIVATIONS = ("none", "gelu")


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
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype
) -> Tensor:
    """y[t, n] = activation(s[t] * scale[n] * (q @ qdata.T)[t, n] + bias[n]).

    Args:
        q, s: (t, k) int8 and (t,) float32 from `quantize_per_token`.
        qdata, scale: (n, k) int8 and (n,) float32.
        bias: (n,) float or None.
        activation: ``"none"`` or ``"gelu"`` (exact, by the error function).
        out_dtype: of y (t, n).
    """
    y = integer_product(q, qdata).to(torch.float32) * scale * s[:, None]
    return finish(y, bias, activation, out_dtype)


def w4a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """`w8a8_linear` whose int8 operand is code * group_scale: group_scale (n, k / group) uint8, `qdata` in `layout`."""
    operand = expand_int4(qdata, group_scale, q.shape[1], layout)
    return w8a8_linear(q, s, operand, scale, bias, activation, out_dtype)


def gobo_linear(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """y = activation(s * (scale * (q @ codebook[codes].T) + q @ outliers.T) + bias), outliers exact.

    Args:
        qdata: codes of the dictionary in `layout`, or the int8 operand itself.
        codebook, scale: (2**bits,) int8 centroids, ascending, and (1,) float32 of the whole matrix.
        outlier_rowptr, outlier_col, outlier_delta: (n + 1,), (outliers,), (outliers,): compressed sparse rows of the
            difference between the exact weight and its centroid.
    """
    k = q.shape[1]
    product = integer_product(q, expand_dictionary(qdata, codebook, k, layout)).to(torch.float32) * scale
    n = product.shape[1]
    delta = dense_outliers(outlier_rowptr, outlier_col, outlier_delta, n, k).to(torch.float64)
    correction = (q.to(torch.float64) @ delta.t()).to(torch.float32)
    return finish((product + correction) * s[:, None], bias, activation, out_dtype)


def requantize(y: Tensor, out_scale: float) -> Tensor:
    """(t, n) float32 to int8 codes with one static scale. NaN becomes code 0: the residual stream, not this, carries it."""
    codes = torch.round(y * (1.0 / out_scale)).nan_to_num(0.0).clamp(-INT8.qmax, INT8.qmax)
    return codes.to(torch.int8)


def w8a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Float activations x (t, k), int8 weights with a scale per row; y (t, n) of x's type."""
    return _float_linear(x, qdata.to(torch.float64) * scale.to(torch.float64)[:, None], bias, activation)


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

    Args:
        qkv: (t, 3 * num_heads * d) int8: all queries, then all keys, then all values of a token.
        scales: (3,) float32 static scales of queries, keys and values.
        cu_seqlens: (sequences + 1,) int32, ascending from 0 to t: sequence i is tokens cu_seqlens[i] ... cu_seqlens[i + 1] - 1.
        softmax_scale: factor on the scores, usually d**-0.5.

    Returns:
        (t, num_heads * d) of `out_dtype`. Scores are exact int32 sums; softmax and the product with the values are float.
    """
    t, width = qkv.shape[0], qkv.shape[1] // 3
    query, key, value = qkv.view(t, 3, num_heads, width // num_heads).to(torch.float64).unbind(1)
    out = torch.zeros_like(query)
    factor = float(scales[0]) * float(scales[1]) * softmax_scale
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], key[start:stop]) * factor
        weights = torch.softmax(scores, dim=-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, value[start:stop]) * float(scales[2])
    return out.reshape(t, width).to(out_dtype)


def add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(y + residual) as float (t, k) of residual's type, and its `quantize_per_token` codes and scales.

    The codes are those of the float32 norm before it is rounded to the residual's type.
    """
    total = y.to(torch.float32) + residual.to(torch.float32)
    normed = _layer_norm(total, gamma, beta, eps)
    return normed.to(residual.dtype), *quantize_per_token(normed)


def embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """LayerNorm of word + token type + position rows: float (t, k) of `positions`' type, with codes and scales.

    Args:
        ids, position_ids, token_type_ids: (t,) integers.
        words, scheme, layout: the word table's tensors in the order of `plain_specs`, its scheme and its layout.
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
    """Float32 rows (t, k) of an embedding table of any embedding scheme."""
    if SCHEMES[scheme].has_dictionary:
        qdata, codebook, rowptr, col, delta = words
        return gobo_embedding(ids, qdata, codebook, rowptr, col, delta, torch.float32, k, layout)
    qdata, scale = words
    if SCHEMES[scheme].weight is INT4:
        return w4_embedding(ids, qdata, scale, torch.float32, k, layout)
    return w8_embedding(ids, qdata, scale, torch.float32)


def expand_int4(qdata: Tensor, group_scale: Tensor, k: int, layout: str) -> Tensor:
    """The int8 operand (n, k) of w4a8: code * group_scale."""
    if Layout(layout) is Layout.INT8_EXPANDED:
        return qdata
    codes = _codes(qdata, INT4, k, layout)
    return codes * group_scale.to(torch.int8).repeat_interleave(_group_size(k, group_scale), dim=1)


def expand_dictionary(qdata: Tensor, codebook: Tensor, k: int, layout: str) -> Tensor:
    """The int8 operand (n, k) of gobo3a8 and gobo4a8: codebook[code]."""
    if Layout(layout) is Layout.INT8_EXPANDED:
        return qdata
    codes = _codes(qdata, _dictionary_format(codebook), k, layout)
    return codebook.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def dequantize_int4(qdata: Tensor, scale: Tensor, k: int, layout: str) -> Tensor:
    """Float32 (n, k) of int4 codes with a scale per group."""
    codes = _codes(qdata, INT4, k, layout).to(torch.float32)
    groups = codes.view(codes.shape[0], scale.shape[1], _group_size(k, scale))
    return (groups * scale.to(torch.float32).unsqueeze(2)).view(codes.shape)


def dequantize_dictionary(
    qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor, k: int, layout: str
) -> Tensor:  # fmt: skip
    """Float32 (n, k) of dictionary codes; outliers come back bit for bit."""
    weight = expand_dictionary(qdata, codebook, k, layout)
    rows, columns = outlier_positions(outlier_rowptr, outlier_col)
    weight[rows, columns] += outlier_delta
    return weight


def dequantize(weight: QuantizedTensor) -> Tensor:
    """Float32 (n, k) that a quantized tensor of any scheme stands for."""
    tensors, k, layout = weight.tensors, weight.shape[1], weight.layout.value
    scheme = weight.scheme
    if scheme.has_dictionary and scheme.activation is None:
        return dequantize_dictionary(**tensors, k=k, layout=layout)
    if scheme.has_dictionary:
        weight_float = (
            expand_dictionary(tensors["qdata"], tensors["codebook"], k, layout).to(torch.float32) * tensors["scale"]
        )
        rows, columns = outlier_positions(tensors["outlier_rowptr"], tensors["outlier_col"])
        weight_float[rows, columns] += tensors["outlier_delta"]
        return weight_float
    if "group_scale" in tensors:
        operand = expand_int4(tensors["qdata"], tensors["group_scale"], k, layout)
        return operand.to(torch.float32) * tensors["scale"][:, None]
    if scheme.weight.bits == INT4.bits:
        return dequantize_int4(tensors["qdata"], tensors["scale"], k, layout)
    return tensors["qdata"].to(torch.float32) * tensors["scale"][:, None]


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


def _codes(qdata: Tensor, fmt: Format, k: int, layout: str) -> Tensor:
    if Layout(layout) is Layout.BYTES:
        return qdata
    assert fmt.kind in (Kind.INTEGER, Kind.DICTIONARY)
    return _layout.unpack_codes(qdata, fmt, k)


def _group_size(k: int, scale: Tensor) -> int:
    """Codes that share one of the scales (n, groups): an even number, for packed rows of k and k + 1 codes look alike."""
    size = k // max(1, scale.shape[1])
    if size * scale.shape[1] != k or size % 2:
        raise QBertError(f"k is {k}, which {scale.shape[1]} groups of an even size do not make")
    return size


def _dictionary_format(codebook: Tensor) -> Format:
    return DICT3 if codebook.numel() == DICT3.codes else DICT4
