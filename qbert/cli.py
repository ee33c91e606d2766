"""L13. The command line: parses, calls, prints. `--json` gives every command's result to machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qbert.errors import QBertError
from qbert.formats import FORMATS, SCHEMES, Kind
from qbert.recipe import Recipe

EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="qbert",
    help="BERT-family encoders, small and actually faster. MODEL is a local folder, a hub id, or an alias: minilm, mpnet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# A pipe or a file has no width; 80 columns, rich's guess, would fold the tables.
_PIPED_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
out, err = Console(width=_PIPED_WIDTH), Console(stderr=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="local folder, hub id, or alias (minilm, mpnet)")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="task by name; may be repeated")]
Data = Annotated[
    Path | None, typer.Option("--data", help="your own labelled texts, .tsv or .jsonl with text and label")
]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="write a picture (.png, .svg, .pdf)")]
Linear = Annotated[str, typer.Option("--scheme", help="scheme of the linears, or none; see `qbert formats`")]
Embedding = Annotated[str | None, typer.Option("--embedding", help="scheme of the embeddings")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="pattern of modules that stay float; may be repeated")
]
Override = Annotated[list[str] | None, typer.Option("--override", help="PATTERN=SCHEME; may be repeated")]


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    scheme: Linear = "w8a8",
    embedding: Embedding = None,
    exclude: Exclude = None,
    override: Override = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="run BERT-type encoders fused: few operators, no padding")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate", metavar="TEXTS", help="static scales from: default, a task, a .txt, .tsv or .jsonl"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into the folder OUT, which AutoModel.from_pretrained loads after `import qbert`."""
    from qbert.workflow import quantize_checkpoint

    recipe = _recipe(scheme, embedding, exclude, override)
    with _progress("quantizing", as_json) as progress:
        report = quantize_checkpoint(model, output, recipe, fuse=fuse, calibrate_with=calibrate, progress=progress)
    _emit(report, as_json)
    if not as_json:
        _print_encoders(report.encoders if fuse else [])
        out.print(
            f"{report.modules} modules at {report.bits_per_weight:.3f} bits per weight in {report.seconds:.1f} s; "
            f"{report.file_bytes / 1e6:.1f} MB, {report.percent_of_float32:.1f}% of float32: {report.folder}",
            soft_wrap=True,
        )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder")], as_json: Json = False
) -> None:
    """What stands in a checkpoint, module by module, and the kernel that would run here."""
    from qbert.workflow import inspect_checkpoint

    report = inspect_checkpoint(folder)
    _emit(report, as_json)
    if as_json:
        return
    table = Table(
        title=f"{folder}" + (f", quantized from {report.source}" if report.source else ""), title_justify="left"
    )
    for header in ("module", "scheme", "shape", "layout", "bits", "KiB", "outliers", "kernel"):
        right = header in ("bits", "KiB", "outliers")
        table.add_column(header, justify="right" if right else "left", overflow="fold")
    for row in report.modules:
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        figures = (f"{row['bits_per_weight']:.3f}", f"{row['stored_bytes'] / 1024:.1f}", str(row["outliers"] or ""))
        table.add_row(row["name"], row["scheme"], shape, row["layout"], *figures, row["kernel"])
    out.print(table)
    for kernel, reason in dict.fromkeys((row["kernel"], row["reason"]) for row in report.modules):
        out.print(f"{kernel}: {reason}", soft_wrap=True, highlight=False)
    _print_encoders(report.encoders)
    out.print(
        f"quantized {report.quantized_bytes / 1e6:.2f} MB at {report.bits_per_weight:.3f} bits per weight, "
        f"float {report.float_bytes / 1e6:.2f} MB; file {report.file_bytes / 1e6:.2f} MB, "
        f"{report.percent_of_float32:.1f}% of float32 ({report.float32_bytes / 1e6:.1f} MB)",
        soft_wrap=True,
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder")],
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help="the float original")] = None,
    as_json: Json = False,
) -> None:
    """Hold a checkpoint to every rule; with --against, measure each weight against the original's."""
    from qbert.workflow import verify_checkpoint

    report = verify_checkpoint(folder, against)
    _emit(report, as_json)
    if as_json:
        return
    if report.sqnr:
        table = Table(title=f"{folder} against {against}", title_justify="left")
        for header in ("module", "scheme", "bits", "SQNR dB", "largest error"):
            table.add_column(header, justify="left" if header in ("module", "scheme") else "right", overflow="fold")
        for row in report.sqnr:
            ratio = "exact" if row.sqnr_db is None else f"{row.sqnr_db:.2f}"
            table.add_row(row.name, row.scheme, f"{row.bits_per_weight:.3f}", ratio, f"{row.max_error:.4g}")
        out.print(table)
    out.print(f"ok: {report.tensors} tensors of {report.modules} quantized modules keep every rule", soft_wrap=True)


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_OUT", help="a float model or a quantized checkpoint")],
    task: Tasks = None,
    data: Data = None,
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help="original to compare with")] = None,
    scheme: Annotated[str | None, typer.Option("--scheme", help="quantize MODEL like this first")] = None,
    embedding: Embedding = None,
    fine_tune: Annotated[bool, typer.Option("--fine-tune", help="fine-tune MODEL on the task first (cached)")] = False,
    as_json: Json = False,
) -> None:
    """Accuracy on real labelled texts, with n, a 95% interval, and the paired change against the original.

    A quantized checkpoint is compared with the model it was made from, if that is at hand. An encoder without a head gets a
    logistic-regression probe on the original's embeddings; a fine-tuned classifier uses its own head.
    """
    results = [
        _evaluate_one(model, each, against, scheme, embedding, fine_tune, as_json) for each in _tasks(task, data)
    ]
    if as_json:
        out.print_json(data=[result.model_dump(mode="json") for result in results])
    else:
        out.print(_eval_table(model, results))


