"""Work that survives a kill: finished chunks beside the output, each whole or not there, until the output is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qbert.embed.embedder import Embedded, Vectors
from qbert.errors import QBertError

_MANIFEST, _LOCK, _VECTORS = "job.json", "lock", "vectors"
_COUNTS = ("truncated", "tokens")
_PARTIAL, _ABOUT = ".partial", ".json"


@dataclass(frozen=True)
class Store:
    """The folder of a job's finished chunks, `OUT.partial`; `opened` makes one.

    Attributes:
        folder: which holds nothing else.
        rows: of the whole job.
        dimension: of a vector.
        chunk_rows: rows of each chunk but the last.
    """

    folder: Path
    rows: int
    dimension: int
    chunk_rows: int

    @property
    def chunks(self) -> range:
        """Numbers of all chunks."""
        return range(-(-self.rows // self.chunk_rows))

    def size(self, chunk: int) -> int:
        """Rows of a chunk."""
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows)

    def missing(self) -> list[int]:
        """Chunks that are not here; a file that is not such a chunk counts as none."""
        return [chunk for chunk in self.chunks if self._shape(chunk) != (self.size(chunk), self.dimension)]

    def put(self, chunk: int, embedded: Embedded) -> None:
        """
        Raises:
            QBertError: not as many vectors as the chunk has rows.
        """
        expected = (self.size(chunk), self.dimension)
        if embedded.vectors.shape != expected:
            raise QBertError(f"chunk {chunk} has vectors {embedded.vectors.shape}; expected: {expected}")
        about = {name: str(getattr(embedded, name)) for name in _COUNTS}
        write_whole(self._file(chunk), save({_VECTORS: embedded.vectors}, metadata=about))

    def vectors(self) -> Iterator[Vectors]:
        """Of all chunks, in their order."""
        for chunk in self.chunks:
            with safe_open(self._file(chunk), framework="np") as file:
                yield file.get_tensor(_VECTORS)

    def counts(self) -> dict[str, int]:
        """Of all chunks together: texts that were cut, tokens that were read."""
        sums = dict.fromkeys(_COUNTS, 0)
        for chunk in self.chunks:
            with safe_open(self._file(chunk), framework="np") as file:
                about = file.metadata()
            for name in _COUNTS:
                sums[name] += int(about[name])
        return sums

    def remove(self) -> None:
        """At once as far as others see."""
        _remove(self.folder)

    def _file(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:08d}.safetensors"

    def _shape(self, chunk: int) -> tuple[int, ...] | None:
        try:
            with safe_open(self._file(chunk), framework="np") as file:
                return tuple(file.get_slice(_VECTORS).get_shape())
        except (OSError, SafetensorError):
            return None


@contextlib.contextmanager
def opened(output: Path, job: Mapping[str, Any], *, rows: int, dimension: int, overwrite: bool) -> Iterator[Store]:
    """The store of a job that begins or goes on; no other process opens it meanwhile.

    Args:
        output: what the job will write.
        job: plain data that decides every bit of it; ``"chunk_rows"`` among it.
        overwrite: whether what is there of the output or of another job goes away.

    Raises:
        QBertError: a store of another job, or one that another process works on.
    """
    folder = partial_of(output)
    _sweep(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QBertError(f"{str(output)!r}: another process is writing it; wait for it or stop it first") from None
        store = Store(folder, rows, dimension, job["chunk_rows"])
        before = read_json(folder / _MANIFEST)
        if before is not None and before != job:
            if not overwrite:
                raise QBertError(_difference(folder, before, job))
            for file in folder.glob("chunk-*"):
                file.unlink()
        if before != job:
            write_whole(folder / _MANIFEST, json.dumps(job, indent=1).encode())
        yield store


def partial_of(output: Path) -> Path:
    """Where the chunks of an output wait."""
    return output.with_name(output.name + _PARTIAL)


def about_of(output: Path) -> Path:
    """Where it says what an output is."""
    return output.with_name(output.name + _ABOUT)


def began(output: Path, job: Mapping[str, Any]) -> bool:
    """Whether this job has begun to write this output."""
    return read_json(partial_of(output) / _MANIFEST) == job


def remove_partial(output: Path, job: Mapping[str, Any]) -> None:
    """What is left of a job that was killed when its output was whole."""
    _sweep(partial_of(output))
    if began(output, job):
        _remove(partial_of(output))


def read_json(file: Path) -> Any:
    """What stands in a file; None where there is none, or no JSON in it."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def write_whole(file: Path, data: bytes) -> None:
    """A file that is there with all its bytes or not at all, whenever the process or the machine stops."""
    fresh = file.with_name(f".{file.name}.tmp")
    with fresh.open("wb") as opened_file:
        opened_file.write(data)
        opened_file.flush()
        os.fsync(opened_file.fileno())
    fresh.replace(file)


def _difference(folder: Path, before: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    name = next(name for name in (*job, *before) if before.get(name) != job.get(name))
    there, here = (f"{each.get(name)!r:.60}" for each in (before, job))
    return (
        f"{str(folder)!r} has finished chunks of another job ({name}: {there} there, {here} here); "
        "give the same arguments to go on, or --overwrite to begin anew"
    )


def _remove(folder: Path) -> None:
    trash = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """What was left of removing a finished job's chunks when its process was killed."""
    for trash in folder.parent.glob(f".{folder.name}.*.old"):
        shutil.rmtree(trash, ignore_errors=True)
