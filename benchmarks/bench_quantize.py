"""How long quantizing takes and how much memory it needs, scheme by scheme.

    python -m benchmarks.bench_quantize --model minilm --model base

Each row runs in a process of its own, so that its peak memory is its own. One that fails is a row with its reason.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from qbert.convert import quantize_
from qbert.errors import QBertError
from qbert.explain import explain
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.recipe import Recipe
from qbert.timing import reason_of
from qbert.workflow import load_float

from . import options
from .bert_models import random_model
from .machine import Machine, child_command, child_environment
from .problems import SHAPES
from .recorder import Recorder, device_name, device_of, run_command, table_console
from .results_schema import QuantizeRow

_MIB = 2**20
_RUSAGE_UNIT = 1024 if sys.platform == "linux" else 1  # kibibytes on Linux, bytes on macOS
_TIMEOUT = 900.0
_QUICK_SCHEMES = ("w8a8", "w4a8", "gobo3a8")


def load(name: str) -> nn.Module:
    """A model by name, or a shape with random weights as a trained model has them: no package holds a full-size BertModel."""
    model: nn.Module = random_model(SHAPES[name]) if name in SHAPES else load_float(name)
    return model


def measure(model_name: str, linear: str, embedding: str | None = None, target: str = "cpu") -> QuantizeRow:
    """One row: seconds, bits, and memory over that of the loaded model."""
    device = device_of(target)
    model, peak = load(model_name).to(device), _gpu_peak if target == "cuda" else _host_peak
    before, start = peak(), time.perf_counter()
    quantize_(model, Recipe(linear=linear, embedding=embedding))
    if target == "cuda":
        torch.cuda.synchronize()
    seconds, peak_bytes = time.perf_counter() - start, peak() - before
    explanation = explain(model)
    weights = sum(row.shape[0] * row.shape[1] for row in explanation.quantized)
    stored = sum(row.stored_bytes for row in explanation.quantized)
    floats = sum(parameter.numel() for parameter in model.parameters())  # norms, biases, what the recipe leaves
    return QuantizeRow(
        model=model_name, scheme=_name(linear, embedding), device=target, weights=weights,
        bits_per_weight=explanation.bits_per_weight, share_of_float32=(stored + 4 * floats) / (4 * (weights + floats)),
        seconds=seconds, peak_bytes=peak_bytes,
    )  # fmt: skip


def _host_peak() -> int:
    """Largest resident memory of this process so far."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RUSAGE_UNIT)


def _gpu_peak() -> int:
    return int(torch.cuda.max_memory_allocated())


def _name(linear: str, embedding: str | None) -> str:
    return linear if not embedding else f"{linear}+{embedding}"


Job = tuple[str, str, str | None, str]  # model, linear, embedding, target


def in_own_process(job: Job) -> QuantizeRow:
    """The row of a job, measured in a fresh process."""
    model, linear, embedding, target = job
    try:
        command = [*child_command("bench_quantize"), "--row", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=_TIMEOUT)
        if done.returncode == 0:
            return QuantizeRow.model_validate_json(done.stdout.splitlines()[-1])
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"exit status {done.returncode}"
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        reason = reason_of(error)
    return QuantizeRow(model=model, scheme=_name(linear, embedding), device=target, reason=reason)


def run(jobs: Sequence[Job], add: Callable[[QuantizeRow], None], console: Console | None = None) -> None:
    """All jobs, one after the other."""
    for job in track(jobs, "quantizing", console=console or Console(stderr=True), transient=True):
        add(in_own_process(job))


def table(rows: Sequence[QuantizeRow], machine: Machine) -> Table:
    """All rows."""
    shown = Table(title=f"quantizing on {device_name(machine)}, torch {machine.versions.get('torch', '?')}")
    for header in ("model", "scheme", "million weights", "bits", "% fp32", "seconds", "peak MiB over the model"):
        shown.add_column(header, justify="left" if header in ("model", "scheme") else "right")
    for row in rows:
        shown.add_row(row.model, row.scheme, *_cells(row))
    return shown


def _cells(row: QuantizeRow) -> list[str]:
    if row.reason is not None:
        return ["-", "-", "-", "-", row.reason]
    figures: list[tuple[Any, str]] = [
        ((row.weights or 0) / 1e6, ".1f"), (row.bits_per_weight, ".3f"), (100 * (row.share_of_float32 or 0), ".1f"),
        (row.seconds, ".2f"), ((row.peak_bytes or 0) / _MIB, ".0f"),
    ]  # fmt: skip
    return [format(value, pattern) for value, pattern in figures]


def main(
    model: Annotated[
        list[str] | None, typer.Option("--model", help=f"by name, or a shape: {', '.join(SHAPES)}")
    ] = None,
    scheme: Annotated[list[str] | None, typer.Option("--scheme", help="LINEAR or LINEAR+EMBEDDING")] = None,
    target: options.Target = "cpu",
    quick: Annotated[bool, typer.Option(help="three schemes, one model")] = False,
    json_path: options.JsonFile = None,
    row: Annotated[str | None, typer.Option("--row", hidden=True)] = None,
) -> None:
    """Time and memory of quantizing."""
    if row is not None:
        print(measure(*json.loads(row)).model_dump_json())
        return
    device_of(target)
    every = [*(name for name in scheme_names(Role.LINEAR) if not SCHEMES[name].is_variant), "gobo3+gobo4"]
    schemes = scheme or (list(_QUICK_SCHEMES) if quick else every)
    models = model or (["base"] if quick else ["minilm", "base"])
    jobs: list[Job] = []
    for name in models:
        for each in schemes:
            linear, _, embedding = each.partition("+")
            Recipe(linear=linear, embedding=embedding or None)  # complains before anything long starts
            jobs.append((name, linear, embedding or None, target))
    recorder = Recorder("quantize", {"models": models, "schemes": schemes, "target": target}, json_path, target)
    run(jobs, recorder.add)
    rows = recorder.of(QuantizeRow)
    table_console().print(table(rows, recorder.machine))
    if rows and all(each.reason for each in rows):
        raise QBertError(f"nothing could be quantized: {rows[0].reason}")


if __name__ == "__main__":
    run_command(main)
