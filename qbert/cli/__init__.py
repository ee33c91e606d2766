"""The command line: parses, calls, prints. `--json` gives every command's result to machines."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from qbert.cli import bench, cost, models, quality, terminal
from qbert.errors import QBertError

EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="qbert",
    help="BERT-family encoders, small and actually faster. MODEL is a local folder, a hub id, or an alias: minilm, mpnet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": models.quantize,
    "compress": models.compress,
    "inspect": models.inspect,
    "explain": models.explain,
    "verify": models.verify,
    "eval": quality.evaluate_command,
    "finetune": quality.finetune,
    "analyze": cost.analyze,
    "compare": quality.compare,
    "study": quality.study,
    "advise": cost.advise,
    "formats": cost.formats,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(bench.app)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except QBertError as error:
        terminal.err.print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(EXIT_BAD_INPUT)
