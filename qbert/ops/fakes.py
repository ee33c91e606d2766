"""L5. Fakes: the type and shape of each operation's result, from shapes alone. The checks are the implementations' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.ops import checks

# A linear's or attention's result is of type `out_dtype`, or int8 where its place holds an `out_scale`.
_Out = torch.dtype | float


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    checks.activations(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _w8a8(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out: _Out, layout: str
) -> Tensor:  # fmt: skip
    n = checks.w8a8_linear(q, s, qdata, scale, bias, layout)
    return q.new_empty(q.shape[0], n, dtype=checks.out_type(out))


def _w4a8(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out: _Out, layout: str,
) -> Tensor:  # fmt: skip
    n = checks.w4a8_linear(q, s, qdata, group_scale, scale, bias, layout)
    return q.new_empty(q.shape[0], n, dtype=checks.out_type(out))


def _gobo(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out: _Out, layout: str,
) -> Tensor:  # fmt: skip
    outliers = (outlier_rowptr, outlier_col, outlier_delta)
    n = checks.gobo_linear(q, s, qdata, codebook, scale, *outliers, bias, layout)
    return q.new_empty(q.shape[0], n, dtype=checks.out_type(out))


def _w8a16(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    return x.new_empty(x.shape[0], checks.w8a16_linear(x, qdata, scale, bias, layout))


def _w4a16(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    return x.new_empty(x.shape[0], checks.w4a16_linear(x, qdata, scale, bias, layout))


def _gobo_a16(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str,
) -> Tensor:  # fmt: skip
    outliers = (outlier_rowptr, outlier_col, outlier_delta)
    return x.new_empty(x.shape[0], checks.gobo_a16_linear(x, qdata, codebook, *outliers, bias, layout))


def _w8_embedding(ids: Tensor, qdata: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return qdata.new_empty(*ids.shape, qdata.shape[1], dtype=out_dtype)


def _packed_embedding(ids: Tensor, qdata: Tensor, *rest: Any) -> Tensor:
    *_, out_dtype, k, _layout = rest
    return qdata.new_empty(*ids.shape, k, dtype=out_dtype)


def _attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out: _Out
) -> Tensor:
    checks.attention(qkv, scales, cu_seqlens, num_heads)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3, dtype=checks.out_type(out))


def _normed(like: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    k = like.shape[-1]
    return like.new_empty(t, k), like.new_empty(t, k, dtype=torch.int8), like.new_empty(t, dtype=torch.float32)


def _add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    checks.add_layer_norm_quantize(y, residual, gamma, beta)
    return _normed(residual, residual.shape[0])


def _w8a8_linear_add_norm(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor,
    beta: Tensor, eps: float, layout: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.w8a8_linear_add_norm(q, s, qdata, scale, bias, residual, gamma, beta, layout)
    return _normed(residual, residual.shape[0])


def _embed_layer_norm_quantize(
    ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, words: list[Tensor], scheme: str, layout: str,
    positions: Tensor, token_types: Tensor, gamma: Tensor, beta: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.embed_layer_norm_quantize(
        ids, position_ids, token_type_ids, words, scheme, layout, positions, token_types, gamma, beta
    )
    return _normed(positions, ids.shape[0])


FAKES: dict[str, Callable[..., Any]] = {
    "quantize_per_token": _quantize_per_token,
    "w8a8_linear": _w8a8,
    "w8a8_linear_requant": _w8a8,
    "w4a8_linear": _w4a8,
    "w4a8_linear_requant": _w4a8,
    "gobo_linear": _gobo,
    "gobo_linear_requant": _gobo,
    "w8a16_linear": _w8a16,
    "w4a16_linear": _w4a16,
    "gobo_a16_linear": _gobo_a16,
    "w8_embedding": _w8_embedding,
    "w4_embedding": _packed_embedding,
    "gobo_embedding": _packed_embedding,
    "attention_int8": _attention_int8,
    "attention_int8_requant": _attention_int8,
    "add_layer_norm_quantize": _add_layer_norm_quantize,
    "w8a8_linear_add_norm": _w8a8_linear_add_norm,
    "embed_layer_norm_quantize": _embed_layer_norm_quantize,
}
