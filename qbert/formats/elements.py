"""Element formats: what the bits of one number mean. Everything about a format follows from its row of data.

Names are those that ml_dtypes gives, where it has the format.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qbert.errors import QBertError

MAX_BITS = 8


class Kind(enum.Enum):
    """How a code becomes a value."""

    INTEGER = "integer"  # two's complement
    FLOAT = "float"  # sign, exponent, mantissa
    TABLE = "table"  # a fixed list of values
    DICTIONARY = "dictionary"  # a list of values learned from the matrix and stored with it


class Specials(enum.Enum):
    """What a float format keeps out of its finite values."""

    NONE = "none"  # every code is finite (OCP MX: FP6, FP4)
    NAN_ONLY = "nan_only"  # the all-ones code of either sign is NaN, there is no infinity (e4m3fn)
    IEEE = "ieee"  # the top exponent holds infinity and NaN (e5m2)


@dataclass(frozen=True)
class Format:
    """One element format.

    Attributes:
        name: as in ml_dtypes where it has the format.
        bits: bits of one code.
        kind: how a code becomes a value.
        exponent_bits, mantissa_bits, bias, specials: of float formats only; the bits left over are the sign.
        table: values of the codes 0, 1, ..., of table formats only: finite and ascending, at most 2**bits of them.
        fraction_bits: of integer formats only: a code counts units of 2**-fraction_bits (OCP MX's INT8 has 6).

    Raises:
        QBertError: more than 8 bits, or a table that does not ascend, is not finite, or is longer than there are codes.
    """

    name: str
    bits: int
    kind: Kind
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    specials: Specials = Specials.NONE
    table: tuple[float, ...] = ()
    fraction_bits: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= MAX_BITS:
            raise QBertError(f"format {self.name}: {self.bits!r} bits; allowed: 1 to {MAX_BITS}")
        if self.kind is Kind.TABLE:
            _check_table(self.name, self.table, self.codes)
        if self.kind is Kind.FLOAT and (self.exponent_bits < 1 or self.mantissa_bits < 0):
            raise QBertError(
                f"format {self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits; allowed: at "
                "least 1 and 0"
            )

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def qmin(self) -> int:
        """Smallest code of an integer format (two's complement)."""
        self._require(Kind.INTEGER, "qmin")
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code of an integer format; symmetric quantization uses -qmax ... qmax."""
        self._require(Kind.INTEGER, "qmax")
        return (1 << (self.bits - 1)) - 1

    @functools.cached_property
    def values(self) -> tuple[float, ...]:
        """Value of every code 0, 1, ...; NaN and infinity where the format has them."""
        if self.kind is Kind.INTEGER:
            half, unit = self.codes // 2, 2.0**-self.fraction_bits
            return tuple(unit * (code - self.codes if code >= half else code) for code in range(self.codes))
        if self.kind is Kind.FLOAT:
            return tuple(self._decode_float(code) for code in range(self.codes))
        if self.kind is Kind.TABLE:
            return self.table
        raise QBertError(f"format {self.name}: a dictionary format has no values of its own; each matrix learns them")

    @functools.cached_property
    def finite_values(self) -> tuple[float, ...]:
        """The distinct finite values, ascending (+0 and -0 are one)."""
        return tuple(sorted({value for value in self.values if abs(value) != float("inf") and value == value}))

    @property
    def max(self) -> float:
        """Largest finite magnitude."""
        return max(abs(value) for value in self.finite_values)

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): OCP MX v1.0 calls it emax_elem."""
        return math.frexp(self.max)[1] - 1

    def _decode_float(self, code: int) -> float:
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        sign = -1.0 if code >> (self.mantissa_bits + self.exponent_bits) else 1.0
        top = (1 << self.exponent_bits) - 1
        if self.specials is Specials.IEEE and exponent == top:
            return sign * float("inf") if mantissa == 0 else float("nan")
        if self.specials is Specials.NAN_ONLY and exponent == top and mantissa == (1 << self.mantissa_bits) - 1:
            return float("nan")
        if exponent == 0:  # subnormal: no hidden one
            return sign * mantissa * 2.0 ** (1 - self.bias - self.mantissa_bits)
        return sign * (1 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (exponent - self.bias)

    def _require(self, kind: Kind, what: str) -> None:
        if self.kind is not kind:
            raise QBertError(f"format {self.name} is a {self.kind.value} format; {what} needs a {kind.value} format")


def _check_table(name: str, table: tuple[float, ...], codes: int) -> None:
    if not 2 <= len(table) <= codes:
        raise QBertError(f"format {name}: {len(table)} values; allowed: 2 to {codes}, one for each code")
    for value in table:
        if not math.isfinite(value):
            raise QBertError(f"format {name}: value {value}; allowed: finite values")
    for low, high in itertools.pairwise(table):
        if not low < high:
            raise QBertError(f"format {name}: {low} is followed by {high}; allowed: values that ascend")


def integer(bits: int) -> Format:
    """Two's complement integer of `bits` bits."""
    return Format(f"int{bits}", bits, Kind.INTEGER)


def fixed(name: str, bits: int, fraction_bits: int) -> Format:
    """Two's complement fixed point: code * 2**-fraction_bits."""
    return Format(name, bits, Kind.INTEGER, fraction_bits=fraction_bits)


def minifloat(
    name: str, exponent_bits: int, mantissa_bits: int, specials: Specials = Specials.NONE, bias: int | None = None
) -> Format:
    """Signed float, with the IEEE bias 2**(e-1) - 1 unless another is given."""
    if bias is None:
        bias = (1 << (exponent_bits - 1)) - 1 if exponent_bits > 0 else 0
    return Format(name, 1 + exponent_bits + mantissa_bits, Kind.FLOAT, exponent_bits, mantissa_bits, bias, specials)


def table(name: str, values: Sequence[float]) -> Format:
    """Any list of 2 to 256 finite, ascending values; code i is the i-th."""
    values = tuple(float(value) for value in values)
    return Format(name, max(1, (len(values) - 1).bit_length()), Kind.TABLE, table=values)


def posit(name: str, bits: int, exponent_bits: int = 2) -> Format:
    """Posits as a table, without NaR (Gustafson and Yonemoto, 2017; the standard of 2022 has two exponent bits).

    A posit's bits, read as two's complement, ascend with its value: code i is the posit of the bits i + 1 - 2**(bits - 1).
    """
    if not 2 <= bits <= MAX_BITS or exponent_bits < 0:
        raise QBertError(
            f"format {name}: posit of {bits} and {exponent_bits} bits; allowed: 2 to {MAX_BITS}, at least 0"
        )
    positive = [_posit_value(code, bits, exponent_bits) for code in range(1, 1 << (bits - 1))]
    return table(name, [*(-value for value in reversed(positive)), 0.0, *positive])


def _posit_value(code: int, bits: int, exponent_bits: int) -> float:
    """Value of a positive posit: a run of equal bits (the regime), its end, exponent bits, fraction."""
    text = f"{code:0{bits - 1}b}"
    run = len(text) - len(text.lstrip(text[0]))
    regime = run - 1 if text[0] == "1" else -run
    rest = text[run + 1 :]
    exponent = int(rest[:exponent_bits].ljust(exponent_bits, "0") or "0", 2)
    fraction = rest[exponent_bits:]
    mantissa = 1 + int(fraction or "0", 2) / (1 << len(fraction))
    return float(mantissa * 2.0 ** (regime * (1 << exponent_bits) + exponent))


def logarithmic(name: str, bits: int, fraction_bits: int = 0) -> Format:
    """Zero and plus or minus 2**(-i / 2**fraction_bits) for i = 0 ... 2**(bits-1) - 2 (Miyashita et al., 2016)."""
    if not 2 <= bits <= MAX_BITS or fraction_bits < 0:
        raise QBertError(f"format {name}: {bits} and {fraction_bits} bits; allowed: 2 to {MAX_BITS}, at least 0")
    largest = (1 << (bits - 1)) - 2
    positive = [2.0 ** (-i / (1 << fraction_bits)) for i in range(largest, -1, -1)]
    return table(name, [*(-value for value in reversed(positive)), 0.0, *positive])


def dictionary(bits: int) -> Format:
    """2**bits values learned from each matrix (GOBO, Zadeh et al., MICRO 2020)."""
    return Format(f"dict{bits}", bits, Kind.DICTIONARY)


INT8, INT7, INT6, INT5, INT4, INT3, INT2 = (integer(bits) for bits in range(8, 1, -1))
# OCP MX v1.0, section 5.3.4: two's complement with an implied scale of 2**-6.
INT8_MX = fixed("int8_mx", 8, 6)
FLOAT8_E4M3FN = minifloat("float8_e4m3fn", 4, 3, Specials.NAN_ONLY)
FLOAT8_E5M2 = minifloat("float8_e5m2", 5, 2, Specials.IEEE)
FLOAT6_E2M3FN = minifloat("float6_e2m3fn", 2, 3, Specials.NONE)
FLOAT6_E3M2FN = minifloat("float6_e3m2fn", 3, 2, Specials.NONE)
FLOAT4_E2M1FN = minifloat("float4_e2m1fn", 2, 1, Specials.NONE)
# NF4: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et al., QLoRA, 2023, appendix E).
NF4 = Format(
    "nf4",
    4,
    Kind.TABLE,
    table=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
DICT3, DICT4 = dictionary(3), dictionary(4)

POSIT8, POSIT6 = posit("posit8", 8), posit("posit6", 6, 1)
LOG4 = logarithmic("log4", 4)

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        INT8, INT7, INT6, INT5, INT4, INT3, INT2, INT8_MX, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT6_E2M3FN, FLOAT6_E3M2FN,
        FLOAT4_E2M1FN, NF4, POSIT8, POSIT6, LOG4, DICT3, DICT4,
    )
}  # fmt: skip
# Names that people also use for elements -> ours.
ELEMENT_ALIASES = {
    "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp6_e2m3": "float6_e2m3fn", "fp6_e3m2": "float6_e3m2fn",
    "fp4_e2m1": "float4_e2m1fn",
}  # fmt: skip


def get_element(name: str) -> Format:
    """The element format of that name or alias; ``dictN`` for N = 1 ... 8 learns 2**N values.

    Raises:
        QBertError: there is none.
    """
    found = FORMATS.get(ELEMENT_ALIASES.get(name, name))
    if found is None and name.startswith("dict") and name[4:] in map(str, range(1, MAX_BITS + 1)):
        found = dictionary(int(name[4:]))
    if found is None:
        known = (*ELEMENT_ALIASES, *(each for each in FORMATS if each not in ELEMENT_ALIASES.values()))
        raise QBertError(f"element {name!r}; allowed: {', '.join(known)}")
    return found
