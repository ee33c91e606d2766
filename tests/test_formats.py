"""Formats and schemes: every number in the tables against an independent source."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from qbert import formats
from qbert.errors import QBertError
from qbert.formats import (
    DEFAULT_GROUP_SIZE,
    FORMATS,
    GROUP_SIZES,
    NF4,
    SCHEME_ALIASES,
    SCHEMES,
    Kind,
    Role,
)

FLOAT_NAMES = ["float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"]
PAIRS_OF_ROLE_AND_SCHEME = [(role, name) for name, scheme in SCHEMES.items() for role in sorted(scheme.roles, key=str)]


def _bits(values: object) -> np.ndarray:
    """float64 bit patterns with every NaN made the same, so that -0.0 differs from 0.0 and NaN equals NaN."""
    array = np.array(values, dtype=np.float64)
    array[np.isnan(array)] = np.nan
    return array.view(np.uint64)


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_float_code_table_equals_ml_dtypes(name: str) -> None:
    fmt = FORMATS[name]
    codes = np.arange(fmt.codes, dtype=np.uint8)
    theirs = codes.view(getattr(ml_dtypes, name)).astype(np.float64)
    np.testing.assert_array_equal(_bits(fmt.values), _bits(theirs))


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_float_limits_equal_ml_dtypes(name: str) -> None:
    theirs = ml_dtypes.finfo(getattr(ml_dtypes, name))
    fmt = FORMATS[name]
    assert fmt.bits == theirs.bits
    assert fmt.max == float(theirs.max)
    smallest = min(value for value in fmt.finite_values if value > 0)
    assert smallest == float(theirs.smallest_subnormal)


@pytest.mark.parametrize(
    ("name", "finite", "nans", "infinities"),
    [
        ("float8_e4m3fn", 253, 2, 0),
        ("float8_e5m2", 247, 6, 2),
        ("float6_e2m3fn", 63, 0, 0),
        ("float6_e3m2fn", 63, 0, 0),
        ("float4_e2m1fn", 15, 0, 0),
    ],
)
def test_float_special_codes_are_counted(name: str, finite: int, nans: int, infinities: int) -> None:
    """Both zeros are one finite value: finite + 1 + nans + infinities is the number of codes."""
    fmt = FORMATS[name]
    assert len(fmt.finite_values) == finite
    assert sum(map(math.isnan, fmt.values)) == nans
    assert sum(map(math.isinf, fmt.values)) == infinities
    assert finite + 1 + nans + infinities == fmt.codes == len(fmt.values)


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_finite_values_ascend_and_mirror(name: str) -> None:
    values = FORMATS[name].finite_values
    assert all(low < high for low, high in itertools.pairwise(values))
    assert values == tuple(-value for value in reversed(values))


@pytest.mark.parametrize(("name", "dtype"), [("int8", np.int8), ("int4", ml_dtypes.int4), ("int2", ml_dtypes.int2)])
def test_integer_range_equals_ml_dtypes(name: str, dtype: type) -> None:
    fmt, theirs = FORMATS[name], ml_dtypes.iinfo(dtype)
    assert (fmt.qmin, fmt.qmax, fmt.bits) == (theirs.min, theirs.max, theirs.bits)
    assert sorted(fmt.values) == [float(value) for value in range(theirs.min, theirs.max + 1)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8])
def test_integer_codes_are_twos_complement(bits: int) -> None:
    values = formats.integer(bits).values
    assert [int(value) & ((1 << bits) - 1) for value in values] == list(range(1 << bits))
    assert values[-1] == -1.0


def test_nf4_is_the_qlora_construction() -> None:
    """Quantiles of the normal distribution: 8 up from the middle, 7 down, an exact zero, scaled to [-1, 1].

    QLoRA's `create_normal_map`: its offset is the mean of 1 - 1/30 and 1 - 1/32, rounded.
    """
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-NormalDist().inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    assert len(NF4.table) == NF4.codes
    assert NF4.table[7] == 0.0
    np.testing.assert_allclose(NF4.table, expected, rtol=0, atol=1e-6)


def test_dictionary_has_no_values_of_its_own() -> None:
    with pytest.raises(QBertError, match="dict3: a dictionary format has no values of its own"):
        _ = FORMATS["dict3"].values
    assert (FORMATS["dict3"].codes, FORMATS["dict4"].codes) == (8, 16)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.kind is not Kind.INTEGER])
@pytest.mark.parametrize("limit", ["qmin", "qmax"])
def test_integer_limits_of_other_formats_are_an_error(name: str, limit: str) -> None:
    with pytest.raises(QBertError, match=f"format {name} is a .* format; {limit} needs a integer format"):
        getattr(FORMATS[name], limit)


def test_a_format_is_a_value() -> None:
    """Formats and schemes are compared and hashed by value, and nobody can edit the table's entries."""
    assert formats.integer(4) == FORMATS["int4"]
    assert hash(formats.integer(4)) == hash(FORMATS["int4"])
    assert replace(FORMATS["int4"], bits=5) != FORMATS["int4"]
    with pytest.raises(AttributeError):
        FORMATS["int4"].bits = 5  # type: ignore[misc]


def test_names_are_keys() -> None:
    assert all(fmt.name == name for name, fmt in FORMATS.items())
    assert all(scheme.name == name for name, scheme in SCHEMES.items())
    assert all(scheme.weight in FORMATS.values() for scheme in SCHEMES.values())


