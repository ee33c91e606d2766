"""Commands about cost: analyze, advise, formats."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qbert.cli import terminal
from qbert.cli.terminal import Data, Json, PlotFile, Tasks
from qbert.errors import QBertError
from qbert.formats import FORMATS, NAMED, SCHEMES, BlockFormat, Kind, describe, load_format


def analyze(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a float model or a quantized checkpoint")],
    batch: Annotated[int, typer.Option("--batch", help="sequences")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each sequence")] = 128,
    target: Annotated[
        str, typer.Option("--target", help="machine of the predicted times: here, h100, a100 ...")
    ] = "here",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float precision of the prediction")] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="time the model here")] = True,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="take a fused encoder apart again: module by module, not step by step")
    ] = False,
    plot: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Where parameters, FLOPs, bytes, run-time memory and latency of an encoder are, and what bounds each part.

    Of a fused encoder also each step that it runs: the kernel, multiply-adds, bytes and time.
    """
    from qbert import analyze as analysis
    from qbert.convert import unfuse_
    from qbert.workflow import load_any

    # A GPU is not bought to run float32 on its CUDA cores.
    dtype = dtype if dtype is not None or target == "here" else "fp16"
    subject = load_any(model)
    if unfused:
        unfuse_(subject)
    with terminal.err.status("measuring"):
        result = analysis.analyze(
            subject, batch=batch, seq=seq, target=target, dtype=dtype, measure=measure, name=model
        )
    terminal.emit(result, as_json)
    if not as_json:
        terminal.out.print(analysis.to_table(result))
    if plot is not None:
        analysis.plot(result, plot)
        terminal.err.print(f"picture: {plot}", soft_wrap=True)


def advise(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="local folder, alias, base or large")],
    batch: Annotated[int, typer.Option("--batch", help="sequences")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each sequence")] = 128,
    target: Annotated[str, typer.Option("--target", help="here, h100, a100 ...")] = "here",
    max_drop: Annotated[float, typer.Option("--max-drop", help="points of accuracy that it may cost")] = 1.0,
    goal: Annotated[
        str | None,
        typer.Option("--goal", help="MEASURE here what every method of compression brings: for latency, or for size"),
    ] = None,
    task: Tasks = None,
    data: Data = None,
    texts: Annotated[
        str | None, typer.Option("--texts", help="with --goal: for the methods, in place of the tasks' training texts")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="with --goal: which texts are for what")] = 0,
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="results file; may be repeated; by default the stored ones")
    ] = None,
    as_json: Json = False,
) -> None:
    """Does quantizing MODEL pay, with which scheme, and how sure that is: from stored results and the roofline.

    With --goal every method of compression is measured on MODEL here instead, in minutes: which pay and by how much, in
    milliseconds, megabytes and points on labelled texts, which do not and why, and the recipe to run.
    """
    if goal is not None:
        if target != "here" or results is not None:
            raise QBertError("--goal measures on this machine; leave --target and --results out")
        _guide(
            model, as_json, goal=goal, max_drop=max_drop, tasks=task or [], data=data, texts=texts, batch=batch, seq=seq,
            seed=seed,
        )  # fmt: skip
        return
    for name, value in (("--task", task), ("--data", data), ("--texts", texts)):
        if value:
            raise QBertError(f"{name} is for what is measured; allowed with --goal latency or --goal size")
    from qbert.benchmarks import advise as advising
    from qbert.benchmarks.results_schema import load_results

    given = None if results is None else [load_results(path) for path in results]
    advice = advising.advise(model, batch, seq, target, results=given, max_drop=max_drop)
    terminal.emit(advice, as_json)
    if as_json:
        return
    terminal.out.print(advising.table(advice))
    terminal.out.print(f"{advice.verdict}: {advice.reason}", soft_wrap=True, highlight=False)
    if advice.smallest is not None:
        terminal.out.print(f"smallest that keeps its accuracy: {advice.smallest}", highlight=False)
    for line in advice.faster_elsewhere:
        terminal.out.print(line, soft_wrap=True, highlight=False)


def _guide(model: str, as_json: bool, **wanted: Any) -> None:
    from qbert.workflow import guide_model

    with terminal.progress("measuring", as_json) as progress:
        found = guide_model(model, progress=lambda done, total, what: progress(done, None, what), **wanted)
    terminal.emit(found, as_json)
    if as_json:
        return
    terminal.out.print(found.table())
    terminal.out.print(found.verdict(), soft_wrap=True, highlight=False, markup=False)
    if found.recipe is not None:
        terminal.out.print(f"as a recipe:\n{found.recipe.toml()}", highlight=False, markup=False)
        by = wanted["texts"] or ",".join([*wanted["tasks"], *([str(wanted["data"])] if wanted["data"] else [])])
        run = shlex.join(["qbert", "compress", model, "--recipe", "small.toml", "--texts", by, "-o", "OUT"])
        terminal.out.print(f"to run it: {run}", soft_wrap=True, highlight=False, markup=False)
        labelled = [f"--task={name}" for name in wanted["tasks"]] + (
            [f"--data={wanted['data']}"] if wanted["data"] else []
        )
        given = [f"--texts={wanted['texts']}"] if wanted["texts"] else []
        asked = ["--goal", found.goal, "--max-drop", f"{found.max_drop:g}", *labelled, *given]
        search = shlex.join(["qbert", "compress", model, *asked, "-o", "OUT"])
        terminal.out.print(f"to look further: {search}", soft_wrap=True, highlight=False, markup=False)


def formats(
    show: Annotated[
        list[str] | None, typer.Option("--show", metavar="FORMAT", help="all of one block format, or of FILE.py:NAME")
    ] = None,
    as_json: Json = False,
) -> None:
    """The schemes that --scheme and --embedding take, the block formats of `qbert study`, and the elements they are made of."""
    if show:
        _show([load_format(name) for name in show], as_json)
        return
    tables = {
        "schemes": [_scheme_row(name) for name in SCHEMES],
        "block formats": [_block_row(fmt) for fmt in NAMED.values()],
        "formats": [_format_row(name) for name in FORMATS],
    }
    if as_json:
        terminal.out.print_json(data=tables)
        return
    for title, rows in tables.items():
        listed = list(rows)
        table = Table(title=title, title_justify="left")
        for header in listed[0]:
            table.add_column(header)
        for row in listed:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        terminal.out.print(table)


def _show(chosen: list[BlockFormat], as_json: bool) -> None:
    """What `formats.describe` says, with every value and the steps between them."""
    described = [describe(fmt) for fmt in chosen]
    if as_json:
        terminal.out.print_json(data=described)
        return
    for rows in described:
        table = Table(title=str(rows["format"]), title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            if name == "values":
                table.add_row(
                    name, "learned from each matrix" if value is None else " ".join(f"{each:g}" for each in value)
                )
                if value is not None:
                    steps = sorted({high - low for low, high in itertools.pairwise(value)})
                    table.add_row("steps between them", f"{len(steps)} sizes, {steps[0]:g} to {steps[-1]:g}")
            elif name != "format" and value is not None:
                table.add_row(name, str(value))
        terminal.out.print(table)


def _block_row(fmt: BlockFormat) -> dict[str, Any]:
    bits = f"{fmt.bits_per_value(768, 768):.3f}"
    return {
        "format": fmt.name,
        "element": fmt.element.name,
        "scale": fmt.scale,
        "granularity": fmt.granularity,
        "bits": bits,
    }


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
