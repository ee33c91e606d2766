"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Option(help="cpu or cuda")]
Seconds = Annotated[float | None, typer.Option(help="of rounds for each candidate")]
Minutes = Annotated[float | None, typer.Option(help="end after so many, with what is done")]
Threads = Annotated[int | None, typer.Option(help="all physical cores by default")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="append every row to this results file")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="write a picture (.png, .svg, .pdf)")]
