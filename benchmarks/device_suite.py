"""Everything that a machine with a GPU can tell in so many minutes: one command for one that is bare, offline and borrowed.

    python -m benchmarks.device_suite --minutes 9 --out out                      from a clone, on the machine with the GPU
    python -m benchmarks.device_suite --minutes 1 --out out --dry-run            every step, tiny, on a machine without one

It prepares itself (carried wheels, extensions), runs the GPU tests, tunes tiles, and measures in order of value; each row is in
`out/results.json` as soon as it is known. It ends in time by its own clock: steps for which too little is left are skipped and
named. A table of all steps and the best figures come last; the exit code is 1 if a correctness test failed or none could run.

This module imports nothing but typer that a bare machine may lack: `suite_steps`, which does the work, is imported when the
carried wheels are on the path. To carry what is missing there, with all that it needs in turn (pip's --no-deps takes no more)
and in the versions of a machine where they go together:

    pip freeze | grep -iE '^(pydantic|annotated.types|typing)' > pinned.txt
    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels -r pinned.txt
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

EXIT_TESTS, EXIT_BAD_INPUT = 1, 2
WHEELS = Path(__file__).resolve().parents[1] / "wheels"  # where carried wheels are looked for
_MOST_INSTALL_SECONDS = 120


def install_wheels(folder: Path) -> Path | None:
    """Installs all wheels of a folder into a new one, and puts it on the path of this process and its children.

    Returns:
        The new folder; None where there are no wheels.

    Raises:
        typer.BadParameter: pip refuses one of them.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return None
    site = Path(tempfile.mkdtemp(prefix="qbert-wheels-"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--upgrade", "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_INSTALL_SECONDS)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise typer.BadParameter(f"wheels of {folder}: {said[-1]}")
    for module in site.glob("*.py"):  # typing_extensions: an older one that typer has imported must not stay
        sys.modules.pop(module.stem, None)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    importlib.invalidate_caches()
    return site


def main(
    minutes: Annotated[float, typer.Option(help="for everything, this command's own start included")],
    out: Annotated[Path, typer.Option(help="folder for the results: at most eight files, two folders deep")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tiny problems on the CPU, to try the suite out")] = False,
    wheels: Annotated[Path, typer.Option(help="folder with wheels to use")] = WHEELS,
    commit: Annotated[str, typer.Option(help="which commit this is, where the tree came without its history")] = "",
    only: Annotated[list[str] | None, typer.Option("--only", help="name of a step; may be repeated")] = None,
    use_tiles: Annotated[
        bool,
        typer.Option(
            "--use-tiles/--no-use-tiles", help="put the tuned table where qbert reads it, and measure with it"
        ),
    ] = True,
) -> None:
    """Runs everything in order of value, within the time."""
    begin = time.monotonic()
    if minutes <= 0:
        raise typer.BadParameter(f"minutes {minutes:g}: must be positive")
    site = install_wheels(wheels)
    if commit:
        os.environ["QBERT_COMMIT"] = commit
    from qbert.errors import QBertError

    from .suite_steps import Options, run_suite

    options = Options(out.absolute(), begin + 60 * minutes, dry_run, tuple(only or ()), use_tiles, site)
    try:
        good = run_suite(options)
    except QBertError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    if not good:
        raise typer.Exit(EXIT_TESTS)


if __name__ == "__main__":
    typer.run(main)
