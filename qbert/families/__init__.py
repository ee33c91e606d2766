"""The families of encoders, a file each: where their parts are, and the program of a layer."""

from __future__ import annotations

from qbert.families import albert, bert, bert_generation, distilbert, electra, modernbert, mpnet, roberta
from qbert.families.family import EmbeddingPaths, EncoderFamily, LayerPaths, Part, PositionTable
from qbert.families.heads import KEEP_FLOAT, SCORE_TABLES, TASK_HEADS

__all__ = [
    "FAMILIES", "KEEP_FLOAT", "SCORE_TABLES", "TASK_HEADS", "EmbeddingPaths", "EncoderFamily", "LayerPaths", "Part",
    "PositionTable", "family_of",
]  # fmt: skip

FAMILIES: tuple[EncoderFamily, ...] = tuple(
    each.FAMILY for each in (bert, roberta, electra, distilbert, mpnet, albert, modernbert, bert_generation)
)
_BY_CLASS = {model: family for family in FAMILIES for model in family.models}


def family_of(model: object) -> EncoderFamily | None:
    """The family of a bare encoder, None for anything else (a head model is not one, the encoder inside it is)."""
    return _BY_CLASS.get(f"{type(model).__module__}.{type(model).__qualname__}")
