"""The tuner without a GPU: what it would try, that only right results count, and the table that comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tune
from benchmarks.problems import LINEARS
from benchmarks.tune import Problem, Tuned, candidates, dump, merged, problems, tune_one
from qbert import tiles
from qbert.devices import GPUS
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.ops import Activation, triton
from qbert.ops.cuda import prefers_extension
from qbert.ops.kernel import problem_of
from qbert.target import Target
from qbert.tiles import TUNED, TileConfig, select_tile
from qbert.timing import Candidate, Sample, Samples
from qbert.weight.layout import FRAGMENT_LAYOUTS

H100 = Target(**GPUS["h100"].limits)
A100 = Target(**GPUS["a100"].limits)
CPU = torch.device("cpu")
BOUND = [
    "w4a8",
    "gobo3a8",
    "w8a16",
    "w4a16",
    "gobo3",
]  # schemes of which the compiled kernels have a layout of their own


@pytest.mark.parametrize(
    ("scheme", "t"),
    [("w4a16", 1), ("w4a16", 64), *((name, t) for name in ("w8a8", "gobo4a8") for t in (1, 17, 128, 4096))],
)
@pytest.mark.parametrize("target", [H100, A100], ids=["h100", "a100"])
def test_candidates_begin_with_what_runs_and_fit(scheme: str, t: int, target: Target) -> None:
    problem = Problem(scheme, t, 768, 3072)
    found = candidates(problem, target)
    assert found[0] == select_tile(problem.operation, t, 768, 3072, target)
    assert 2 <= len(found) <= tune.MOST_CANDIDATES
    assert len({tune._shape(tile) for tile in found}) == len(found)
    for tile in found[1:]:
        assert tile.block_t * tile.block_n <= 128 * 32 * tile.warps
        assert tile.road != "tma" or target.sm >= 90


def test_problems_come_in_order_of_value_and_once() -> None:
    groups = list(problems())
    flat = [problem for group in groups for problem in group]
    assert len(set(flat)) == len(flat)
    assert groups[0][0] == Problem("w8a8", 4096, *LINEARS["base"][0])
    assert {problem.operation for problem in groups[0]} == {"w8a8_linear", "w4a8_linear", "gobo_linear"}
    assert all(SCHEMES[problem.scheme].activation or problem.t <= 64 for problem in flat)
    assert {(problem.n, problem.k) for problem in flat} == {shape for shapes in LINEARS.values() for shape in shapes}


def _sample(seconds: float) -> Sample:
    return Sample.of([seconds])


def _clock(seconds: dict[str, float]) -> Any:
    def time_all(named: Mapping[str, Candidate]) -> Samples:
        for candidate in named.values():
            assert isinstance(candidate.call(), Tensor)
        return Samples({name: _sample(seconds[name]) for name in named}, {})

    return time_all


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "gobo3a8", "w8a16", "w4a16", "gobo4"])
def test_the_fastest_of_the_right_tiles_wins(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(scheme, 5, 48, 128)
    given = tune.arguments(problem, CPU)
    listed = [TileConfig("few", 16, 16 * (1 + index), 64, 4, 2) for index in range(5)]
    honest = tune.run

    def faulty(problem: Problem, tile: TileConfig, given: Any, activation: Activation = Activation.NONE) -> Tensor:
        if tile == listed[2]:
            raise RuntimeError("out of resources: shared memory\nand more")
        result = honest(problem, tile, given, activation)
        return result + 1 if tile == listed[3] or (tile == listed[4] and activation is Activation.GELU) else result

    monkeypatch.setattr(tune, "run", faulty)
    tuned = tune_one(problem, listed, given, _clock({"0": 3e-6, "1": 2e-6, "2": 1e-9, "3": 1e-9, "4": 1e-9}))
    assert tuned.winner == listed[1]
    assert [row.chosen for row in tuned.rows] == [False, True, False, False, False]
    assert tuned.rows[1].speedup == pytest.approx(1.5)
    assert "shared memory" in (tuned.rows[2].reason or "")
    for row, activation in ((tuned.rows[3], "none"), (tuned.rows[4], "gelu")):
        assert row.time is None
        assert (row.reason or "").endswith(f"activation {activation}")


def test_a_draw_keeps_what_runs_now() -> None:
    problem = Problem("w8a8", 5, 48, 128)
    listed = [TileConfig("few", 16, 16, 64, 4, 2), TileConfig("few", 16, 32, 64, 4, 2)]
    tuned = tune_one(problem, listed, tune.arguments(problem, CPU), _clock({"0": 2.01e-6, "1": 2e-6}))
    assert tuned.winner == listed[0]


def test_where_nothing_can_be_timed_nothing_changes() -> None:
    problem = Problem("w8a8", 5, 48, 128)
    listed = [TileConfig("few", 16, 16, 64, 4, 2)]
    tuned = tune_one(problem, listed, tune.arguments(problem, CPU), lambda named: Samples({}, {"0": "no clock"}))
    assert tuned.winner == listed[0]
    assert tuned.rows[0].reason == "no clock"


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    yield
    tiles.table.cache_clear()
    tiles._select.cache_clear()


def _use(table: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes it the H100's table, written and read."""
    (folder / "nvidia_h100.json").write_text(dump(table))
    monkeypatch.setattr(tiles, "TUNED", folder)
    tiles.table.cache_clear()
    tiles._select.cache_clear()


