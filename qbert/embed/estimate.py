"""What embedding N texts takes: time, memory and machines, from a sample of them that is embedded here."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from qbert.embed.embedder import Embedder
from qbert.embed.job import DEFAULT_CHUNK_ROWS
from qbert.embed.sources import Source
from qbert.errors import QBertError

SAMPLE_TEXTS = 1536
_PARTS = 3  # timed apart, to show how far they lie from each other
_FLOAT_BYTES, _GIGABYTE, _HOUR = 4, 1e9, 3600.0


class Estimate(BaseModel):
    """Outcome of `estimate`.

    Attributes:
        texts: of the whole job.
        sampled: that were embedded, spread evenly over the input.
        tokens_per_text: mean of the sample, special ones included.
        texts_per_second, slowest, fastest: of the sample, and of its slowest and fastest part.
        hours: of one machine like this one, reading included.
        within_hours, machines: how many machines like this one finish the job within so many hours.
        memory_gb: of a process: its peak here, and a chunk of vectors.
        output_gb: of float32 vectors; as much again waits beside it until it is whole.
    """

    model_config = ConfigDict(extra="forbid")

    texts: int
    sampled: int
    tokens_per_text: float
    texts_per_second: float
    slowest: float
    fastest: float
    hours: float
    within_hours: float
    machines: int
    memory_gb: float
    output_gb: float


def estimate(
    embedder: Embedder,
    source: Source,
    *,
    texts: int | None = None,
    within_hours: float = 1.0,
    sample: int = SAMPLE_TEXTS,
) -> Estimate:
    """Embeds a sample of a file or folder, and reckons from that.

    Args:
        texts: of the whole job; by default as many as the source has.
        within_hours: time that the machines are counted for.
        sample: texts that are embedded, at most.

    Raises:
        QBertError: an argument out of range, or a bad row.
    """
    if texts is not None and texts < 1:
        raise QBertError(f"texts {texts}; allowed: 1 or more")
    if within_hours <= 0:
        raise QBertError(f"within {within_hours:g} hours; allowed: more than 0")
    start = time.perf_counter()
    rows = sum(scan.rows for scan in source.scan())
    reading = (time.perf_counter() - start) / rows
    step = max(1, rows // sample)
    chosen = [row.text for index, row in enumerate(source.rows()) if index % step == 0][:sample]
    embedder.embed(chosen[:: max(1, len(chosen) // 8)])  # what a first call prepares is no part of the job
    seconds, tokens, rates = 0.0, 0, []
    for part in _parts(chosen):
        start = time.perf_counter()
        tokens += embedder.embed(part).tokens
        took = time.perf_counter() - start
        seconds += took
        rates.append(len(part) / took)
    wanted = rows if texts is None else texts
    hours = wanted * (seconds / len(chosen) + reading) / _HOUR
    chunk = DEFAULT_CHUNK_ROWS * embedder.dimension * _FLOAT_BYTES
    return Estimate(
        texts=wanted,
        sampled=len(chosen),
        tokens_per_text=tokens / len(chosen),
        texts_per_second=len(chosen) / seconds,
        slowest=min(rates),
        fastest=max(rates),
        hours=hours,
        within_hours=within_hours,
        machines=math.ceil(hours / within_hours),
        memory_gb=(_peak_bytes() + 2 * chunk) / _GIGABYTE,
        output_gb=wanted * embedder.dimension * _FLOAT_BYTES / _GIGABYTE,
    )


def _parts(texts: Sequence[str]) -> list[Sequence[str]]:
    """Every so-manieth text each, so that all parts are alike."""
    return [part for part in (texts[index::_PARTS] for index in range(_PARTS)) if part]


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
