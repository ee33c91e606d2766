"""What a file's tensors must be: data type and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_INT16_MAX = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class TensorSpec:
    """Data type and shape that a tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def column_dtype(k: int) -> torch.dtype:
    """Type of outlier columns: 16 bits where every column fits."""
    return torch.int16 if k - 1 <= _INT16_MAX else torch.int32
