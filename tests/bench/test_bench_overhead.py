"""What Python costs a fused encoder: figures of a narrow one beside those of a real shape, and the tables of both."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import bench_overhead
from benchmarks.bench_overhead import Overhead, forward_us, kinds, measure, steps_us
from benchmarks.problems import Shape

NARROW, WIDER = Shape(2, 64, 2, 128, 50), Shape(2, 128, 4, 256, 50)


@pytest.fixture(scope="module", params=bench_overhead.SCALES)
def found(request: pytest.FixtureRequest) -> Overhead:
    return measure(request.param, 2, shape=WIDER, narrow=NARROW, repeats=3, narrow_repeats=3)


def test_both_encoders_run_fused_and_are_timed(found: Overhead) -> None:
    for result in (found.narrow, found.awake, *found.real):
        (program,) = result.programs
        assert program.scales == found.scales
        assert steps_us(program.steps) > 0
        assert forward_us(result) == pytest.approx(steps_us(program.steps) + 1e3 * (program.rest_ms or 0))
    assert [(result.batch, result.seq) for result in found.real] == list(bench_overhead.BATCHES)
    assert (found.narrow.batch, found.narrow.seq) == bench_overhead.NARROW_BATCH
    assert (found.narrow.environment.threads, found.awake.environment.threads) == (1, 2)
    assert found.python_us == forward_us(found.narrow)
    assert {
        len(steps) for name, steps in kinds(found.real[0]).items() if not name.startswith(("words", "overflow"))
    } == {2}


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    measure("dynamic", 1, shape=NARROW, narrow=NARROW, repeats=1, narrow_repeats=1)
    assert torch.get_num_threads() == before


def test_the_command_prints_three_kinds_of_tables(
    found: Overhead, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_overhead, "measure", lambda scales, threads: dataclasses.replace(found, scales=scales))
    bench_overhead.main(threads=1)
    text = capsys.readouterr().out
    for word in ("us a step", "us a layer", "query, key, value", "outside of steps", "launches", "1 x 16", "2 x 16"):
        assert word in text
    bench_overhead.main(threads=1, steps=False)
    assert "query, key, value" not in capsys.readouterr().out