@app.command()
def finetune(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    task: Annotated[str, typer.Option("--task", help="classification task")] = "trec",
    epochs: Annotated[int | None, typer.Option("--epochs", help="passes over the training texts")] = None,
) -> None:
    """Fine-tune MODEL with a classification head on a task, on the CPU, in minutes."""
    from qbert.evaluate import finetune as run
    from qbert.zoo import resolve_model

    with _progress(f"fine-tuning on {task}", False) as progress:
        tuned = run(resolve_model(model), task, output, epochs=epochs, progress=_two(progress))
    out.print(f"{task}: accuracy {tuned.accuracy:.1f}% on held-out texts: {output}", soft_wrap=True)


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a float model or a quantized checkpoint")],
    batch: Annotated[int, typer.Option("--batch", help="sequences")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each sequence")] = 128,
    target: Annotated[
        str, typer.Option("--target", help="machine of the predicted times: here, h100, a100 ...")
    ] = "here",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float precision of the prediction")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="time the model here")] = True,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Where parameters, FLOPs, bytes, run-time memory and latency of an encoder are, and what bounds each part."""
    from qbert import analyze as analysis
    from qbert.convert import unfuse_
    from qbert.nn import encoders, fused_forward
    from qbert.workflow import load_any

    # A GPU is not bought to run float32 on its CUDA cores.
    dtype = dtype if dtype is not None or target == "here" else "fp16"
    subject = load_any(model)
    if any(fused_forward(base) for _, base, _ in encoders(subject)):
        err.print("the encoder is taken apart module by module, so it is not run fused here")
        unfuse_(subject)
    with err.status("measuring"):
        result = analysis.analyze(
            subject, batch=batch, seq=seq, target=target, dtype=dtype, measure=measure, name=model
        )
    _emit(result, as_json)
    if not as_json:
        out.print(analysis.to_table(result))
    if plot is not None:
        analysis.plot(result, plot)
        err.print(f"picture: {plot}", soft_wrap=True)


@app.command()
def compare(
    model: Model,
    task: Tasks = None,
    data: Data = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme", help="LINEAR[+EMBEDDING][:dynamic|:static], the last for the fused encoder; may be repeated"
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="sequences of the timed forward")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each")] = 128,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL in several ways, save, load back, evaluate and time each; one table against float32."""
    from qbert import compare as comparing

    recipes = None if not scheme else tuple(_split_scheme(each) for each in scheme)
    with err.status("loading") as status:
        step = lambda text: status.update(text)
        result = comparing.compare(model, _tasks(task, data), recipes, batch=batch, seq=seq, step=step)
    _emit(result, as_json)
    if not as_json:
        out.print(comparing.to_table(result))
    if plot is not None:
        comparing.plot(result, plot)
        err.print(f"picture: {plot}", soft_wrap=True)


@app.command()
def formats(as_json: Json = False) -> None:
    """The schemes that --scheme and --embedding take, and the number formats they are made of."""
    if as_json:
        out.print_json(
            data={"schemes": [_scheme_row(name) for name in SCHEMES], "formats": [_format_row(n) for n in FORMATS]}
        )
        return
    for title, rows in (("schemes", map(_scheme_row, SCHEMES)), ("element formats", map(_format_row, FORMATS))):
        listed = list(rows)
        table = Table(title=title, title_justify="left")
        for header in listed[0]:
            table.add_column(header)
        for row in listed:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        out.print(table)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except QBertError as error:
        err.print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(EXIT_BAD_INPUT)


def _evaluate_one(
    model: str,
    task: Any,
    against: str | None,
    scheme: str | None,
    embedding: str | None,
    fine_tune: bool,
    as_json: bool,
) -> Any:
    from qbert import checkpoint, workflow
    from qbert.convert import quantize_
    from qbert.evaluate import evaluate, finetuned_model, load_tokenizer
    from qbert.zoo import resolve_model

    if fine_tune:
        with _progress("fine-tuning", as_json) as progress:
            model = str(finetuned_model(resolve_model(model), task, progress=_two(progress)))
    path = resolve_model(model)
    subject: Any = model
    if scheme is not None or embedding is not None:
        subject = quantize_(workflow.load_any(model), Recipe(linear=scheme, embedding=embedding))
        against = against or model
    elif against is None and Path(path).is_dir() and checkpoint.is_checkpoint(path):
        against = workflow.source_of(path)
    tokenizer = load_tokenizer(resolve_model(against or model))
    with _progress(f"encoding {getattr(task, 'name', task)}", as_json) as progress:
        return evaluate(subject, task, against, load=workflow.load_any, tokenizer=tokenizer, progress=_two(progress))


def _eval_table(model: str, results: list[Any]) -> Table:
    table = Table(title=model, title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("task", "metric", "n", "score", "change", "flips", "cosine", "cut"):
        table.add_column(header, justify="left" if header in ("task", "metric") else "right", no_wrap=True)
    for result in results:
        low, high = result.interval
        change = result.comparison
        paired = ("", "", "")
        if change is not None:
            ends = f"[{-change.drop_interval[1]:+.1f}, {-change.drop_interval[0]:+.1f}]"
            flips = "" if change.flips is None else str(change.flips)
            paired = (f"{-change.drop:+.2f}\n{ends}", flips, f"{change.cosine_mean:.4f}\nmin {change.cosine_min:.4f}")
        scored = (str(result.n), f"{result.score:.2f}\n[{low:.1f}, {high:.1f}]")
        table.add_row(result.task, f"{result.metric}\n{result.head}", *scored, *paired, str(result.n_truncated))
    table.caption = (
        "95% intervals in brackets. change: points against the original on the same texts, paired. "
        "cut: texts longer than the model reads."
    )
    table.caption_justify = "left"
    return table


def _recipe(scheme: str, embedding: str | None, exclude: list[str] | None, override: list[str] | None) -> Recipe:
    overrides: dict[str, str | None] = {}
    for each in override or ():
        pattern, equals, value = each.partition("=")
        if not (pattern and equals and value):
            raise QBertError(f"override {each!r}; allowed: PATTERN=SCHEME, or PATTERN=none to leave it float")
        overrides[pattern] = None if value == "none" else value
    return Recipe(None if scheme == "none" else scheme, embedding, tuple(exclude or ()), overrides)


def _split_scheme(text: str) -> tuple[str, str | None, str | None]:
    schemes, _, fused = text.partition(":")
    linear, _, embedding = schemes.partition("+")
    return linear, embedding or None, fused or None


def _print_encoders(encoders: list[dict[str, Any]]) -> None:
    from qbert.explain import EncoderRow

    for row in encoders:
        out.print(str(EncoderRow(**row)), soft_wrap=True, highlight=False, markup=False)


def _tasks(names: list[str] | None, data: Path | None) -> list[Any]:
    from qbert.evaluate import file_task, get_task

    tasks: list[Any] = [get_task(name) for name in names or ()]
    if data is not None:
        tasks.append(file_task(data))
    return tasks or [get_task("trec")]


def _scheme_row(name: str) -> dict[str, Any]:
    scheme = SCHEMES[name]
    roles = ", ".join(sorted(role.value for role in scheme.roles))
    return {
        "scheme": name,
        "for": roles,
        "weight": scheme.weight.name,
        "group": scheme.group_size,
        "summary": scheme.summary,
    }


def _format_row(name: str) -> dict[str, Any]:
    fmt = FORMATS[name]
    learned = fmt.kind is Kind.DICTIONARY
    values = None if learned else len(fmt.finite_values)
    largest = None if learned else fmt.max
    return {"format": name, "bits": fmt.bits, "kind": fmt.kind.value, "finite values": values, "largest": largest}


def _emit(report: BaseModel, as_json: bool) -> None:
    if as_json:
        out.print_json(report.model_dump_json())


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Any]:
    """A progress bar on stderr while something long runs; yields what to call with (done, total, name)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar:
        shown = bar.add_task(title, total=None)

        def advance(done: int, total: int, name: str = "") -> None:
            bar.update(shown, completed=done, total=total, description=f"{title} {name}".rstrip())

        yield advance


def _two(progress: Any) -> Any:
    """For callers that report (done, total) without a name."""
    return lambda done, total: progress(done, total)


if __name__ == "__main__":
    main()
