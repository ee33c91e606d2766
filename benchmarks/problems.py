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
    """

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int = VOCABULARY

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(output channels, input channels) of a layer's products: query, key and value together, attention's output, and
        the feed-forward network's two."""
        h, f = self.hidden, self.inner
        return (3 * h, h), (h, h), (f, h), (h, f)

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


SHAPES: dict[str, Shape] = {
    "base": Shape(12, 768, 12, 3072),
    "large": Shape(24, 1024, 16, 4096),
    "minilm-shape": Shape(6, 384, 12, 1536),
    "tiny": Shape(2, 64, 2, 256),
}
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
    return Shape(layers, hidden, heads, inner, int(getattr(config, "vocab_size", VOCABULARY)))
