"""One picture of a search: milliseconds against points, sizes as areas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qbert.compress.search_report import SearchReport
from qbert.compress.workshop import Tried
from qbert.errors import MissingDependency

_KEPT, _DROPPED, _TEST = "#0072B2", "0.6", "#D55E00"  # told apart by colour-blind people too (Okabe and Ito)
_LARGEST = 900.0  # square points of the original's disc


def plot(report: SearchReport, path: str | Path, title: str = "") -> None:
    """Milliseconds of every model that was tried against the points it loses on its worst task, its megabytes as an area.

    Models that were kept are joined in order; a star is the one that was found, on test texts.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError:
        raise MissingDependency("pictures need matplotlib; install it with: pip install 'qbert[plot]'") from None
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    axis = figure.subplots()
    timed = [row for row in report.rows if row.speedup is not None]
    for place, row in enumerate(sorted(timed, key=lambda row: -row.drop)):
        _disc(axis, report, row, above=place % 2 == 0)
    kept = [row for row in report.rows if row.kept]
    axis.plot([report.ms(row) for row in kept], [-row.drop for row in kept], color=_KEPT, linewidth=1, zorder=1)
    if report.test:
        worst = min(change.change for change in report.test)
        axis.plot(report.ms(report.found), worst, "*", color=_TEST, markersize=13, label="found, on test texts")
    axis.axhline(-report.given.max_drop, color="0.35", linestyle="--", linewidth=1, label="points that may be lost")
    if report.given.speedup is not None:
        asked = report.original_ms / report.given.speedup
        axis.axvline(asked, color="0.35", linestyle=":", linewidth=1, label="speed asked for")
    axis.set_xscale("log")
    for each in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        each(ScalarFormatter())
    axis.set_xlabel(f"milliseconds of {report.given.batch} x {report.given.seq} tokens here")
    axis.set_ylabel("change in points, worst task (bars: 95%, paired)")
    axis.set_title(title or report.title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right", fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _disc(axis: Any, report: SearchReport, row: Tried, above: bool) -> None:
    colour = _KEPT if row.kept else _DROPPED
    largest = max(each.megabytes or 0.0 for each in report.rows)
    ms, y = report.ms(row), -row.drop
    if row.changes:
        low, high = min(row.changes, key=lambda change: change.change).interval
        axis.errorbar(ms, y, [[max(0.0, y - low)], [max(0.0, high - y)]], color=colour, elinewidth=0.8, zorder=1)
    area = _LARGEST * (row.megabytes or 0.0) / largest
    axis.scatter(ms, y, area, facecolor=colour if row.kept else "none", edgecolor=colour, alpha=0.6, zorder=2)
    label, where = f"{row.step}\n{row.megabytes:.0f} MB", (8, 6 if above else -16)
    axis.annotate(label, (ms, y), xytext=where, textcoords="offset points", fontsize=7, color="0.2")
