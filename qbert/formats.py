"""Number formats and quantization schemes as data: every number stands here once, everything else is derived.

A `Format` says what the bits of one element mean, a `Granularity` how many elements share a scale, and a `Scheme` puts
both together into what a user names: ``"w8a8"``, ``"gobo3"``. Element formats take the names that ml_dtypes gives them.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

from qbert.errors import QBertError


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
        table: values of codes 0 ... 2**bits - 1, of table formats only.
    """

    name: str
    bits: int
    kind: Kind
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    specials: Specials = Specials.NONE
    table: tuple[float, ...] = ()

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
        """Value of every code 0 ... 2**bits - 1; NaN and infinity where the format has them."""
        if self.kind is Kind.INTEGER:
            half = self.codes // 2
            return tuple(float(code - self.codes if code >= half else code) for code in range(self.codes))
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


def integer(bits: int) -> Format:
    """Two's complement integer of `bits` bits."""
    return Format(f"int{bits}", bits, Kind.INTEGER)


def minifloat(name: str, exponent_bits: int, mantissa_bits: int, specials: Specials) -> Format:
    """Signed float with the IEEE bias 2**(e-1) - 1."""
    bias = (1 << (exponent_bits - 1)) - 1
    return Format(name, 1 + exponent_bits + mantissa_bits, Kind.FLOAT, exponent_bits, mantissa_bits, bias, specials)


def dictionary(bits: int) -> Format:
    """2**bits values learned from each matrix (GOBO, Zadeh et al., MICRO 2020)."""
    return Format(f"dict{bits}", bits, Kind.DICTIONARY)


INT8, INT4, INT3, INT2 = integer(8), integer(4), integer(3), integer(2)
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

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        INT8, INT4, INT3, INT2, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT6_E2M3FN, FLOAT6_E3M2FN, FLOAT4_E2M1FN, NF4, DICT3, DICT4,
    )
}  # fmt: skip


@dataclass(frozen=True)
class PerRow:
    """One scale for each row (output channel) of a weight."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` neighbours along a row."""

    size: int


@dataclass(frozen=True)
class PerTensor:
    """One scale, or one dictionary, for the whole matrix."""


Granularity = PerRow | PerGroup | PerTensor

GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64


