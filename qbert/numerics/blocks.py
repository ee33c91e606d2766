"""Matrices in a block format: quantized to codes and scales, back to floats, and activations rounded in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import BlockFormat, Clipping, Keep
from qbert.numerics.rounding import encode, round_units, values_of
from qbert.numerics.scales import MIN_ABSMAX, Scales, as_float, choose, in_units, outer_scale

# What a search tries as the magnitude that a scale covers, in shares of the block's largest.
_SHRINKS = tuple(1 - step / 40 for step in range(21))


@dataclass(frozen=True)
class Blocks:
    """A quantized (n, k) matrix, unpacked.

    Attributes:
        codes: (n, k) uint8.
        scales: of its blocks; None where it has none.
        zero: (rows, blocks) uint8 zero points, or None.
        outliers: (n, k) bool of numbers that are kept exactly, or None.
        kept: (outliers,) float32, row by row, or None.
        codebook: (m,) float32 values of the codes where they are learned, or None.
    """

    codes: Tensor
    scales: Scales | None = None
    zero: Tensor | None = None
    outliers: Tensor | None = None
    kept: Tensor | None = None
    codebook: Tensor | None = None


def quantize_blocks(matrix: Tensor, fmt: BlockFormat) -> Blocks:
    """A finite float32 (n, k) in a format that learns nothing.

    Raises:
        QBertError: a dictionary.
    """
    if fmt.is_learned:
        raise QBertError(f"format {fmt.name} learns its values; `qbert.quantizers` does that")
    mask = outlier_mask(matrix, fmt, per_row=False) if fmt.keeps_outliers else None
    rest = matrix if mask is None else matrix.masked_fill(mask, 0.0)
    kept = None if mask is None else matrix[mask]
    if fmt.scale == "none":
        return Blocks(encode(rest, fmt), outliers=mask, kept=kept)
    blocks, shape = to_blocks(rest, fmt), (matrix.shape[0], matrix.shape[1])
    if not fmt.symmetric:
        codes, scales, zero = _affine(blocks, fmt)
        return Blocks(from_blocks(codes, fmt, shape), scales, zero, mask, kept)
    absmax = _magnitudes(blocks, fmt)
    scales = choose(absmax, fmt)
    units = in_units(blocks, scales, absmax, fmt, multiply=False)
    # Rounded as a matrix: what a draw depends on is the number's column, not its place in a block.
    return Blocks(encode(from_blocks(units, fmt, shape), fmt), scales, None, mask, kept)


def dequantize(quantized: Blocks, fmt: BlockFormat) -> Tensor:
    """Float32 (n, k) that a quantized matrix stands for; outliers come back bit for bit."""
    codes, shape = quantized.codes, (quantized.codes.shape[0], quantized.codes.shape[1])
    if quantized.codebook is not None:
        values = quantized.codebook[codes.to(torch.int32)]
    elif quantized.scales is None:
        values = values_of(codes, fmt)
    else:
        units = codes.to(torch.float32) if quantized.zero is not None else values_of(codes, fmt)
        blocks = to_blocks(units, fmt)
        if quantized.zero is not None:
            blocks = blocks - quantized.zero.to(torch.float32).unsqueeze(2)
        values = from_blocks(blocks * as_float(quantized.scales).unsqueeze(2), fmt, shape)
    if quantized.outliers is not None:
        assert quantized.kept is not None
        values = values.masked_scatter(quantized.outliers, quantized.kept)
    return values


def round_activations(tokens: Tensor, fmt: BlockFormat) -> Tensor:
    """Float32 (t, k), each token rounded by itself: no result depends on the batch. NaN and infinity make their block NaN.

    Scales that lie under a tensor's lie under their token's here.
    """
    mask = outlier_mask(tokens, fmt, per_row=True) if fmt.keeps_outliers else None
    rest = tokens if mask is None else tokens.masked_fill(mask, 0.0)
    rounded = _unscaled(rest, fmt) if fmt.scale == "none" else _rounded(rest, fmt)
    return rounded if mask is None else torch.where(mask, tokens, rounded)


def activation_codes(tokens: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Values (t, k) in units of a scale for each token, and the scales (t, 1): what an integer product multiplies."""
    absmax = _magnitudes(tokens.unsqueeze(1), fmt)
    scales = choose(absmax, fmt)
    return round_units(in_units(tokens.unsqueeze(1), scales, absmax, fmt, multiply=True).squeeze(1), fmt), as_float(
        scales
    )


def _unscaled(tokens: Tensor, fmt: BlockFormat) -> Tensor:
    return torch.where(tokens.isfinite(), round_units(tokens, fmt), torch.nan)


