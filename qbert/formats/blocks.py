"""Formats of whole matrices as data: element x scale x granularity x rounding x clipping x outliers.

A `BlockFormat` is what a study compares: MXFP4, NVFP4, int4 in groups of 64, or ten lines of one's own. Everything about it is
plain data, so it is saved with a model and read back without running anything. `qbert.numerics` computes with it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbert.errors import QBertError
from qbert.formats.elements import FORMATS, Format, Kind, Specials, get_element

WHOLE = 0  # of a block's side: all there are
_SIDES = {"tensor": (WHOLE, WHOLE), "row": (1, WHOLE), "token": (1, WHOLE)}
MAX_SIDE = 2**20
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 2.0**127


@dataclass(frozen=True)
class ScaleFormat:
    """What a block's scale is stored as.

    Attributes:
        name: what users type.
        bits: of one scale.
        outer: what the scales lie under: ``"tensor"`` or ``"row"`` (a float32), or None.
        summary: one line for people.
    """

    name: str
    bits: int
    outer: str | None
    summary: str

    @property
    def is_integer(self) -> bool:
        """Whether scales are integers from 1 under a float scale of their row."""
        return self.name.startswith("uint")

    @property
    def largest(self) -> float:
        """Largest scale of those that lie under another one."""
        return float((1 << self.bits) - 1) if self.is_integer else E4M3_MAX


E4M3_MAX, E4M3_SMALLEST = 448.0, 2.0**-6  # of scales; NVIDIA's recipe uses no subnormal ones
SCALES: dict[str, ScaleFormat] = {
    each.name: each
    for each in (
        ScaleFormat("none", 0, None, "elements as they are, saturated"),
        ScaleFormat("float32", 32, None, "largest magnitude over largest element"),
        ScaleFormat("bfloat16", 16, None, "the same, rounded to bfloat16"),
        ScaleFormat("float16", 16, None, "the same, rounded to float16"),
        ScaleFormat("e8m0", 8, None, "a power of two (OCP MX v1.0, section 5.4.1)"),
        ScaleFormat("e4m3", 8, "tensor", "FP8 under a float32 of the tensor (NVFP4)"),
        ScaleFormat("uint4", 4, "row", "1 ... 15 under a float32 of the row (VS-Quant, Dai et al. 2021)"),
        ScaleFormat("uint6", 6, "row", "1 ... 63 under a float32 of the row"),
        ScaleFormat("uint8", 8, "row", "1 ... 255 under a float32 of the row"),
    )
}
SCALE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8_e4m3": "e4m3"}

# How a power of two is found for a block's largest magnitude (torchao's ScaleCalculationMode): OCP MX's own rule is floor.
SCALE_RULES = ("floor", "even", "ceil", "rceil")


class Rounding(enum.Enum):
    """Which of two neighbours a number becomes."""

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    TOWARD_ZERO = "toward_zero"
    STOCHASTIC = "stochastic"  # the nearer, the likelier; the draw follows from the number, its column and the seed


class Clipping(enum.Enum):
    """Which magnitude a block's scale maps to the largest element."""

    ABSMAX = "absmax"
    MSE = "mse"  # the one of a few below the largest whose squared error is least
    PERCENTILE = "percentile"  # this percentile of the block's magnitudes


class Keep(enum.Enum):
    """Which numbers are kept exactly, beside the format."""

    NONE = "none"
    SIGMA = "sigma"  # further than this many standard deviations from the mean
    SHARE = "share"  # this share of all, the largest magnitudes
    GOBO = "gobo"  # log-density below -4 under the fitted Gaussian (Zadeh et al., MICRO 2020)


