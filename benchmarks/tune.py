"""Finds the fastest tile for each problem on the GPU that is here, and writes it into that GPU's table.

    python -m benchmarks.tune --minutes 3 --out build/tuned         the table and every measurement go to that folder
    cp build/tuned/nvidia_h100.json kernels/tuned/                  from then on it is what runs

The compiled extension is a candidate, too. Where it reads a weight in a layout of its own, the layout decides for all problems:
it gets the whole operation if it is faster than Triton's best tiles in the geometric mean over the problems that were measured.

A tile counts only if its results with each activation equal, bit for bit where sums are integers, those of the tile that runs
now: a table that mixed tiles or backends that differ would give a token other bits in another batch. Candidates are
those that fit the shared memory and registers, the best by a computed time first. Problems come in order of value, and the
table is written after each, so that it may be stopped at any time. Other processes compile before anything is timed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from qbert import ops
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.ops import Activation
from qbert.ops.cuda import compiled_obstacle, own_layout, prefers_extension
from qbert.ops.operations import Linear
from qbert.ops.reference import codes_and_scales
from qbert.ops.table import select_layout
from qbert.quantizers import quantize
from qbert.target import Target, target_of
from qbert.testing import random_activations, random_weight, to_device
from qbert.tiles import MIN_SM, TMA_SM, TUNED, TileConfig, forced, select_tile, table_name, tile_key
from qbert.timing import Candidate, DeviceLost, Rules, Samples, measure, one_line
from qbert.weight import Layout, Weight

from .machine import describe
from .problems import LINEAR_SCHEMES, LINEARS, WEIGHT_ONLY_TOKENS
from .results_schema import ResultsWriter, TileRow

# The compiled extension chooses its own tile.
COMPILED = TileConfig("cuda", 128, 128, 128, 12, 4, source="candidate")
# By value: a batch that fills the GPU, the usual small one, a large one, single sentences, and what lies between.
TOKENS = (4096, 128, 16384, 16, 1024, 512, 1, 64, 256, 2048, 8192, 32, 65536)
MOST_CANDIDATES = 20
_SECONDS = 0.06  # of measuring, for each candidate
_ROUNDS = 15
_CLEARLY = 1.01  # by how much a tile must be faster than the one that runs now to replace it
_SUMS_A_THREAD = 128  # 32-bit sums: half of a thread's registers
_LOOSE = 2e-2  # of the largest value: float sums in another order
_OUT = torch.bfloat16
_WORKERS, _WORKER_THREADS = 8, 2
_COMPILED_TOKENS = 128  # code is the same for all multiples of 16
_COMPILING = 0.4  # of the time that is left, at most: what is not compiled by then compiles when it is first called
WEIGHT_ONLY = ("w8a16_linear", "w4a16_linear", "gobo_a16_linear")


@dataclass(frozen=True)
class Problem:
    """A product: t tokens, n output and k input channels, a weight of `scheme`."""

    scheme: str
    t: int
    n: int
    k: int

    @property
    def operation(self) -> str:
        """The name of its tiles in a table."""
        return tile_key(SCHEMES[self.scheme])

    @property
    def exact(self) -> bool:
        """Whether its sums are integers, so that all tiles give the same bits."""
        return SCHEMES[self.scheme].activation is not None

    @property
    def bound(self) -> bool:
        """Whether the compiled kernel reads the weight in a layout of its own, which then decides for all problems."""
        return own_layout(SCHEMES[self.scheme]) is not None


def problems(schemes: Sequence[str] = LINEAR_SCHEMES) -> Iterator[list[Problem]]:
    """All problems in order of value, those of as many tokens together; of schemes that share tiles the first."""
    leaders = list({tile_key(SCHEMES[name]): name for name in reversed(schemes)}.values())[::-1]
    shapes = list(dict.fromkeys(itertools.chain.from_iterable(LINEARS.values())))
    for t in TOKENS:
        suited = [name for name in leaders if SCHEMES[name].activation or t <= WEIGHT_ONLY_TOKENS]
        yield [Problem(name, t, n, k) for name in suited for n, k in shapes]


# ---- candidates -----------------------------------------------------------------------------------------------------


def candidates(problem: Problem, target: Target) -> list[TileConfig]:
    """Tiles worth trying: what runs now first, then by computed time, at most `MOST_CANDIDATES`."""
    operation, sizes = problem.operation, (problem.t, problem.n, problem.k)
    triton = select_tile(operation, *sizes, replace(target, native=False))
    if problem.bound:
        now = COMPILED if prefers_extension(operation, target) else triton
    else:
        now = select_tile(operation, *sizes, target)
    first = [now, triton]
    if compiled_obstacle("linear", target) is None:
        first.append(COMPILED)
    found: dict[tuple[object, ...], TileConfig] = {}
    for tile in first:
        found.setdefault(_shape(tile), tile)
    for tile in sorted(_all_tiles(problem, target), key=partial(_computed, problem, target)):
        if len(found) < MOST_CANDIDATES:
            found.setdefault(_shape(tile), tile)
    return list(found.values())


def _shape(tile: TileConfig) -> tuple[object, ...]:
    return tuple(value for name, value in asdict(tile).items() if name != "source")


@dataclass(frozen=True)
class Choices:
    """What the kernels of an operation can be told on one road."""

    block_n: tuple[int, ...]
    block_k: tuple[int, ...]
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (2, 3, 4, 5)
    split_k: tuple[int, ...] = (1,)


# Packed integer weights lie in blocks of 128 codes; weight-only kernels split k over their warps, whatever block_k says.
_PACKED_FEW = Choices((64, 128), (128,), stages=(3, 4, 5), split_k=(1, 2, 4, 8))
_FEW = {
    "w8a8_linear": Choices((16, 32, 64), (128, 256, 512), stages=(3, 4, 5, 6, 8)),
    "w4a8_linear": _PACKED_FEW,
    "gobo_linear": _PACKED_FEW,
    **dict.fromkeys(WEIGHT_ONLY, Choices((8, 16, 32, 64), (512,), warps=(4, 8, 16), stages=(1,))),
}
_PACKED_MANY = Choices((64, 128, 256), (128,))
_MANY = {
    "w8a8_linear": Choices((64, 128, 256), (64, 128, 256)),
    "w4a8_linear": _PACKED_MANY,
    "gobo_linear": _PACKED_MANY,
}


def _all_tiles(problem: Problem, target: Target) -> Iterator[TileConfig]:
    blocks_t: tuple[int, ...]
    if problem.t <= WEIGHT_ONLY_TOKENS:
        least = 16 if problem.exact else 8
        road, blocks_t, choices = "few", (max(least, 1 << (problem.t - 1).bit_length()),), _FEW[problem.operation]
    else:
        road = "tma" if target.sm >= TMA_SM and problem.k % 16 == 0 else "pointer"
        blocks_t, choices = (64, 128, 256), _MANY[problem.operation]
    for block_t, block_n, block_k, warps, stages, split_k in itertools.product(
        blocks_t, choices.block_n, choices.block_k, choices.warps, choices.stages, choices.split_k
    ):
        tile = TileConfig(road, block_t, block_n, block_k, warps, stages, split_k=split_k, source="candidate")
        if _fits(tile, problem, target):
            yield tile


def _fits(tile: TileConfig, problem: Problem, target: Target) -> bool:
    """Whether sums fit the registers and all stages the shared memory, and no program is without work."""
    stage = tile.block_k * (
        tile.block_t * (1 if problem.exact else 2) + tile.block_n * SCHEMES[problem.scheme].weight_bits / 8
    )
    sums = tile.block_t * tile.block_n / (32 * tile.warps)
    return (
        stage * tile.stages <= target.shared_memory
        and sums <= _SUMS_A_THREAD
        and tile.block_k * tile.split_k <= max(problem.k, tile.block_k)
        and tile.block_n < 2 * problem.n
    )


def _computed(problem: Problem, target: Target, tile: TileConfig) -> float:
    """Cycles of one multiprocessor for its share of tiles, up to a factor; deeper pipelines and wider tiles break ties."""
    programs = math.ceil(problem.t / tile.block_t) * math.ceil(problem.n / tile.block_n) * tile.split_k
    depth = math.ceil(math.ceil(problem.k / tile.block_k) / tile.split_k)
    waves = math.ceil(programs / target.sm_count)
    # A step costs its products, its operands' way through shared memory, and a fixed part for barriers.
    step = tile.block_k * (tile.block_t * tile.block_n / 4096 + (tile.block_t + tile.block_n) / 64) + 64
    return waves * (depth * step + 1000) * (1 + 0.01 * (8 - tile.stages))


# ---- one problem ----------------------------------------------------------------------------------------------------


Given = Callable[..., Linear]  # of a tile and an activation, NONE where it is not said


def arguments(problem: Problem, device: torch.device) -> Given:
    """The problem's record: the same numbers always, the weight in the layout that the tile reads."""
    held: dict[Layout, Linear] = {}
    scheme = SCHEMES[problem.scheme]
    triton = select_layout(scheme, Role.LINEAR, replace(target_of(device), prefer="triton"))
    own = own_layout(scheme) or triton

    def given(tile: TileConfig, activation: Activation = Activation.NONE) -> Linear:
        layout = own if tile.road == "cuda" else triton
        if layout not in held:
            held[layout] = _arguments(problem, device, layout)
        return held[layout]._replace(activation=activation)

    return given


