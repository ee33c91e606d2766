"""Symmetric round-to-nearest: the scale maps the largest magnitude of a row or group to the largest code."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.formats import INT4, W4A8_GROUP_SCALE_MAX, PerGroup, Scheme
from qbert.quantizers.portions import in_portions
from qbert.weight.codec import MIN_ABSMAX
from qbert.weight.layout import pack_codes


def quantize_absmax(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """(n, k) float32 to the PLAIN tensors of an integer scheme; a few rows at a time, which are independent of one another."""
    parts = [_some_rows(rows, scheme) for rows in in_portions(weight)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _some_rows(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    fmt = scheme.weight
    if not isinstance(scheme.granularity, PerGroup):
        scale = _scale(weight.abs().amax(dim=1), fmt.qmax)
        return {"qdata": pack_codes(_codes(weight, scale[:, None], fmt.qmax), fmt), "scale": scale}
    groups = weight.view(weight.shape[0], -1, scheme.granularity.size)
    if scheme.activation is not None:
        return _two_level(groups)
    scale = _scale(groups.abs().amax(dim=2), fmt.qmax).to(torch.bfloat16)  # codes are taken with the scale as stored
    codes = _codes(groups, scale.to(torch.float32).unsqueeze(2), fmt.qmax).view(weight.shape)
    return {"qdata": pack_codes(codes, fmt), "scale": scale}


def _two_level(groups: Tensor) -> dict[str, Tensor]:
    """Int4 codes, integer group scales and one float scale a row: weight = scale * group_scale * code.

    code * group_scale fits int8, so a kernel sums over the whole row in int32 and scales once (the idea of QServe's
    progressive quantization, Lin et al., 2024, without zero points). Of the two integers around a group's ideal scale the
    one with the smaller squared error is kept.
    """
    ideal = groups.abs().amax(dim=2) / INT4.qmax  # (n, groups)
    scale = _scale(ideal.amax(dim=1), W4A8_GROUP_SCALE_MAX)
    ratio = ideal / scale[:, None]
    candidates = []
    for integer in (ratio.floor(), ratio.floor() + 1):
        group_scale = integer.clamp(1, W4A8_GROUP_SCALE_MAX)
        step = (scale[:, None] * group_scale).unsqueeze(2)
        codes = _codes(groups, step, INT4.qmax)
        # Errors in units of the row's scale: squares of very small or large weights would leave float32's range.
        error = (((codes * step - groups) / scale[:, None, None]) ** 2).sum(dim=2)
        candidates.append((group_scale, codes, error))
    (low, low_codes, low_error), (high, high_codes, high_error) = candidates
    take_high = high_error < low_error
    codes = torch.where(take_high.unsqueeze(2), high_codes, low_codes).view(groups.shape[0], -1)
    group_scale = torch.where(take_high, high, low).to(torch.uint8)
    return {"qdata": pack_codes(codes, INT4), "scale": scale, "group_scale": group_scale}


def _scale(absmax: Tensor, qmax: int) -> Tensor:
    """absmax / qmax; 1 where everything is (next to) zero, so that scales are always positive and normal."""
    return torch.where(absmax > MIN_ABSMAX, absmax / qmax, torch.ones_like(absmax))


def _codes(values: Tensor, scale: Tensor, qmax: int) -> Tensor:
    return torch.round(values / scale).clamp(-qmax, qmax)
