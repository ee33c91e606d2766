"""What a forward of an encoder needs at least: the roofline's two numbers for the rows of `bench_bert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bert_inputs import Batch
from .problems import read_config, shape_of
from .results_schema import Precision, Work

_HIDDEN_BYTES = 4  # of a value of the result

# Part of a system's name -> the precision of the unit that does most of its products; the first that fits.
_PRECISIONS: tuple[tuple[str, Precision], ...] = (
    ("int8", "int8"), ("a8w8", "int8"), ("w8a8", "int8"), ("w4a8", "int8"), ("gobo4a8", "int8"), ("gobo3a8", "int8"),
    ("fp8", "fp8"), ("fp16", "fp16"), ("fp32", "fp32"),
)  # fmt: skip


def precision_of(system: str) -> Precision:
    """Of most products of a system of that name; bf16 where it does not say."""
    return next((precision for part, precision in _PRECISIONS if part in system), "bf16")


def work_of(folder: Path, batch: Batch, system: str, weight_bytes: int) -> Work:
    """Products of the linears and of attention without padding; all weights read once, the result written once.

    Where layers share weights (ALBERT) their products still count a layer each, and their bytes once.
    """
    config = read_config(folder)
    shape = shape_of(config)
    assert shape is not None  # `find_model` takes nothing else
    lengths = batch.mask.sum(1).tolist()
    linears = 2.0 * sum(lengths) * shape.linear_weights
    attention = 4.0 * shape.hidden * sum(_pairs(length, window) for length in lengths for window in _windows(config))
    # Of the word embeddings only the rows of the batch's tokens are read. Parameters: about all, matrices and the word table.
    words = shape.vocabulary * int(getattr(config, "embedding_size", shape.hidden))
    kept = shape.linear_weights // shape.layers * int(getattr(config, "num_hidden_groups", shape.layers))
    unread = words / (kept + words) * weight_bytes
    moved = weight_bytes - unread + _HIDDEN_BYTES * sum(lengths) * shape.hidden
    return Work(operations=linears + attention, precision=precision_of(system), bytes=max(0.0, moved))


def _windows(config: Any) -> list[int | None]:
    """How far a token sees in each layer; None: everywhere."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in a sequence of that length."""
    reach = length - 1 if window is None else min(window, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)
