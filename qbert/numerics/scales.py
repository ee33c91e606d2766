"""Scales of blocks: from the magnitudes that they are to cover to what is stored, and to what codes are multiplied with."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from qbert.formats import BlockFormat
from qbert.formats.blocks import E4M3_SMALLEST

MIN_ABSMAX = 2.0**-100  # below this a block counts as zero: its scale is 1 and its codes are 0
_EXPONENT_BIAS, _NAN_CODE = 127, 255  # of E8M0 (OCP MX v1.0, section 5.4.1)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Scales(NamedTuple):
    """
    Attributes:
        stored: (rows, blocks) as a file holds them: floats, codes of E8M0 (uint8), E4M3 (float8_e4m3fn), or integers (uint8).
        outer: (rows, 1) or (1, 1) float32 that they lie under, or None.
    """

    stored: Tensor
    outer: Tensor | None


def choose(absmax: Tensor, fmt: BlockFormat, outer: Tensor | None = None) -> Scales:
    """Scales (rows, blocks) for magnitudes (rows, blocks) float32; NaN and infinity give a scale that is not finite.

    Args:
        outer: what they lie under, where it is known already.
    """
    if fmt.scale == "e8m0":
        return Scales(_e8m0(absmax, fmt), None)
    if fmt.scale_format.outer is None:
        dtype = _DTYPES[fmt.scale]
        return Scales(_ratio(absmax, fmt.largest).to(dtype).clamp(min=torch.finfo(dtype).tiny), None)
    outer = outer_scale(absmax, fmt) if outer is None else outer
    ideal = absmax / fmt.largest / outer
    largest = fmt.scale_format.largest
    if fmt.scale_format.is_integer:  # NaN has no integer: it is in the outer scale, which is the row's
        return Scales(ideal.nan_to_num(1.0).round().clamp(1, largest).to(torch.uint8), outer)
    return Scales(ideal.clamp(E4M3_SMALLEST, largest).to(torch.float8_e4m3fn), outer)


def outer_scale(absmax: Tensor, fmt: BlockFormat, per_row: bool = False) -> Tensor:
    """What block scales lie under: (rows, 1), or (1, 1) of the whole matrix."""
    by_row = per_row or fmt.scale_format.outer == "row"
    top = absmax.amax(dim=1, keepdim=True) if by_row else absmax.amax().view(1, 1)
    return _ratio(top, fmt.largest * fmt.scale_format.largest)


def as_float(scales: Scales) -> Tensor:
    """Float32 (rows, blocks) that codes are multiplied with."""
    inner = scales.stored
    if inner.dtype == torch.uint8 and scales.outer is None:
        return _powers(inner.device)[inner.to(torch.int32)]
    floats = inner.to(torch.float32)
    return floats if scales.outer is None else floats * scales.outer


def in_units(blocks: Tensor, scales: Scales, absmax: Tensor, fmt: BlockFormat, *, multiply: bool) -> Tensor:
    """Numbers (rows, blocks, size) over their scales.

    Args:
        absmax: (rows, blocks) that the scales were chosen for.
        multiply: by the reciprocal of a float32 scale, as kernels do with activations; weights are divided.
    """
    if scales.outer is not None and not fmt.scale_format.is_integer:  # NVIDIA's order of operations, and torchao's
        return blocks * ((1.0 / scales.outer) / scales.stored.to(torch.float32)).unsqueeze(2)
    if multiply and fmt.scale == "float32":
        return blocks * (fmt.largest / absmax.clamp(min=MIN_ABSMAX)).unsqueeze(2)
    return blocks / as_float(scales).unsqueeze(2)


def _ratio(absmax: Tensor, largest: float) -> Tensor:
    return torch.where(absmax <= MIN_ABSMAX, torch.ones_like(absmax), absmax / largest)


def _e8m0(absmax: Tensor, fmt: BlockFormat) -> Tensor:
    """Codes uint8 of powers of two: floor(log2(absmax)) - emax, after the rule's own rounding."""
    bits = absmax.contiguous().view(torch.int32)
    if fmt.scale_rule == "even":  # the magnitude rounded to the element's mantissa
        bits = (bits + (1 << (22 - _mantissa_bits(fmt)))) & 0x7F800000
    elif fmt.scale_rule == "rceil":  # the least power of two that the largest element still covers
        bits = (absmax / fmt.largest).view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) - _EXPONENT_BIAS
    if fmt.scale_rule in ("ceil", "rceil"):
        exponent = exponent + ((bits & 0x7FFFFF) > 0).to(torch.int32)
    if fmt.scale_rule != "rceil":
        exponent = exponent - (math.frexp(fmt.largest)[1] - 1)
    code = (exponent + _EXPONENT_BIAS).clamp(0, 2 * _EXPONENT_BIAS).to(torch.uint8)
    return torch.where(absmax.isfinite(), code, _NAN_CODE)


@functools.lru_cache
def _powers(device: torch.device) -> Tensor:
    """Float32 (256,) of the codes of E8M0: 2**-127 ... 2**127, NaN."""
    return torch.tensor([2.0 ** (code - _EXPONENT_BIAS) for code in range(_NAN_CODE)] + [math.nan], device=device)


def _mantissa_bits(fmt: BlockFormat) -> int:
    """Of floats; integers and tables have as many as the step below their largest value says."""
    if fmt.element.mantissa_bits:
        return fmt.element.mantissa_bits
    return max(0, fmt.element.bits - 2)
