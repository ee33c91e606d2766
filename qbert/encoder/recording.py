"""Recording what a function does on a device, to have it done again by one call. The only code that knows CUDA graphs."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """Records launches on a device. All recordings of one recorder share memory, so one runs at a time: in a turn."""

    def unavailable(self) -> str | None:
        """Why nothing can be recorded or repeated at this moment; None if it can."""

    def turn(self) -> AbstractContextManager[None]:
        """What is launched inside starts on the device after everything launched in the turn before has ended there."""

    def record(self, run: Callable[[], None]) -> Callable[[], Any]:
        """Runs `run`, in a turn, and returns what repeats it: the same launches, on the same addresses.

        Raises:
            torch.OutOfMemoryError: recording took more memory than there is.
        """

    def nbytes(self) -> int:
        """Device memory that all recordings hold together."""

    def wait(self) -> None:
        """Returns when everything launched in turns has ended, so that recordings and their memory may be dropped."""

    def reset(self) -> None:
        """Lets go of the recordings' memory, once they were dropped."""


class CudaRecorder:
    """`Recorder` by CUDA graphs on one memory pool.

    Raises:
        RuntimeError: in `record`, for what CUDA cannot capture, such as waiting for a result.
    """

    _capturing = threading.Lock()  # a process captures one graph at a time

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._turn_over = torch.cuda.Event()
        self._pool: Any = torch.cuda.graph_pool_handle()

    def unavailable(self) -> str | None:
        return "the caller is capturing a CUDA graph" if torch.cuda.is_current_stream_capturing() else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)  # threads may have streams that do not wait for one another
        stream.wait_event(self._turn_over)
        try:
            yield
        finally:
            self._turn_over.record(stream)

    def record(self, run: Callable[[], None]) -> Callable[[], Any]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        with self._capturing, torch.cuda.device(self._device), _no_garbage_collection():
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()  # compiles and loads the kernels, which cannot be done while capturing
            # "thread_local": meanwhile other threads may allocate, and wait for what they launched.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                run()
            current.wait_stream(self._stream)
        return graph.replay

    def nbytes(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == tuple(self._pool))

    def wait(self) -> None:
        # Not for the whole device: that is forbidden while another thread captures.
        for stream in (self._stream, torch.cuda.current_stream(self._device)):
            stream.synchronize()
        self._turn_over.synchronize()

    def reset(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # torch refuses a pool whose last graph is gone


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What is collected might be another model's graph or event, and freeing one ends a capture with an error."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def recorder_of(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None
