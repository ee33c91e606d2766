"""The engine that computes chunks on a Ray cluster: Ray Data spreads them, tries them again where a machine is lost, and brings
vectors back to the process that asked, which stores them as it stores its own. The cluster needs no file system in common.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbert.embed.embedder import Embedded, Embedder
from qbert.embed.job import Chunk
from qbert.embed.pipeline import Pipeline
from qbert.errors import MissingDependency, QBertError
from qbert.evaluate.loading import load_tokenizer, quiet_transformers
from qbert.workflow import load_any


class RayEngine:
    """See `job.Engine`. It connects to the cluster of RAY_ADDRESS, or starts one on this machine.

    Args:
        workers: processes that hold the model; by default as many as the cluster has CPUs for.
        cpus: of each worker, and its threads.
    """

    def __init__(self, workers: int | None = None, cpus: int = 1) -> None:
        for name, value in (("workers", workers), ("cpus", cpus)):
            if value is not None and value < 1:
                raise QBertError(f"{name} {value}; allowed: 1 or more")
        self._workers, self._cpus, self._ray = workers, cpus, _ray()

    def __call__(
        self, embedder: Embedder, chunks: Iterable[Chunk], chunk_rows: int, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Embedded]]:
        ray, given = self._ray, list(chunks)
        if not given:
            return
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        workers = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // self._cpus)
        rows = [{"chunk": chunk, "texts": texts} for chunk, texts in given]
        packed = ray.put(_pack(embedder))
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=([packed], self._cpus, chunk_rows),
            concurrency=(1, min(workers, len(rows))),
            num_cpus=self._cpus,
        )
        for row in done.iter_rows():
            vectors = np.frombuffer(row["vectors"], dtype=np.float32).reshape(-1, embedder.dimension)
            advance(len(vectors))
            yield int(row["chunk"]), Embedded(vectors, int(row["truncated"]), np.frombuffer(row["lengths"], np.int64))


class _Worker:
    """Holds the model in a process of Ray's."""

    def __init__(self, packed: list[Any], threads: int, chunk_rows: int) -> None:
        torch.set_num_threads(threads)
        self._embedder, self._chunk_rows = _unpack(_ray().get(packed[0])), chunk_rows

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = int(row["chunk"])
        embedded = self._embedder.embed([str(text) for text in row["texts"]], first=chunk * self._chunk_rows)
        vectors, lengths = embedded.vectors.tobytes(), embedded.lengths.tobytes()
        return {"chunk": chunk, "vectors": vectors, "lengths": lengths, "truncated": embedded.truncated}


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency(f"the engine ray needs Ray Data ({error}): pip install 'qbert[ray]'") from None
    return ray


def _pack(embedder: Embedder) -> dict[str, Any]:
    """An embedder as bytes: the very model that the driver has, quantized once, with its files' own checks on the way back."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model: Any = embedder.model
        model.save_pretrained(folder)
        embedder.tokenizer.save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    kept = {"max_length": embedder.max_length, "batch_tokens": embedder.batch_tokens}
    return {"files": files, "pipeline": asdict(embedder.pipeline), **kept}


def _unpack(packed: dict[str, Any]) -> Embedder:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in packed["files"].items():
            (Path(folder) / name).write_bytes(data)
        model, tokenizer = load_any(folder), load_tokenizer(folder)
    pipeline = Pipeline(**packed["pipeline"])
    return Embedder(model, tokenizer, pipeline, packed["max_length"], packed["batch_tokens"])