def _arguments(problem: Problem, device: torch.device, layout: Layout) -> Linear:
    """A random one, with a bias and a bfloat16 result."""
    scheme = SCHEMES[problem.scheme]
    x = random_activations(problem.t, problem.k).to(device, _OUT)
    tokens, s = codes_and_scales(x) if scheme.activation else (x, None)
    weight: Weight = to_device(quantize(random_weight(problem.n, problem.k), scheme).to_layout(layout), device)
    bias = torch.linspace(-1, 1, problem.n, device=device, dtype=_OUT)
    return Linear(tokens, s, weight, bias, Activation.NONE, False, _OUT)


def run(problem: Problem, tile: TileConfig, given: Given, activation: Activation = Activation.NONE) -> Tensor:
    """The linear with that tile."""
    with forced(problem.operation, tile):
        result: Tensor = ops.run(given(tile, activation))
    return result


@dataclass(frozen=True)
class Tuned:
    """What came of one problem.

    Attributes:
        winner: the fastest tile; of a `bound` problem the fastest of Triton's.
        rows: of all tiles.
        compiled: of a bound problem the winner's time over the compiled kernel's: 0 where that gave no right result, None
            where it was no candidate or the winner has no time.
    """

    problem: Problem
    winner: TileConfig
    rows: list[TileRow]
    compiled: float | None = None


