"""DistilBERT (Sanh et al., 2019): BERT's layers under other names, without token types and pooler."""

from __future__ import annotations

from dataclasses import replace

from qbert.families import bert
from qbert.families.family import ACTIVATION, COUNTING, DROPOUT, LIST, EncoderFamily, LayerPaths, Reshaping, part

FAMILY = EncoderFamily(
    name="DistilBERT",
    models=("transformers.models.distilbert.modeling_distilbert.DistilBertModel",),
    arguments=("input_ids", "attention_mask", "inputs_embeds", "position_ids"),
    output="BaseModelOutput",
    embeddings=replace(bert.FAMILY.embeddings, token_types=None),
    layers="transformer.layer",
    layer=LayerPaths(
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        output_norm="output_layer_norm",
    ),
    pool=None,
    poolers=(),
    stock={
        "embeddings": part("Embeddings", buffers={"position_ids": COUNTING}),
        "embeddings.dropout": DROPOUT,
        "transformer": part("Transformer"),
        "transformer.layer": LIST,
        "transformer.layer.*": part("TransformerBlock"),
        "transformer.layer.*.attention": part(
            "*SelfAttention", reads=("attention_head_size", "scaling"), is_causal=False
        ),
        "transformer.layer.*.attention.dropout": DROPOUT,
        "transformer.layer.*.ffn": part("FFN"),
        "transformer.layer.*.ffn.dropout": DROPOUT,
        "transformer.layer.*.ffn.activation": ACTIVATION,
    },
    settings={"heads": "n_heads", "activation": "activation"},
    reshaping=Reshaping("n_layers", "hidden_dim", "n_heads", None),
)
