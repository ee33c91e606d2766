"""The approximations of activations keep what they promise; tools/fit_gelu.py measures them."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

FIT = runpy.run_path(str(Path(__file__).parents[1] / "tools/fit_gelu.py"))


def test_promises_hold_on_a_sample():
    assert FIT["broken"](step=10_007) == []


@pytest.mark.slow
def test_promises_hold_for_every_float32():
    assert FIT["broken"](step=1) == []


def test_the_fits_in_use_are_near_the_best():
    for name, form, below, times in (
        ("gpu", FIT["GPU"], (1.0,), 4),
        ("cpu", FIT["CPU"], FIT["cpu_coefficients"]()[1], 4),
        ("2**r", FIT["EXP2"], (1.0,), 10),  # of float32 coefficients: half a unit in the last place is 6e-8
    ):
        best = float(FIT["minimax"](form, below)[2])
        assert best < FIT["fit_errors"]()[name] < times * best


def test_another_fit_in_one_place_is_found(monkeypatch):
    """One coefficient off by a unit in its last place; and one off by so much that results are wrong."""
    found = FIT["in_use"]()
    first, *rest = found
    for factor, wrong in ((1 + 2e-7, "one fit in"), (1.001, "gpu (fit, exact arithmetic) within")):
        changed = (found[first][0] * factor, *found[first][1:])
        monkeypatch.setitem(
            FIT["broken"].__globals__, "in_use", lambda of=changed: {first: of, rest[0]: found[rest[0]]}
        )
        assert any(each.startswith(wrong) for each in FIT["broken"](step=1_000_003))


def test_another_logistic_function_in_one_place_is_found(monkeypatch):
    """A constant that is not its best float32, in one file or in both."""
    found = FIT["logistic_constants"]()
    (first, one), (second, other) = found.items()
    off = replace(one, tanh=(one.tanh[0] * (1 + 2e-7), one.tanh[1]))
    for constants in ({first: off, second: other}, {first: off, second: off}):
        monkeypatch.setitem(FIT["broken"].__globals__, "logistic_constants", lambda of=constants: of)
        assert any(each.startswith(first) for each in FIT["broken"](step=1_000_003))
        assert ("one logistic function" in " ".join(FIT["broken"](step=1_000_003))) == (constants[second] is other)
