"""How long quantizing takes and how much memory it needs, scheme by scheme.

    python -m benchmarks.bench_quantize --model minilm --model bert-base

Each row runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from qbert import quantize_
from qbert.analyze.targets import device_description
from qbert.explain import explain
from qbert.formats import Role, scheme_names
from qbert.recipe import Recipe
from qbert.workflow import load_float

BERT_BASE = "bert-base"  # the shape with seeded random weights: no package holds a full-size BertModel
_MIB = 2**20
_KIB_PER_RUSAGE_UNIT = 1 if sys.platform == "linux" else 1 / 1024  # kibibytes on Linux, bytes on macOS


def load(name: str) -> nn.Module:
    """A model by name, or BERT-base with random weights of the deviation it is initialized with."""
    if name != BERT_BASE:
        return load_float(name)
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB_PER_RUSAGE_UNIT * 1024 / _MIB


def measure(model_name: str, linear: str, embedding: str | None) -> dict[str, Any]:
    """One row: seconds, bits, and memory over that of the loaded model."""
    model = load(model_name)
    before = peak_mib()
    start = time.perf_counter()
    quantize_(model, Recipe(linear=linear, embedding=embedding))
    seconds = time.perf_counter() - start
    explanation = explain(model)
    weights = sum(row.shape[0] * row.shape[1] for row in explanation.quantized)
    stored = sum(row.stored_bytes for row in explanation.quantized)
    floats = sum(parameter.numel() for parameter in model.parameters())  # norms, biases, what the recipe leaves
    return {
        "model": model_name,
        "scheme": linear if embedding is None else f"{linear}+{embedding}",
        "million_weights": weights / 1e6,
        "bits_per_weight": explanation.bits_per_weight,
        "percent_of_float32": 100 * (stored + 4 * floats) / (4 * (weights + floats)),
        "seconds": seconds,
        "peak_mib_over_model": peak_mib() - before,
    }


def main(
    model: Annotated[list[str] | None, typer.Option("--model", help=f"model by name, or {BERT_BASE}")] = None,
    scheme: Annotated[list[str] | None, typer.Option("--scheme", help="LINEAR or LINEAR+EMBEDDING")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    row: Annotated[str | None, typer.Option("--row", hidden=True)] = None,
) -> None:
    """Time and memory of quantizing."""
    if row is not None:
        print(json.dumps(measure(*json.loads(row))))
        return
    schemes = scheme or [name for name in scheme_names(Role.LINEAR) if "-g" not in name] + ["gobo3+gobo4"]
    jobs = [(name, *(each.partition("+")[::2])) for name in model or ["minilm", BERT_BASE] for each in schemes]
    rows = [_in_own_process(*job) for job in track(jobs, console=Console(stderr=True), transient=True)]
    if as_json:
        print(json.dumps({"device": device_description(torch.device("cpu")), "torch": torch.__version__, "rows": rows}))
        return
    table = Table(title=f"quantizing on {device_description(torch.device('cpu'))}, torch {torch.__version__}")
    for header in ("model", "scheme", "million weights", "bits", "% fp32", "seconds", "peak MiB over the model"):
        table.add_column(header, justify="left" if header in ("model", "scheme") else "right")
    for each in rows:
        names = ("million_weights", "bits_per_weight", "percent_of_float32", "seconds", "peak_mib_over_model")
        figures = [each[name] for name in names]
        formats = ("{:.1f}", "{:.3f}", "{:.1f}", "{:.2f}", "{:.0f}")
        table.add_row(each["model"], each["scheme"], *(f.format(v) for f, v in zip(formats, figures, strict=True)))
    Console().print(table)


def _in_own_process(model: str, linear: str, embedding: str) -> dict[str, Any]:
    job = json.dumps([model, linear, embedding or None])
    command = [sys.executable, "-m", "benchmarks.bench_quantize", "--row", job]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1] if done.stderr else f"{job}: exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    typer.run(main)
