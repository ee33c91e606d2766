"""From the seconds that `bench_bert` gets to its rows, and from its rows to the tables that are printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qbert.clocks import GpuState
from qbert.timing import Sample, ratio

from .machine import Machine
from .recorder import device_name
from .results_schema import BertRow, SystemRow

_MS, _MB = 1e3, 1e6
_HOW = "wall clock of a forward until its result is there, in a process of its own; warm caches"


# ---- from seconds to figures ----------------------------------------------------------------------------------------


def sample(rounds: Sequence[Sequence[float]], before: GpuState | None = None, after: GpuState | None = None) -> Sample:
    """Seconds of the forwards, round by round; a round's figure is the median of the forwards in the system's turn."""
    medians = [statistics.median(forwards) for forwards in rounds]
    calls = round(statistics.mean(map(len, rounds)))
    return Sample.of(medians, max(1, calls), _HOW, before=before, after=after)


def add_ratios(rows: Mapping[str, BertRow], baseline: str) -> None:
    """Fills in, for the rows of one case, how they stand to the baseline and to qbert's fastest row."""
    times = {name: row.time for name, row in rows.items() if row.time is not None}
    ours = {name: time.median for name, time in times.items() if name.startswith("qbert")}
    best = min(ours, key=lambda name: ours[name], default=None)
    for name, time in times.items():
        if baseline in times:
            rows[name].baseline, rows[name].speedup = baseline, ratio(times[baseline], time)
        if best is not None:
            rows[name].over_best_qbert = ratio(time, times[best])


def cosines(reference: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and least cosine of corresponding rows of (rows, k), in float64. NaN where a row is not finite or zero."""
    a, b = reference.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        values = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(values.mean()), float(values.min())


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(
    systems: Sequence[SystemRow], rows: Sequence[BertRow], machine: Machine, limit: str = ""
) -> list[RenderableType]:
    """Of each model: times by case; size and agreement of each system; what each system is, or why it is not there.
    Then how the models stand to the first.

    Args:
        limit: what all systems were held to, for the title.
    """
    models = list(dict.fromkeys(system.model for system in systems))
    shown: list[RenderableType] = []
    for model in models:
        of = [system for system in systems if system.model == model]
        shown += _tables_of(of, [row for row in rows if row.model == model], machine, limit)
    return [*shown, *([_models(models, rows)] if rows and len(models) > 1 else [])]


def _tables_of(
    systems: Sequence[SystemRow], rows: Sequence[BertRow], machine: Machine, limit: str
) -> list[RenderableType]:
    remarks = "\n".join(f"{system.name}: {_remark(rows, system)}" for system in systems)
    shown = [_times(systems, rows, machine, limit), _systems(systems, rows)] if rows else []
    return [*shown, Text(remarks)]


def over_first(models: Sequence[str], rows: Sequence[BertRow]) -> dict[tuple[str, str, str], float]:
    """(model, system, case) -> its time over that of the first model: both were measured in the same rounds."""
    times = {(row.model, row.name, row.case): row.time.median for row in rows if row.time is not None}
    return {
        (model, name, case): time / times[models[0], name, case]
        for (model, name, case), time in times.items()
        if model != models[0] and (models[0], name, case) in times
    }


def _models(models: Sequence[str], rows: Sequence[BertRow]) -> Table:
    ratios, cases = over_first(models, rows), list(dict.fromkeys(row.case for row in rows))
    table = Table(title=f"time over that of {models[0]} in the same rounds", title_justify="left")
    table.add_column("system", no_wrap=True)
    columns = [(model, case) for model in models[1:] for case in cases]
    for model, case in columns:
        table.add_column(f"{model} {case}", justify="right")
    for name in dict.fromkeys(row.name for row in rows):
        found = [ratios.get((model, name, case)) for model, case in columns]
        if any(found):
            table.add_row(name, *("-" if each is None else f"{each:.3f}" for each in found))
    return table


def _cell(rows: Sequence[BertRow], name: str, case: str) -> BertRow | None:
    return next((row for row in rows if row.name == name and row.case == case), None)


def _cases(rows: Sequence[BertRow]) -> dict[str, BertRow]:
    """A row of each case."""
    return {row.case: row for row in reversed(rows)}


def _times(systems: Sequence[SystemRow], rows: Sequence[BertRow], machine: Machine, limit: str) -> Table:
    cases = dict(reversed(_cases(rows).items()))
    baseline = next((row.baseline for row in rows if row.baseline), "the baseline")
    padding = ", ".join(f"{name} ({row.batch}x{row.width}) {row.padding_share:.0%}" for name, row in cases.items())
    table = Table(
        title=f"{systems[0].model}: ms a forward, and speed-up over {baseline}; {device_name(machine)}{limit}; torch "
        f"{machine.versions.get('torch', '?')}, commit {machine.commit or '?'}, {machine.date}",
        title_justify="left", caption_justify="left",
        caption="Medians of interleaved rounds; ±: half the distance of the quartiles; *: qbert's fastest row of the case. "
        f"Share of padding: {padding}.",
    )  # fmt: skip
    table.add_column("system", no_wrap=True)
    for name in cases:
        table.add_column(name, justify="right")
    for system in systems:
        table.add_row(system.name, *(_time(_cell(rows, system.name, name)) for name in cases))
    return table


def _time(row: BertRow | None) -> str:
    if row is None or row.time is None:
        return "-"
    milliseconds = row.time.median * _MS
    figure = (
        f"{milliseconds:.0f}"
        if milliseconds >= 100
        else f"{milliseconds:.2f}"
        if milliseconds < 10
        else f"{milliseconds:.1f}"
    )
    star = "*" if row.name.startswith("qbert") and row.over_best_qbert == 1.0 else ""
    faster = "" if row.speedup is None else f" {row.speedup:.2f}x"
    return f"{figure} ±{row.time.spread:.0%}{faster}{star}"


def _systems(systems: Sequence[SystemRow], rows: Sequence[BertRow]) -> Table:
    shown = max(_cases(rows).values(), key=lambda row: row.tokens)
    agreement = (
        "of random weights: how exact the arithmetic is" if shown.random_weights else "how close the model stays"
    )
    table = Table(
        title=f"systems; memory and agreement on {shown.case}", title_justify="left", caption_justify="left",
        caption="weights: as stored. peak: memory that model and forward add to the process. cosine of the last hidden state "
        f"to torch float32 ({agreement}).",
    )  # fmt: skip
    for header in ("system", "weights MB", "peak MB", "cos mean", "cos min", "padding"):
        table.add_column(header, justify="left" if header in ("system", "padding") else "right")
    for system in systems:
        row = _cell(rows, system.name, shown.case)
        table.add_row(
            system.name, _megabytes(system.weight_bytes), _megabytes(row.peak_bytes if row else None),
            _cosine(row.cosine_mean if row else None), _cosine(row.cosine_min if row else None), system.padding or "-",
        )  # fmt: skip
    return table


def _remark(rows: Sequence[BertRow], system: SystemRow) -> str:
    if system.reason:
        return f"not measured: {system.reason}"
    reasons = {row.reason: row.case for row in rows if row.name == system.name and row.reason}
    failed = [f"{case}: {reason}" for reason, case in reasons.items()]
    return "; ".join([system.configuration, *system.notes, *failed])


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / _MB:.0f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
