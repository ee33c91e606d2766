"""Target files: those that ship say where every figure comes from, and a wrong one is refused with all that is wrong in it."""

from __future__ import annotations

import tomllib

import pytest
from small_target import SMALL

from qbert.cost import SHIPPED, load_hardware, parse_hardware
from qbert.devices import GPUS, HARDWARE
from qbert.errors import QBertError


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_ones_are_whole(name: str) -> None:
    target = load_hardware(name)
    assert target.name == name
    assert all(len(each.source) > 5 for each in (target, target.array, target.vector, *target.rate, *target.memory))
    assert (name in GPUS) == (target.gpu is not None)


def test_those_that_were_asked_for_ship_with_energies() -> None:
    for name in ("h100", "h200", "b200", "amx", "vnni", "gobo"):
        target = load_hardware(name)
        assert target.has_energy
        assert target.assumptions  # energies of chips are not in data sheets: said, not hidden


def test_gpus_have_one_table() -> None:
    """What choosing kernels and the roofline ask is what the file says."""
    data = tomllib.loads((HARDWARE / "h100.toml").read_text())
    assert GPUS["h100"].bandwidth == data["memory"][0]["bandwidth"] == 3.35e12
    assert GPUS["h100"].peaks["int8"] == 1978.9e12
    assert GPUS["b200"].peaks["fp8"] == 4500e12  # of a rate for several operands


def test_energy_needs_every_section() -> None:
    assert not parse_hardware(SMALL).has_energy
    with_joules = SMALL.replace('source = "made up"\n[', 'joules = 1e-12\nsource = "made up"\n[').replace(
        "ops = 1e11\nsource", "ops = 1e11\njoules = 1e-12\nsource"
    )
    with_joules = with_joules.replace('joules = 1e-12\nsource = "made up"\n[array]', 'source = "made up"\n[array]')
    with_joules = with_joules.replace("8]]\njoules = 1e-12\n", "8]]\n")
    assert parse_hardware(with_joules).has_energy


def test_more_units_share_the_same_main_memory() -> None:
    one, four = parse_hardware(SMALL), parse_hardware(SMALL).of_units(4)
    assert four.rate[0].ops == 2 * one.rate[0].ops
    assert four.vector.ops == 2 * one.vector.ops
    assert four.memory == one.memory


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('ops = 1e12', "ops = -1", "rate.0.ops: Input should be greater than 0 (given: -1)"),
        ('ops = 1e12', "ops = inf", "rate.0.ops: Input should be a finite number"),
        ('source = "made up"\n[vector]', "[vector]", "memory.0.source: Field required"),
        ('weights = "bf16"', 'weights = "bf17"', "rate.0.weights: operand 'bf17'; allowed: fp32, tf32, bf16, fp16, int2"),
        ('weights = "bf16"', 'weights = "fp16"', "no rate for bf16 x bf16, which is its float"),
        ('units = 2', "units = 2\nunit = 3", "array.unit: no such entry (given: 3)"),
        ('tiles = [[8, 8, 8]]', "tiles = [[8, 0, 8]]", "array.tiles: tile [8, 0, 8]; allowed: three sides of 1 to"),
        ('tiles = [[8, 8, 8]]', "tiles = []", "array.tiles: Tuple should have at least 1 item"),
        ('tiles = [[8, 8, 8]]', 'tiles = [[8, 8, 8]]\ndataflow = "rows"', "'output', 'weight' or 'activation'"),
        ('bandwidth = 1e10\n', "", "memory DRAM has no bandwidth"),
        ('[vector]', '[[memory]]\nname = "L2"\nbytes = 1e9\nsource = "made up"\n[vector]', "memory L2 is not smaller than"),
        ('ops = 1e12', 'ops = 1e12\nblocks = ["e8m0-32"]', "block 'e8m0-32'; allowed: SCALE/COLUMNS"),
        ('ops = 1e12', 'ops = 1e12\nsustained = 1.5', "rate.0.sustained: Input should be less than or equal to 1"),
        ('name = "small"', 'name = ', "is no TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, said: str) -> None:
    assert SMALL.count(old) >= 1
    with pytest.raises(QBertError) as caught:
        parse_hardware(SMALL.replace(old, new, 1), "chip.toml")
    assert said in str(caught.value)
    assert "chip.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_problem_is_named_at_once() -> None:
    text = SMALL.replace("ops = 1e12", "ops = 0").replace("units = 2", 'units = "two"').replace("float =", "floats =")
    with pytest.raises(QBertError) as caught:
        parse_hardware(text)
    for said in ("float: Field required", "floats: no such entry", "array.units:", "rate.0.ops:"):
        assert said in str(caught.value)


def test_unknown_names_and_files() -> None:
    with pytest.raises(QBertError, match=r"target 'h900'; allowed: .*h100.*a file that ends in .toml"):
        load_hardware("h900")
    with pytest.raises(QBertError, match=r"target 'nowhere.toml' cannot be read: No such file"):
        load_hardware("nowhere.toml")
