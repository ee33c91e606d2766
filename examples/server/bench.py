"""Texts a second of the server with batching and without, from so many clients at once, in one run:

    python examples/server/bench.py minilm --scheme w8a8 --clients 32

Rounds alternate between the two servers, and the median of the rounds' ratios is printed beside both medians.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import httpx2
import typer

SERVER = Path(__file__).with_name("server.py")
START_SECONDS = 120.0


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """A server in a process of its own, ready to answer; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(SERVER), model, "--port", str(port), *options], start_new_session=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # of the group: LitServe's workers are processes of their own
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=10)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """
    Raises:
        RuntimeError: the server has ended, or does not answer in time.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{address} did not answer in {START_SECONDS:g} s")


def ask(address: str, texts: Sequence[str], clients: int) -> None:
    """Each text in a request of its own, so many at a time. A plain client: OpenAI's takes more time than the model."""
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    with httpx2.Client(limits=limits, timeout=60) as client, ThreadPoolExecutor(clients) as pool:
        body = lambda text: {"input": text, "encoding_format": "base64"}
        for answer in pool.map(lambda text: client.post(f"{address}/embeddings", json=body(text)), texts):
            answer.raise_for_status()


def sentences(count: int) -> list[str]:
    """Of English prose, as short as queries are."""
    from qbert.calibrate import default_texts

    found = [each for text in default_texts(count) for each in text.split(". ") if 20 <= len(each) <= 100]
    return [found[index % len(found)] for index in range(count)]


def main(
    model: Annotated[str, typer.Argument(help="as server.py takes it")],
    scheme: Annotated[str | None, typer.Option()] = None,
    pooling: Annotated[str | None, typer.Option()] = None,
    clients: Annotated[int, typer.Option()] = 32,
    requests: Annotated[int, typer.Option(help="of a round")] = 512,
    rounds: Annotated[int, typer.Option()] = 5,
    data: Annotated[Path | None, typer.Option(help=".txt with a text a line; by default sentences of prose")] = None,
) -> None:
    """Print both servers' throughput, and their ratio."""
    texts = sentences(requests) if data is None else data.read_text(encoding="utf-8").splitlines()[:requests]
    options = [
        word for name, value in (("--scheme", scheme), ("--pooling", pooling)) if value for word in (name, value)
    ]
    with serving(model, *options) as batching, serving(model, "--requests", "1", *options) as alone:
        seconds: dict[str, list[float]] = {batching: [], alone: []}
        for address in (batching, alone):
            ask(address, texts[:clients], clients)
        for _ in range(rounds):
            for address, row in seconds.items():
                start = time.perf_counter()
                ask(address, texts, clients)
                row.append(time.perf_counter() - start)
    for name, address in (("batching", batching), ("one by one", alone)):
        print(f"{name}: {len(texts) / statistics.median(seconds[address]):.0f} texts a second, {clients} clients")
    ratios = [one / many for many, one in zip(seconds[batching], seconds[alone], strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)")


if __name__ == "__main__":
    typer.run(main)
