"""Files of vectors: killed at any moment and run again, a job writes the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from embed_cases import texts

from qbert import QBertError
from qbert.embed import Embedder, Source, embed_file, embedder_of
from qbert.embed.store import about_of, opened, partial_of, read_json

ROWS, CHUNK = 300, 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "id": index * 7}) + "\n" for index, text in enumerate(texts(ROWS)))
    )
    return path


@pytest.fixture(scope="module")
def embedder(fused: Path) -> Embedder:
    return embedder_of(str(fused))


@pytest.fixture(scope="module")
def expected(embedder: Embedder) -> np.ndarray:
    return embedder.embed(texts(ROWS)).vectors


def nothing_left(output: Path) -> bool:
    """Whether only the output and what it says about itself stand in its folder."""
    return {file.name for file in output.parent.iterdir()} == {output.name, about_of(output).name}


def test_npy_holds_a_vector_for_each_row(
    embedder: Embedder, source: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    seen: list[tuple[int, int, str]] = []
    report = embed_file(embedder, Source(source), output, chunk_rows=CHUNK, progress=lambda *row: seen.append(row))
    assert np.array_equal(np.load(output), expected)
    assert (report.rows, report.dimension, report.resumed) == (ROWS, 64, 0)
    assert report.truncated == sum(len(text.split()) > 30 for text in texts(ROWS))
    assert seen[-1] == (ROWS, ROWS, "embedding")
    assert nothing_left(output)
    assert read_json(about_of(output)) == report.model_dump(mode="json")
    umask = os.umask(0)
    os.umask(umask)
    assert output.stat().st_mode & 0o777 == 0o666 & ~umask


def test_parquet_has_row_numbers_and_ids(
    embedder: Embedder, source: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'qbert[embed]'")
    import pyarrow.parquet as parquet

    output = tmp_path / "out.parquet"
    embed_file(embedder, Source(source, id_column="id"), output, chunk_rows=CHUNK)
    table = parquet.read_table(output)
    assert table["row"].to_pylist() == list(range(ROWS))
    assert table["id"].to_pylist() == [index * 7 for index in range(ROWS)]
    assert np.array_equal(np.stack(table["vector"].to_numpy()), expected)
    again = embed_file(embedder, Source(source), tmp_path / "plain.parquet", chunk_rows=CHUNK)
    assert again.rows == ROWS
    assert parquet.read_table(tmp_path / "plain.parquet").column_names == ["row", "vector"]


@pytest.mark.parametrize("chunk", [1, 7, ROWS - 1, ROWS, 10 * ROWS])
def test_chunks_change_no_bit(
    embedder: Embedder, source: Path, expected: np.ndarray, tmp_path: Path, chunk: int
) -> None:
    embed_file(embedder, Source(source), tmp_path / "out.npy", chunk_rows=chunk)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)


class Killed(Exception):
    """In place of a signal."""


def stopping_after(chunks: int):
    """An engine that computes so many chunks and is gone."""

    def engine(embedder, given, chunk_rows, advance):
        for index, (chunk, rows) in enumerate(given):
            if index == chunks:
                raise Killed
            yield chunk, embedder.embed(rows, advance)

    return engine


def test_a_job_goes_on_where_it_stopped(embedder: Embedder, source: Path, expected: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    with pytest.raises(Killed):
        embed_file(embedder, Source(source), output, chunk_rows=CHUNK, engine=stopping_after(3))
    assert not output.exists()
    (partial_of(output) / "chunk-00000001.safetensors").write_bytes(b"half")  # a disk that lost its end
    report = embed_file(embedder, Source(source), output, chunk_rows=CHUNK)
    assert report.resumed == 2 * CHUNK
    assert np.array_equal(np.load(output), expected)
    assert nothing_left(output)


def test_a_finished_job_is_not_done_again(embedder: Embedder, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    embed_file(embedder, Source(source), output, chunk_rows=CHUNK)
    before = output.stat().st_mtime_ns
    report = embed_file(embedder, Source(source), output, chunk_rows=CHUNK, engine=stopping_after(0))
    assert report.resumed == ROWS
    assert output.stat().st_mtime_ns == before


def test_another_jobs_work_is_left_alone(
    embedder: Embedder, source: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    with pytest.raises(Killed):
        embed_file(embedder, Source(source), output, chunk_rows=CHUNK, engine=stopping_after(2))
    with pytest.raises(QBertError, match=r"chunks of another job \(chunk_rows: 32 there, 64 here\); .* --overwrite"):
        embed_file(embedder, Source(source), output, chunk_rows=64)
    output.write_bytes(b"somebody else's")
    with pytest.raises(QBertError, match="exists, of another job; --overwrite replaces it"):
        embed_file(embedder, Source(source), output, chunk_rows=64)
    assert output.read_bytes() == b"somebody else's"
    embed_file(embedder, Source(source), output, chunk_rows=64, overwrite=True)
    assert np.array_equal(np.load(output), expected)


def test_other_texts_are_another_job(embedder: Embedder, source: Path, tmp_path: Path) -> None:
    mine, output = tmp_path / "mine.txt", tmp_path / "out.npy"
    mine.write_text("\n".join(texts(80)))
    with pytest.raises(Killed):
        embed_file(embedder, Source(mine), output, chunk_rows=CHUNK, engine=stopping_after(1))
    mine.write_text("\n".join(["another", *texts(79)]))
    with pytest.raises(QBertError, match="another job"):
        embed_file(embedder, Source(mine), output, chunk_rows=CHUNK)


def test_texts_that_change_meanwhile_are_noticed(embedder: Embedder, tmp_path: Path) -> None:
    mine, output = tmp_path / "mine.txt", tmp_path / "out.npy"
    mine.write_text("\n".join(texts(40)))

    def engine(embedder, given, chunk_rows, advance):
        for chunk, rows in given:
            mine.write_text("\n".join([*texts(40), "more"]))
            yield chunk, embedder.embed(rows)

    with pytest.raises(QBertError, match="changed while it was read"):
        embed_file(embedder, Source(mine), output, engine=engine)
    assert not output.exists()


def test_two_processes_do_not_write_one_file(embedder: Embedder, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    with opened(output, {"chunk_rows": 1}, rows=1, dimension=1, overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(QBertError, match="another process is writing it"):
                embed_file(embedder, Source(source), output, overwrite=overwrite)


def test_a_vector_that_is_none_is_named_by_its_row(embedder: Embedder, tmp_path: Path) -> None:
    model = embedder_of(str(embedder.model.config.name_or_path))
    model.model.embeddings.LayerNorm.weight.data[0] = float("nan")
    (tmp_path / "in.txt").write_text("\n".join(texts(5)))
    with pytest.raises(QBertError, match="NaN or Inf for 1 texts, row 0 for one"):
        embed_file(model, Source(tmp_path / "in.txt"), tmp_path / "out.npy", chunk_rows=1)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("name", ["out.txt", "out", "folder"])
def test_outputs_of_other_kinds_are_refused(embedder: Embedder, source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(QBertError, match=r"allowed: a file that ends in .npy or .parquet"):
        embed_file(embedder, Source(source), tmp_path / name)


def test_npy_has_no_place_for_ids(embedder: Embedder, source: Path, tmp_path: Path) -> None:
    with pytest.raises(QBertError, match="has no place for ids"):
        embed_file(embedder, Source(source, id_column="id"), tmp_path / "out.npy")


# Children of a process that has loaded everything: a kill costs no seconds of imports, so many are tried.
KILLING = """
import os, random, signal, sys, time
from pathlib import Path
from qbert.embed import Source, embed_file, embedder_of
from qbert.embed.store import partial_of

