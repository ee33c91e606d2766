"""Commands about accuracy: eval, finetune, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from qbert.cli import terminal
from qbert.cli.terminal import Data, Embedding, Json, Model, PlotFile, Tasks
from qbert.recipe import in_words


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
        _evaluate_one(model, each, against, scheme, embedding, fine_tune, as_json)
        for each in terminal.tasks(task, data)
    ]
    if as_json:
        terminal.out.print_json(data=[result.model_dump(mode="json") for result in results])
    else:
        terminal.out.print(_eval_table(model, results))


def finetune(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    task: Annotated[str, typer.Option("--task", help="classification task")] = "trec",
    epochs: Annotated[int | None, typer.Option("--epochs", help="passes over the training texts")] = None,
) -> None:
    """Fine-tune MODEL with a classification head on a task, on the CPU, in minutes."""
    from qbert.evaluate import finetune as run
    from qbert.zoo import resolve_model

    with terminal.progress(f"fine-tuning on {task}", False) as progress:
        tuned = run(resolve_model(model), task, output, epochs=epochs, progress=terminal.two(progress))
    terminal.out.print(f"{task}: accuracy {tuned.accuracy:.1f}% on held-out texts: {output}", soft_wrap=True)


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
    with terminal.err.status("loading") as status:
        step = lambda text: status.update(text)
        result = comparing.compare(model, terminal.tasks(task, data), recipes, batch=batch, seq=seq, step=step)
    terminal.emit(result, as_json)
    if not as_json:
        terminal.out.print(comparing.to_table(result))
    if plot is not None:
        comparing.plot(result, plot)
        terminal.err.print(f"picture: {plot}", soft_wrap=True)


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
    from qbert.evaluate import evaluate, finetuned_model
    from qbert.evaluate.loading import own_tokenizer
    from qbert.zoo import resolve_model

    if fine_tune:
        with terminal.progress("fine-tuning", as_json) as progress:
            model = str(finetuned_model(resolve_model(model), task, progress=terminal.two(progress)))
    path = resolve_model(model)
    subject: Any = model
    if scheme is not None or embedding is not None:
        subject = quantize_(workflow.load_any(model), in_words(scheme, embedding))
        against = against or model
    elif against is None and Path(path).is_dir() and checkpoint.is_checkpoint(path):
        against = workflow.source_of(path)
    tokenizer = own_tokenizer(path)  # the original has its own: words that were trimmed have other numbers
    with terminal.progress(f"encoding {getattr(task, 'name', task)}", as_json) as progress:
        return evaluate(
            subject, task, against, load=workflow.load_any, tokenizer=tokenizer, progress=terminal.two(progress)
        )


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


def _split_scheme(text: str) -> tuple[str, str | None, str | None]:
    schemes, _, fused = text.partition(":")
    linear, _, embedding = schemes.partition("+")
    return linear, embedding or None, fused or None


def study(
    model: Model,
    fmt: Annotated[
        list[str] | None, typer.Option("--format", help="a block format, or FILE.py:NAME of your own; may be repeated")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option("--sweep", help="all of: 'element=fp4_e2m1,int4 block=16,32 scale=e8m0,bf16'")
    ] = None,
    sites: Annotated[
        str, typer.Option("--sites", help="where: weights,embeddings,activations,attention,norms,gelu")
    ] = "weights",
    task: Tasks = None,
    data: Data = None,
    by_part: Annotated[
        bool, typer.Option("--parts/--no-parts", help="measure each linear and table alone, too")
    ] = True,
    store: Annotated[
        Path | None, typer.Option("--store", help="folder of finished formats, by default in qbert's cache")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="model time and energy on h100, b200, amx ..., or a .toml file; may be repeated"),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="sequences of the modelled forward")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each")] = 128,
    plot: Annotated[Path | None, typer.Option("--plot", help="a page (.html) or a picture (.png, .svg, .pdf)")] = None,
    as_json: Json = False,
) -> None:
    """What number formats do to MODEL: error by site, accuracy with intervals, true size, modelled time and energy.

    Goes on where it was killed.
    """
    from qbert import study as studying
    from qbert.cost import load_hardware
    from qbert.formats import load_format
    from qbert.formats import sweep as swept

    chosen = [load_format(each) for each in fmt or ()] + [each for text in sweep or () for each in swept(text)]
    machines = [load_hardware(each) for each in dict.fromkeys(target or ())]
    measured = []
    if machines:
        from qbert.benchmarks.modelled import beside

        measured = [row for each in machines for row in beside(each)]
    with terminal.err.status("loading") as status:
        step = lambda text: status.update(text)
        result = studying.run_study(
            model, chosen, terminal.tasks(task, data), sites=sites.split(","), store=store, by_part=by_part,
            targets=machines, batch=batch, seq=seq, beside=measured, step=step,
        )  # fmt: skip
    terminal.emit(result, as_json)
    if not as_json:
        terminal.out.print(studying.to_table(result))
        if machines:
            terminal.out.print(studying.to_cost_table(result))
    if plot is not None:
        studying.plot(result, plot)
        terminal.err.print(f"page or picture: {plot}", soft_wrap=True)
