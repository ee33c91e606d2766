"""Smaller without training: what each plan costs and saves, losing rows too.

    python -m benchmarks.bench_compress --model minilm --task trec --task lee
    python -m benchmarks.bench_compress --fine-tune trec --plan "prune x2" --plan "prune x2, Kwon"     a classifier, with labels
    python -m benchmarks.bench_compress --macs --scheme none --texts trec --task trec     no times: the same on every machine

Every row compresses a fresh copy of the model by a recipe, on texts of none of the tasks, and is scored against the original:
the paired change in points, its 95% interval, and the milliseconds of the model quantized, calibrated and fused. Kwon's method
(2022), magnitudes and chance have the same budgets and the same code that takes units out (`qbert.compress.baselines`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict
from torch import nn

from qbert.compress import Compression, CompressionReport, compress
from qbert.compress.report import stored_bytes
from qbert.errors import QBertError
from qbert.evaluate import (
    Baseline,
    EvalResult,
    class_map,
    finetuned_model,
    get_task,
    load_fp32,
    load_tokenizer,
    prepare_baseline,
    score,
)
from qbert.recipe import NONE
from qbert.workflow import compression_texts, load_float
from qbert.zoo import resolve_model

# Other ways to choose, and what is done to the weights that are left, by the arguments of `prune_`.
OTHERS: dict[str, dict[str, Any]] = {
    "Kwon": {"method": "fisher", "refit": "scales"},
    "Kwon's choice, refitted": {"method": "fisher"},
    "magnitude": {"method": "magnitude", "refit": False},
    "magnitude, refitted": {"method": "magnitude"},
    "random": {"method": "random", "refit": False},
    "random, refitted": {"method": "random"},
}
# Name -> fields of `qbert.Compression` beside the scheme.
PLANS: dict[str, dict[str, Any]] = {
    "quantized only": {},
    "5 layers": {"layers": 5},
    "4 layers": {"layers": 4},
    "prune x1.25": {"prune": {"speedup": 1.25}},
    "prune x1.5": {"prune": {"speedup": 1.5}},
    "prune x2": {"prune": {"speedup": 2.0}},
    "prune x1.5, means only": {"prune": {"speedup": 1.5, "refit": False}},
    "prune x1.5, uniform": {"prune": {"speedup": 1.5, "uniform": True}},
    **{
        f"prune x{times:g}, {name}": {"prune": {"speedup": times, **how}}
        for times in (1.25, 1.5, 2.0)
        for name, how in OTHERS.items()
    },
    "5 layers, prune x1.25": {"layers": 5, "prune": {"speedup": 1.25}},
    "low rank where it pays": {"rank": "auto"},
    "low rank, 99% of the energy": {"rank": {"energy": 0.99}},
    "low rank, 99.95% of the energy": {"rank": {"energy": 0.9995}},
    "low rank, by outputs alone": {"rank": {"fisher": False}},
    "FFN out of rank 192": {"rank": {"rank": 192, "linears": ["ffn_out"]}},
    "prune x1.25, low rank": {"prune": {"speedup": 1.25}, "rank": "auto"},
    "2:4": {"sparsity": "2:4"},
    "2:4, magnitude": {"sparsity": {"sparsity": "2:4", "method": "magnitude"}},
    "50% zeros": {"sparsity": 0.5},
    "50% zeros, magnitude": {"sparsity": {"sparsity": 0.5, "method": "magnitude"}},
    "70% zeros": {"sparsity": 0.7},
    "70% zeros, magnitude": {"sparsity": {"sparsity": 0.7, "method": "magnitude"}},
    "gobo4a8 in place of zeros": {"quantize": "gobo4a8+none"},
    "gobo3a8 in place of zeros": {"quantize": "gobo3a8+none"},
    "16,384 words": {"vocabulary": 16384},
    "8,192 words": {"vocabulary": 8192},
}


class Row(BaseModel):
    """One plan: its report, the scores of the finished model on the tasks, and what a file of it takes."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    report: CompressionReport
    scores: list[EvalResult]
    megabytes: float


def fields_of(plan: str, macs: bool) -> dict[str, Any]:
    """Of a plan's recipe; with `macs` a budget of milliseconds is one of multiply-adds, by as many times fewer."""
    fields = copy.deepcopy(PLANS[plan])
    pruning = fields.get("prune")
    if macs and pruning is not None:
        pruning["macs"] = 1 / pruning.pop("speedup")
    return fields


