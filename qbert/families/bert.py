"""BERT (Devlin et al., 2019)."""

from __future__ import annotations

from qbert.families.family import EmbeddingPaths, EncoderFamily, LayerPaths

FAMILY = EncoderFamily(
    name="BERT",
    models=("transformers.models.bert.modeling_bert.BertModel",),
    arguments=(
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states",
        "encoder_attention_mask", "past_key_values", "use_cache",
    ),
    output="BaseModelOutputWithPoolingAndCrossAttentions",
    embeddings=EmbeddingPaths(
        words="embeddings.word_embeddings",
        positions="embeddings.position_embeddings",
        token_types="embeddings.token_type_embeddings",
        norm="embeddings.LayerNorm",
    ),
    layers="encoder.layer",
    layer=LayerPaths(
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_output="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        output_norm="output.LayerNorm",
    ),
)  # fmt: skip