# Policies that take a number, with what it may be.
_NUMBERS: dict[enum.Enum, tuple[float, float, str]] = {
    Rounding.STOCHASTIC: (0, 2**31 - 1, "a whole number from 0, the seed"),
    Clipping.PERCENTILE: (1, 100, "1 to 100"),
    Keep.SIGMA: (0.5, 1e6, "at least 0.5"),
    Keep.SHARE: (0, 0.5, "0 to 0.5"),
}


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is stored, or an activation rounded.

    Attributes:
        name: what users type.
        element: of one number.
        scale: a name of `SCALES`.
        block: (rows, columns) that share a scale; 0 is all of them: (1, 0) a row or token, (0, 0) the matrix. The last block
            of a row is shorter where the columns are no multiple.
        symmetric: integers only: around zero, or (affine) each block with a zero point of the element's bits.
        rounding: ``nearest_even``, ``nearest_away``, ``toward_zero``, ``stochastic:SEED``.
        clipping: ``absmax``, ``mse``, ``percentile:P``.
        outliers: ``none``, ``sigma:Z``, ``share:S``, ``gobo``.
        scale_rule: of E8M0 scales: ``floor``, ``even``, ``ceil``, ``rceil``.
        top: the element's value that a scale maps the largest magnitude to; None is its largest. Posits have more: their
            largest values are far apart.

    Raises:
        QBertError: a value that is not allowed, or a combination that means nothing.
    """

    name: str
    element: Format
    scale: str = "float32"
    block: tuple[int, int] = (1, WHOLE)
    symmetric: bool = True
    rounding: str = "nearest_even"
    clipping: str = "absmax"
    outliers: str = "none"
    scale_rule: str = "floor"
    top: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 1 <= len(self.name) <= 64 or not self.name.isprintable():
            raise QBertError(f"format name {self.name!r}; allowed: 1 to 64 printable characters")
        problem = _wrong_type(self) or _problem_of(self)
        if problem is not None:
            raise QBertError(f"format {self.name}: {problem}")
        for kind, text in ((Rounding, self.rounding), (Clipping, self.clipping), (Keep, self.outliers)):
            _policy(self.name, kind, text)

    def __hash__(self) -> int:  # a dataclass's own walks through tables, and formats are keys of caches
        return hash((self.name, self.element.name, self.scale, self.block))

    @property
    def largest(self) -> float:
        """The element's value that a scale maps the largest magnitude to."""
        if self.element.kind is Kind.INTEGER and self.top is None:
            return self.element.qmax * 2.0**-self.element.fraction_bits  # codes are -qmax ... qmax
        return self.element.max if self.top is None else self.top

    @property
    def scale_format(self) -> ScaleFormat:
        """The row of `SCALES`."""
        return SCALES[self.scale]

    @property
    def rounding_policy(self) -> tuple[Rounding, float]:
        """Kind and seed."""
        return _policy(self.name, Rounding, self.rounding)

    @property
    def clipping_policy(self) -> tuple[Clipping, float]:
        """Kind and percentile."""
        return _policy(self.name, Clipping, self.clipping)

    @property
    def outlier_policy(self) -> tuple[Keep, float]:
        """Kind and number."""
        return _policy(self.name, Keep, self.outliers)

    @property
    def keeps_outliers(self) -> bool:
        """Whether some numbers are kept exactly."""
        return self.outliers != Keep.NONE.value

    @property
    def is_learned(self) -> bool:
        """Whether the element's values are learned from each matrix."""
        return self.element.kind is Kind.DICTIONARY

    @property
    def granularity(self) -> str:
        """What shares a scale, in words."""
        rows, columns = self.block
        if self.scale == "none":
            return "no scale"
        if rows == WHOLE:
            return "tensor"
        if columns == WHOLE:
            return "row" if rows == 1 else f"{rows} rows"
        return f"block of {columns}" if rows == 1 else f"block of {rows} x {columns}"

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Blocks along each side of an (n, k) matrix; the last ones may be cut short."""
        rows, columns = self.sides(n, k)
        return -(-n // rows), -(-k // columns)

    def sides(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of one block of an (n, k) matrix."""
        return self.block[0] or n, self.block[1] or k

    def bits_per_value(self, n: int, k: int) -> float:
        """Stored bits of an (n, k) matrix over its values, with scales and zero points; outliers come on top."""
        blocks = math.prod(self.grid(n, k))
        outer = {None: 0, "row": 32 * self.grid(n, k)[0], "tensor": 32}[self.scale_format.outer]
        zero = 0 if self.symmetric else self.element.bits * blocks
        learned = 32 * self.element.codes if self.is_learned else 0
        return self.element.bits + (self.scale_format.bits * blocks + outer + zero + learned) / (n * k)

    def obstacle_for_activations(self) -> str | None:
        """Why it is not for activations; None where it is. No result may depend on the batch that it came in."""
        rows, _ = self.block
        if self.is_learned:
            return "a dictionary is learned from a stored matrix"
        if rows != 1 and self.scale != "none":
            return f"a {self.granularity} scale mixes tokens, so results would depend on the batch"
        if self.outliers == Keep.GOBO.value:
            return "gobo's outliers are of a stored matrix"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` gives it back. Elements that stand in `FORMATS` go by their names."""
        data: dict[str, Any] = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        known = FORMATS.get(self.element.name) == self.element
        return data | {
            "element": self.element.name if known else _element_to_dict(self.element),
            "block": list(self.block),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockFormat:
        """From `to_dict`'s data, which may come from anywhere.

        Raises:
            QBertError: an entry that is missing, unknown, of another type or out of range.
        """
        fields = _checked_fields(cls, data, "format")
        element, block = fields["element"], fields.get("block", [1, WHOLE])
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(side) is int for side in block):
            raise QBertError(f"format block {block!r}; allowed: two whole numbers")
        parsed = get_element(element) if isinstance(element, str) else _element_from_dict(element)
        return cls(**{**fields, "element": parsed, "block": (block[0], block[1])})


def block_format(
    name: str,
    element: Format | str,
    scale: str = "float32",
    block: int | str | tuple[int, int] = "row",
    **policies: Any,
) -> BlockFormat:
    """A format of one's own.

    Args:
        name: what it is called in reports and files.
        element: of one number, or its name.
        scale: see `SCALES`; ``bf16`` and ``fp32`` are understood too.
        block: columns that share a scale; (rows, columns); ``"row"`` (or ``"token"``), ``"tensor"``.
        policies: `symmetric`, `rounding`, `clipping`, `outliers`, `scale_rule`, `top` of `BlockFormat`.

    Raises:
        QBertError: a value that is not allowed.
    """
    unknown = policies.keys() - {"symmetric", "rounding", "clipping", "outliers", "scale_rule", "top"}
    if unknown:
        raise QBertError(
            f"format {name}: no setting {sorted(unknown)[0]!r}; allowed: element, scale, block, symmetric, rounding, clipping, "
            "outliers, scale_rule, top"
        )
    element = get_element(element) if isinstance(element, str) else element
    if isinstance(block, str):
        if block not in _SIDES:
            raise QBertError(f"format {name}: block {block!r}; allowed: a number, two numbers, {', '.join(_SIDES)}")
        block = _SIDES[block]
    sides = (1, block) if isinstance(block, int) else block
    return BlockFormat(name, element, SCALE_ALIASES.get(scale, scale), sides, **policies)


def _wrong_type(fmt: BlockFormat) -> str | None:
    """Files may hold anything, so the rules below see only values of the right types."""
    if not isinstance(fmt.element, Format):
        return f"element {fmt.element!r}; allowed: a Format, see qbert.formats"
    for name in ("scale", "rounding", "clipping", "outliers", "scale_rule"):
        if not isinstance(getattr(fmt, name), str):
            return f"{name} {getattr(fmt, name)!r}; allowed: text"
    if type(fmt.symmetric) is not bool:
        return f"symmetric {fmt.symmetric!r}; allowed: true, false"
    if fmt.top is not None and type(fmt.top) not in (int, float):
        return f"top {fmt.top!r}; allowed: a number, or none"
    return None


def _problem_of(fmt: BlockFormat) -> str | None:
    if fmt.scale not in SCALES:
        return f"scale {fmt.scale!r}; allowed: {', '.join(SCALES)}"
    if not isinstance(fmt.block, tuple) or len(fmt.block) != 2 or not all(type(side) is int for side in fmt.block):
        return f"block {fmt.block!r}; allowed: two whole numbers"
    rows, columns = fmt.block
    if not (0 <= rows <= MAX_SIDE and 0 <= columns <= MAX_SIDE) or columns == 1 or (rows == WHOLE and columns != WHOLE):
        return f"block {rows} x {columns}; allowed: 1 to {MAX_SIDE} rows, 2 to {MAX_SIDE} columns or 0 (all), or 0 x 0"
    if fmt.scale_rule not in SCALE_RULES:
        return f"scale_rule {fmt.scale_rule!r}; allowed: {', '.join(SCALE_RULES)}"
    if fmt.is_learned:
        return (
            None
            if fmt.scale == "none"
            else f"scale {fmt.scale}; allowed with a dictionary: none (its values are learned)"
        )
    if fmt.outliers == Keep.GOBO.value:
        return "outliers gobo; allowed with a dictionary only; otherwise: none, sigma:Z, share:S"
    if not fmt.symmetric and (
        fmt.element.kind is not Kind.INTEGER or fmt.element.fraction_bits or fmt.element.bits < 2
    ):
        return f"symmetric false with {fmt.element.name}; allowed with integers of 2 to 8 bits"
    if not fmt.symmetric and (fmt.rounding, fmt.clipping) != ("nearest_even", "absmax"):
        return f"zero points with {fmt.rounding} and {fmt.clipping}; allowed: nearest_even and absmax"
    if not fmt.symmetric and fmt.scale not in ("float32", "bfloat16", "float16"):
        return f"zero points with scale {fmt.scale}; allowed: float32, bfloat16, float16"
    if not fmt.symmetric and fmt.top is not None:
        return "top with zero points; allowed without them"
    values = [abs(value) for value in fmt.element.finite_values if value]
    if not values or (fmt.top is None and fmt.largest <= 0):
        return f"element {fmt.element.name} has no value but 0"
    if max(values) >= _FLOAT32_MAX or min(values) < _FLOAT32_MIN:
        return f"element values from {min(values):.3g} to {max(values):.3g}; allowed: normal float32 numbers, 2**-126 to 2**127"
    if fmt.top is not None and not 0 < fmt.top <= fmt.element.max:
        return f"top {fmt.top!r}; allowed: more than 0, at most {fmt.element.max}"
    return None


def _policy(name: str, kind: type[Any], text: object) -> tuple[Any, float]:
    """``"percentile:99.9"`` to its kind and number."""
    word, colon, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    known = next((each for each in kind if each.value == word), None)
    allowed = ", ".join(f"{each.value}:NUMBER" if each in _NUMBERS else each.value for each in kind)
    if known is None or bool(colon) != (known in _NUMBERS):
        what = "outliers" if kind is Keep else kind.__name__.lower()
        raise QBertError(f"format {name}: {what} {text!r}; allowed: {allowed}")
    if known not in _NUMBERS:
        return known, 0.0
    low, high, rule = _NUMBERS[known]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (known is Rounding.STOCHASTIC and value != int(value)):
        raise QBertError(f"format {name}: {word} {number!r}; allowed: {rule}")
    return known, value


def _element_to_dict(element: Format) -> dict[str, Any]:
    data = {each.name: getattr(element, each.name) for each in dataclasses.fields(element)}
    return data | {"kind": element.kind.value, "specials": element.specials.value, "table": list(element.table)}


def _element_from_dict(data: object) -> Format:
    if not isinstance(data, Mapping):
        raise QBertError(f"format element {data!r}; allowed: a name or an object")
    fields = _checked_fields(Format, data, "element")
    for name in ("bits", "exponent_bits", "mantissa_bits", "bias", "fraction_bits"):
        value = fields.get(name, 0)
        if type(value) is not int or not -128 <= value <= 128:
            raise QBertError(f"element {name} {value!r}; allowed: whole numbers to 128")
    values = fields.get("table", [])
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise QBertError(f"element table {str(values)[:40]}; allowed: a list of numbers")
    try:
        kind, specials = Kind(fields["kind"]), Specials(fields.get("specials", "none"))
    except ValueError as error:
        raise QBertError(f"element: {error}") from None
    bits = (fields["bits"], 1 + fields.get("exponent_bits", 0) + fields.get("mantissa_bits", 0))
    if kind is Kind.FLOAT and bits[0] != bits[1]:
        raise QBertError(f"element bits {bits[0]}; allowed: {bits[1]}, a sign, the exponent and the mantissa")
    return Format(**{**fields, "kind": kind, "specials": specials, "table": tuple(map(float, values))})


def _checked_fields(cls: type[Any], data: Mapping[str, Any], what: str) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    known = {each.name for each in fields}
    needed = {each.name for each in fields if each.default is dataclasses.MISSING}
    for name in sorted(set(data) - known, key=str):
        raise QBertError(f"{what} entry {name!r}; allowed: {', '.join(sorted(known))}")
    for name in sorted(needed - set(data)):
        raise QBertError(f"{what} without {name!r}; it must be there")
    if not isinstance(data["name"], str):
        raise QBertError(f"{what} name {data['name']!r}; allowed: text")
    return dict(data)
