"""GELU's approximations keep what they promise; tools/fit_gelu.py measures them."""

import runpy
from pathlib import Path

import pytest

FIT = runpy.run_path(str(Path(__file__).parents[1] / "tools/fit_gelu.py"))


def test_promises_hold_on_a_sample():
    assert FIT["broken"](step=10_007) == []


@pytest.mark.slow
def test_promises_hold_for_every_float32():
    assert FIT["broken"](step=1) == []


def test_the_fits_in_use_are_near_the_best():
    for name, form, below in (("gpu", FIT["GPU"], (1.0,)), ("cpu", FIT["CPU"], FIT["cpu_coefficients"]()[1])):
        best = float(FIT["minimax"](form, below)[2])
        assert best < FIT["fit_errors"]()[name] < 4 * best


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