model, source, output, chunk, seed = sys.argv[1:]
random.seed(int(seed))
embedder, kills = embedder_of(model), 0

def chunks():
    return len(list(partial_of(Path(output)).glob("chunk-*")))

while True:
    before = chunks()
    child = os.fork()
    if child == 0:
        try:
            embed_file(embedder, Source(Path(source)), Path(output), chunk_rows=int(chunk))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kills < 8:
        deadline = time.monotonic() + random.uniform(0, 0.3)
        while chunks() == before and time.monotonic() < deadline:  # on any machine some are killed between chunks
            time.sleep(0.0005)
        time.sleep(random.uniform(0, 0.002))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(kills, os.WEXITSTATUS(status))
        break
    kills += 1
"""


@pytest.mark.parametrize("seed", [0])
def test_killed_at_any_moment_it_writes_the_same_bytes(
    embedder: Embedder, fused: Path, source: Path, tmp_path: Path, seed: int
) -> None:
    embed_file(embedder, Source(source), tmp_path / "whole.npy", chunk_rows=8)
    output = tmp_path / "out" / "killed.npy"
    arguments = [str(fused), str(source), str(output), "8", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", KILLING, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    kills, code = map(int, done.stdout.split())
    assert code == 0, done.stderr
    assert kills >= 1
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    embed_file(embedder, Source(source), output, chunk_rows=8)  # what a kill at the very end left goes away
    assert nothing_left(output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "fused"])
def test_the_command_killed_writes_the_same_bytes(
    encoder: Path, fused: Path, source: Path, tmp_path: Path, kind: str
) -> None:
    """Float models too, whose bits depend on batches: chunks are batched alike whatever was finished before."""
    model = encoder if kind == "float" else fused
    output = tmp_path / "killed.npy"
    command = [sys.executable, "-m", "qbert", "embed", str(model), str(source), "--chunk", "2", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([*command, str(tmp_path / "whole.npy")], check=True, env=environment, capture_output=True)
    moments = random.Random(kind)
    for _ in range(3):
        process, before = subprocess.Popen([*command, str(output)], env=environment), chunks_in(output)
        while chunks_in(output) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not output.exists()
    assert subprocess.run([*command, str(output)], env=environment, capture_output=True).returncode == 0
    assert read_json(about_of(output))["resumed"] >= 3 * 2
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def chunks_in(output: Path) -> int:
    return len(list(partial_of(output).glob("chunk-*")))
