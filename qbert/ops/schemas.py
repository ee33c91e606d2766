"""L5. The operators' signatures. Arguments of an operation come in this order everywhere: fake, CPU, CUDA, reference.

`layout` says how `qdata` lies (`qbert.layout`). Rows of panels and fragments are padded, so a matrix's own are not visible
in them: there are as many as `scale` (w8*, w4a8: values; w4a16: rows) or the row pointers (dictionaries) say.
"""

from __future__ import annotations

_GOBO = "Tensor qdata, Tensor codebook, Tensor scale, Tensor outlier_rowptr, Tensor outlier_col, Tensor outlier_delta"
_GOBO_FLOAT = "Tensor qdata, Tensor codebook, Tensor outlier_rowptr, Tensor outlier_col, Tensor outlier_delta"
_W4A8 = "Tensor qdata, Tensor group_scale, Tensor scale"
_TOKENS = "Tensor q, Tensor s"
_ATTENTION = "Tensor qkv, Tensor scales, Tensor cu_seqlens, int num_heads, float softmax_scale"
_FLOAT_END = "Tensor? bias, str activation, ScalarType out_dtype, str layout"
_INT8_END = "Tensor? bias, str activation, float out_scale, str layout"
_LIKE_X_END = "Tensor? bias, str activation, str layout"

SCHEMAS: dict[str, str] = {
    "quantize_per_token": "(Tensor x) -> (Tensor, Tensor)",
    "w8a8_linear": f"({_TOKENS}, Tensor qdata, Tensor scale, {_FLOAT_END}) -> Tensor",
    "w8a8_linear_requant": f"({_TOKENS}, Tensor qdata, Tensor scale, {_INT8_END}) -> Tensor",
    "w4a8_linear": f"({_TOKENS}, {_W4A8}, {_FLOAT_END}) -> Tensor",
    "w4a8_linear_requant": f"({_TOKENS}, {_W4A8}, {_INT8_END}) -> Tensor",
    "gobo_linear": f"({_TOKENS}, {_GOBO}, {_FLOAT_END}) -> Tensor",
    "gobo_linear_requant": f"({_TOKENS}, {_GOBO}, {_INT8_END}) -> Tensor",
    "w8a16_linear": f"(Tensor x, Tensor qdata, Tensor scale, {_LIKE_X_END}) -> Tensor",
    "w4a16_linear": f"(Tensor x, Tensor qdata, Tensor scale, {_LIKE_X_END}) -> Tensor",
    "gobo_a16_linear": f"(Tensor x, {_GOBO_FLOAT}, {_LIKE_X_END}) -> Tensor",
    "w8_embedding": "(Tensor ids, Tensor qdata, Tensor scale, ScalarType out_dtype) -> Tensor",
    "w4_embedding": "(Tensor ids, Tensor qdata, Tensor scale, ScalarType out_dtype, int k, str layout) -> Tensor",
    "gobo_embedding": f"(Tensor ids, {_GOBO_FLOAT}, ScalarType out_dtype, int k, str layout) -> Tensor",
    "attention_int8": f"({_ATTENTION}, ScalarType out_dtype) -> Tensor",
    "attention_int8_requant": f"({_ATTENTION}, float out_scale) -> Tensor",
    "add_layer_norm_quantize": "(Tensor y, Tensor residual, Tensor gamma, Tensor beta, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "w8a8_linear_add_norm": f"({_TOKENS}, Tensor qdata, Tensor scale, Tensor? bias, Tensor residual, Tensor gamma,"
    " Tensor beta, float eps, str layout) -> (Tensor, Tensor, Tensor)",
    "embed_layer_norm_quantize": "(Tensor ids, Tensor position_ids, Tensor token_type_ids, Tensor[] words, str scheme,"
    " str layout, Tensor positions, Tensor token_types, Tensor gamma, Tensor beta, float eps) -> (Tensor, Tensor, Tensor)",
}
