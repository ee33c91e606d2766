"""Rows of a matrix a few at a time: what is computed on the way to codes is several times as large as the matrix itself."""

from __future__ import annotations

from torch import Tensor

_ELEMENTS = 1 << 18  # a megabyte of float32, which stays in the cache


def in_portions(weight: Tensor) -> tuple[Tensor, ...]:
    """(n, k) as views of whole rows, each of about so many elements, at least one row."""
    return weight.split(max(1, _ELEMENTS // weight.shape[1]))
