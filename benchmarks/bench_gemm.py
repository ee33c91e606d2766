"""Linear layers: every scheme of qbert beside torch and other libraries, at BERT's shapes, from one token to 16384.

    python -m benchmarks.bench_gemm --quick                              a few minutes on a CPU
    python -m benchmarks.bench_gemm --target cuda --json out.json        every shape and number of tokens, most valuable first
    python -m benchmarks.bench_gemm --predict --target h100              what would be the best case; measures nothing

Candidates of a problem run in turns (see `timing`). On a GPU, and for few tokens on a CPU, arguments come out of memory in
every call, as in a model, where each weight is met once a forward. Every result is checked first: a wrong one has no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qbert.errors import QBertError
from qbert.target import physical_cores
from qbert.timing import Caches, Rules, Sample, measure, ratio, reason_of, refuse_zeros

from . import options
from . import predict as prediction
from .bounds import Bounds
from .ceilings import device_bounds
from .linears import Built, Entry, Problem, Weights, entries
from .machine import Machine
from .problems import LINEARS, WEIGHT_ONLY_TOKENS
from .recorder import Recorder, check_picture, device_name, device_of, run_command, table_console
from .results_schema import GemmRow

BASELINE = {"cpu": "torch fp32", "cuda": "torch bf16"}
# Most valuable first: where a budget ends a run, what is missing matters least.
TOKENS = (1024, 4096, 128, 16384, 1, 16, 64, 512, 256, 2048, 8192, 32, 8, 4, 2)
QUICK_TOKENS = {"cpu": (1024, 16, 1), "cuda": (1024, 4096, 128, 16384, 1, 16)}
CPU_MOST_TOKENS = 4096  # beyond, a float32 product takes half a second, and figures no longer change
SECONDS, QUICK_SECONDS = 0.3, 0.1  # of rounds for each candidate
_MICRO, _TERA, _GIGA = 1e6, 1e12, 1e9

Grid = list[tuple[int, int, int]]  # (n, k, tokens)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long."""

    device: torch.device
    seconds: float = SECONDS
    names: tuple[str, ...] = ()  # parts of candidates' names; none: all


def grid(models: Sequence[str], tokens: Sequence[int]) -> Grid:
    """All problems in the order of their value; a shape that two models share is there once."""
    shapes = list(dict.fromkeys(shape for model in models for shape in LINEARS[model]))
    return [(n, k, t) for t in tokens for n, k in shapes]


def measure_problem(problem: Problem, settings: Settings, chosen: Sequence[Entry] | None = None) -> list[GemmRow]:
    """One row for each candidate: figures, or the reason why there are none."""
    found = entries(problem.device, problem.t) if chosen is None else chosen
    wanted = [each for each in found if _wanted(each.name, settings)]
    built, rows = {}, {}
    for entry in wanted:
        rows[entry.name] = row = _row(problem, entry)
        try:
            built[entry.name] = made = entry.build(problem)
            refuse_zeros(entry.name, replace(made.candidate, sets=made.candidate.sets[:1]))
            row.reason = _first_result(made)
            _describe(row, made)
        except Exception as error:  # whatever a library raises is a row with its reason
            row.reason = reason_of(error)
    ready = {name: made.candidate for name, made in built.items() if rows[name].reason is None}
    caches: Caches = "rotate" if problem.cold else "warm"
    samples = measure(ready, problem.device, Rules(settings.seconds, caches=caches))
    for name, reason in samples.failures.items():
        rows[name].reason = reason
    _add_times(rows, samples, BASELINE[problem.device.type])
    return list(rows.values())


def _wanted(name: str, settings: Settings) -> bool:
    parts = settings.names
    return not parts or name == BASELINE[settings.device.type] or any(part in name for part in parts)


def _row(problem: Problem, entry: Entry) -> GemmRow:
    return GemmRow(
        name=entry.name, library=entry.library, scheme=entry.scheme, configuration=entry.configuration,
        regime="cold" if problem.cold else "warm", t=problem.t, n=problem.weights.n, k=problem.weights.k,
    )  # fmt: skip


def _first_result(made: Built) -> str | None:
    """Why the first call's result is wrong, or None."""
    with torch.inference_mode():
        return made.check(made.candidate.call(*made.candidate.sets[0]))


def _describe(row: GemmRow, made: Built) -> None:
    row.work, row.kernel, row.tile = made.work, made.kernel, made.tile
    row.weight_bytes, row.out_dtype = made.weight_bytes, made.out_dtype


def _add_times(rows: Mapping[str, GemmRow], samples: Mapping[str, Sample], baseline: str) -> None:
    for name, sample in samples.items():
        row = rows[name]
        row.time = sample
        if baseline in samples and row.work is not None and row.work.operations:
            row.baseline, row.speedup = baseline, ratio(samples[baseline], sample)