Measure = Callable[[Mapping[str, Candidate]], Samples]


def tune_one(problem: Problem, tiles: Sequence[TileConfig], given: Given, time_all: Measure) -> Tuned:
    """Times the tiles whose results are right.

    Args:
        tiles: the first is the one that runs now; the others' results are compared with its result.
    """
    now, reasons = tiles[0], {}
    expected = {activation: run(problem, now, given, activation) for activation in Activation}
    right: dict[str, TileConfig] = {}
    for index, tile in enumerate(tiles):
        reason = _wrong(problem, tile, given, expected)
        if reason:
            reasons[index] = reason
        else:
            right[str(index)] = tile
    samples = time_all({name: Candidate(partial(run, problem, tile, given)) for name, tile in right.items()})
    names = [str(index) for index, tile in enumerate(tiles) if not (problem.bound and tile.road == "cuda")]
    winner = _fastest(names, samples)
    rows = []
    for index, tile in enumerate(tiles):
        sample, base = samples.get(str(index)), samples.get("0")
        rows.append(
            TileRow(
                operation=problem.operation, scheme=problem.scheme, t=problem.t, n=problem.n, k=problem.k,
                tile={**asdict(tile)}, time=sample, chosen=str(index) == winner,
                speedup=base.median / sample.median if base and sample else None,
                reason=None if sample else reasons.get(index) or samples.failures.get(str(index), "not timed"),
            )
        )  # fmt: skip
    return Tuned(
        problem, tiles[int(winner)], rows, _against_compiled(tiles, winner, samples) if problem.bound else None
    )


def _against_compiled(tiles: Sequence[TileConfig], winner: str, samples: Samples) -> float | None:
    """The winner's time over that of the compiled kernel."""
    compiled = next((str(index) for index, tile in enumerate(tiles) if tile.road == "cuda"), None)
    if compiled is None or winner not in samples:
        return None
    return samples[winner].median / samples[compiled].median if compiled in samples else 0.0


