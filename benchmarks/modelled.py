"""The cost model beside what was measured: every stored forward of a fused W8A8 encoder on a machine that a target describes.

    python -m benchmarks.modelled --target amx --target zen4

A target names the folders of `benchmarks/results` that are of its machine. The model counts the tokens that are there; a ragged
batch counts as sequences of its mean length. Nothing is measured here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from qbert.cost import SHIPPED, Beside, EncoderWork, Formats, Hardware, encoder_cost, load_hardware, read_work
from qbert.errors import QBertError
from qbert.formats import get_format
from qbert.modules import AttentionFormats

from .bert_models import config_of
from .problems import SHAPES
from .recorder import run_command, table_console
from .results_schema import RESULTS, BertRow, Results, load_results

# System of `bench_bert` -> whether scales are static.
SYSTEMS = {"qbert-w8a8": False, "qbert-w8a8-static": True}
GOAL = 0.25


def beside(target: Hardware, folder: Path = RESULTS) -> list[Beside]:
    """Every case that was measured of the systems and shapes that are modelled; none where nothing is stored."""
    folders = () if target.measured is None else target.measured.results
    files = [path for name in folders for path in sorted((folder / name).glob("*.json"))]
    return [row for path in files for row in _of_file(target, load_results(path))]


def _of_file(target: Hardware, results: Results) -> Iterable[Beside]:
    threads = results.machine.threads or results.machine.cores
    own = target if threads == target.array.units else target.of_units(threads)
    for row in results.of(BertRow):
        if row.name not in SYSTEMS or row.model not in SHAPES or row.time is None or row.tokens < row.batch:
            continue
        modelled = encoder_cost(work_of(row.model), own, w8a8(static=SYSTEMS[row.name]), lengths=lengths_of(row)).ms
        yield Beside(
            target=target.name, results=f"{results.path.parent.name}/{results.path.name}", system=row.name, model=row.model,
            case=row.case, tokens=row.tokens, measured_ms=1e3 * row.time.median, modelled_ms=modelled,
        )  # fmt: skip


def w8a8(*, static: bool) -> Formats:
    """What the fused encoder's numbers are: int8 everywhere between its norms."""
    int8 = get_format("int8")
    return Formats(weights=int8, activations=int8, attention=AttentionFormats.of(int8), static=static)


def lengths_of(row: BertRow) -> list[int]:
    """Sequences whose tokens are those of the case, as even as they can be."""
    least, more = divmod(row.tokens, row.batch)
    return [least + (index < more) for index in range(row.batch)]


@functools.cache
def work_of(model: str) -> EncoderWork:
    """The program of a shape by name; no weight is made."""
    from transformers import AutoModel

    with torch.device("meta"):
        return read_work(AutoModel.from_config(config_of(SHAPES[model])))


def table(rows: Sequence[Beside]) -> Table:
    """Measured and modelled milliseconds, and the error."""
    drawn = Table(title="modelled beside measured, fused W8A8", title_justify="left", caption_justify="left")
    drawn.caption = "error: of the model; + is too long. system: static scales, or a scale a token."
    for header in ("target", "system", "model", "case", "tokens", "measured ms", "modelled ms", "error", "results"):
        drawn.add_column(
            header, justify="right" if header in ("tokens", "measured ms", "modelled ms", "error") else "left"
        )
    for row in rows:
        drawn.add_row(
            row.target, row.system, row.model, row.case, str(row.tokens), f"{row.measured_ms:.1f}", f"{row.modelled_ms:.1f}",
            f"{row.error:+.0%}", row.results,
        )  # fmt: skip
    return drawn


def main(
    target: Annotated[
        list[str] | None, typer.Option("--target", help="may be repeated; all that ship by default")
    ] = None,
) -> None:
    """Prints the table, and how many cases are within the goal."""
    rows = [row for name in target or SHIPPED for row in beside(load_hardware(name))]
    if not rows:
        raise QBertError(
            f"nothing is stored for {', '.join(target or SHIPPED)}; allowed: targets whose [measured] names results"
        )
    console = table_console()
    console.print(table(rows))
    near = sum(abs(row.error) <= GOAL for row in rows)
    console.print(
        f"{near} of {len(rows)} cases within {GOAL:.0%}; mean error {sum(abs(row.error) for row in rows) / len(rows):.0%}"
    )


if __name__ == "__main__":
    run_command(main)
