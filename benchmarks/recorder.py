"""What every benchmark does with its rows: keeps them for its tables, and appends each to a results file at once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from qbert.errors import MissingDependency, QBertError

from .machine import Machine, describe
from .results_schema import AnyRow, ResultsWriter, RowType, RunRow, load_results

TARGETS = ("cpu", "cuda")
EXIT_BAD_INPUT = 2
_FILE_WIDTH = 170  # of tables that are written to a file or a pipe
QUIET_LOAD = 0.5

Setting = str | int | float | bool | None | list[str]


class Recorder:
    """Rows of one run of one benchmark.

    Args:
        benchmark: its name; settings: what it was told.
        json_path: a results file to append to; None keeps the rows in memory only.
        device: what is measured; the machine is described before anything ran, so that its load average is that of others.
    """

    def __init__(
        self, benchmark: str, settings: dict[str, Setting], json_path: Path | None = None, device: Any = "cpu"
    ) -> None:
        self.machine = describe(device)
        self.rows: list[AnyRow] = []
        self._writer = None if json_path is None else ResultsWriter(json_path, self.machine)
        self.add(RunRow(benchmark=benchmark, settings=settings))

    def add(self, row: AnyRow) -> None:
        """One row more."""
        self.rows.append(row)
        if self._writer is not None:
            self._writer.add(row)

    def extend(self, rows: Iterable[AnyRow]) -> None:
        """Several."""
        for row in rows:
            self.add(row)

    def stored(self, kind: type[RowType]) -> list[RowType]:
        """Rows of one class that the file has, those of earlier runs among them."""
        return [] if self._writer is None else load_results(self._writer.path).of(kind)

    def of(self, kind: type[RowType]) -> list[RowType]:
        """Rows of one class, in their order."""
        return [row for row in self.rows if isinstance(row, kind)]


def table_console() -> Console:
    """Where tables are printed: as wide as the terminal, or wide enough in a file."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def device_name(machine: Machine) -> str:
    """For a table's title."""
    return machine.gpu.name if machine.gpu else machine.device


def device_of(target: str) -> torch.device:
    """
    Raises:
        QBertError: no such target, or no GPU where one is meant.
    """
    if target not in TARGETS:
        raise QBertError(f"target {target!r}: allowed are {', '.join(TARGETS)}")
    if target == "cuda" and not torch.cuda.is_available():
        raise QBertError("target 'cuda': no NVIDIA GPU is here; allowed: cpu")
    return torch.device(target)


def check_picture(path: Path | None) -> None:
    """Before anything is measured.

    Raises:
        MissingDependency: a picture is wanted and matplotlib is not installed.
    """
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("pictures need matplotlib; install it with: pip install 'qbert[plot]'")


def run_command(main: Callable[..., Any]) -> None:
    """A benchmark as a program of its own: bad input is one line and exit code 2, as with `qbert bench`."""
    try:
        typer.run(main)
    except QBertError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
        sys.exit(EXIT_BAD_INPUT)
