"""Size, bits and accuracy of every scheme on real tasks, beside other libraries, and beside what a survey printed.

    python -m benchmarks.bench_accuracy                         MiniLM on two tasks, some minutes
    python -m benchmarks.bench_accuracy --task trec --way gobo3+gobo4 --json out.json

qbert's models go through a file and back before they are scored. Peers quantize the same float32 model with their own
documented calls, so that what changes is their quantization alone. All are scored on the same texts with the same head, fitted
on float32's embeddings; the change is paired, text by text, with its 95% interval (see `qbert.evaluate`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from qbert.errors import QBertError
from qbert.evaluate import Baseline, EvalResult, get_task, load_tokenizer, prepare_baseline, score
from qbert.evaluate.loading import load_fp32
from qbert.recipe import Recipe
from qbert.timing import reason_of
from qbert.workflow import DEFAULT_TEXTS, load_any, quantize_checkpoint
from qbert.zoo import resolve_model

from . import options
from .machine import Machine
from .peers import bnb_peer
from .peers.ao_peer import configuration
from .peers.base import library
from .published import SOURCE, TABLE, published_rows
from .recorder import Recorder, device_name, run_command, table_console
from .results_schema import AccuracyRow

WAYS = (
    "w8a8", "w8a8:dynamic", "w8a8:static", "w8a8+w8", "w8a16", "w4a8", "w4a8:static", "w4a16", "gobo4", "gobo4a8",
    "gobo4a8:static", "gobo4+gobo4", "gobo3", "gobo3a8", "gobo3a8:static", "gobo3+w8", "gobo3+gobo4",
)  # fmt: skip
QUICK_WAYS = ("w8a8:static", "w4a8", "gobo3a8", "gobo3+gobo4")
TASKS, QUICK_TASKS = ("trec", "lee"), ("trec",)
MODEL = "minilm"
_CONFIDENCE, _PERCENT, _FLOAT32_BYTES = 0.95, 100.0, 4


@dataclass(frozen=True)
class Stored:
    """A model to score, and what it takes to store it."""

    model: nn.Module
    bits_per_weight: float
    stored_bytes: int
    share_of_float32: float


@dataclass(frozen=True)
class Entry:
    """A row before it is measured: LINEAR[+EMBEDDING][:dynamic|:static] of qbert's, or a peer."""

    name: str
    library: str
    scheme: str | None
    build: Callable[[str], Stored]


# ---- qbert ----------------------------------------------------------------------------------------------------------


def way(name: str) -> Entry:
    """A way of qbert's to store and run a model.

    Raises:
        QBertError: an unknown scheme, or something else than dynamic or static.
    """
    schemes, _, fused = name.partition(":")
    linear, _, embedding = schemes.partition("+")
    if fused not in ("", "dynamic", "static"):
        raise QBertError(f"way {name!r}; allowed after a colon: dynamic, static")
    recipe = Recipe(linear, embedding or None)
    return Entry(name, "qbert", linear, lambda source: _through_a_file(source, recipe, fused))


def _through_a_file(source: str, recipe: Recipe, fused: str) -> Stored:
    with tempfile.TemporaryDirectory() as folder:
        calibrate_with = DEFAULT_TEXTS if fused == "static" else None
        report = quantize_checkpoint(
            source, Path(folder) / "model", recipe, fuse=bool(fused), calibrate_with=calibrate_with
        )
        model = load_any(report.folder)
    return Stored(model, report.bits_per_weight, report.file_bytes, report.percent_of_float32 / _PERCENT)


# ---- peers ----------------------------------------------------------------------------------------------------------


def peers() -> tuple[Entry, ...]:
    """Other libraries' ways, linears only, as all of them leave embeddings alone."""
    return (
        Entry("bitsandbytes int8", "bitsandbytes", "w8a8", lambda source: _bitsandbytes(source, nf4=False)),
        Entry("bitsandbytes nf4", "bitsandbytes", "w4a16", lambda source: _bitsandbytes(source, nf4=True)),
        Entry("torchao int8 dynamic", "torchao", "w8a8", lambda source: _torchao(source, "int8")),
        Entry("torchao int8 weight-only", "torchao", "w8a16", lambda source: _torchao(source, "int8-weight")),
        Entry(
            "torchao int4 weight-only, a byte a code",
            "torchao",
            "w4a16",
            lambda source: _torchao(source, "int4-weight"),
        ),
        Entry("quanto int8", "optimum-quanto", "w8a16", lambda source: _quanto(source, "qint8")),
        Entry("quanto int4", "optimum-quanto", "w4a16", lambda source: _quanto(source, "qint4")),
    )