@pytest.mark.parametrize(("role", "name"), PAIRS_OF_ROLE_AND_SCHEME, ids=lambda value: getattr(value, "value", value))
def test_every_scheme_is_found_for_its_roles(role: Role, name: str) -> None:
    assert formats.get_scheme(name, role) is SCHEMES[name]
    assert name in formats.scheme_names(role)


@pytest.mark.parametrize("family", ["w4a8", "w4a16", "w4"])
def test_group_sizes_and_their_spellings(family: str) -> None:
    role = Role.EMBEDDING if family == "w4" else Role.LINEAR
    sizes = {formats.get_scheme(f"{family}-g{size}", role).group_size for size in GROUP_SIZES}
    assert sizes == set(GROUP_SIZES)
    assert formats.get_scheme(f"{family}-g{DEFAULT_GROUP_SIZE}", role) is formats.get_scheme(family, role)
    assert formats.get_scheme(family, role).group_size == DEFAULT_GROUP_SIZE
    assert f"{family}-g{DEFAULT_GROUP_SIZE}" not in SCHEMES  # one scheme, one name in a file


def test_a_name_of_ones_own_may_end_in_a_group_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases are a table, no rule about endings: a scheme that somebody adds is found as it is called."""
    mine = replace(SCHEMES["w4a8"], name="mine-g64")
    monkeypatch.setitem(SCHEMES, "mine-g64", mine)
    assert formats.get_scheme("mine-g64", Role.LINEAR) is mine
    with pytest.raises(QBertError, match="unknown scheme 'mine'"):
        formats.get_scheme("mine", Role.LINEAR)
    assert set(SCHEME_ALIASES.values()) <= set(SCHEMES)
    assert not set(SCHEME_ALIASES) & set(SCHEMES)


@pytest.mark.parametrize(
    "name",
    ["", "w4a4", "W8A8", " w8a8", "w8a8-g64x", "w4a8-g16", "w4a8-g", "w4a8-g064", "-g64", None, 8, ("w8a8",)],
    ids=repr,
)
def test_unknown_scheme_is_an_error_that_lists_the_allowed(name: object) -> None:
    with pytest.raises(QBertError) as caught:
        formats.get_scheme(name, Role.LINEAR)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"unknown scheme {name!r}; allowed for linears: ")
    assert message.endswith(", ".join(formats.scheme_names(Role.LINEAR)))


@pytest.mark.parametrize(
    ("name", "role", "allowed"),
    [("w8", Role.LINEAR, "w8a8"), ("w4-g32", Role.LINEAR, "w4a8"), ("w8a8", Role.EMBEDDING, "w8")],
)
def test_scheme_of_the_other_role_is_an_error(name: str, role: Role, allowed: str) -> None:
    with pytest.raises(QBertError, match=f"scheme is not for {role.value}s: '{name}'; allowed .*{allowed}"):
        formats.get_scheme(name, role)


@pytest.mark.parametrize("name", formats.scheme_names(Role.EMBEDDING))
def test_tied_linear_reads_the_embedding_as_it_is_stored(name: str) -> None:
    """Every embedding scheme has a tied linear scheme, with the same codes and scales and float activations."""
    embedding = SCHEMES[name]
    linear = formats.tied_linear_scheme(embedding)
    assert Role.LINEAR in linear.roles
    assert (linear.weight, linear.granularity, linear.activation) == (embedding.weight, embedding.granularity, None)


def test_tied_linear_schemes_are_those_that_users_know() -> None:
    expected = {
        "w8": "w8a16",
        "w4": "w4a16",
        "w4-g32": "w4a16-g32",
        "w4-g128": "w4a16-g128",
        "gobo3": "gobo3",
        "gobo4": "gobo4",
    }
    found = {name: formats.tied_linear_scheme(SCHEMES[name]).name for name in formats.scheme_names(Role.EMBEDDING)}
    assert found == expected


def test_a_table_that_no_linear_is_stored_as_has_no_tied_scheme() -> None:
    odd = replace(SCHEMES["w8"], name="odd", weight=formats.INT2)
    with pytest.raises(QBertError, match="no scheme for linears stores its weight as odd does"):
        formats.tied_linear_scheme(odd)


def test_largest_w4a8_operand_fits_int8() -> None:
    limit = formats.W4A8_GROUP_SCALE_MAX
    assert limit * formats.INT4.qmax <= formats.INT8.qmax < (limit + 1) * formats.INT4.qmax


@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits", "group_size", "dictionary"),
    [
        ("w8a8", 8, 8, None, False),
        ("w8a16", 8, None, None, False),
        ("w4a8-g128", 4, 8, 128, False),
        ("w4a16", 4, None, 64, False),
        ("gobo3", 3, None, None, True),
        ("gobo4a8", 4, 8, None, True),
        ("w8", 8, None, None, False),
        ("w4-g32", 4, None, 32, False),
    ],
)
def test_scheme_properties(
    name: str, weight_bits: int, activation_bits: int | None, group_size: int | None, dictionary: bool
) -> None:
    scheme = SCHEMES[name]
    assert (scheme.weight_bits, scheme.activation_bits) == (weight_bits, activation_bits)
    assert (scheme.group_size, scheme.has_dictionary) == (group_size, dictionary)