def test_measured_rows_replace_their_own_kind_and_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = json.loads((TUNED / "nvidia_h100.json").read_text())
    winner = TileConfig("tma", 64, 64, 128, 4, 3)
    problem = Problem("w8a8", 300, 768, 768)
    once = merged(before, [Tuned(problem, winner, [])], "measured")
    twice = merged(once, [Tuned(problem, TileConfig("tma", 64, 128, 128, 4, 3), [])], "measured again")
    assert len(twice["w8a8_linear"]) == len(once["w8a8_linear"]) == len(before["w8a8_linear"]) + 1
    _use(twice, monkeypatch, tmp_path)
    tile = select_tile("w8a8_linear", 300, 768, 768, H100)
    assert (tile.block_n, tile.source) == (128, "measured again")
    assert select_tile("w8a8_linear", 300, 770, 768, H100).source != "measured again"
    assert select_tile("w8a8_linear", 300, 768, 768, A100).road != "tma"


def test_where_the_compiled_kernel_wins_triton_s_row_stays() -> None:
    problem, key = Problem("w8a8", 300, 768, 768), {"n": 768, "k": 768, "tokens": 300}
    table = merged({}, [Tuned(problem, TileConfig("tma", 64, 64, 128, 4, 3), [])], "first")
    table = merged(table, [Tuned(problem, tune.COMPILED, [])], "second")
    assert [row["road"] for row in table["w8a8_linear"] if key.items() <= row.items()] == ["tma", "cuda"]
    table = merged(table, [Tuned(problem, TileConfig("tma", 64, 128, 128, 4, 3), [])], "third")
    assert [(row["road"], row["block_n"]) for row in table["w8a8_linear"]] == [("tma", 128)]


def test_the_compiled_kernel_is_a_candidate_where_it_is_built() -> None:
    native = replace(H100, native=True)
    assert tune.COMPILED in candidates(Problem("w8a8", 4096, 768, 768), native)
    assert tune.COMPILED not in candidates(Problem("w8a8", 4096, 768, 768), H100)
    assert tune.COMPILED not in candidates(Problem("w8a8", 4096, 768, 768), replace(native, sm=80))


@pytest.mark.parametrize("scheme", BOUND)
def test_where_the_compiled_kernel_runs_now_it_comes_first_and_triton_s_tile_second(scheme: str) -> None:
    problem = Problem(scheme, 16, 768, 768)
    native = replace(H100, native=True)
    table = select_tile(problem.operation, 16, 768, 768, H100)
    assert candidates(problem, native)[:2] == [table, tune.COMPILED]
    assert candidates(problem, replace(native, prefer="cuda"))[:2] == [tune.COMPILED, table]


