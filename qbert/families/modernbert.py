"""ModernBERT (Warner et al., 2024): norms before the linears, rotary positions, local attention, a gated FFN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbert.families.family import (
    ACTIVATION,
    DROPOUT,
    LIST,
    OPTIONAL_DROPOUT,
    EmbeddingPaths,
    EncoderFamily,
    LayerBuilder,
    LayerPaths,
    Reader,
    part,
)

ROTARY = "rotary_emb"
FULL, LOCAL = "full_attention", "sliding_attention"
# Those whose frequencies do not depend on the length of the batch.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rotary(encoder: Any, layer: Any) -> Tensor:
    """(positions, head_dim) float32: cosines, then sines, of each position's angles (RoFormer, Su et al., 2021)."""
    module, kind = encoder.get_submodule(ROTARY), layer.attention_type
    frequencies: Tensor = getattr(module, f"{kind}_inv_freq").to(torch.float32)
    positions = torch.arange(encoder.config.max_position_embeddings, dtype=torch.float32, device=frequencies.device)
    angles = positions[:, None] * frequencies
    scaling: float = getattr(module, f"{kind}_attention_scaling")
    return torch.cat((angles.cos(), angles.sin()), dim=1) * scaling


def window(encoder: Any, layer: Any) -> int | None:
    """Tokens on each side that a token of the layer sees; None where it sees all."""
    return int(encoder.config.local_attention) // 2 if layer.attention_type == LOCAL else None


def program(b: LayerBuilder, paths: LayerPaths) -> None:
    """Attention, then a gated feed-forward network (Shazeer, 2020), each of the normed stream and added to the stream."""
    b.attention(*paths.qkv, rotary=rotary, window=window)
    b.linear_add(paths.attention_output, paths.attention_norm, reads="context")
    b.linear(paths.ffn_in, reads="hidden", writes="inner", activation="activation", gated=True)
    b.linear_add_last(paths.ffn_out, paths.output_norm, reads="inner")


def obstacle(encoder: Any) -> str | None:
    """Rotations or layers of kinds that are not known here."""
    module = encoder.get_submodule(ROTARY)
    for name, layer in encoder.get_submodule("layers").named_children():
        if layer.attention_type not in (FULL, LOCAL):
            return f"layers.{name} is of type {layer.attention_type!r}; fused are {FULL} and {LOCAL}"
        rope = module.rope_type.get(layer.attention_type)
        if rope not in ROPE_TYPES:
            return f"the rotations of {layer.attention_type} are {rope!r}; fused are {', '.join(ROPE_TYPES)}"
    return None


FAMILY = EncoderFamily(
    name="ModernBERT",
    models=("transformers.models.modernbert.modeling_modernbert.ModernBertModel",),
    arguments=("input_ids", "attention_mask", "position_ids", "inputs_embeds"),
    output="BaseModelOutput",
    embeddings=EmbeddingPaths(
        words="embeddings.tok_embeddings", positions=None, token_types=None, norm="embeddings.norm"
    ),
    layers="layers",
    layer=LayerPaths(
        qkv=("attn.Wqkv",),
        attention_output="attn.Wo",
        attention_norm="mlp_norm",
        ffn_in="mlp.Wi",
        ffn_out="mlp.Wo",
        output_norm="attn_norm",
    ),
    stock={
        "embeddings": part("*Embeddings"),
        "embeddings.drop": DROPOUT,
        "layers": LIST,
        "layers.*": part("*EncoderLayer", reads=("attention_type",)),
        "layers.*.attn": part("*Attention", reads=("head_dim",), is_causal=False),
        "layers.*.attn.out_drop": OPTIONAL_DROPOUT,
        "layers.*.mlp": part("*MLP"),
        "layers.*.mlp.act": ACTIVATION,
        "layers.*.mlp.drop": DROPOUT,
        ROTARY: part(
            "*RotaryEmbedding", reads=("rope_type", f"{FULL}_attention_scaling", f"{LOCAL}_attention_scaling")
        ),
    },
    pool=None,
    poolers=(),
    readers=(Reader(("*ForSequenceClassification", "*ForMultipleChoice"), settings={"classifier_pooling": "cls"}),),
    distances=ROTARY,
    program=program,
    final_norm="final_norm",
    reads=("local_attention", "max_position_embeddings"),
    settings={"heads": "num_attention_heads", "activation": "hidden_activation"},
    obstacle=obstacle,
    reshaping="its layers take turns with local attention, and its feed-forward networks are gated",
)