def _wrong(
    problem: Problem, tile: TileConfig, given: Given, expected: Mapping[Activation, Tensor]
) -> str | None:  # fmt: skip
    """What is wrong with the tile's results, activation by activation. Rounded to 16 bits as they are, millions of them still
    show functions that differ in the last bit of a float32."""
    try:
        for activation, wanted in expected.items():
            result = run(problem, tile, given, activation)
            if problem.exact and not torch.equal(result.view(torch.int16), wanted.view(torch.int16)):
                return f"another result than the tile that runs now, activation {activation.text}"
            error = float((result.float() - wanted.float()).abs().max() / wanted.float().abs().max())
            if not problem.exact and not error < _LOOSE:
                return f"off by {error:.2g} of the largest value, activation {activation.text}"
    except Exception as error:  # a tile that cannot be compiled or launched is a row with its reason
        return one_line(error)
    return None


def _fastest(names: Sequence[str], samples: Mapping[str, Any]) -> str:
    """The first of the names, unless another is clearly faster; it runs now, so it is kept where nothing could be timed."""
    first, timed = names[0], [name for name in names if name in samples]
    if not timed:
        return first
    best = min(timed, key=lambda name: samples[name].median)
    return first if first in timed and samples[first].median <= _CLEARLY * samples[best].median else best


# ---- the table ------------------------------------------------------------------------------------------------------


def merged(
    table: Mapping[str, Sequence[Mapping[str, Any]]], tuned: Iterable[Tuned], source: str
) -> dict[str, list[Any]]:
    """The table with a row for each problem that was tuned, in place of one for the same shape and tokens.

    Operations whose weights have a layout of their own in the compiled extension get or lose the row that sends all of them
    there.
    """
    result: dict[str, list[Any]] = {operation: [dict(row) for row in rows] for operation, rows in table.items()}
    tuned = list(tuned)
    for each in tuned:
        problem, tile = each.problem, {**asdict(each.winner), "source": source}
        key = {"n": problem.n, "k": problem.k, "tokens": problem.t}
        rows = result.setdefault(problem.operation, [])
        # Where the compiled extension wins, Triton's row stays for machines without it; "pointer" is for older GPUs.
        kept = ("pointer", "tma", "few") if tile["road"] == "cuda" else ("pointer",)
        rows[:] = [row for row in rows if {name: row.get(name) for name in key} != key or row["road"] in kept]
        rows.append({**key, **tile})
        rows.sort(
            key=lambda row: (row.get("n") is None, row.get("n") or 0, row.get("k") or 0, row.get("tokens") or 1 << 40)
        )
    for operation, ratios in _compiled_ratios(tuned).items():
        rows = result[operation]
        rows[:] = [row for row in rows if row["road"] != "cuda"]
        mean = math.prod(ratios) ** (1 / len(ratios))
        if mean > _CLEARLY:
            said = f"{source}: {mean:.2f} times as fast as Triton's best, geometric mean over {len(ratios)} problems"
            rows.append({"n": None, "k": None, "tokens": None, **asdict(COMPILED), "source": said})
    return result


def _compiled_ratios(tuned: Iterable[Tuned]) -> dict[str, list[float]]:
    """How many times as fast as Triton's best the compiled kernel was, problem by problem of each operation."""
    ratios: dict[str, list[float]] = {}
    for each in tuned:
        if each.compiled is not None:
            ratios.setdefault(each.problem.operation, []).append(each.compiled)
    return ratios