@pytest.mark.parametrize("scheme", BOUND)
def test_each_road_gets_the_weight_in_its_own_layout(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "target_of", lambda device: replace(H100, native=True, prefer="cuda"))
    problem = Problem(scheme, 5, 48, 128)
    given = tune.arguments(problem, CPU)
    of_triton, compiled = given(TileConfig("tma", 64, 64, 128, 4, 3)), given(tune.COMPILED)
    (row,) = (row for row in triton.KERNELS if row.operation == "linear")
    assert row.obstacle(problem_of(of_triton), H100) is None
    assert compiled.weight.layout in FRAGMENT_LAYOUTS
    assert given(TileConfig("few", 16, 64, 128, 4, 3), Activation.GELU).weight is of_triton.weight
    assert torch.equal(
        tune.run(problem, tune.COMPILED, given), tune.run(problem, TileConfig("tma", 64, 64, 128, 4, 3), given)
    )


@pytest.mark.parametrize("scheme", BOUND)
def test_triton_s_tiles_are_chosen_among_themselves_where_layouts_differ(scheme: str) -> None:
    problem = Problem(scheme, 5, 48, 128)
    listed = [tune.COMPILED, TileConfig("few", 16, 16, 64, 4, 2), TileConfig("few", 16, 32, 64, 4, 2)]
    given = tune.arguments(problem, CPU)
    tuned = tune_one(problem, listed, given, _clock({"0": 1e-6, "1": 3e-6, "2": 2e-6}))
    assert tuned.winner == listed[2]
    assert tuned.compiled == pytest.approx(2.0)
    assert [row.chosen for row in tuned.rows] == [False, False, True]
    untimed = tune_one(problem, listed, given, lambda named: Samples({"1": _sample(1e-6)}, {"0": "lost", "2": "lost"}))
    assert (untimed.winner, untimed.compiled) == (listed[1], 0.0)
    assert tune_one(problem, listed[1:], given, _clock({"0": 1e-6, "1": 1e-6})).compiled is None


@pytest.mark.parametrize(
    ("ratios", "gets_it"),
    [
        ([2.0, 0.9], True),
        ([2.0, 0.4], False),
        ([1.0, 1.0], False),
        ([3.0, 0.0], False),
        ([None, 1.5], True),
        ([None], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", BOUND)
def test_a_whole_operation_is_compiled_where_its_geometric_mean_is_better(
    scheme: str, ratios: list[float | None], gets_it: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = json.loads((TUNED / "nvidia_h100.json").read_text())
    operation, tile = Problem(scheme, 1, 1, 1).operation, TileConfig("few", 16, 16, 64, 4, 2)
    had = {"n": None, "k": None, "tokens": None, **dataclasses.asdict(tune.COMPILED)}
    for rows in (before[operation], [*before[operation], had]):
        results = [Tuned(Problem(scheme, 300 + index, 768, 768), tile, [], ratio) for index, ratio in enumerate(ratios)]
        table = merged({**before, operation: rows}, results, "measured")
        assert len([row for row in table[operation] if row["source"] == "measured"]) == len(ratios)
        _use(table, monkeypatch, tmp_path)
        expected = gets_it if gets_it is not None else rows[-1] is had
        assert prefers_extension(operation, replace(H100, native=True)) == expected
        assert select_tile(operation, 300, 768, 768, H100).source == "measured"


def test_the_table_in_the_repository_is_written_as_the_tuner_writes() -> None:
    """One row a line: a change of the table is a readable diff."""
    text = (TUNED / "nvidia_h100.json").read_text()
    lines = [line for line in text.splitlines() if line.strip().startswith("{") and line.strip() != "{"]
    assert len(lines) == sum(len(rows) for rows in json.loads(text).values())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QBertError, match="no NVIDIA GPU here"):
        tune.tune(1.0, tmp_path)
