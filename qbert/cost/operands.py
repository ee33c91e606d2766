"""Which units can multiply which formats: what an operand of the hardware holds exactly, and what has to be decoded first."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from qbert.cost.target import FLOAT_BYTES, FLOATS, Hardware, Rate
from qbert.formats import FORMATS, BlockFormat, Format, Kind
from qbert.formats.elements import ELEMENT_ALIASES

Side = BlockFormat | None  # of a product; None: the target's float
# Elements that a class of low-bit floats takes (OCP MX v1.0, table 1; NVIDIA's fp8).
_MINIFLOATS = {
    "fp8": ("float8_e4m3fn", "float8_e5m2"),
    "fp6": ("float6_e2m3fn", "float6_e3m2fn"),
    "fp4": ("float4_e2m1fn",),
}
_MANTISSA = {"fp32": 23, "tf32": 10, "bf16": 7, "fp16": 10}
_EXPONENTS = {"fp32": (-126, 127), "tf32": (-126, 127), "bf16": (-126, 127), "fp16": (-14, 15)}


@dataclass(frozen=True)
class Held:
    """How a unit takes one side of a product.

    Attributes:
        operand: of the unit.
        decoded: codes become that operand first.
        sums: each block's sum is scaled apart, on the vector units; else scales are at the end, in the unit, or multiplied in.
        rounded: the operand does not hold the values exactly.
    """

    operand: str
    decoded: bool = False
    sums: bool = False
    rounded: bool = False


@dataclass(frozen=True)
class Way:
    """One rate, and how both sides of a product come to it."""

    rate: Rate
    weights: Held
    activations: Held


def ways(target: Hardware, weights: Side, activations: Side, k: int) -> list[Way]:
    """Every way in which the target can multiply them, in the order of its rates: low-bit operands hold codes exactly or not at
    all, floats hold what is decoded, rounded where they must."""
    return [
        Way(rate, left, right)
        for rate in target.rate
        for left in _held(rate.weights, rate, weights, k, target.float)
        for right in _held(rate.activations, rate, activations, k, target.float)
    ]


def _held(operands: Sequence[str], rate: Rate, side: Side, k: int, float_name: str) -> list[Held]:
    """How a unit with these operands takes a side; several where there is a choice."""
    if side is None:
        return [Held(float_name)] if float_name in operands else []
    blocked = is_blocked(side, k)
    applied = blocked and f"{side.scale}/{side.block[1]}" in rate.blocks
    found = []
    for operand in operands:
        if operand in FLOATS:  # codes and their scales become floats
            exact = holds(operand, side) and (not blocked or side.scale == "e8m0")
            found.append(Held(operand, decoded=True, rounded=not exact))
        elif holds(operand, side):
            found.append(Held(operand, not takes(operand, side), sums=blocked and not applied))
    return found


def is_blocked(side: Side, k: int) -> bool:
    """Whether several scales lie along what a product of k input channels sums over."""
    return side is not None and side.scale != "none" and 0 < side.block[1] < k


def takes(operand: str, side: BlockFormat) -> bool:
    """Whether a unit reads the codes as they are stored."""
    element = side.element
    if operand.startswith("int"):
        return element.kind is Kind.INTEGER and element.bits == int(operand[3:])
    if operand.startswith("dict"):
        return element.kind is Kind.DICTIONARY
    return operand not in _MINIFLOATS or element.name in _MINIFLOATS[operand]


@functools.lru_cache(maxsize=1024)
def holds(operand: str, side: BlockFormat) -> bool:
    """Whether an operand has every value of a format's element, up to one power of two that a scale takes up."""
    element = side.element
    if operand in _MANTISSA:
        return element.kind is not Kind.DICTIONARY and _fits_float(operand, element)
    if operand.startswith("dict"):
        return element.kind is Kind.DICTIONARY and element.bits <= int(operand[4:])
    if operand in _MINIFLOATS:
        return element.kind is not Kind.DICTIONARY and any(
            set(element.finite_values) <= set(FORMATS[name].finite_values) for name in _MINIFLOATS[operand]
        )
    if operand in ("int2", "int3", "int4", "int5", "int6", "int7", "int8"):
        return element.kind is not Kind.DICTIONARY and _fits_integer(int(operand[3:]), side)
    name = operand.removeprefix("element:")
    return element.name == ELEMENT_ALIASES.get(name, name)


def _fits_integer(bits: int, side: BlockFormat) -> bool:
    values = [Fraction(value) for value in side.element.finite_values]
    unit = max(value.denominator for value in values)  # floats are fractions of powers of two
    largest = max(abs(value) * unit for value in values)
    if side.element.kind is Kind.INTEGER:  # symmetric ones leave the lowest code out; a zero point takes a bit more
        largest = Fraction(side.element.qmax if side.symmetric else side.element.codes // 2)
    if unit == 1 and values:
        shared = functools.reduce(math.gcd, (abs(int(value)) for value in values), 0) or 1
        largest = largest / shared if side.element.kind is not Kind.INTEGER else largest
    return largest <= (1 << (bits - 1)) - (0 if not side.symmetric else 1)


def _fits_float(operand: str, element: Format) -> bool:
    low, high = _EXPONENTS[operand]
    for value in element.finite_values:
        mantissa, exponent = math.frexp(abs(value))
        steps = mantissa * 2 ** (_MANTISSA[operand] + 1)
        if value and (steps != int(steps) or not low <= exponent - 1 <= high):
            return False
    return True


def stored_bits(side: Side, rows: int, columns: int, target: Hardware) -> float:
    """Bits that a value of a (rows, columns) matrix takes in memory, scales included."""
    if side is None:
        return 8.0 * FLOAT_BYTES[target.float]
    return side.bits_per_value(rows, columns)
