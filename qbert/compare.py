"""The main job, scheme by scheme: quantize a real model, save it, load it back, evaluate it, time it; one table."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import nn

from qbert.analyze.targets import device_description
from qbert.encoder import encoders, obstacle
from qbert.errors import MissingDependency, QBertError
from qbert.evaluate import Baseline, EvalResult, load_tokenizer, prepare_baseline, score
from qbert.recipe import Recipe
from qbert.timing import medians
from qbert.workflow import DEFAULT_TEXTS, load_any, quantize_checkpoint
from qbert.zoo import resolve_model


class Way(NamedTuple):
    """One way to store and run a model.

    Attributes:
        linear: scheme of the linears.
        embedding: scheme of the embeddings; None leaves them float.
        fused: ``"dynamic"`` or ``"static"`` scales of a fused encoder; None to run module by module.
    """

    linear: str
    embedding: str | None = None
    fused: str | None = None

    @property
    def name(self) -> str:
        """As the command line takes it."""
        schemes = self.linear if self.embedding is None else f"{self.linear}+{self.embedding}"
        return schemes if self.fused is None else f"{schemes}:{self.fused}"


FUSED = ("dynamic", "static")
# The last row is the paper's setting: 3-bit weights, 4-bit embeddings.
DEFAULT_WAYS = (
    Way("w8a8"), Way("w8a8", None, "dynamic"), Way("w8a8", None, "static"), Way("w8a8", "w8"), Way("w4a8"), Way("w4a16"),
    Way("gobo4"), Way("gobo4a8"), Way("gobo3"), Way("gobo3a8"), Way("gobo3", "gobo4"),
)  # fmt: skip

Step = Callable[[str], None]


class Row(BaseModel):
    """One way to store the model.

    Attributes:
        name: linear scheme, the embeddings' after a plus sign, the fused encoder's scales after a colon.
        bits_per_weight: of the quantized weights, with all metadata; 32 for the original.
        file_bytes, percent_of_float32: of the weights' file.
        quantize_seconds: None for the original.
        forward_ms: median of interleaved forwards at `Comparison.batch` x `Comparison.seq` tokens.
        speedup: over the original in the same rounds.
        cosine_mean, cosine_min: of text embeddings to the original's, over all texts of all tasks.
        results: one for each task.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    bits_per_weight: float
    file_bytes: int
    percent_of_float32: float
    quantize_seconds: float | None
    forward_ms: float
    speedup: float
    cosine_mean: float
    cosine_min: float
    results: list[EvalResult]


class ComparisonTable(BaseModel):
    """All rows, and where they were measured."""

    model_config = ConfigDict(extra="forbid")

    model: str
    device: str
    torch_version: str
    batch: int
    seq: int
    rows: list[Row]


