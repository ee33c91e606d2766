"""MPNet (Song et al., 2020): BERT whose attention adds a bias by the distance between two tokens, the same in every layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qbert.families import bert
from qbert.families.family import (
    ACTIVATION,
    CLASSIFIED,
    COUNTING,
    DROPOUT,
    LIST,
    LayerBuilder,
    LayerPaths,
    Reader,
    Reshaping,
    part,
    positions_after_padding,
)

TABLE = "encoder.relative_attention_bias"
# Attribute of an attention module that lost heads: which of the table's columns are those of the heads that it kept.
KEPT_HEADS = "kept_heads"
BUCKETS, REACH = (
    32,
    128,
)  # transformers computes with these, whatever the configuration says; beyond, all are in the last bucket


def buckets(distances: Tensor) -> Tensor:
    """The bucket of each distance key - query (T5's rule, Raffel et al., 2020): near ones alone, far ones by logarithm."""
    half, away = BUCKETS // 2, distances.abs()
    near = half // 2
    far = near + (torch.log(away.float() / near) / math.log(REACH / near) * (half - near)).to(torch.int64)
    return torch.where(distances > 0, half, 0) + torch.where(away < near, away, far.clamp(max=half - 1))


def bias_by_distance(encoder: Any, layer: Any) -> Tensor:
    """(heads, 2 * reach + 1) float32: what each head adds at distances -reach ... reach."""
    table: Tensor = encoder.get_submodule(TABLE).weight.detach().to(torch.float32)
    kept = getattr(layer.attention.attn, KEPT_HEADS, None)
    if kept is not None:
        table = table[:, list(kept)]
    distances = torch.arange(-REACH, REACH + 1, device=table.device)
    return table[buckets(distances)].t().contiguous()


def narrowed_bias(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook of an attention module that lost heads: of the biases of all heads those of the heads it kept.

    transformers computes (1, heads, queries, keys) biases once and hands them to every layer.
    """
    kept, bias = getattr(attention.attn, KEPT_HEADS, None), kwargs.get("position_bias")
    if kept is None or bias is None:
        return None
    return args, {**kwargs, "position_bias": bias[:, list(kept)]}


def program(b: LayerBuilder, paths: LayerPaths) -> None:
    """BERT's layer but for the bias."""
    b.attention(*paths.qkv, bias=bias_by_distance)
    b.linear_add_norm(paths.attention_output, paths.attention_norm, reads="context")
    b.linear(paths.ffn_in, reads="hidden", writes="inner", activation="activation")
    b.linear_add_norm(paths.ffn_out, paths.output_norm, reads="inner")


def obstacle(encoder: Any) -> str | None:
    """A table of biases that does not fit: fewer buckets than are looked up, or other heads."""
    shape, heads = tuple(encoder.get_submodule(TABLE).weight.shape), encoder.config.num_attention_heads
    if shape[0] >= BUCKETS and shape[1] == heads:
        return None
    return f"{TABLE} is {shape[0]} buckets of {shape[1]} heads; needed: {BUCKETS} or more, and {heads}"


FAMILY = replace(
    bert.FAMILY,
    name="MPNet",
    models=("transformers.models.mpnet.modeling_mpnet.MPNetModel",),
    arguments=(
        "input_ids", "attention_mask", "position_ids", "inputs_embeds", "output_attentions", "output_hidden_states",
        "return_dict",
    ),
    output="BaseModelOutputWithPooling",
    embeddings=replace(bert.FAMILY.embeddings, token_types=None),
    layer=replace(
        bert.FAMILY.layer,
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_output="attention.attn.o",
        attention_norm="attention.LayerNorm",
    ),
    stock={
        "embeddings": part("*Embeddings", reads=("padding_idx",), buffers={"position_ids": COUNTING}),
        "embeddings.dropout": DROPOUT,
        "encoder": part("*Encoder"),
        "encoder.layer": LIST,
        "encoder.layer.*": part("*Layer"),
        "encoder.layer.*.attention": part("*Attention"),
        "encoder.layer.*.attention.attn": part("*SelfAttention", reads=("attention_head_size", KEPT_HEADS)),
        "encoder.layer.*.attention.attn.dropout": DROPOUT,
        "encoder.layer.*.attention.dropout": DROPOUT,
        "encoder.layer.*.intermediate": part("*Intermediate"),
        "encoder.layer.*.intermediate.intermediate_act_fn": ACTIVATION,
        "encoder.layer.*.output": part("*Output"),
        "encoder.layer.*.output.dropout": DROPOUT,
    },
    readers=(CLASSIFIED, Reader(("*ForMultipleChoice",))),
    positions=positions_after_padding,
    skips_padding=True,
    distances=TABLE,
    program=program,
    collects=True,
    obstacle=obstacle,
    reshaping=Reshaping(biased=True),
)  # fmt: skip
