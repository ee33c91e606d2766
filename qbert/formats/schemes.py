"""Quantization schemes as data: what kernels compute with. Every number stands here once, everything else is derived.

A `Granularity` says how many elements share a scale, and a `Scheme` puts it together with element formats into what a user
names: ``"w8a8"``, ``"gobo3"``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from qbert.errors import QBertError
from qbert.formats.blocks import BlockFormat
from qbert.formats.elements import DICT3, DICT4, FORMATS, INT4, INT8, Format, Kind
from qbert.formats.named import get_format


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
    def keeps_outliers(self) -> bool:
        """Whether some weights are kept exactly, beside their codes."""
        return self.has_dictionary

    @property
    def weight_bits(self) -> int:
        """Bits of one weight code, without scales and outliers."""
        return self.weight.bits

    @property
    def activation_bits(self) -> int | None:
        """Bits of one activation, or None where activations stay float."""
        return self.activation.bits if self.activation else None


@dataclass(frozen=True)
class EmulatedScheme(Scheme):
    """A weight in any block format, computed with in float: no kernel reads it. It stands in no table; a file spells it out.

    Attributes:
        weights: how the weight is stored.
        activations: how a linear's input is rounded, or None to leave it float.
    """

    weights: BlockFormat
    activations: BlockFormat | None

    def __hash__(self) -> int:  # defined anew: a dataclass replaces what it inherits
        return hash(self.name)

    @property
    def keeps_outliers(self) -> bool:
        """Whether some weights are kept exactly."""
        return self.weights.keeps_outliers


def emulated_scheme(weights: BlockFormat, activations: BlockFormat | None = None) -> EmulatedScheme:
    """The scheme of weights in one format under activations in another.

    Raises:
        QBertError: a format that is not for activations.
    """
    check_activations(activations)
    name = f"{weights.name}/{activations.name if activations else 'float'}"
    roles = frozenset({Role.LINEAR, Role.EMBEDDING})
    return EmulatedScheme(name, weights.element, PerRow(), None, roles, "emulated in float", weights, activations)


def check_activations(fmt: BlockFormat | None) -> None:
    """Raises QBertError for a format that is not for activations."""
    problem = fmt.obstacle_for_activations() if fmt else None
    if fmt and problem:
        raise QBertError(f"activations {fmt.name}: {problem}; allowed: one scale a token, blocks of one row, or none")


def native_scheme(scheme: EmulatedScheme) -> str | None:
    """The scheme whose kernels compute the same; None where there is none."""
    for native, (weights, activations) in _NATIVE.items():
        if (scheme.weights, scheme.activations) == (get_format(weights), activations and get_format(activations)):
            return native
    return None


# Scheme -> the names of the formats that it stores weights in and rounds activations to.
_NATIVE: dict[str, tuple[str, str | None]] = {
    "w8a8": ("int8", "int8"), "w8a16": ("int8", None), "w4a16": ("int4-g64", None), "w4a16-g32": ("int4-g32", None),
    "w4a16-g128": ("int4-g128", None), "gobo3": ("gobo3", None), "gobo4": ("gobo4", None),
}  # fmt: skip

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
    if isinstance(embedding, EmulatedScheme):
        return embedding
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
