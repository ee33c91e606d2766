"""BERT (Devlin et al., 2019)."""

from __future__ import annotations

from qbert.families.family import (
    ACTIVATION,
    COUNTING,
    DROPOUT,
    LIST,
    ZEROS,
    EmbeddingPaths,
    EncoderFamily,
    LayerPaths,
    part,
)

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
    stock={
        "embeddings": part("*Embeddings", buffers={"position_ids": COUNTING, "token_type_ids": ZEROS}),
        "embeddings.dropout": DROPOUT,
        "encoder": part("*Encoder"),
        "encoder.layer": LIST,
        "encoder.layer.*": part("*Layer", is_decoder=False, add_cross_attention=False),
        "encoder.layer.*.attention": part("*Attention", is_cross_attention=False),
        "encoder.layer.*.attention.self": part(
            "*SelfAttention", reads=("attention_head_size", "scaling"), is_decoder=False, is_causal=False
        ),
        "encoder.layer.*.attention.self.dropout": DROPOUT,
        "encoder.layer.*.attention.output": part("*SelfOutput"),
        "encoder.layer.*.attention.output.dropout": DROPOUT,
        "encoder.layer.*.intermediate": part("*Intermediate"),
        "encoder.layer.*.intermediate.intermediate_act_fn": ACTIVATION,
        "encoder.layer.*.output": part("*Output"),
        "encoder.layer.*.output.dropout": DROPOUT,
    },
)  # fmt: skip
