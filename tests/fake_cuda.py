"""A GPU that is not there: streams, events and graphs of torch.cuda on a clock that only launches and kernels move.

The host's clock and the GPU's run side by side: a launch costs the host LAUNCH seconds, a kernel starts when it is launched and
the one before it has ended, an event is stamped when the kernels before it have ended.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

LAUNCH, REPLAY = 10e-6, 5e-6


class FakeCuda:
    """Stands where `torch.cuda` does. `broken`: from then on everything raises."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.capturing: list[float] | None = None
        self.broken = False
        self.captures: list[int] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(fake.host, fake.gpu)

            def synchronize(self) -> None:
                fake.synchronize()

            def elapsed_time(self, end) -> float:
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def __init__(self) -> None:
                self.kernels: list[float] = []

            def replay(self) -> None:
                fake.host += REPLAY
                fake.gpu = max(fake.host, fake.gpu) + sum(self.kernels)

        class Stream:
            def __init__(self, device=None) -> None:
                pass

            def wait_stream(self, other) -> None:
                pass

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream
        self.current_stream = Stream

    def kernel(self, seconds: float) -> None:
        """What a call of a candidate does."""
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.capturing is not None:
            self.capturing.append(seconds)
            return
        self.host += LAUNCH
        self.gpu = max(self.host, self.gpu) + seconds

    def synchronize(self, device=None) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = self.gpu = max(self.host, self.gpu)

    @contextmanager
    def graph(self, graph, stream=None):
        self.capturing = graph.kernels
        try:
            yield
        finally:
            self.captures.append(len(graph.kernels))
            self.capturing = None

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def device(self, device):
        yield

    def get_device_properties(self, device):
        return SimpleNamespace(
            name="NVIDIA Fake", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
            shared_memory_per_block_optin=232448, uuid="1234",
        )  # fmt: skip