def _rounded(tokens: Tensor, fmt: BlockFormat) -> Tensor:
    blocks, shape = to_blocks(tokens, fmt), (tokens.shape[0], tokens.shape[1])
    if not fmt.symmetric:
        codes, scales, zero = _affine(blocks, fmt)
        return from_blocks((codes.to(torch.float32) - zero.unsqueeze(2)) * as_float(scales).unsqueeze(2), fmt, shape)
    absmax = _magnitudes(blocks, fmt)
    outer = None if fmt.scale_format.outer is None else outer_scale(absmax, fmt, per_row=True)
    scales = choose(absmax, fmt, outer)
    units = from_blocks(in_units(blocks, scales, absmax, fmt, multiply=True), fmt, shape)
    return from_blocks(to_blocks(round_units(units, fmt), fmt) * as_float(scales).unsqueeze(2), fmt, shape)


def outlier_mask(matrix: Tensor, fmt: BlockFormat, *, per_row: bool) -> Tensor:
    """(n, k) bool of the numbers that are kept exactly, of the whole matrix or row by row."""
    keep, number = fmt.outlier_policy
    rows = matrix if per_row else matrix.reshape(1, -1)
    if keep is Keep.SIGMA:
        centred = rows - rows.mean(dim=1, keepdim=True)
        mask = centred.abs() > number * centred.square().mean(dim=1, keepdim=True).sqrt()
    else:
        assert keep is Keep.SHARE
        count = round(number * rows.shape[1])
        mask = torch.zeros_like(rows, dtype=torch.bool)
        mask.scatter_(1, rows.abs().topk(count, dim=1).indices, True)
    return mask.view(matrix.shape)


def to_blocks(matrix: Tensor, fmt: BlockFormat) -> Tensor:
    """(n, k) to (block rows, block columns, size); blocks that the matrix does not fill are filled with zeros."""
    n, k = matrix.shape
    rows, columns = fmt.sides(n, k)
    down, across = fmt.grid(n, k)
    if n % rows or k % columns:
        matrix = torch.nn.functional.pad(matrix, (0, across * columns - k, 0, down * rows - n))
    if rows == 1:
        return matrix.view(down, across, columns) if matrix.is_contiguous() else matrix.reshape(down, across, columns)
    return matrix.reshape(down, rows, across, columns).transpose(1, 2).reshape(down, across, rows * columns)


def from_blocks(blocks: Tensor, fmt: BlockFormat, shape: tuple[int, int]) -> Tensor:
    """Inverse of `to_blocks`."""
    n, k = shape
    rows, columns = fmt.sides(n, k)
    down, across = fmt.grid(n, k)
    if rows == 1:
        whole = blocks.reshape(down, across * columns)
    else:
        whole = blocks.reshape(down, across, rows, columns).transpose(1, 2).reshape(down * rows, across * columns)
    return whole if whole.shape == shape else whole[:n, :k].contiguous()


def _magnitudes(blocks: Tensor, fmt: BlockFormat) -> Tensor:
    """(rows, blocks) that scales are to cover."""
    clipping, percentile = fmt.clipping_policy
    absmax = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=2)
    if clipping is Clipping.PERCENTILE:
        rank = max(1, -(-int(percentile * blocks.shape[2] * 1000) // 100_000))
        clipped = blocks.abs().kthvalue(rank, dim=2).values
        return torch.where(absmax.isfinite(), torch.where(clipped > 0, clipped, absmax), absmax)
    return _searched(blocks, absmax, fmt) if clipping is Clipping.MSE else absmax


def _searched(blocks: Tensor, absmax: Tensor, fmt: BlockFormat) -> Tensor:
    """The magnitude, of a few up to the largest, that leaves a block the least squared error."""
    outer = None if fmt.scale_format.outer is None else outer_scale(absmax, fmt)
    # Errors in units of the block's largest: squares of very small or large numbers would leave float32's range.
    relative = absmax.clamp(min=MIN_ABSMAX).unsqueeze(2)
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for shrink in _SHRINKS:
        covered = absmax * shrink
        scales = choose(covered, fmt, outer)
        restored = round_units(in_units(blocks, scales, covered, fmt, multiply=False), fmt) * as_float(
            scales
        ).unsqueeze(2)
        error = ((restored - blocks) / relative).square_().sum(dim=2)
        best, least = torch.where(error < least, covered, best), torch.minimum(error, least)
    return best


def _affine(blocks: Tensor, fmt: BlockFormat) -> tuple[Tensor, Scales, Tensor]:
    """Codes (rows, blocks, size) uint8, scales and zero points: value = (code - zero) * scale, with an exact 0."""
    top = fmt.element.codes - 1
    low, high = blocks.amin(dim=2).clamp(max=0), blocks.amax(dim=2).clamp(min=0)
    stored = choose((high - low) * (fmt.largest / top), fmt)
    scale = as_float(stored)
    zero = (-low / scale).round().clamp(0, top)
    codes = ((blocks / scale.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, top)
    return codes.nan_to_num(0).to(torch.uint8), stored, zero.nan_to_num(0).to(torch.uint8)
