"""The command line: parses, calls, prints. `--json` gives every command's result to machines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from qbert.cli import bench, cost, embed, models, quality, terminal
from qbert.errors import QBertError

EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="qbert",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": models.quantize,
    "compress": models.compress,
    "export": models.export,
    "inspect": models.inspect,
    "explain": models.explain,
    "verify": models.verify,
    "embed": embed.embed,
    "eval": quality.evaluate_command,
    "finetune": quality.finetune,
    "analyze": cost.analyze,
    "compare": quality.compare,
    "study": quality.study,
    "advise": cost.advise,
    "formats": cost.formats,
    "info": models.info,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(bench.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from qbert.workflow import qbert_version

        terminal.out.print(f"qbert {qbert_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """BERT-family encoders, small and actually faster. MODEL is a local folder, a hub id, or an alias: minilm, mpnet."""


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except QBertError as error:
        terminal.err.print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(EXIT_BAD_INPUT)
