"""The breakdown for people: tables for the terminal, bars for the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qbert.analyze.components import LABELS, Component
from qbert.analyze.result import META_DEVICE, AnalyzeResult, ComponentResult, ProgramResult, StepResult
from qbert.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MILLION, _GIGA, _MIB = 1e6, 1e9, 1 << 20

Column = tuple[str, Callable[[ComponentResult], str]]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1f}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


_WORK_COLUMNS: tuple[Column, ...] = (
    ("params\nM", lambda row: f"{row.parameters / _MILLION:.2f}"),
    ("%", lambda row: _percent(row.shares.parameters)),
    ("weights\nMiB", lambda row: f"{row.weight_bytes / _MIB:.2f}"),
    ("GFLOP", lambda row: f"{row.matmul_flops / _GIGA:.2f}"),
    ("%", lambda row: _percent(row.shares.matmul_flops)),
    ("vector\nGFLOP", lambda row: f"{row.vector_flops / _GIGA:.3f}"),
    ("moved\nMiB", lambda row: f"{row.bytes_moved / _MIB:.1f}"),
    ("%", lambda row: _percent(row.shares.bytes_moved)),
    ("kernels", lambda row: str(row.launches)),
)
_TIME_COLUMNS: tuple[Column, ...] = (
    ("peak\nMiB", lambda row: f"{row.peak_bytes / _MIB:.1f}"),
    ("at peak\nMiB", lambda row: f"{row.bytes_at_peak / _MIB:.1f}"),
    ("measured\nms", lambda row: _ms(row.measured_ms)),
    ("%", lambda row: _percent(row.shares.measured)),
    ("predicted\nms", lambda row: _ms(row.predicted.ms)),
    ("%", lambda row: _percent(row.shares.predicted)),
    ("bound", lambda row: row.predicted.bound),
    ("FLOP/\nbyte", lambda row: f"{row.predicted.intensity:.1f}"),
    ("launch\nms", lambda row: _ms(row.predicted.launch_ms)),
)


def to_table(result: AnalyzeResult) -> Group:
    """Two tables (work; memory and time) and the notes that they need; print it with a `rich.console.Console`."""
    heading = f"{result.model} ({result.model_dtype}), batch {result.batch}, seq {result.seq}"
    work = _table(f"{heading}: parameters and work", result, _WORK_COLUMNS)
    _total_row(work, result, _WORK_COLUMNS)
    times = _table(
        f"{heading}: run-time memory and latency, {_where(result)}",
        result,
        _TIME_COLUMNS,
    )
    if result.measurement is not None:
        empty = [""] * (len(_TIME_COLUMNS) - 3)
        times.add_row("remainder", "", "", _ms(result.measurement.remainder_ms), *empty, style="dim")
    _total_row(times, result, _TIME_COLUMNS)
    programs = [_program_table(heading, result, program) for program in result.programs]
    parts: list[RenderableType] = [work, times, *programs, *(Text(note, style="dim") for note in _notes(result))]
    return Group(*parts)


_STEP_HEADERS, _STEP_FIGURES = ("part", "step", "kernel"), ("GMAC", "weights\nMiB", "values\nMiB", "measured\nms", "%")


def _program_table(heading: str, result: AnalyzeResult, program: ProgramResult) -> Table:
    """Steps that are alike in all layers together, part by part."""
    table = Table(
        title=f"{heading}: steps of the fused {program.encoder} ({program.family}, {program.scales} scales)",
        title_justify="left",
    )
    for header in _STEP_HEADERS:
        table.add_column(header, no_wrap=header == "part")
    for header in ("n x k", "times", *_STEP_FIGURES):
        table.add_column(header, justify="right")
    total_ms = result.total.measured_ms
    for part in program.parts:
        for alike in _alike([step for step in program.steps if step.part == part.part]):
            first = alike[0]
            table.add_row(
                "", first.step, first.kernel, f"{first.n} x {first.k}" if first.n else str(first.k), str(len(alike)),
                *_step_cells(alike, total_ms),
            )  # fmt: skip
        own = [step for step in program.steps if step.part == part.part]
        table.add_row(part.part, "", "", "", str(len(own)), *_step_cells(own, total_ms), style="bold")
        table.add_section()
    table.add_row("all steps", "", "", "", str(len(program.steps)), *_step_cells(program.steps, total_ms), style="bold")
    if program.rest_ms is not None:
        table.add_row("the rest", *[""] * 7, _ms(program.rest_ms), _of_total(program.rest_ms, total_ms), style="dim")
        table.add_row("forward", *[""] * 7, _ms(total_ms), "", style="bold")
    return table


def _alike(steps: list[StepResult]) -> list[list[StepResult]]:
    """Steps that differ in their layer only."""
    kinds: dict[tuple[object, ...], list[StepResult]] = {}
    for step in steps:
        kinds.setdefault((step.step, step.operation, step.scheme, step.kernel, step.n, step.k), []).append(step)
    return list(kinds.values())


def _step_cells(steps: list[StepResult], total_ms: float | None) -> list[str]:
    times = [step.measured_ms for step in steps if step.measured_ms is not None]
    milliseconds = sum(times) if times else None
    return [
        f"{sum(step.macs for step in steps) / _GIGA:.3f}",
        f"{sum(step.weight_bytes for step in steps) / _MIB:.2f}",
        f"{sum(step.activation_bytes for step in steps) / _MIB:.1f}",
        _ms(milliseconds),
        _of_total(milliseconds, total_ms),
    ]


def _of_total(milliseconds: float | None, total_ms: float | None) -> str:
    return _percent(None if milliseconds is None or not total_ms else 100 * milliseconds / total_ms)


def _where(result: AnalyzeResult) -> str:
    """Which machines the times are of."""
    predicted = f"predicted for {result.target.name} ({result.target.description}) in {result.dtype}"
    return predicted if result.measurement is None else f"measured on {result.environment.device}, {predicted}"


def _table(title: str, result: AnalyzeResult, columns: tuple[Column, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("component", no_wrap=True)
    for header, _ in columns:
        table.add_column(header, justify="right")
    for row in result.components:
        table.add_row(LABELS[Component(row.component)], *(show(row) for _, show in columns))
    return table


def _total_row(table: Table, result: AnalyzeResult, columns: tuple[Column, ...]) -> None:
    table.add_section()
    table.add_row("total", *(show(result.total) for _, show in columns), style="bold")


def _notes(result: AnalyzeResult) -> list[str]:
    target = result.target
    peaks = ", ".join(f"{precision} {peak:.4g}" for precision, peak in target.peak_tflops.items())
    counted = (
        "GFLOP: matrix products, a multiply-add is 2. Moved: inputs and outputs of every operation, no cache. "
        "Peak: activations alive while the component allocates; at peak: whose they are at the model's highest point."
    )
    predicted = (
        f"Predicted: the sum of max(FLOPs/peak, bytes/bandwidth) of each operation on {target.description}: TFLOPS "
        f"{peaks}; {target.bandwidth_gb_s:.4g} GB/s; launches ({target.launch_us:.2g} us each) come on top. "
        f"Source: {target.source}."
    )
    notes = [counted, predicted]
    if result.measurement is not None:
        measured = result.measurement
        notes.append(
            f"Measured: medians of {measured.repeats} passes ({measured.fastest_ms:.2f} to {measured.slowest_ms:.2f} ms); "
            f"torch {result.environment.torch_version}, {result.environment.threads} threads; "
            f"the hooks cost {measured.hook_cost_ms:.2f} ms a pass; "
            "remainder: total less the components."
        )
    if result.programs:
        notes.append(
            "Steps: what a fused encoder runs in place of its modules; steps that are alike in all layers stand together. "
            "Measured where they run, in the forward with stamps; the rest of the plain forward is Python between the steps, "
            "padding taken off and put back, pooler and heads."
        )
    if result.environment.device == META_DEVICE and result.attention_implementation == "sdpa":
        notes.append(
            "On the meta device torch runs scaled_dot_product_attention unfused: its bytes, memory and kernels are those "
            "of eager attention; a fused kernel keeps the scores out of memory."
        )
    if result.uncounted_ops:
        ops = ", ".join(f"{name} x{times}" for name, times in sorted(result.uncounted_ops.items()))
        notes.append(f"FLOPs not known, counted as 0: {ops}.")
    return notes


# Okabe & Ito, "Color Universal Design" (2008): eight colours that colour-blind readers can tell apart, in an order that
# puts light beside dark. White edges part neighbours in print.
_COLOURS: dict[Component, str] = {
    Component.EMBEDDINGS: "#E69F00",
    Component.QKV_LINEARS: "#0072B2",
    Component.ATTENTION_SCORES: "#56B4E9",
    Component.ATTENTION_OUTPUT: "#009E73",
    Component.FFN: "#D55E00",
    Component.NORMS: "#F0E442",
    Component.POOLER_HEAD: "#CC79A7",
    Component.OTHER: "#000000",
}
_DARK = frozenset({Component.QKV_LINEARS, Component.OTHER})  # numbers on them are white
_LABEL_FROM_PERCENT = 3.0  # narrower pieces have no room for a number
_FIGURE_INCHES = (11.0, 4.8)
_DPI = 150


def _bars(result: AnalyzeResult) -> list[tuple[str, dict[str, float]]]:
    """(label, share of each component in percent) for every bar, top to bottom; without data no bar."""
    total = result.total
    bars = [
        (f"parameters\n{total.parameters / _MILLION:.1f} M", _shares(result, "parameters")),
        (f"FLOPs\n{total.matmul_flops / _GIGA:.1f} GFLOP", _shares(result, "matmul_flops")),
        (f"bytes moved\n{total.bytes_moved / _MIB:.0f} MiB", _shares(result, "bytes_moved")),
        (f"peak activations\n{total.peak_bytes / _MIB:.1f} MiB", _shares(result, "bytes_at_peak")),
        (f"measured here\n{_ms(total.measured_ms)} ms", _shares(result, "measured")),
        (f"predicted, {result.target.name}\n{_ms(total.predicted.ms)} ms", _shares(result, "predicted")),
    ]
    return [(label, shares) for label, shares in bars if any(shares.values())]


def _shares(result: AnalyzeResult, metric: str) -> dict[str, float]:
    return {row.component: getattr(row.shares, metric) or 0.0 for row in result.components}


def plot(result: AnalyzeResult, path: str | Path) -> None:
    """Draw the breakdown as one bar of shares for each quantity and write it to `path` (PNG, SVG or PDF by its ending).

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=_FIGURE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no change to the caller's pyplot
    axes = figure.add_subplot()
    _draw_bars(axes, _bars(result))
    axes.set_xlabel("share of the model's total (%)")
    axes.set_title(
        f"{result.model} ({result.model_dtype}), batch {result.batch}, seq {result.seq}\n{_where(result)}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=len(Component), frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=_DPI)


def _draw_bars(axes: Axes, bars: list[tuple[str, dict[str, float]]]) -> None:
    labels = [label for label, _ in bars]
    lefts = [0.0] * len(bars)
    for component in Component:
        widths = [shares[component.value] for _, shares in bars]
        patches = axes.barh(
            labels, widths, left=lefts, height=0.72, color=_COLOURS[component], edgecolor="white", linewidth=0.8,
            label=LABELS[component],
        )  # fmt: skip
        texts = [f"{width:.0f}" if width >= _LABEL_FROM_PERCENT else "" for width in widths]
        axes.bar_label(
            patches, texts, label_type="center", fontsize=9, color="white" if component in _DARK else "black"
        )
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
