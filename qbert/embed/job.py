"""A file of texts to a file of vectors: chunk by chunk, so that what a killed process had finished is not computed again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from qbert.embed.embedder import SAME_BITS, Embedded, Embedder
from qbert.embed.outputs import check_output, write_npy, write_parquet
from qbert.embed.sources import FileScan, Source
from qbert.embed.store import Store, about_of, began, opened, partial_of, read_json, remove_partial, write_whole
from qbert.errors import QBertError
from qbert.target import cpu_target
from qbert.workflow import qbert_version
from qbert.zoo import sha256_of_file

DEFAULT_CHUNK_ROWS = 4096  # a few seconds of work, all that a kill costs; long enough to sort by length
Progress = Callable[[int, int, str], None]  # (rows done, rows in all, what is done)
Chunk = tuple[int, list[str]]  # its number, its texts


class Engine(Protocol):
    """Computes chunks in any order."""

    def __call__(
        self, embedder: Embedder, chunks: Iterable[Chunk], chunk_rows: int, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Embedded]]:
        """
        Args:
            chunk_rows: rows of each chunk but the last.
            advance: called with the number of texts that are done.
        """


class EmbedReport(BaseModel):
    """Outcome of `embed_file`, which also stands beside the output, in `OUT.json`.

    Attributes:
        job: all that decides the vectors: the model's digest, files, pooling ...
        rows, dimension: of the output, float32.
        resumed: rows that an earlier process had finished.
        truncated: texts of which the model read only the beginning.
        tokens: that were read, special ones included.
        seconds: this process's, from reading the first text to the finished file.
        batch_bits: whether a text's vector depends on the texts that share its batch.
        sha256: of the output file.
    """

    model_config = ConfigDict(extra="forbid")

    output: str
    job: dict[str, Any]
    rows: int
    dimension: int
    resumed: int
    truncated: int
    tokens: int
    seconds: float
    batch_bits: str
    sha256: str


def here(
    embedder: Embedder, chunks: Iterable[Chunk], chunk_rows: int, advance: Callable[[int], None]
) -> Iterator[tuple[int, Embedded]]:
    """The engine that computes in this process."""
    for chunk, texts in chunks:
        yield chunk, embedder.embed(texts, advance, first=chunk * chunk_rows)


def embed_file(
    embedder: Embedder,
    source: Source,
    output: Path,
    *,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    overwrite: bool = False,
    engine: Engine = here,
    progress: Progress | None = None,
) -> EmbedReport:
    """Writes a vector for each row of a file or folder.

    Finished chunks wait in `OUT.partial`. Called again with the same arguments after a kill, it goes on, and the output has
    the bytes that it would have had; called again after the end, it says so.

    Args:
        output: .npy or .parquet.
        chunk_rows: rows that are computed, sorted by length and stored together.
        overwrite: whether an output or finished chunks of another job are replaced.
        engine: what computes chunks.
        progress: called with (rows done, rows in all, what is done).

    Raises:
        QBertError: a bad row, before anything is computed; an output or chunks of another job; texts that changed meanwhile;
            a vector with NaN or Inf in it.
    """
    if chunk_rows < 1:
        raise QBertError(f"chunk {chunk_rows}; allowed: 1 or more rows")
    check_output(output, source.id_column is not None)
    start, advance = time.perf_counter(), progress or (lambda done, total, name: None)
    stamps, scans = _stamps(source), source.scan(lambda rows: advance(rows, rows, "reading"))
    job = _job(embedder, source, scans, chunk_rows)
    finished = _finished(output, job)
    if finished is not None and not overwrite:
        remove_partial(output, job)
        return finished
    if output.exists() and not overwrite and not began(output, job):
        raise QBertError(f"output {str(output)!r} exists, of another job; --overwrite replaces it")
    rows = sum(scan.rows for scan in scans)
    with opened(output, job, rows=rows, dimension=embedder.dimension, overwrite=overwrite) as store:
        missing = store.missing()
        resumed = rows - sum(map(store.size, missing))
        _compute(embedder, source, store, missing, engine, _Counted(advance, resumed, rows))
        if _stamps(source) != stamps:
            raise QBertError(f"{str(source.path)!r} changed while it was read; let it be, and run this again")
        whole = partial_of(output) / f"whole{output.suffix}"
        _assemble(whole, store, source, all(scan.integer_ids for scan in scans))
        report = EmbedReport(
            output=str(output), job=job, rows=rows, dimension=embedder.dimension, resumed=resumed, **store.counts(),
            seconds=time.perf_counter() - start, batch_bits=embedder.batch_bits, sha256=sha256_of_file(whole),
        )  # fmt: skip
        write_whole(about_of(output), report.model_dump_json(indent=1).encode())
        whole.replace(output)
        store.remove()
    return report


def _compute(
    embedder: Embedder, source: Source, store: Store, missing: list[int], engine: Engine, counted: _Counted
) -> None:
    for chunk, embedded in engine(embedder, _chunks(source, store, missing), store.chunk_rows, counted):
        store.put(chunk, embedded)


def _chunks(source: Source, store: Store, missing: list[int]) -> Iterator[Chunk]:
    """Texts of the chunks that are missing; the others are read past."""
    if not missing:
        return
    wanted, rows = set(missing), source.rows(skip=missing[0] * store.chunk_rows)
    for chunk in range(missing[0], missing[-1] + 1):
        texts = [row.text for row in islice(rows, store.size(chunk))]
        if chunk in wanted:
            yield chunk, texts


def _assemble(whole: Path, store: Store, source: Source, integer_ids: bool) -> None:
    if whole.suffix == ".npy":
        write_npy(whole, store.vectors(), store.rows, store.dimension)
        return
    ids = None if source.id_column is None else (row.id for row in source.rows() if row.id is not None)
    write_parquet(whole, store.vectors(), ids, store.dimension, integers=integer_ids)


def _job(embedder: Embedder, source: Source, scans: list[FileScan], chunk_rows: int) -> dict[str, Any]:
    """All that decides the bits of the output, as JSON gives it back. Where batches do, what decides theirs is among it."""
    job: dict[str, Any] = {
        "qbert": qbert_version(),
        **embedder.made_of,
        **embedder.pipeline.to_dict(),
        "max_length": embedder.max_length,
        "column": source.column,
        "id_column": source.id_column,
        "chunk_rows": chunk_rows,
        "files": [asdict(scan) for scan in scans],
        "torch": metadata.version("torch"),
    }
    if embedder.batch_bits != SAME_BITS:
        job |= {"batch_tokens": embedder.batch_tokens, "threads": torch.get_num_threads(), "cpu": cpu_target().isa}
    return dict(json.loads(json.dumps(job)))


def _finished(output: Path, job: dict[str, Any]) -> EmbedReport | None:
    """The report of an output that is this job's and whole."""
    said = read_json(about_of(output))
    if not isinstance(said, dict) or said.get("job") != job or not output.is_file():
        return None
    report = EmbedReport.model_validate(said)
    if sha256_of_file(output) != report.sha256:
        return None
    return report.model_copy(update={"resumed": report.rows, "output": str(output)})


def _stamps(source: Source) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files()]


class _Counted:
    """Rows that are done, for a progress bar."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def __call__(self, rows: int) -> None:
        self._done += rows
        self._progress(self._done, self._total, "embedding")