def _bitsandbytes(source: str, nf4: bool) -> Stored:
    model = load_fp32(resolve_model(source))
    before = _sizes(model)
    return _stored(bnb_peer.replace_linears(model, "cpu", nf4=nf4), before)


def _torchao(source: str, name: str) -> Stored:
    quantization = library("torchao.quantization")
    model = load_fp32(resolve_model(source))
    before = _sizes(model)
    quantization.quantize_(model, configuration(name))
    return _stored(model, before)


def _quanto(source: str, kind: str) -> Stored:
    quanto = library("optimum.quanto")
    model = load_fp32(resolve_model(source))
    before = _sizes(model)
    quanto.quantize(model, weights=getattr(quanto, kind), exclude="*embeddings*")
    quanto.freeze(model)
    return _stored(model, before)


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Weights in linears, and all parameters, of a float model."""
    linears = sum(each.weight.numel() for each in model.modules() if isinstance(each, nn.Linear))
    return linears, sum(parameter.numel() for parameter in model.parameters())


def _stored(model: nn.Module, before: tuple[int, int]) -> Stored:
    linears, parameters = before
    stored = sum(stored_bytes(each) for each in model.state_dict().values())
    bits = 8 * (stored - _FLOAT32_BYTES * (parameters - linears)) / linears
    return Stored(model.eval(), bits, stored, stored / (_FLOAT32_BYTES * parameters))


def stored_bytes(value: Any) -> int:
    """Of a tensor, or of the tensors that a subclass of tensor is made of."""
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return sum(stored_bytes(getattr(value, name)) for name in names)
    return value.numel() * value.element_size()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(entry: Entry, source: str, tokenizer: Any, baselines: Sequence[Baseline]) -> Iterator[AccuracyRow]:
    """A row for each task: figures, or the reason why there are none."""
    try:
        stored = entry.build(source)
    except Exception as error:  # whatever a library raises is a row with its reason
        for baseline in baselines:
            yield _row(entry, source, baseline, reason=reason_of(error))
        return
    for baseline in baselines:
        try:
            result = score(stored.model, tokenizer, baseline)
        except Exception as error:
            yield _row(entry, source, baseline, reason=reason_of(error))
            continue
        yield _scored(_row(entry, source, baseline), result, stored)


def _row(entry: Entry, source: str, baseline: Baseline, reason: str | None = None) -> AccuracyRow:
    return AccuracyRow(
        model=source, task=baseline.data.name, name=entry.name, library=entry.library, scheme=entry.scheme,
        metric=baseline.data.metric, float_score=baseline.score / _PERCENT, reason=reason,
    )  # fmt: skip


def _scored(row: AccuracyRow, result: EvalResult, stored: Stored) -> AccuracyRow:
    change = result.comparison
    assert change is not None
    row.score, row.drop, row.cosine = result.score / _PERCENT, change.drop / _PERCENT, change.cosine_mean
    row.drop_low, row.drop_high = (end / _PERCENT for end in change.drop_interval)
    row.confidence = _CONFIDENCE
    row.bits_per_weight, row.stored_bytes = stored.bits_per_weight, stored.stored_bytes
    row.share_of_float32 = stored.share_of_float32
    return row


def float_rows(source: str, baselines: Sequence[Baseline], parameters: int) -> list[AccuracyRow]:
    """The original's own rows."""
    return [
        AccuracyRow(
            model=source, task=each.data.name, name="float32", library="torch", metric=each.data.metric,
            float_score=each.score / _PERCENT, score=each.score / _PERCENT, drop=0.0, cosine=1.0, bits_per_weight=32.0,
            stored_bytes=_FLOAT32_BYTES * parameters, share_of_float32=1.0,
        )
        for each in baselines
    ]  # fmt: skip


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[AccuracyRow], machine: Machine) -> Iterator[Table]:
    """What was measured, then the survey's table with a column for it."""
    measured = [row for row in rows if not row.published]
    if measured:
        yield _measured(measured, machine)
    yield _published(measured)


