"""What each field of a recipe does to a float model, in the order in which each leaves the next one possible; then quantizing.

A new method is a row of `STEPS` and a field of the same name in `recipe.Compression`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qbert.calibrate import calibrate
from qbert.compress.factorize import factorize_
from qbert.compress.latency import Load, Table
from qbert.compress.layers import drop_layers_
from qbert.compress.prune import prune_
from qbert.compress.report import Report
from qbert.compress.sparsify import sparsify_
from qbert.compress.vocabulary import trim_vocabulary_
from qbert.convert import fuse_, quantize_
from qbert.recipe import Recipe

Progress = Callable[[int, int, str], None]
CALIBRATED_BY = 128  # texts


@dataclass(frozen=True)
class Given:
    """What steps choose and refit by.

    Attributes:
        texts: of the kind the model is used on.
        labels: of a classifier, one for each text.
        load: the forward that is to be faster, with the scheme that the finished model will have.
        table: milliseconds of the layers for that load, where they were measured already.
    """

    texts: Sequence[str]
    labels: Sequence[int] | None
    pooling: str
    load: Load
    seed: int = 0
    table: Table | None = None
    progress: Progress | None = None


def _trim_vocabulary(model: nn.Module, tokenizer: Any, value: Any, given: Given) -> Report:
    return trim_vocabulary_(model, tokenizer, given.texts, size=value, pooling=given.pooling)


def _drop_layers(model: nn.Module, tokenizer: Any, value: Any, given: Given) -> Report:
    return drop_layers_(
        model, given.texts, keep=value, tokenizer=tokenizer, pooling=given.pooling, progress=given.progress
    )


def _prune(model: nn.Module, tokenizer: Any, value: Any, given: Given) -> Report:
    load = given.load
    return prune_(
        model, given.texts, **value, labels=given.labels, tokenizer=tokenizer, scheme=load.scheme, batch=load.batch,
        seq=load.seq, pooling=given.pooling, seed=given.seed, table=given.table, progress=given.progress,
    )  # fmt: skip


def _factorize(model: nn.Module, tokenizer: Any, value: Any, given: Given) -> Report:
    load = given.load
    return factorize_(
        model, given.texts, **value, labels=given.labels, tokenizer=tokenizer, scheme=load.scheme, batch=load.batch,
        seq=load.seq, pooling=given.pooling, seed=given.seed, progress=given.progress,
    )  # fmt: skip


def _sparsify(model: nn.Module, tokenizer: Any, value: Any, given: Given) -> Report:
    return sparsify_(
        model, given.texts, **value, tokenizer=tokenizer, pooling=given.pooling, progress=given.progress
    )  # fmt: skip


# Field of a recipe -> what changes (model, its tokenizer) by the field's value, both in place.
STEPS: dict[str, Callable[[nn.Module, Any, Any, Given], Report]] = {
    "vocabulary": _trim_vocabulary,
    "layers": _drop_layers,
    "prune": _prune,
    "rank": _factorize,
    "sparsity": _sparsify,
}


def quantize_last(model: nn.Module, tokenizer: Any, scheme: Recipe, texts: Sequence[str]) -> None:
    """Calibrates, quantizes and fuses a model in place; one whose linears stay float is neither calibrated nor fused."""
    calibration = None
    if scheme.linear is not None:
        calibration = calibrate(model, texts[:CALIBRATED_BY], tokenizer=tokenizer)
    quantize_(model, scheme)
    if calibration is not None:
        fuse_(model, calibration)
