"""What a classifier saves whose encoder computes in its last layer only the token that is read.

    python -m benchmarks.bench_readers
    python -m benchmarks.bench_readers --model base --cases 8x128,1x16

The same fused classifier in turns: as it is, and with a hook on its encoder that does nothing, for whose sake every token is
computed. The logits of both are compared bit for bit.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.table import Table

from qbert.calibrate import calibrate
from qbert.convert import quantize_
from qbert.errors import QBertError
from qbert.recipe import Recipe
from qbert.target import physical_cores
from qbert.timing import Rules, Sample, measure, ratio

from . import options
from .bert_models import random_model
from .machine import Machine, describe
from .problems import SHAPES, Shape
from .recorder import QUIET_LOAD, device_name, run_command, table_console

MODELS, CASES = "base,minilm-shape", "8x128,32x128,1x16"
SCALES = ("static", "dynamic")
_CALIBRATION = (4, 32)  # sequences, tokens of each


class Row(NamedTuple):
    """One classifier, one batch.

    Attributes:
        every, first: with all tokens in the last layer, and with first ones.
        factor: how many times faster that is: the median of ratios within a round.
    """

    scales: str
    case: str
    every: Sample
    first: Sample
    factor: float


def classifier(shape: Shape, static: bool) -> Any:
    """A fused `...ForSequenceClassification` of a shape, with random weights, scales calibrated on random tokens."""
    model, calibration = random_model(shape, classifies=True), None
    if static:
        calibration = calibrate(model, [_batch(shape, *_CALIBRATION)])
    return quantize_(model, Recipe("w8a8"), fuse=True, calibration=calibration)


def _batch(shape: Shape, sequences: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(shape.vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rows(shape: Shape, cases: list[tuple[int, int]], seconds: float) -> list[Row]:
    """Both kinds of scales, all batches.

    Raises:
        QBertError: the logits of both ways are not the same bits.
    """
    found = []
    for scales in SCALES:
        model = classifier(shape, scales == "static")
        for sequences, tokens in cases:
            found.append(_row(model, scales, _batch(shape, sequences, tokens), seconds))
    return found


@torch.inference_mode()
def _row(model: Any, scales: str, batch: dict[str, torch.Tensor], seconds: float) -> Row:
    def first() -> Any:
        return model(**batch).logits

    def every() -> Any:
        handle = model.base_model.register_forward_hook(lambda *_: None)
        try:
            return model(**batch).logits
        finally:
            handle.remove()

    case = "x".join(str(size) for size in batch["input_ids"].shape)
    if not torch.equal(first(), every()):
        raise QBertError(f"logits of {case} differ between first tokens and all")
    samples = measure({"every": every, "first": first}, "cpu", Rules(seconds=seconds))
    return Row(scales, case, samples["every"], samples["first"], ratio(samples["every"], samples["first"]))


def table(name: str, found: list[Row], threads: int, machine: Machine) -> Table:
    """Milliseconds both ways, and the factor."""
    drawn = Table(
        title=f"Classifier of {name}: the last layer for first tokens alone; {threads} threads; {device_name(machine)}; "
        f"commit {machine.commit}, {machine.date}",
        title_justify="left", caption="logits equal bit for bit", caption_justify="left",
    )  # fmt: skip
    for header in ("scales", "batch"):
        drawn.add_column(header)
    for header in ("all tokens ms", "first tokens ms", "faster by"):
        drawn.add_column(header, justify="right")
    for each in found:
        ms = (f"{sample.median * 1e3:.2f}" for sample in (each.every, each.first))
        drawn.add_row(each.scales, each.case, *ms, f"{each.factor - 1:.1%}")
    return drawn


def main(
    model: Annotated[str, typer.Option(help=f"shapes, with commas: {', '.join(SHAPES)}")] = MODELS,
    cases: Annotated[str, typer.Option(help="BATCHxLENGTH, with commas")] = CASES,
    seconds: Annotated[float, typer.Option(min=0.0, help="for each way of each batch")] = 5.0,
    threads: options.Threads = None,
) -> None:
    """Prints what reading first tokens alone saves a fused classifier on this CPU."""
    count, machine, console = threads or physical_cores(), describe(), table_console()
    torch.set_num_threads(count)
    for name in model.split(","):
        if name not in SHAPES:
            raise QBertError(f"model {name!r} is no shape; allowed: {', '.join(SHAPES)}")
        found = rows(SHAPES[name], [_case(each) for each in cases.split(",")], seconds)
        console.print(table(name, found, count, machine))
    if machine.load_average > count + QUIET_LOAD:
        console.print(f"load average {machine.load_average:.1f}: something else was running; these are no measurements")


def _case(text: str) -> tuple[int, int]:
    sequences, _, tokens = text.partition("x")
    if not (sequences.isdecimal() and tokens.isdecimal() and int(sequences) and int(tokens)):
        raise QBertError(f"case {text!r}; allowed: BATCHxLENGTH, such as 8x128")
    return int(sequences), int(tokens)


if __name__ == "__main__":
    run_command(main)