def compare(
    source: str,
    tasks: Sequence[Any],
    ways: Sequence[tuple[str | None, ...]] | None = None,
    *,
    batch: int = 8,
    seq: int = 128,
    step: Step = lambda text: None,
) -> ComparisonTable:
    """Quantizes `source` in several ways and measures each against the original.

    Args:
        source: local folder, hub id or alias of a float model.
        tasks: names or data, see `qbert.evaluate`.
        ways: a `Way`, or its first fields, for each row; by default `DEFAULT_WAYS`, without the fused ones for a model that
            cannot be fused.
        batch, seq: shape of the timed forward.
        step: told what is being done.
    """
    if not tasks:
        raise QBertError("no task to compare on; allowed: at least one")
    chosen = [_checked(each) for each in (DEFAULT_WAYS if ways is None else ways)]
    original = load_any(source)
    chosen = _possible(chosen, original, asked_for=ways is not None)
    tokenizer = load_tokenizer(resolve_model(source))
    baselines = []
    for task in tasks:
        step(f"float32 on {getattr(task, 'name', task)}")
        baselines.append(prepare_baseline(original, tokenizer, task))
    measured = []
    models: dict[str, nn.Module] = {"float32": original}
    with tempfile.TemporaryDirectory() as folder:
        for way in chosen:
            name = way.name
            step(name)
            calibrate_with = DEFAULT_TEXTS if way.fused == "static" else None
            recipe, fuse = Recipe(way.linear, way.embedding), way.fused is not None
            report = quantize_checkpoint(source, Path(folder) / name, recipe, fuse=fuse, calibrate_with=calibrate_with)
            models[name] = load_any(report.folder)  # what is evaluated went through a file
            measured.append((name, report, [score(models[name], tokenizer, baseline) for baseline in baselines]))
    step(f"timing {batch} x {seq} tokens")
    milliseconds = _forward_ms(models, batch, seq)
    rows = [_original_row(original, baselines, milliseconds["float32"])]
    for name, report, results in measured:
        comparisons = [(result, result.comparison) for result in results if result.comparison is not None]
        texts = sum(result.n for result, _ in comparisons)
        rows.append(
            Row(
                name=name,
                bits_per_weight=report.bits_per_weight,
                file_bytes=report.file_bytes,
                percent_of_float32=report.percent_of_float32,
                quantize_seconds=report.seconds,
                forward_ms=milliseconds[name],
                speedup=milliseconds["float32"] / milliseconds[name],
                cosine_mean=sum(result.n * each.cosine_mean for result, each in comparisons) / texts,
                cosine_min=min(each.cosine_min for _, each in comparisons),
                results=results,
            )
        )
    return ComparisonTable(
        model=source,
        device=device_description(torch.device("cpu")),
        torch_version=torch.__version__,
        batch=batch,
        seq=seq,
        rows=rows,
    )


def to_table(comparison: ComparisonTable) -> Table:
    """The comparison as a rich table."""
    table = Table(
        title=f"{comparison.model}, forward {comparison.batch} x {comparison.seq} on {comparison.device}, "
        f"torch {comparison.torch_version}",
        title_justify="left",
    )
    for header in (
        "scheme",
        "bits",
        "file MB",
        "% fp32",
        "quantize s",
        "forward ms",
        "speed-up",
        "cos mean",
        "cos min",
    ):
        table.add_column(header, justify="left" if header == "scheme" else "right")
    for result in comparison.rows[0].results:
        table.add_column(f"{result.task}\n{result.metric}, n={result.n}", justify="right")
    for row in comparison.rows:
        table.add_row(*_cells(row))
    table.caption = (
        "bits: stored bits per quantized weight with scales, dictionaries and outliers. Tasks: score, and the paired change "
        "against float32 in points with its 95% interval."
    )
    table.caption_justify = "left"
    return table