def run_plan(
    model: nn.Module,
    tokenizer: Any,
    plan: str,
    scheme: str | None,
    baselines: list[Baseline],
    texts: Sequence[str],
    *,
    labels: Sequence[int] | None = None,
    macs: bool = False,
) -> Row:
    """Compresses a copy of the model and scores it; nothing is timed with `macs`."""
    recipe = Compression.of(**{"quantize": scheme, **fields_of(plan, macs)})
    small = compress(model, recipe, texts=texts, tokenizer=tokenizer, labels=labels, measure=not macs)
    scores = [score(small.model, small.tokenizer, each) for each in baselines]
    return Row(plan=plan, report=small.report, scores=scores, megabytes=stored_bytes(small.model) / 1e6)


def line(row: Row) -> str:
    """A row of the table: plan, milliseconds, speed-up over the quantized original, and the tasks."""
    first, last = row.report.steps[0], row.report.steps[-1]
    macs, parameters = last.size.macs / first.size.macs, last.size.parameters / first.size.parameters
    faster = "" if last.speedup is None else f"{last.speedup:.2f}x ({last.ms:.0f} ms)"
    seconds = sum(step.seconds for step in row.report.steps)
    cells = [
        row.plan,
        f"x{macs:.2f}",
        f"x{parameters:.2f}",
        f"{row.megabytes:.1f}",
        faster,
        f"{last.agreement.mean:.3f}",
    ]
    for found in row.scores:
        assert found.comparison is not None
        low, high = found.comparison.drop_interval
        cells.append(f"{-found.comparison.drop:+.1f} [{-high:+.1f}, {-low:+.1f}]")
    return f"| {' | '.join([*cells, f'{seconds:.0f}'])} |"


def details(row: Row) -> list[str]:
    """What became of each linear that might have been two: why it is, or why not."""
    notes = [note for step in row.report.steps if step.method == "low rank" for note in step.notes]
    return [f"\n{row.plan}:", *notes] if notes else []


def header(tasks: list[str]) -> str:
    """The first two lines of the table."""
    cells = ["plan", "multiply-adds", "parameters", "MB", "faster than quantized only", "agreement", *tasks, "s"]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def labelled(model: nn.Module, task: str, count: int) -> tuple[list[str], list[int]]:
    """Training texts of a task, and their labels as a classifier counts its classes."""
    train = get_task(task).load().train.sample(count)
    classes = class_map(model, train.label_names)
    if classes is None:
        raise QBertError(f"--fine-tune {task}: the model has no classes of that task")
    return list(train.texts), [classes[label] for label in train.labels]


def main(
    model: Annotated[str, typer.Option(help="alias, folder or hub id")] = "minilm",
    task: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    plan: Annotated[list[str] | None, typer.Option(help="some of the plans, by name; may be repeated")] = None,
    scheme: Annotated[str, typer.Option(help="of the finished model; none to stay float")] = "w8a8",
    texts: Annotated[str, typer.Option(help="to compress by, see `qbert compress`")] = "sms,amazon,rt,movie",
    count: Annotated[int, typer.Option(help="of those texts, at most; words take as many as they get")] = 1024,
    fine_tune: Annotated[
        str | None,
        typer.Option(help="a task: its classifier is compressed (trained first, cached), by its labelled texts"),
    ] = None,
    macs: Annotated[
        bool, typer.Option("--macs", help="budgets of multiply-adds in place of milliseconds; no times")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="rows as JSON, written as they come")] = None,
) -> None:
    """Run the plans one after the other and print a row for each."""
    names, tasks = plan or list(PLANS), task or ([fine_tune] if fine_tune else ["trec", "lee"])
    for name in names:
        if name not in PLANS:
            raise QBertError(f"plan {name!r}; allowed: {', '.join(PLANS)}")
    path = resolve_model(model) if fine_tune is None else str(finetuned_model(resolve_model(model), fine_tune))
    original, tokenizer = load_float(path) if fine_tune else load_fp32(path), load_tokenizer(path)
    baselines = [prepare_baseline(original, tokenizer, each) for each in tasks]
    print(header(tasks))
    rows, labels = list[Row](), None
    given = compression_texts(texts)[:count] if fine_tune is None else []
    if fine_tune is not None:
        given, labels = labelled(original, fine_tune, count)
    for name in names:
        if not fields_of(name, macs) and scheme == NONE:
            continue  # the original itself
        rows.append(
            run_plan(
                original,
                tokenizer,
                name,
                None if scheme == NONE else scheme,
                baselines,
                given,
                labels=labels,
                macs=macs,
            )
        )
        print(line(rows[-1]), flush=True)
        if out is not None:
            out.write_text(json.dumps([row.model_dump(mode="json") for row in rows], indent=1))
    for row in rows:
        print("\n".join(details(row)), end="\n" if details(row) else "")


if __name__ == "__main__":
    typer.run(main)
