"""What `bench_bert` measured, as data: the JSON that is written, the ratios in it, and the tables that are printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.machine import Machine
from benchmarks.peers import BASELINE

_MS, _MB = 1e3, 1e6


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Spread(_Strict):
    """Milliseconds over the rounds; a round's figure is the median of the forwards in the system's turn."""

    median: float
    quartile1: float
    quartile3: float
    rounds: int
    forwards: int


class Cell(_Strict):
    """One system on one case: figures, or the reason why there are none.

    Attributes:
        time: of one forward (with --sentences: of all texts).
        speedup: over the float32 baseline: median over the rounds of the ratio within a round.
        over_best_qbert: this system's time over that of qbert's fastest row in this case, the same way: above 1, qbert wins.
        cosine_mean, cosine_min: over all tokens that are not padding (with --sentences: over texts), to torch float32.
        peak_bytes: memory at the height of a forward, less what the process had before the model was loaded.
        first_seconds: the first forward, with all that it compiled.
        reason: why there are no figures, or why some are missing.
    """

    row: str
    case: str
    time: Spread | None = None
    speedup: float | None = None
    over_best_qbert: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    peak_bytes: int | None = None
    first_seconds: float | None = None
    reason: str | None = None


class SystemRow(_Strict):
    """One system.

    Attributes:
        configuration, source: how it is run, and what recommends that.
        padding: what it does with padding.
        weight_bytes: as stored, embeddings included.
        prepare_seconds: what is done once and kept; 0 where it was kept.
        rest_seconds: median time after a command until its threads were idle.
        reason: why it could not be measured at all.
    """

    name: str
    library: str
    configuration: str
    source: str
    padding: str | None = None
    weight_bytes: int | None = None
    prepare_seconds: float | None = None
    load_seconds: float | None = None
    rest_seconds: float | None = None
    notes: list[str] = []
    reason: str | None = None


class CaseRow(_Strict):
    """One batch; with --sentences all batches together."""

    name: str
    sequences: int
    width: int
    tokens: int
    padding_share: float


class Report(_Strict):
    """Everything."""

    benchmark: str = "bert"
    machine: Machine
    model: str
    random_weights: bool
    threads: int
    isa: str | None
    wait_policy: str
    minutes: float
    seconds: float
    systems: list[SystemRow]
    cases: list[CaseRow]
    cells: list[Cell]

    def cell(self, row: str, case: str) -> Cell | None:
        """The cell of that row and case, or None."""
        return next((cell for cell in self.cells if cell.row == row and cell.case == case), None)


# ---- from seconds to figures ----------------------------------------------------------------------------------------


def spread(rounds: Sequence[Sequence[float]]) -> Spread:
    """Seconds of the forwards, round by round -> milliseconds."""
    medians = [statistics.median(forwards) * _MS for forwards in rounds]
    low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75))
    return Spread(
        median=float(middle), quartile1=float(low), quartile3=float(high), rounds=len(rounds),
        forwards=sum(map(len, rounds)),
    )  # fmt: skip


def ratio(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]) -> float | None:
    """Median over the rounds that both have of the ratio of a round's medians; None if they share none.

    A disturbance that lasts longer than a round meets both, and cancels.
    """
    pairs = zip(numerator, denominator, strict=False)
    ratios = [statistics.median(above) / statistics.median(below) for above, below in pairs]
    return statistics.median(ratios) if ratios else None


def add_ratios(cells: Mapping[str, Cell], rounds: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Fills in, for the cells of one case, how they stand to the baseline and to qbert's fastest row."""
    measured = {name: cell.time.median for name, cell in cells.items() if cell.time is not None}
    best = min((name for name in measured if name.startswith("qbert")), key=lambda name: measured[name], default=None)
    for name in measured:
        if BASELINE in measured:
            cells[name].speedup = ratio(rounds[BASELINE], rounds[name])
        if best is not None:
            cells[name].over_best_qbert = ratio(rounds[name], rounds[best])


def cosines(reference: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and least cosine of corresponding rows of (rows, k), in float64. NaN where a row is not finite or zero."""
    a, b = reference.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        values = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(values.mean()), float(values.min())


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(report: Report) -> list[RenderableType]:
    """Times by case; size and agreement of each system; what each system is, or why it is not there."""
    remarks = "\n".join(f"{system.name}: {_remark(report, system)}" for system in report.systems)
    shown = [_times(report), _systems(report)] if report.cases else []
    return [*shown, Text(remarks)]


def _times(report: Report) -> Table:
    machine = report.machine
    limit = f", all limited to {report.isa}" if report.isa else ""
    table = Table(
        title=f"{report.model}: ms a forward, and speed-up over {BASELINE}; {machine.device}{limit}; torch "
        f"{machine.versions.get('torch', '?')}, commit {machine.commit or '?'}, {machine.date}",
        title_justify="left", caption_justify="left",
        caption="Medians of interleaved rounds; ±: half the distance of the quartiles; *: qbert's fastest row of the case. "
        f"Share of padding: {', '.join(f'{c.name} ({c.sequences}x{c.width}) {c.padding_share:.0%}' for c in report.cases)}.",
    )  # fmt: skip
    table.add_column("system", no_wrap=True)
    for case in report.cases:
        table.add_column(case.name, justify="right")
    for system in report.systems:
        table.add_row(system.name, *(_time(report.cell(system.name, case.name)) for case in report.cases))
    return table


def _time(cell: Cell | None) -> str:
    if cell is None or cell.time is None:
        return "-"
    time = cell.time
    figure = f"{time.median:.0f}" if time.median >= 100 else f"{time.median:.1f}"
    percent = 50 * (time.quartile3 - time.quartile1) / time.median
    star = "*" if cell.row.startswith("qbert") and cell.over_best_qbert == 1.0 else ""
    faster = "" if cell.speedup is None else f" {cell.speedup:.2f}x"
    return f"{figure} ±{percent:.0f}%{faster}{star}"


def _systems(report: Report) -> Table:
    shown = max(report.cases, key=lambda case: case.tokens).name
    agreement = (
        "of random weights: how exact the arithmetic is" if report.random_weights else "how close the model stays"
    )
    table = Table(
        title=f"systems; memory and agreement on {shown}", title_justify="left", caption_justify="left",
        caption="weights: as stored. peak: memory that model and forward add to the process. cosine of the last hidden state "
        f"to torch float32 ({agreement}).",
    )  # fmt: skip
    for header in ("system", "weights MB", "peak MB", "cos mean", "cos min", "padding"):
        table.add_column(header, justify="left" if header in ("system", "padding") else "right")
    for system in report.systems:
        cell = report.cell(system.name, shown)
        table.add_row(
            system.name, _megabytes(system.weight_bytes), _megabytes(cell.peak_bytes if cell else None),
            _cosine(cell.cosine_mean if cell else None), _cosine(cell.cosine_min if cell else None), system.padding or "-",
        )  # fmt: skip
    return table


def _remark(report: Report, system: SystemRow) -> str:
    if system.reason:
        return f"not measured: {system.reason}"
    reasons = {cell.reason: cell.case for cell in report.cells if cell.row == system.name and cell.reason}
    failed = [f"{case}: {reason}" for reason, case in reasons.items()]
    return "; ".join([system.configuration, *system.notes, *failed])


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / _MB:.0f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
