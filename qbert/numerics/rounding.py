"""Numbers to codes of an element format and back. Everything is saturated: what is beyond the largest value becomes it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qbert.formats import BlockFormat, Format, Kind, Rounding, usable_codes

_HASH, _HASH_COLUMN, _HASH_SEED = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd constants of MurmurHash3 and xxHash


@dataclass(frozen=True)
class Grid:
    """The values that a format has, and where one ends and the next begins.

    Attributes:
        values: (m,) float32 ascending.
        codes: (m,) uint8 of each.
        edges: (m - 1,) float32: x is rounded to ``values[i]`` where i edges lie below x.
    """

    values: Tensor
    codes: Tensor
    edges: Tensor


def encode(units: Tensor, fmt: BlockFormat) -> Tensor:
    """Codes uint8 (n, k) of numbers in units of their scales, float32 (n, k). NaN has no code: see `round_units`."""
    grid = _grid(fmt, units.device)
    return grid.codes[_nearest(units, fmt, grid)]


def round_units(units: Tensor, fmt: BlockFormat) -> Tensor:
    """The values float32 (n, k) that `encode`'s codes stand for; NaN stays NaN."""
    if fmt.rounding == Rounding.NEAREST_EVEN.value:
        if fmt.element.kind is Kind.INTEGER:
            return _round_integer(units, fmt.element)
        if fmt.element.kind is Kind.FLOAT and fmt.element.mantissa_bits:
            return _round_float(units, fmt.element)
    grid = _grid(fmt, units.device)
    return torch.where(units.isnan(), units, grid.values[_nearest(units, fmt, grid)])


def values_of(codes: Tensor, fmt: BlockFormat) -> Tensor:
    """Float32 values of codes uint8."""
    return _table(fmt.element, codes.device)[codes.to(torch.int32)]


def _round_integer(units: Tensor, element: Format) -> Tensor:
    unit = 2.0**-element.fraction_bits
    largest = element.qmax * unit
    return (units.clamp(-largest, largest) / unit).round() * unit


def _round_float(units: Tensor, element: Format) -> Tensor:
    """To a multiple of the last place at a number's own binade: adding 1.5 * 2**23 places drops what is below, ties to even."""
    clamped = units.clamp(-element.max, element.max)
    binade = (clamped.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**floor(log2 |x|)
    magic = binade.clamp_(min=2.0 ** (1 - element.bias)).mul_(1.5 * 2.0 ** (23 - element.mantissa_bits))
    return (clamped + magic).sub_(magic)


def _nearest(units: Tensor, fmt: BlockFormat, grid: Grid) -> Tensor:
    """Index int32 into a grid's values."""
    rounding, seed = fmt.rounding_policy
    if rounding is not Rounding.STOCHASTIC:
        return torch.bucketize(units.contiguous(), grid.edges, out_int32=True)
    low = (torch.bucketize(units, grid.values, right=True, out_int32=True) - 1).clamp(0, grid.values.numel() - 2)
    below, above = grid.values[low], grid.values[low + 1]
    share = ((units - below) / (above - below)).clamp(0, 1)
    return low + (_draws(units, int(seed)) < share).to(torch.int32)


def _draws(units: Tensor, seed: int) -> Tensor:
    """Uniform in [0, 1), from a number's bits, its column and the seed: the same in every batch and on every run."""
    columns = torch.arange(units.shape[-1], dtype=torch.int64, device=units.device)
    mixed = (
        units.contiguous().view(torch.int32).to(torch.int64) * _HASH + columns * _HASH_COLUMN + (seed + 1) * _HASH_SEED
    )
    for shift in (15, 13, 16):  # MurmurHash3's finalizer
        mixed = (mixed & 0xFFFFFFFF) ^ ((mixed & 0xFFFFFFFF) >> shift)
        mixed = mixed * _HASH_COLUMN
    return ((mixed & 0xFFFFFFFF) >> 8).to(torch.float32) * 2.0**-24


@functools.lru_cache(maxsize=256)
def _grid(fmt: BlockFormat, device: torch.device) -> Grid:
    codes = usable_codes(fmt)
    values = [fmt.element.values[code] for code in codes]
    rounding, _ = fmt.rounding_policy
    exact = torch.tensor(values, dtype=torch.float32).to(torch.float64)  # the values as they are computed with
    if rounding is Rounding.TOWARD_ZERO:
        # Up to the next value away from zero, it is the one before; the edge itself belongs to the next one.
        edges = torch.where(exact[1:] > 0, exact[1:], exact[:-1])
        upward = exact[1:] > 0
    else:
        edges = (exact[1:] + exact[:-1]) / 2
        upward = edges > 0 if rounding is Rounding.NEAREST_AWAY else torch.tensor([code % 2 == 0 for code in codes[1:]])
    rounded = edges.to(torch.float32)
    # Comparing float32 numbers with an edge rounded down decides as the edge itself; one below, and the edge goes up.
    down = rounded.nextafter(torch.tensor(-torch.inf))
    rounded = torch.where(
        (rounded.to(torch.float64) > edges) | (upward & (rounded.to(torch.float64) == edges)), down, rounded
    )
    return Grid(
        exact.to(torch.float32).to(device), torch.tensor(codes, dtype=torch.uint8, device=device), rounded.to(device)
    )


@functools.lru_cache(maxsize=256)
def _table(element: Format, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=torch.float32, device=device)
