"""What is measured, whoever measures it: BERT's shapes, and the schemes of linears in the order of reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .results_schema import Precision

VOCABULARY, POSITIONS = 30_522, 514


@dataclass(frozen=True)
class Shape:
    """An encoder's sizes.

    Attributes:
        layers: how many.
        hidden: size of a token's values.
        heads: of a layer.
        inner: width of the feed-forward network.
        vocabulary: rows of the table of words.
        family: `model_type` of transformers, where its layers are not BERT's.
    """

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int = VOCABULARY
    family: str = "bert"

    @property
    def gated(self) -> bool:
        """GeGLU: a gate stands beside each value of the feed-forward network's first product."""
        return self.family == "modernbert"

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(output channels, input channels) of a layer's products: query, key and value together, attention's output, and
        the feed-forward network's two."""
        h, f = self.hidden, self.inner
        return (3 * h, h), (h, h), (2 * f if self.gated else f, h), (h, f)

    @property
    def linear_weights(self) -> int:
        """Of all layers."""
        return self.layers * sum(n * k for n, k in self.linears)

    @property
    def table_weights(self) -> int:
        """Of the embeddings."""
        return (self.vocabulary + POSITIONS) * self.hidden

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return self.hidden // self.heads


# BERT's, and those of all-mpnet-base-v2, albert-base-v2 and answerdotai/ModernBERT-base, from their configurations.
SHAPES: dict[str, Shape] = {
    "base": Shape(12, 768, 12, 3072),
    "large": Shape(24, 1024, 16, 4096),
    "minilm-shape": Shape(6, 384, 12, 1536),
    "mpnet-base": Shape(12, 768, 12, 3072, 30_527, "mpnet"),
    "albert-base": Shape(12, 768, 12, 3072, 30_000, "albert"),
    "modernbert-base": Shape(22, 768, 12, 1152, 50_368, "modernbert"),
    "tiny": Shape(2, 64, 2, 256),
    "tiny-mpnet": Shape(2, 64, 2, 256, family="mpnet"),
    "tiny-albert": Shape(2, 64, 2, 256, family="albert"),
    "tiny-modernbert": Shape(4, 64, 2, 96, family="modernbert"),
}
# Families of `SHAPES` whose layers are not BERT's.
OTHER_FAMILIES = frozenset(shape.family for shape in SHAPES.values()) - {"bert"}
# Whose linears are measured alone.
LINEARS: dict[str, tuple[tuple[int, int], ...]] = {name: SHAPES[name].linears for name in ("base", "large")}
# Schemes whose products run on int8 matrix units, and those that only stream their weights.
INTEGER_SCHEMES, WEIGHT_ONLY_SCHEMES = ("w8a8", "w4a8", "gobo4a8", "gobo3a8"), ("w8a16", "w4a16", "gobo4", "gobo3")
LINEAR_SCHEMES = (*INTEGER_SCHEMES, *WEIGHT_ONLY_SCHEMES)
PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WEIGHT_ONLY_TOKENS = 64  # beyond, arithmetic in bfloat16 bounds them: weight-only schemes cannot win


def read_config(folder: Path) -> Any:
    """The configuration beside a model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def shape_of(config: Any) -> Shape | None:
    """The sizes in a configuration; None where it is that of no BERT-type encoder. The second names are DistilBERT's."""
    layers, hidden, heads, inner = (
        next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
        for names in (
            ("num_hidden_layers", "n_layers"), ("hidden_size", "dim"), ("num_attention_heads", "n_heads"),
            ("intermediate_size", "hidden_dim"),
        )
    )  # fmt: skip
    if not (layers and hidden and heads and inner):
        return None
    family = config.model_type if config.model_type in OTHER_FAMILIES else "bert"
    return Shape(layers, hidden, heads, inner, int(getattr(config, "vocab_size", VOCABULARY)), family)