class Role(enum.Enum):
    """What a scheme can be applied to."""

    LINEAR = "linear"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored and computed with.

    Attributes:
        name: what users type.
        weight: format of the weight codes.
        granularity: what shares a scale.
        activation: format of the activations, or None where they stay float.
        roles: what it can be applied to.
        summary: one line for people.
    """

    name: str
    weight: Format
    granularity: Granularity
    activation: Format | None
    roles: frozenset[Role]
    summary: str

    def __hash__(self) -> int:  # a dataclass's own walks through the formats' tables, and schemes are keys of caches
        return hash(self.name)

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale along a row, or None."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    @property
    def is_variant(self) -> bool:
        """Whether it is another one at a group size that is not the default: comparisons leave it out."""
        return self.group_size not in (None, DEFAULT_GROUP_SIZE)

    @property
    def has_dictionary(self) -> bool:
        """Whether codes are indices into a learned dictionary, with outliers kept apart."""
        return self.weight.kind is Kind.DICTIONARY

    @property
    def weight_bits(self) -> int:
        """Bits of one weight code, without scales and outliers."""
        return self.weight.bits

    @property
    def activation_bits(self) -> int | None:
        """Bits of one activation, or None where activations stay float."""
        return self.activation.bits if self.activation else None


_LINEAR, _EMBEDDING = frozenset({Role.LINEAR}), frozenset({Role.EMBEDDING})
# The largest group scale such that code * scale still fits int8: the integer sums then stay exact over the whole row.
W4A8_GROUP_SCALE_MAX = INT8.qmax // INT4.qmax


# Names that people also use -> the one that stands in files.
SCHEME_ALIASES: dict[str, str] = {}


def _grouped(name: str, activation: Format | None, roles: frozenset[Role], summary: str) -> list[Scheme]:
    """The scheme at every group size; that of the default size has the bare name, and the spelled-out one as an alias."""
    SCHEME_ALIASES[f"{name}-g{DEFAULT_GROUP_SIZE}"] = name
    return [
        Scheme(
            name if size == DEFAULT_GROUP_SIZE else f"{name}-g{size}", INT4, PerGroup(size), activation, roles,
            f"{summary}, groups of {size}",
        )
        for size in (DEFAULT_GROUP_SIZE, *(size for size in GROUP_SIZES if size != DEFAULT_GROUP_SIZE))
    ]  # fmt: skip


SCHEMES: dict[str, Scheme] = {
    each.name: each
    for each in (
        Scheme("w8a8", INT8, PerRow(), INT8, _LINEAR, "int8 weights per row, int8 activations per token"),
        Scheme("w8a16", INT8, PerRow(), None, _LINEAR, "int8 weights per row, float activations"),
        *_grouped("w4a8", INT8, _LINEAR, "int4 weights, integer group scales inside a row scale, int8 activations"),
        *_grouped("w4a16", None, _LINEAR, "int4 weights, float activations"),
        Scheme("gobo3", DICT3, PerTensor(), None, _LINEAR | _EMBEDDING, "GOBO: 8-entry dictionary, exact outliers"),
        Scheme("gobo4", DICT4, PerTensor(), None, _LINEAR | _EMBEDDING, "GOBO: 16-entry dictionary, exact outliers"),
        Scheme("gobo3a8", DICT3, PerTensor(), INT8, _LINEAR, "gobo3 with int8 centroids and int8 activations"),
        Scheme("gobo4a8", DICT4, PerTensor(), INT8, _LINEAR, "gobo4 with int8 centroids and int8 activations"),
        Scheme("w8", INT8, PerRow(), None, _EMBEDDING, "int8 table, one scale per row"),
        *_grouped("w4", None, _EMBEDDING, "int4 table"),
    )
}


def add_scheme(scheme: Scheme) -> Scheme:
    """Makes a scheme known under its name, with its format, to everything that takes a scheme's name in this process.

    Raises:
        QBertError: the name, or that of its weight's format, stands for something else already, or nothing computes it.
    """
    problem = _problem_of(scheme)
    if problem is not None:
        raise QBertError(f"scheme {scheme.name!r}: {problem}")
    known: dict[str, tuple[object, object]] = {
        "scheme": (SCHEMES.get(SCHEME_ALIASES.get(scheme.name, scheme.name)), scheme),
        "format": (FORMATS.get(scheme.weight.name), scheme.weight),
    }
    for kind, (there, new) in known.items():
        if there is not None and there != new:
            raise QBertError(f"{kind} {getattr(new, 'name', '')!r} is known already and another one: {there}")
    FORMATS[scheme.weight.name] = scheme.weight
    SCHEMES[scheme.name] = scheme
    return scheme


def _problem_of(scheme: Scheme) -> str | None:
    """Why nothing computes with a scheme; None where the reference does."""
    fmt, share = scheme.weight, scheme.granularity
    if scheme.name == "float":
        return "that name stands for tables that are not quantized"
    if scheme.activation not in (None, INT8):
        return f"activations are {scheme.activation.name if scheme.activation else None}; allowed: float (None) or int8"
    if fmt.kind is Kind.DICTIONARY and (not isinstance(share, PerTensor) or fmt.bits > 7):
        return "a dictionary is of the whole matrix (PerTensor) and has at most 7 bits"
    if fmt.kind is not Kind.DICTIONARY and isinstance(share, PerTensor):
        return "one scale for a whole matrix is not stored; allowed: PerRow, PerGroup"
    if isinstance(share, PerGroup):
        if share.size < 2 or share.size % 2:
            return f"groups of {share.size}; allowed: even numbers, because packed rows of k and k + 1 codes look alike"
        if scheme.activation is not None and fmt is not INT4:
            return "group scales under int8 activations are integers, made for int4 codes"
    if scheme.activation is not None and fmt.kind not in (Kind.INTEGER, Kind.DICTIONARY):
        return f"{fmt.name} codes are no int8 operand; allowed with int8 activations: integers, dictionaries"
    return None


def tied_linear_scheme(embedding: Scheme) -> Scheme:
    """How a linear whose weight is tied to a quantized table computes: with the table's own tensors and float activations.

    Raises:
        QBertError: no scheme for linears stores a weight so.
    """
    alike = (embedding.weight, embedding.granularity, None)
    for scheme in SCHEMES.values():
        if Role.LINEAR in scheme.roles and (scheme.weight, scheme.granularity, scheme.activation) == alike:
            return scheme
    raise QBertError(f"no scheme for linears stores its weight as {embedding.name} does")


def scheme_names(role: Role) -> list[str]:
    """Names of the schemes that can be applied to `role`."""
    return [name for name, scheme in SCHEMES.items() if role in scheme.roles]


def get_scheme(name: str, role: Role) -> Scheme:
    """The scheme of that name or alias: w4a8-g64 is w4a8.

    Raises:
        QBertError: unknown name, or a scheme that cannot be applied to `role`.
    """
    scheme = SCHEMES.get(SCHEME_ALIASES.get(name, name))
    if scheme is None or role not in scheme.roles:
        problem = "unknown scheme" if scheme is None else f"scheme is not for {role.value}s:"
        raise QBertError(f"{problem} {name!r}; allowed for {role.value}s: {', '.join(scheme_names(role))}")
    return scheme