def run(
    problems: Iterable[tuple[int, int, int]], settings: Settings, add: Callable[[GemmRow], None], deadline: float
) -> int:
    """Measures problem by problem until a deadline on `time.monotonic`; how many were left out."""
    weights: dict[tuple[int, int], Weights] = {}
    left = 0
    for n, k, t in problems:
        if time.monotonic() > deadline:
            left += 1
            continue
        if (n, k) not in weights:
            weights[n, k] = Weights(n, k, settings.device)
        cold = settings.device.type == "cuda" or t <= WEIGHT_ONLY_TOKENS
        with torch.inference_mode():
            for row in measure_problem(Problem(weights[n, k], t, cold), settings):
                add(row)
    return left


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[GemmRow], machine: Machine, bounds: Bounds | None = None) -> Iterator[Table]:
    """One table for each shape; rows that lost and rows that failed are in it."""
    for n, k in dict.fromkeys((row.n, row.k) for row in rows):
        yield _table([row for row in rows if (row.n, row.k) == (n, k)], machine, bounds)


def _table(rows: Sequence[GemmRow], machine: Machine, bounds: Bounds | None) -> Table:
    shape, baseline = f"{rows[0].n} x {rows[0].k}", next((row.baseline for row in rows if row.baseline), "baseline")
    table = Table(
        title=f"linear {shape}; {device_name(machine)}; commit {machine.commit}, {machine.date}",
        title_justify="left", caption_justify="left",
        caption=f"Medians; ±: half the distance of the quartiles; x: {baseline}'s time over this one's, within rounds. "
        "bound: share of what this device reaches at best for the bytes and operations of the row.",
    )  # fmt: skip
    for header in ("tokens", "candidate", "kernel, tile", "us", "TOPS", "GB/s", "bound", "x", "timed by"):
        left = header in ("candidate", "kernel, tile", "timed by")
        table.add_column(header, justify="left" if left else "right", overflow="fold")
    last = None
    for row in sorted(rows, key=lambda row: row.t):
        if last not in (None, row.t):
            table.add_section()
        last = row.t
        table.add_row(str(row.t), row.name, *_cells(row, bounds))
    return table


def _cells(row: GemmRow, bounds: Bounds | None) -> list[str]:
    ran = ", ".join(filter(None, (row.kernel, row.tile)))
    if row.time is None or row.work is None:
        return [row.reason or ran, *"-----", ""]
    seconds = row.time.median
    share = None if bounds is None else bounds.share(row.work, seconds)
    return [
        ran, f"{seconds * _MICRO:.1f} ±{row.time.spread:.0%}", f"{row.work.operations / seconds / _TERA:.2f}",
        f"{row.work.bytes / seconds / _GIGA:.1f}", "-" if share is None else f"{share:.0%}",
        "-" if row.speedup is None else f"{row.speedup:.2f}", row.time.how,
    ]  # fmt: skip


# ---- the command ----------------------------------------------------------------------------------------------------


def main(
    target: Annotated[str, typer.Option(help="cpu or cuda; with --predict a GPU: h100, a100 ...")] = "cpu",
    model: Annotated[list[str] | None, typer.Option("--model", help="base or large; may be repeated")] = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", help="may be repeated")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="part of a candidate's name; may be repeated")
    ] = None,
    quick: Annotated[bool, typer.Option(help="base only, few numbers of tokens, short rounds")] = False,
    seconds: options.Seconds = None,
    minutes: options.Minutes = None,
    threads: options.Threads = None,
    predict: Annotated[bool, typer.Option("--predict", help="compute floors and tiles, measure nothing")] = False,
    json_path: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Times linear layers beside their peers."""
    models = model or (["base"] if quick else list(LINEARS))
    if unknown := [each for each in models if each not in LINEARS]:
        raise QBertError(f"model {unknown[0]!r}: allowed are {', '.join(LINEARS)}")
    if predict:
        _predict(target, models, tokens)
        return
    check_picture(plot)
    chosen = tokens or _tokens(target, quick)
    device = device_of(target)
    torch.set_num_threads(threads or physical_cores())
    settings = Settings(device, seconds or (QUICK_SECONDS if quick else SECONDS), tuple(only or ()))
    recorder = Recorder("gemm", {"target": target, "models": models, "seconds": settings.seconds}, json_path, device)
    bounds = device_bounds(recorder, device)
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    problems = grid(models, chosen)
    left = run(
        track(problems, "linears", console=Console(stderr=True), transient=True), settings, recorder.add, deadline
    )
    console = table_console()
    for table in tables(recorder.of(GemmRow), recorder.machine, bounds):
        console.print(table)
    if left:
        console.print(f"{left} of {len(problems)} problems were not measured: the {minutes:g} minutes were over")
    if plot is not None:
        from .plots import latency_by_tokens

        latency_by_tokens(recorder.of(GemmRow), plot)


def _predict(gpu: str, models: Sequence[str], tokens: Sequence[int] | None) -> None:
    gpu = "h100" if gpu in ("cpu", "cuda") else gpu
    for each in models:
        rows = prediction.predictions(gpu, tokens=tokens or prediction.TOKENS, shapes=LINEARS[each])
        table_console().print(prediction.table(rows, gpu))


def _tokens(target: str, quick: bool) -> Sequence[int]:
    if quick:
        return QUICK_TOKENS.get(target, ())
    return [t for t in TOKENS if target != "cpu" or t <= CPU_MOST_TOKENS]


if __name__ == "__main__":
    run_command(main)
