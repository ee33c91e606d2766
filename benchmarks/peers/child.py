"""The process that one system lives in: it does what its parent says, and between two commands it is truly idle.

    python -m benchmarks.peers.child FILE_DESCRIPTOR TARGET ROW

Two thread pools in one process, or two processes with spinning pools, fight for the same cores. So each system has a process of
its own with its own threads left at their defaults, and a command is answered only when no thread of the process uses the
processor any more: that is measured, not assumed, so no wait policy has to be forced on anyone.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from qbert.timing import Unavailable, come_to_rest, elapsed, one_line

from . import ROWS
from .base import Bound, Floats, Ids, Job, Loaded, Peer, TextPeer

_ALWAYS_WARM_BELOW = 0.1  # seconds: a shorter forward feels what other processes left in the caches
_MAX_FORWARDS = 200


class Host:
    """Holds one peer and carries out commands; each method but the private ones is a command."""

    def __init__(self, peer_class: type[Peer]) -> None:
        self._class = peer_class
        self._peer: Peer | None = None
        self._embed: Callable[[], Floats] = lambda: np.empty(0, np.float32)
        self._meter: Meter = HostMeter()

    @property
    def peer(self) -> Peer:
        assert self._peer is not None, "prepare comes first"
        return self._peer

    def prepare(self, job: Job) -> float:
        """Makes the system and its converted model; seconds."""
        torch.set_num_threads(job.threads)
        self._meter = meter_of(job.device)
        start = time.perf_counter()
        self._peer = self._class(job)
        self._peer.prepare()
        release_memory()
        return time.perf_counter() - start

    def load(self) -> Loaded:
        """Gets the system ready."""
        self._meter.mark()
        seconds = self._meter.seconds(self.peer.load)
        release_memory()
        return Loaded(self.peer.weight_bytes(), self.peer.padding, seconds)

    def bind(self, ids: Ids, mask: Ids) -> Bound:
        """Takes a batch and runs it once."""
        self.peer.bind(ids, mask)
        results: list[Any] = []
        seconds = self._meter.seconds(lambda: results.append(self.peer.forward()))
        hidden = np.array(self.peer.hidden(results.pop()), dtype=np.float32)
        release_memory()
        return Bound(seconds, hidden)

    def turn(self, seconds: float) -> list[float]:
        """Forwards of the batch for about so many seconds, one at least; the seconds of each."""
        return _turn(self.peer.forward, seconds, self._meter)

    def memory(self) -> int:
        """Bytes that the loaded model costs at the height of a forward, less what was in use before it was loaded."""
        return self._meter.peak(self.peer.forward)

    def notes(self) -> list[str]:
        """See `Peer.notes`."""
        return self.peer.notes()

    def sentences(self, batches: list[tuple[Ids, Ids]], calls: list[list[str]], size: int) -> Bound:
        """Takes texts, as batches or call by call, and embeds all once; `hidden` is (texts, hidden) in their order."""
        peer = self.peer
        if isinstance(peer, TextPeer):
            self._embed = lambda: np.concatenate([peer.encode(texts, size) for texts in calls])
        else:
            self._embed = lambda: _embedded(peer, batches)
        start = time.perf_counter()
        vectors = self._embed()
        return Bound(time.perf_counter() - start, vectors)

    def sweep(self) -> list[float]:
        """Embeds all texts once; the seconds."""
        return _turn(self._embed, 0.0, self._meter)

    def sweep_memory(self) -> int:
        """As `memory`, for a sweep."""
        return self._meter.peak(self._embed)


def _embedded(peer: Peer, batches: Sequence[tuple[Ids, Ids]]) -> Floats:
    parts = []
    for ids, mask in batches:
        peer.bind(ids, mask)
        parts.append(mean_pooled(peer.hidden(peer.forward()), mask))
    return np.concatenate(parts)


def mean_pooled(hidden: Floats, mask: Ids) -> Floats:
    """(batch, width, hidden) -> (batch, hidden): the mean over tokens that are not padding, as MiniLM is meant to be used."""
    weights = mask.astype(np.float32)[:, :, None]
    pooled: Floats = (hidden * weights).sum(1) / weights.sum(1)
    return pooled


class Meter(Protocol):
    """How time and memory of one process are measured, where its model runs."""

    def mark(self) -> None:
        """Memory that is in use now does not count as the model's."""

    def seconds(self, run: Callable[[], object]) -> float:
        """From the call until its result is there."""

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes in use at the height of `run`, less those at the mark."""


class HostMeter:
    """On the CPU: the wall clock, and the process's resident memory."""

    def __init__(self) -> None:
        self._marked = 0

    def mark(self) -> None:
        self._marked = resident_bytes()

    def seconds(self, run: Callable[[], object]) -> float:
        return elapsed(run)

    def peak(self, run: Callable[[], object]) -> int:
        return peak_of(run) - self._marked


class CudaMeter:
    """On a GPU: the wall clock until the device is done, as a caller who needs the result waits; memory that torch reserves.

    Reserved, not allocated: a captured graph keeps its memory though no tensor holds it.
    """

    def mark(self) -> None:
        torch.cuda.empty_cache()

    def seconds(self, run: Callable[[], object]) -> float:
        return elapsed(run, "cuda")

    def peak(self, run: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()


def meter_of(device: str) -> Meter:
    """
    Raises:
        Unavailable: a GPU is asked for and there is none.
    """
    if device == "cpu":
        return HostMeter()
    if not torch.cuda.is_available():
        raise Unavailable("no NVIDIA GPU is here")
    return CudaMeter()


def _turn(run: Callable[[], object], budget: float, meter: Meter) -> list[float]:
    times = [meter.seconds(run)]
    if times[0] < _ALWAYS_WARM_BELOW and budget:
        times = [meter.seconds(run)]  # the first only brought the weights back into the caches
    while sum(times) < budget and len(times) < _MAX_FORWARDS:
        times.append(meter.seconds(run))
    return times


def resident_bytes() -> int:
    """Memory of this process now; 0 where /proc does not say."""
    return _status_bytes("VmRSS")


def peak_of(run: Callable[[], object]) -> int:
    """High-water mark of this process's memory during `run`.

    Raises:
        Unavailable: the system cannot reset the mark.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Unavailable(f"peak memory: {one_line(error)}") from None
    run()
    return _status_bytes("VmHWM")


def release_memory() -> None:
    """Gives back what is no longer used, so that a float model that was converted is not counted."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _status_bytes(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def serve(connection: Connection, target: str, row: str) -> None:
    """Answers (command, arguments) with (result, reason or None, seconds until idle) until the other end is gone."""
    peer_class = ROWS[target][row].peer_class()
    for name in peer_class.imports:
        importlib.import_module(name)
    host = Host(peer_class)
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_answer(host, command, arguments))


def _answer(host: Host, command: str, arguments: Sequence[Any]) -> tuple[Any, str | None, float]:
    try:
        result = getattr(host, command)(*arguments)
        return result, None, come_to_rest()
    except Unavailable as reason:
        return None, str(reason), 0.0
    except Exception as error:  # whatever a library raises is a row with a reason, not the end of the benchmark
        return None, one_line(error), 0.0


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2], sys.argv[3])
