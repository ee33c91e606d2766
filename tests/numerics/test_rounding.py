"""Elements: codes and values of every format and rounding, against ml_dtypes and against the definitions."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from qbert import formats
from qbert.formats import FORMATS, Kind, block_format, minifloat, usable_codes
from qbert.numerics import encode, round_activations, round_units, values_of

ELEMENTS = [name for name, fmt in FORMATS.items() if fmt.kind is not Kind.DICTIONARY]
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic:3")
OWN = {
    "f5": minifloat("f5", 2, 2),
    "e4m0": minifloat("e4m0", 4, 0),
    "ternary": formats.table("ternary", (-1, 0, 1)),
    "log5": formats.logarithmic("log5", 5, 1),
    "posit8_0": formats.posit("posit8_0", 8, 0),
}


def plain(element, **policies):
    return block_format("plain", element, "none", **policies)


def probes(fmt):
    """Every value, every middle, their neighbours in float32, what lies beyond, and the rest of the line."""
    values = np.array([fmt.element.values[code] for code in usable_codes(fmt)], dtype=np.float64)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, values * 1.5, [0.0, -0.0]]).astype(np.float32)
    around = [np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf)]
    random = np.random.default_rng(0).normal(scale=fmt.element.max / 3, size=4096).astype(np.float32)
    return torch.from_numpy(np.concatenate([points, *around, random]))[None]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("element", [*map(FORMATS.get, ELEMENTS), *OWN.values()], ids=lambda each: each.name)
def test_values_and_codes_agree(element, rounding):
    """The fast way to values takes the same decisions as the table of codes, bit for bit."""
    fmt = plain(element, rounding=rounding)
    x = probes(fmt)
    codes = encode(x, fmt)
    assert torch.equal(round_units(x, fmt), values_of(codes, fmt))
    assert set(codes.unique().tolist()) <= set(usable_codes(fmt))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"])
def test_nearest_even_is_ml_dtypes(name):
    """Below the largest value; beyond it the formats are saturated, as OCP MX asks for."""
    fmt = plain(name)
    x = probes(fmt)
    inside = x.clamp(-fmt.element.max, fmt.element.max)
    theirs = inside.numpy().astype(getattr(ml_dtypes, name)).astype(np.float32)
    assert np.array_equal(round_units(x, fmt).numpy(), theirs)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_half_to_even_and_stay_symmetric(bits):
    fmt = plain(formats.integer(bits))
    limit = fmt.element.qmax
    x = torch.arange(-4 * limit, 4 * limit + 1)[None] / 2
    assert torch.equal(round_units(x, fmt), x.round().clamp(-limit, limit))


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("element", [*map(FORMATS.get, ELEMENTS), *OWN.values()], ids=lambda each: each.name)
def test_roundings_are_what_they_are_called(element, rounding):
    """Against the definition, number by number, in Python's exact fractions."""
    fmt = plain(element, rounding=rounding)
    codes = usable_codes(fmt)
    values = [float(np.float32(element.values[code])) for code in codes]
    x = probes(fmt)[0][:: max(1, len(codes) // 16)]
    for number, found in zip(x.tolist(), round_units(x[None], fmt)[0].tolist(), strict=True):
        high = next((i for i, value in enumerate(values) if value >= number), len(values) - 1)
        low = max(0, high - 1)
        if values[high] <= number or number <= values[low]:
            expected = values[high] if values[high] <= number else values[low]
        elif rounding == "toward_zero":
            expected = values[low] if number > 0 else values[high]
        else:
            below, above = number - values[low], values[high] - number
            tie = high if (number > 0 if rounding == "nearest_away" else codes[high] % 2 == 0) else low
            expected = values[tie] if below == above else values[low] if below < above else values[high]
        assert found == expected, (number, values[low], values[high])


def test_stochastic_rounding_is_unbiased_and_the_same_in_every_batch():
    fmt = plain("int8", rounding="stochastic:1")
    x = torch.full((64, 1024), 3.25) + torch.rand(64, 1024, generator=torch.Generator().manual_seed(0)) * 1e-3
    rounded = round_units(x, fmt)
    assert set(rounded.unique().tolist()) == {3.0, 4.0}
    assert abs(float(rounded.mean()) - 3.25) < 0.01
    assert torch.equal(round_units(x[5:7], fmt), rounded[5:7])
    assert not torch.equal(round_units(x, plain("int8", rounding="stochastic:2")), rounded)


def test_posits_are_the_standards():
    """Values of posit8 (es 2) that the 2022 standard and SoftPosit agree on, and the rules that make the others."""
    values = dict(zip(range(1, 128), FORMATS["posit8"].table[128:], strict=True))
    assert {code: values[code] for code in (0b01000000, 0b01000001, 0b01111111, 0b00000001, 0b00110000, 0b01010000)} == {
        0b01000000: 1.0, 0b01000001: 1.125, 0b01111111: 2.0**24, 0b00000001: 2.0**-24, 0b00110000: 0.25, 0b01010000: 4.0,
    }  # fmt: skip
    for code in range(1, 64):  # the reciprocal of a power of two is the two's complement within the positive half
        if math.log2(values[code]) == int(math.log2(values[code])):
            assert values[128 - code] == 1 / values[code]


def test_logarithms_are_powers():
    positive = [value for value in OWN["log5"].table if value > 0]
    assert all(high / low == pytest.approx(math.sqrt(2)) for low, high in itertools.pairwise(positive))
    assert FORMATS["log4"].table[-3:] == (0.25, 0.5, 1.0)


@pytest.mark.parametrize("name", [*(n for n, f in formats.NAMED.items() if not f.is_learned), "plain"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_in_its_token_and_is_never_one(name, bad):
    fmt = plain("fp4_e2m1") if name == "plain" else formats.get_format(name)
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    clean = round_activations(x, fmt)
    x[1, 40] = bad
    rounded = round_activations(x, fmt)
    assert rounded[1, 40].isnan()
    assert torch.equal(rounded[[0, 2]], clean[[0, 2]])
