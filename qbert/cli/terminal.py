"""What all commands share: consoles, progress bars, options that several take, and how results are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
Embedding = Annotated[
    str | None, typer.Option("--embedding", help="scheme of the embeddings, or none; w8 with w8a8, else none")
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="pattern of modules that stay float; may be repeated")
]
Override = Annotated[list[str] | None, typer.Option("--override", help="PATTERN=SCHEME; may be repeated")]


def emit(report: BaseModel, as_json: bool) -> None:
    """Prints a report as JSON where that was asked for."""
    if as_json:
        out.print_json(report.model_dump_json())


@contextmanager
def progress(title: str, quiet: bool) -> Iterator[Any]:
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


def two(advance: Any) -> Any:
    """For callers that report (done, total) without a name."""
    return lambda done, total: advance(done, total)


def print_encoders(encoders: list[dict[str, Any]]) -> None:
    """A line for each encoder: whether it runs fused, and why not."""
    from qbert.explain import EncoderRow

    for row in encoders:
        out.print(str(EncoderRow(**row)), soft_wrap=True, highlight=False, markup=False)


def tasks(names: list[str] | None, data: Path | None) -> list[Any]:
    """What --task and --data name; trec by default."""
    from qbert.evaluate import file_task, get_task

    chosen: list[Any] = [get_task(name) for name in names or ()]
    if data is not None:
        chosen.append(file_task(data))
    return chosen or [get_task("trec")]
