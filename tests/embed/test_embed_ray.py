"""The same job on a Ray cluster of two nodes, one of which is killed midway: no row lost or doubled, the same bits.

Ray is large, so requirements.txt leaves it out: `.venv/bin/python -m pip install --no-deps -r requirements-ray.txt`, then
`.venv/bin/python -m pytest -m slow tests/embed/test_embed_ray.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embed_cases import texts

from qbert.embed import Source, embed_file, embedder_of

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs Ray: pip install --no-deps -r requirements-ray.txt")
ROOT = Path(__file__).resolve().parents[2]
ROWS, CHUNK = 400, 8


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_is_killed_midway(cluster: Any, fused: Path, tmp_path: Path) -> None:
    from qbert.embed.on_ray import RayEngine

    source = tmp_path / "in.txt"
    source.write_text("\n".join(texts(ROWS)))
    embedder = embedder_of(str(fused))
    embed_file(embedder, Source(source), tmp_path / "here.npy", chunk_rows=CHUNK)

    second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    killed: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        if what == "embedding" and done >= total // 8 and not killed:
            killed.append(done)
            threading.Thread(target=cluster.remove_node, args=(second, False)).start()

    report = embed_file(
        embedder, Source(source), tmp_path / "ray.npy", chunk_rows=CHUNK, engine=RayEngine(workers=2), progress=kill
    )
    assert killed
    assert killed[0] < ROWS
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        assert time.monotonic() < deadline, "the second node is still there"
        time.sleep(0.2)
    assert report.rows == ROWS
    assert (tmp_path / "ray.npy").read_bytes() == (tmp_path / "here.npy").read_bytes()
    assert np.load(tmp_path / "ray.npy").shape == (ROWS, 64)
