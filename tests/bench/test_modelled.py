"""The model beside stored measurements: which rows it finds, and that it is near them."""

from __future__ import annotations

from statistics import mean

import pytest

from benchmarks import modelled
from benchmarks.results_schema import BertRow
from qbert.cost import load_hardware


@pytest.mark.parametrize("name", ["amx", "zen4"])
def test_fused_w8a8_is_within_a_quarter(name: str) -> None:
    """Of most cases that are stored; a case in a run that was twice as slow as another run of it cannot be of both."""
    rows = modelled.beside(load_hardware(name))
    assert {row.system for row in rows} == set(modelled.SYSTEMS)
    errors = [abs(row.error) for row in rows if row.model == "base"]
    assert len(errors) >= 12
    assert mean(errors) <= 0.2
    assert sum(error <= modelled.GOAL for error in errors) >= 0.75 * len(errors)


def test_every_stored_case_of_the_vnni_machine_is_within_a_quarter() -> None:
    """Families and lengths among them that nothing was fitted to."""
    rows = modelled.beside(load_hardware("vnni"))
    assert {"base", "mpnet-base", "modernbert-base", "albert-base"} <= {row.model for row in rows}
    assert max(abs(row.error) for row in rows) <= modelled.GOAL


def test_nothing_is_stored_for_a_chip_that_is_not_here() -> None:
    assert modelled.beside(load_hardware("gobo")) == []


def test_a_ragged_batch_has_its_tokens() -> None:
    row = BertRow.model_construct(tokens=815, batch=32)
    lengths = modelled.lengths_of(row)
    assert (len(lengths), sum(lengths), max(lengths) - min(lengths)) == (32, 815, 1)


def test_fewer_threads_are_fewer_units() -> None:
    zen4 = load_hardware("zen4")
    work, formats = modelled.work_of("tiny"), modelled.w8a8(static=True)
    one, two = (modelled.encoder_cost(work, target, formats, batch=8, seq=128) for target in (zen4.of_units(1), zen4))
    assert 1.5 < one.ms / two.ms <= 2.0 or one.bound != "compute"
