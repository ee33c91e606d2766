"""How far a tensor is from another."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(|reference|^2 / |reference - actual|^2), in float64.

    Infinity where both are equal, NaN where either is not finite.
    """
    signal = float(reference.to(torch.float64).square().sum())
    noise = float((reference.to(torch.float64) - actual.to(torch.float64)).square().sum())
    if math.isnan(noise) or math.isinf(noise):
        return math.nan
    return math.inf if noise == 0.0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
