"""Folders that are complete or absent."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder so that `target` appears complete or not at all.

    Yields a hidden folder beside `target`; when the block ends without an error it is renamed.

    Args:
        replace: whether it takes the place of a folder that is there. Otherwise that one stays and this one goes: another
            process was faster.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    folder = holder / target.name
    folder.mkdir()  # inside the holder, because mkdtemp's own folder is closed to other users
    try:
        yield folder
        if replace and target.is_dir():
            _replace(folder, target, holder.with_name(f"{holder.name}.old"))
        else:
            _move(folder, target)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _replace(folder: Path, target: Path, aside: Path) -> None:
    """The old folder is set aside first: whatever fails, one of the two stays whole."""
    target.rename(aside)
    try:
        folder.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