def _measured(rows: Sequence[AccuracyRow], machine: Machine) -> Table:
    tasks = list(dict.fromkeys(row.task for row in rows))
    table = Table(
        title=f"accuracy of {rows[0].model}; {device_name(machine)}; commit {machine.commit}, {machine.date}",
        title_justify="left", caption_justify="left",
        caption="bits: stored per quantized weight, with scales, dictionaries and outliers. Tasks: score, and the paired "
        "change against float32 in points with its 95% interval. cosine: mean, of text embeddings to float32's.",
    )  # fmt: skip
    for header in ("scheme", "library", "bits", "% fp32", "cosine", *tasks):
        table.add_column(header, justify="left" if header in ("scheme", "library") else "right", overflow="fold")
    for name in dict.fromkeys(row.name for row in rows):
        own = {row.task: row for row in rows if row.name == name}
        first = next(iter(own.values()))
        bits = "-" if first.bits_per_weight is None else f"{first.bits_per_weight:.2f}"
        share = "-" if first.share_of_float32 is None else f"{first.share_of_float32:.1%}"
        cosines = [row.cosine for row in own.values() if row.cosine is not None]
        mean = f"{min(cosines):.4f}" if cosines else "-"
        table.add_row(name, first.library, bits, share, mean, *(_score(own.get(task)) for task in tasks))
    return table


def _score(row: AccuracyRow | None) -> str:
    if row is None or row.score is None:
        return "-" if row is None else row.reason or "-"
    score = f"{_PERCENT * row.score:.1f}"
    return score if row.drop_low is None else f"{score}  {_change(row)}"


def _change(row: AccuracyRow) -> str:
    """Points gained, with the interval's ends in their order."""
    if row.drop is None or row.drop_low is None or row.drop_high is None:
        return "-"
    ends = f"[{-_PERCENT * row.drop_high:+.1f}, {-_PERCENT * row.drop_low:+.1f}]"
    return f"{-_PERCENT * row.drop:+.1f} {ends}"


def _published(measured: Sequence[AccuracyRow]) -> Table:
    table = Table(
        title="published: a survey's table of BERT-base compressed, and what was measured here",
        title_justify="left", caption_justify="left",
        caption=f"{SOURCE}. Published changes are means over GLUE tasks and SQuAD of BERT-base, measured ones "
        "are on other tasks and another model: sizes compare, changes only in kind.",
    )  # fmt: skip
    for header in ("kind", "system", "size", "change", "nearest here", "size ", "change "):
        table.add_column(header, justify="right" if "size" in header or "change" in header else "left", overflow="fold")
    for each in TABLE:
        own = [row for row in measured if row.name == each.nearest and row.score is not None]
        size = f"{own[0].share_of_float32 or 0:.1%}" if own else "-"
        changes = "\n".join(f"{row.task} {_change(row)}" for row in own) or "-"
        nearest = f"{each.nearest}: {each.how_near}" if each.nearest else "not done here"
        table.add_row(each.kind, each.system, f"{each.share:.1f}%", f"{each.change:+.2f}", nearest, size, changes)
    return table


# ---- the command ----------------------------------------------------------------------------------------------------


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("accuracy", total=total)
        yield lambda name: bar.update(shown, advance=1, description=name)


def main(
    model: Annotated[str, typer.Option(help="local folder, hub id or alias of a float model")] = MODEL,
    task: Annotated[list[str] | None, typer.Option("--task", help="may be repeated")] = None,
    chosen: Annotated[
        list[str] | None, typer.Option("--way", help="LINEAR[+EMBEDDING][:dynamic|:static]; may be repeated")
    ] = None,
    with_peers: Annotated[bool, typer.Option("--peers/--no-peers", help="other libraries too")] = True,
    quick: Annotated[bool, typer.Option(help="one task, four ways")] = False,
    json_path: options.JsonFile = None,
) -> None:
    """Scores every scheme on real texts."""
    names = task or list(QUICK_TASKS if quick else TASKS)
    ways = chosen or list(QUICK_WAYS if quick else WAYS)
    entries = [way(name) for name in ways] + (list(peers()) if with_peers else [])
    tasks = [get_task(name) for name in names]
    recorder = Recorder("accuracy", {"model": model, "tasks": names, "ways": ways}, json_path)
    with _steps(1 + len(entries)) as step:
        step("float32")
        original, tokenizer = load_any(model), load_tokenizer(resolve_model(model))
        baselines = [prepare_baseline(original, tokenizer, each) for each in tasks]
        recorder.extend(float_rows(model, baselines, sum(each.numel() for each in original.parameters())))
        for entry in entries:
            step(entry.name)
            recorder.extend(measure(entry, model, tokenizer, baselines))
    recorder.extend(published_rows())
    for table in tables(recorder.of(AccuracyRow), recorder.machine):
        table_console().print(table)


if __name__ == "__main__":
    run_command(main)