def dump(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A table as JSON, one row a line, so that a change is a line in a diff."""
    operations = (
        f'  "{operation}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
        for operation, rows in table.items()
    )
    return "{\n" + ",\n".join(operations) + "\n}\n"


# ---- all of it ------------------------------------------------------------------------------------------------------


def _compile(work: tuple[Problem, TileConfig]) -> None:
    """In another process: one call, whose kernel stays in Triton's cache on disk. What fails will fail again, with a reason."""
    problem, tile = work
    if tile.road == "cuda":
        return
    try:
        run(problem, tile, _few_arguments(replace(problem, t=min(problem.t, _COMPILED_TOKENS))))
    except Exception:
        return


@lru_cache(maxsize=4)
def _few_arguments(problem: Problem) -> Given:
    """Quantizing a weight takes longer than compiling for it does."""
    return arguments(problem, torch.device("cuda"))


def tune(
    minutes: float, out: Path, *, schemes: Sequence[str] = LINEAR_SCHEMES, console: Console | None = None
) -> list[Tuned]:
    """Tunes in order of value until the time is up; the table and all rows lie in `out` after each problem.

    Raises:
        QBertError: no GPU here, or one that the kernels do not run on.
    """
    if not torch.cuda.is_available():
        raise QBertError("no NVIDIA GPU here; tiles are tuned where they run")
    device, deadline = torch.device("cuda", torch.cuda.current_device()), time.monotonic() + 60 * minutes
    target, machine = target_of(device), describe(device)
    if target.sm < MIN_SM:
        raise QBertError(f"{machine.gpu.name if machine.gpu else device}: compute capability below {MIN_SM / 10:.1f}")
    name = table_name(target)
    writer = ResultsWriter(out / f"{name}-tiles.json", machine)
    time_all: Measure = partial(measure, device=device, rules=Rules(_SECONDS, max_rounds=_ROUNDS))
    source = f"measured on {torch.cuda.get_device_name(device)}, {machine.date[:10]}"
    before, done = json.loads((TUNED / f"{name}.json").read_text()), list[Tuned]()
    workers = min(_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(_WORKER_THREADS,)
    ) as pool:
        for group in problems(schemes):
            work = [(problem, tile) for problem in group for tile in candidates(problem, target)]
            compiling = [pool.submit(_compile, each) for each in _once_each(work)]
            wait(compiling, timeout=max(0.0, _COMPILING * (deadline - time.monotonic())))
            for each in compiling:
                each.cancel()  # those that have not begun
            for problem in group:
                if time.monotonic() > deadline:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return done
                tuned = tune_one(problem, candidates(problem, target), arguments(problem, device), time_all)
                for row in tuned.rows:
                    writer.add(row)
                done.append(tuned)
                (out / f"{name}.json").write_text(dump(merged(before, done, source)))
                if console:
                    console.print(_line(tuned), highlight=False, soft_wrap=True)
    return done


def _once_each(work: Iterable[tuple[Problem, TileConfig]]) -> list[tuple[Problem, TileConfig]]:
    """One problem for each (operation, tile): kernels are compiled for tiles, not for shapes."""
    return list({(problem.operation, tile): (problem, tile) for problem, tile in work}.values())


def _line(tuned: Tuned) -> str:
    problem, tile = tuned.problem, tuned.winner
    chosen = next(row for row in tuned.rows if row.chosen)
    if chosen.time is None:
        return f"{problem}: nothing could be timed: {chosen.reason}"
    tops = 2e-12 * problem.t * problem.n * problem.k / chosen.time.median
    return (
        f"{problem.scheme} t={problem.t} n={problem.n} k={problem.k}: {tile.road} {tile.block_t}x{tile.block_n}x{tile.block_k} "
        f"w{tile.warps} s{tile.stages} k/{tile.split_k}: {chosen.time.median * 1e6:.2f} us, {tops:.0f} TOPS, "
        f"{chosen.speedup or 1:.2f}x of before ({sum(row.time is not None for row in tuned.rows)} of {len(tuned.rows)} tiles)"
        + ("" if tuned.compiled is None else f"; the compiled kernel: {tuned.compiled:.2f}x of it")
    )


def main(
    minutes: Annotated[float, typer.Option("--minutes", help="time for all of it")] = 3.0,
    out: Annotated[Path, typer.Option("--out", help="folder for the table and the measurements")] = Path("build/tuned"),
    scheme: Annotated[list[str] | None, typer.Option("--scheme", help="linear scheme; may be repeated")] = None,
) -> None:
    """Tune this GPU's tiles."""
    unknown = [name for name in scheme or () if name not in SCHEMES or Role.LINEAR not in SCHEMES[name].roles]
    if unknown:
        raise typer.BadParameter(f"unknown scheme {unknown[0]!r}; allowed: {', '.join(LINEAR_SCHEMES)}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        tune(minutes, out, schemes=scheme or LINEAR_SCHEMES, console=Console())
    except (QBertError, DeviceLost) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
