"""ALBERT (Lan et al., 2020): one layer's weights, called as often as the model is deep; embeddings of a size of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from qbert.families import bert
from qbert.families.family import ACTIVATION, DROPOUT, LIST, EncoderFamily, LayerPaths, part

_LAYER = "encoder.albert_layer_groups.*.albert_layers.*"


def calls(encoder: Any, groups: str) -> dict[str, str]:
    """Each call of a layer: every layer of a group in turn, and each group as often as the others, one after the other."""
    paths, config = [], encoder.config
    for index in range(config.num_hidden_layers):
        group = int(index / (config.num_hidden_layers / config.num_hidden_groups))
        layers = f"{groups}.{group}.albert_layers"
        paths += [f"{layers}.{each}" for each in range(len(encoder.get_submodule(layers)))]
    return {f"encoder.layer.{index}": path for index, path in enumerate(paths)}


def pooled(encoder: Any, hidden: Tensor) -> Tensor | None:
    """(batch, h): a linear and an activation of the first token."""
    if encoder.pooler is None:
        return None
    first: Tensor = encoder.pooler_activation(encoder.pooler(hidden[:, 0]))
    return first


FAMILY = EncoderFamily(
    name="ALBERT",
    models=("transformers.models.albert.modeling_albert.AlbertModel",),
    arguments=("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    output="BaseModelOutputWithPooling",
    embeddings=replace(bert.FAMILY.embeddings, projection="encoder.embedding_hidden_mapping_in"),
    layers="encoder.albert_layer_groups",
    layer=LayerPaths(
        qkv=("attention.query", "attention.key", "attention.value"),
        attention_output="attention.dense",
        attention_norm="attention.LayerNorm",
        ffn_in="ffn",
        ffn_out="ffn_output",
        output_norm="full_layer_layer_norm",
    ),
    stock={
        "embeddings": bert.FAMILY.stock["embeddings"],
        "embeddings.dropout": DROPOUT,
        "encoder": part("*Transformer"),
        "encoder.albert_layer_groups": LIST,
        "encoder.albert_layer_groups.*": part("*LayerGroup"),
        "encoder.albert_layer_groups.*.albert_layers": LIST,
        _LAYER: part("*Layer"),
        f"{_LAYER}.attention": part("*Attention", reads=("attention_head_size", "scaling"), is_causal=False),
        f"{_LAYER}.attention.attention_dropout": DROPOUT,
        f"{_LAYER}.attention.output_dropout": DROPOUT,
        f"{_LAYER}.activation": ACTIVATION,
        f"{_LAYER}.dropout": DROPOUT,
    },
    pool=pooled,
    poolers=("pooler", "pooler_activation"),
    calls=calls,
    reads=("num_hidden_layers", "num_hidden_groups"),
    reshaping="its layers share their weights",
)
