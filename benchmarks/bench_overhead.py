"""What a fused encoder costs besides its kernels' work: microseconds of Python a step and a layer, their share of a forward.

    python -m benchmarks.bench_overhead
    python -m benchmarks.bench_overhead --threads 8 --no-steps

Python: a forward of 1 x 4 tokens through a narrow encoder (`NARROW`) by one thread, whose kernels do next to nothing. Launches:
what that forward takes longer with all threads, which each kernel wakes. Both are the same whatever the width, so of a forward
of few tokens through BERT-base, which has as many layers, they are the share that no faster kernel changes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from qbert.analyze import AnalyzeResult, analyze
from qbert.analyze.result import StepResult
from qbert.calibrate import calibrate
from qbert.convert import quantize_
from qbert.recipe import Recipe
from qbert.target import physical_cores

from . import options
from .bert_models import random_model
from .machine import Machine, describe
from .problems import SHAPES, Shape
from .recorder import QUIET_LOAD, device_name, run_command, table_console

NARROW = Shape(layers=12, hidden=64, heads=2, inner=256, vocabulary=1000)
NARROW_BATCH, BASE = (1, 4), SHAPES["base"]
BATCHES = ((1, 16), (2, 16))
SCALES = ("static", "dynamic")
REPEATS, NARROW_REPEATS = 30, 200
_SCHEME = "w8a8"
_CALIBRATION = (4, 32)  # sequences, tokens of each
_PEAKS = "h100"  # an analysis predicts times, too: of a machine that need not be measured
_US_PER_MS = 1e3


@dataclass(frozen=True)
class Overhead:
    """Forwards of one encoder with one kind of scales.

    Attributes:
        narrow, awake: of the narrow encoder, by one thread and by all.
        real: of BERT-base by all threads, batch by batch.
    """

    scales: str
    narrow: AnalyzeResult
    awake: AnalyzeResult
    real: list[AnalyzeResult]

    @property
    def python_us(self) -> float:
        """Of a forward."""
        return forward_us(self.narrow)

    @property
    def launches_us(self) -> float:
        """Of a forward; below the noise it can come out negative."""
        return forward_us(self.awake) - forward_us(self.narrow)


def forward_us(result: AnalyzeResult) -> float:
    """Microseconds of a plain forward."""
    assert result.total.measured_ms is not None
    return result.total.measured_ms * _US_PER_MS


def steps_us(steps: Sequence[StepResult]) -> float:
    """Microseconds of steps."""
    return sum(step.measured_ms or 0.0 for step in steps) * _US_PER_MS


def kinds(result: AnalyzeResult) -> dict[str, list[StepResult]]:
    """The steps by name: alike in all layers."""
    found: dict[str, list[StepResult]] = {}
    for step in result.programs[0].steps:
        found.setdefault(step.step, []).append(step)
    return found


def fused_encoder(shape: Shape, static: bool) -> Any:
    """A fused BertModel of a shape, with random weights and its scales calibrated on random tokens."""
    model = random_model(shape)
    calibration = None
    if static:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(shape.vocabulary, _CALIBRATION, generator=generator)
        calibration = calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    return quantize_(model, Recipe(_SCHEME), fuse=True, calibration=calibration)


def measure(
    scales: str, threads: int, *, shape: Shape = BASE, narrow: Shape = NARROW, repeats: int = REPEATS,
    narrow_repeats: int = NARROW_REPEATS,
) -> Overhead:  # fmt: skip
    """All forwards of an encoder of that shape, and of a narrow one of as many layers."""
    of = functools.partial(analyze, target=_PEAKS)
    small, before = fused_encoder(narrow, scales == "static"), torch.get_num_threads()
    batch, seq = NARROW_BATCH
    try:
        torch.set_num_threads(1)
        alone = of(small, batch=batch, seq=seq, repeats=narrow_repeats)
        torch.set_num_threads(threads)
        awake = alone if threads == 1 else of(small, batch=batch, seq=seq, repeats=narrow_repeats)
        large = fused_encoder(shape, scales == "static")
        real = [of(large, batch=batch, seq=seq, repeats=repeats) for batch, seq in BATCHES]
    finally:
        torch.set_num_threads(before)
    return Overhead(scales, alone, awake, real)


# ---- tables ---------------------------------------------------------------------------------------------------------


def narrow_table(found: Sequence[Overhead], machine: Machine) -> Table:
    """Microseconds of Python."""
    batch, seq = NARROW_BATCH
    drawn = Table(
        title=f"Python of a fused encoder: {NARROW.layers} layers of {NARROW.hidden}, {batch} x {seq} tokens, one thread; "
        f"{device_name(machine)}; commit {machine.commit}, {machine.date}",
        title_justify="left", caption_justify="left",
        caption="us a layer: its steps, timed where they run. outside: of the forward what is in no step: Python between the "
        "steps, packing, the result.",
    )  # fmt: skip
    drawn.add_column("scales")
    for header in ("forward us", "steps", "us a step", "steps a layer", "us a layer", "outside us"):
        drawn.add_column(header, justify="right")
    for each in found:
        steps = each.narrow.programs[0].steps
        in_layers = [step for step in steps if step.part != "embedding"]
        layers = len({step.layer for step in in_layers})
        drawn.add_row(
            each.scales, f"{each.python_us:.0f}", str(len(steps)), f"{steps_us(steps) / len(steps):.2f}",
            f"{len(in_layers) / layers:g}", f"{steps_us(in_layers) / layers:.1f}", f"{each.python_us - steps_us(steps):.0f}",
        )  # fmt: skip
    return drawn


def step_table(each: Overhead, threads: int) -> Table:
    """Kinds of steps: how often, and how long once."""
    shape = f"{len(each.real[0].programs[0].steps)} steps, {each.scales} scales, {threads} threads"
    drawn = Table(title=f"One step in microseconds; {shape}", title_justify="left")
    for header in ("step", "part"):
        drawn.add_column(header)
    batches = [f"{batch} x {seq}" for batch, seq in BATCHES]
    for header in ("times", "Python", *(f"{batch}{suffix}" for batch in batches for suffix in (" us", " %"))):
        drawn.add_column(header, justify="right")
    narrow, real = kinds(each.narrow), [kinds(result) for result in each.real]
    for name, steps in real[0].items():
        cells = []
        for result, found in zip(each.real, real, strict=True):
            us = steps_us(found[name])
            cells += [f"{us / len(steps):.2f}", f"{us / forward_us(result):.1%}"]
        alone = f"{steps_us(narrow[name]) / len(narrow[name]):.2f}" if name in narrow else "-"
        drawn.add_row(name, steps[0].part, str(len(steps)), alone, *cells)
    outside = [forward_us(result) - steps_us(result.programs[0].steps) for result in (each.narrow, *each.real)]
    shares = [f"{us / forward_us(result):.1%}" for us, result in zip(outside[1:], each.real, strict=True)]
    figures = (cell for us, share in zip(outside[1:], shares, strict=True) for cell in (f"{us:.1f}", share))
    drawn.add_row("outside of steps", "", "1", f"{outside[0]:.1f}", *figures)
    return drawn


def share_table(found: Sequence[Overhead], threads: int) -> Table:
    """Of a whole forward."""
    drawn = Table(
        title=f"Shares of a forward of BERT-base's shape, {threads} threads", title_justify="left", caption_justify="left",
        caption="Python, launches: the narrow encoder's, see above. norms: their steps as they are, with their Python.",
    )  # fmt: skip
    for header in ("scales", "tokens"):
        drawn.add_column(header)
    for header in ("forward us", "Python", "launches", "norms"):
        drawn.add_column(header, justify="right")
    for each in found:
        for cells in _shares(each):
            drawn.add_row(*cells)
    return drawn


def _shares(each: Overhead) -> Iterator[list[str]]:
    for (batch, seq), result in zip(BATCHES, each.real, strict=True):
        total = forward_us(result)
        norms = steps_us([step for step in result.programs[0].steps if step.part == "norm"])
        shares = (each.python_us / total, each.launches_us / total, norms / total)
        yield [each.scales, f"{batch} x {seq}", f"{total:.0f}", *(f"{share:.1%}" for share in shares)]


def main(
    threads: options.Threads = None,
    steps: Annotated[bool, typer.Option("--steps/--no-steps", help="each kind of step, too")] = True,
) -> None:
    """Prints what Python, launches and norms cost a fused encoder on this CPU."""
    count, machine = threads or physical_cores(), describe()
    found = [measure(scales, count) for scales in SCALES]
    console = table_console()
    console.print(narrow_table(found, machine))
    for each in found if steps else ():
        console.print(step_table(each, count))
    console.print(share_table(found, count))
    if machine.load_average > count + QUIET_LOAD:
        console.print(f"load average {machine.load_average:.1f}: something else was running; these are no measurements")


if __name__ == "__main__":
    run_command(main)
