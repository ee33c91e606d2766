"""Latency of every component on this machine: one stamp wherever one component, or step of a fused encoder, hands over.

The time between two stamps belongs to the component that ran, so the components add up to the whole forward pass. Steps are
timed where they run, on the values and with the caches that the step before has left.
Attention scores are what an attention module takes besides its linears. Passes with and without stamps alternate:
the difference is what stamping costs.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from qbert.analyze.components import Component
from qbert.analyze.program import Running, StepName
from qbert.analyze.tracker import ComponentTracker
from qbert.timing import elapsed, in_rounds

WARM_UP_PASSES = 2
_MS_PER_S = 1e3


@dataclass(frozen=True)
class Latency:
    """Medians over the repeats, in milliseconds.

    Attributes:
        total_ms: a forward pass as users run it, without stamps.
        fastest_ms, slowest_ms: of those passes; far apart on a machine that is busy otherwise.
        stamped_ms: a forward pass with stamps.
        hook_cost_ms: median difference between the two, pass by pass; below the noise it can come out negative.
        component_ms: time of each component in the passes with stamps.
        repeats: passes of each kind.
        step_ms: time of each step of fused encoders in the passes with stamps.
    """

    total_ms: float
    fastest_ms: float
    slowest_ms: float
    stamped_ms: float
    hook_cost_ms: float
    component_ms: dict[Component, float]
    repeats: int
    step_ms: dict[StepName, float] = field(default_factory=dict)

    @property
    def remainder_ms(self) -> float:
        """What the components do not explain: `total_ms` less their sum. Mostly the hooks' cost, with a minus sign."""
        return self.total_ms - sum(self.component_ms.values())


class _Stamps:
    """Points in time on the device that runs the model, each with what ran until then."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._taken: list[tuple[Running | None, float | torch.cuda.Event]] = []

    def take(self, ran: Running | None) -> None:
        """Stamp now. On CUDA the stream stamps it, so that nothing waits."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._taken.append((ran, event))
        else:
            self._taken.append((ran, time.perf_counter()))

    def times(self) -> _Times:
        """After the device is done."""
        found = _Times()
        for (_, start), (ran, end) in zip(self._taken, self._taken[1:], strict=False):
            if ran is not None:
                milliseconds = _between_ms(start, end)
                found.components[ran.component] += milliseconds
                if ran.step is not None:
                    found.steps[ran.step] += milliseconds
        return found


@dataclass
class _Times:
    """Milliseconds in one pass."""

    components: dict[Component, float] = field(default_factory=lambda: dict.fromkeys(Component, 0.0))
    steps: dict[StepName, float] = field(default_factory=lambda: defaultdict(float))


def _between_ms(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * _MS_PER_S
    assert not isinstance(start, float)
    assert not isinstance(end, float)
    return start.elapsed_time(end)


def measure_latency(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], device: torch.device, repeats: int
) -> Latency:
    """Time `model(**inputs)` on `device`, `repeats` times plain and `repeats` times with stamps, in turn."""
    forward = lambda: model(**inputs)

    def plain() -> tuple[float, _Times]:
        return elapsed(forward, device) * _MS_PER_S, _Times()

    def stamped() -> tuple[float, _Times]:
        stamps = _Stamps(device)
        with ComponentTracker(model, stamps.take):
            seconds = elapsed(forward, device)
        return seconds * _MS_PER_S, stamps.times()

    with torch.inference_mode():
        for _ in range(WARM_UP_PASSES):
            forward()
        rounds, _ = in_rounds({"plain": plain, "stamped": stamped}, 0.0, repeats, repeats, refusal=())
    totals = [milliseconds for milliseconds, _ in rounds["plain"]]
    stamped_totals = [milliseconds for milliseconds, _ in rounds["stamped"]]
    times = [found for _, found in rounds["stamped"]]
    return Latency(
        total_ms=statistics.median(totals),
        fastest_ms=min(totals),
        slowest_ms=max(totals),
        stamped_ms=statistics.median(stamped_totals),
        hook_cost_ms=statistics.median(b - a for a, b in zip(totals, stamped_totals, strict=True)),
        component_ms={each: statistics.median(found.components[each] for found in times) for each in Component},
        repeats=repeats,
        step_ms={each: statistics.median(found.steps[each] for found in times) for each in times[0].steps},
    )