def plot(comparison: ComparisonTable, path: str | Path) -> None:
    """Bits per weight against cosine and against each task's score, to a picture file.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("pictures need matplotlib; install it with: pip install 'qbert[plot]'") from None
    original, schemes = comparison.rows[0], comparison.rows[1:]
    columns = 2 if original.results else 1
    lines = math.ceil((1 + len(original.results)) / columns)
    figure = Figure(figsize=(5.2 * columns + 2.2, 3.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    _draw(
        axes[0],
        schemes,
        [(row.cosine_mean, row.cosine_mean, row.cosine_mean) for row in schemes],
        "mean cosine to float32",
    )
    for axis, result in zip(axes[1:], original.results, strict=False):
        index = original.results.index(result)
        values = [_with_interval(row.results[index]) for row in schemes]
        _draw(axis, schemes, values, f"{result.task}: {result.metric}, n={result.n}")
        axis.axhline(result.score, color="0.35", linestyle="--", linewidth=1, label="float32")
    for axis in axes[1 + len(original.results) :]:
        axis.remove()
    handles, labels = axes[-1 if len(axes) == 1 else 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="linears + embeddings")
    figure.suptitle(f"{comparison.model}: stored bits against quality (bars: 95% of the paired change)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# Okabe and Ito's palette, told apart by colour-blind people too; int8 activations have hollow markers.
_FAMILIES = {"w8": ("#0072B2", "s"), "w4": ("#D55E00", "^"), "gobo4": ("#009E73", "o"), "gobo3": ("#CC79A7", "D")}


def _with_interval(result: EvalResult) -> tuple[float, float, float]:
    """Score, and the ends of the paired 95% interval around it."""
    change = result.comparison
    assert change is not None
    low, high = change.baseline_score - change.drop_interval[1], change.baseline_score - change.drop_interval[0]
    return result.score, low, high


def _draw(axis: Any, rows: Sequence[Row], values: Sequence[tuple[float, float, float]], label: str) -> None:
    """One panel: (value, low, high) of each row over its bits."""
    for row, (value, low, high) in zip(rows, values, strict=True):
        colour, marker = next(
            (style for prefix, style in _FAMILIES.items() if row.name.startswith(prefix)), ("0.5", "x")
        )
        axis.errorbar(
            row.bits_per_weight,
            value,
            [[max(0.0, value - low)], [max(0.0, high - value)]],
            color=colour,
            marker="*" if "+" in row.name else marker,
            markersize=10 if "+" in row.name else 7,
            markerfacecolor="none" if "a8" in row.name else colour,
            elinewidth=0.8,
            linestyle="none",
            label=row.name,
        )
    axis.set_xlabel("stored bits per quantized weight")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _checked(fields: Sequence[str | None]) -> Way:
    """Complains before anything long starts."""
    way = Way(*fields)  # type: ignore[arg-type]
    if way.fused is not None and way.fused not in FUSED:
        raise QBertError(f"fused encoder {way.fused!r}; allowed: {', '.join(FUSED)}")
    Recipe(way.linear, way.embedding)
    return way


def _possible(ways: list[Way], model: nn.Module, asked_for: bool) -> list[Way]:
    """Without the fused ones where nothing can be fused; an error if the user wants them."""
    if any(encoders(model)) or not any(way.fused for way in ways):
        return ways
    if asked_for:
        raise QBertError(f"no fused encoder: {obstacle(model)}")
    return [way for way in ways if way.fused is None]


def _original_row(original: nn.Module, baselines: Sequence[Baseline], forward_ms: float) -> Row:
    float32_bytes = sum(4 * parameter.numel() for parameter in original.parameters())
    return Row(
        name="float32",
        bits_per_weight=32.0,
        file_bytes=float32_bytes,
        percent_of_float32=100.0,
        quantize_seconds=None,
        forward_ms=forward_ms,
        speedup=1.0,
        cosine_mean=1.0,
        cosine_min=1.0,
        results=[baseline.result for baseline in baselines],
    )


def _forward_ms(models: dict[str, nn.Module], batch: int, seq: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(getattr(next(iter(models.values())).config, "vocab_size", 1000))
    ids = torch.randint(0, vocabulary, (batch, seq), generator=generator)
    with torch.inference_mode():
        runs = {name: (lambda model=model: model(input_ids=ids)) for name, model in models.items()}
        seconds = medians(runs)
    return {name: 1e3 * value for name, value in seconds.items()}


def _cells(row: Row) -> list[str]:
    cells = [
        row.name,
        f"{row.bits_per_weight:.2f}",
        f"{row.file_bytes / 1e6:.1f}",
        f"{row.percent_of_float32:.1f}",
        "" if row.quantize_seconds is None else f"{row.quantize_seconds:.1f}",
        f"{row.forward_ms:.0f}",
        f"{row.speedup:.2f}x",
        f"{row.cosine_mean:.4f}",
        f"{row.cosine_min:.3f}",
    ]
    for result in row.results:
        change = result.comparison
        cells.append(
            f"{result.score:.1f} [{result.interval[0]:.1f}, {result.interval[1]:.1f}]"
            if change is None
            else f"{result.score:.1f}  {-change.drop:+.1f} [{-change.drop_interval[1]:+.1f}, {-change.drop_interval[0]:+.1f}]"
        )
    return cells
