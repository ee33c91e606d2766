"""Times belong to the component that ran, and add up."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from qbert.analyze import Component
from qbert.analyze.measure import measure_latency
from qbert.analyze.tracker import ComponentTracker

CPU = torch.device("cpu")
SLEEP_MS = 5.0


class Sleep(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP_MS / 1e3)
        return x


class Around(nn.Module):
    """A pooler that sleeps itself and calls a module of another component in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Sleep()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP_MS / 1e3)
        return self.embeddings(x)


class Model(nn.Module):
    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pooler(x)


def test_times_add_up() -> None:
    latency = measure_latency(Model(Around()), {"x": torch.zeros(1)}, CPU, repeats=3)
    # "pooler.embeddings" is a table by name: what an outer module does around an inner one is its own
    assert latency.component_ms[Component.EMBEDDINGS] >= SLEEP_MS
    assert latency.component_ms[Component.POOLER_HEAD] >= SLEEP_MS
    assert latency.fastest_ms <= latency.total_ms <= latency.slowest_ms
    total = sum(latency.component_ms.values()) + latency.remainder_ms
    assert total == pytest.approx(latency.total_ms)


def test_hooks_go_and_errors_leave_no_trace() -> None:
    model = Model(nn.Linear(2, 2))
    tracker = ComponentTracker(model)
    with pytest.raises(RuntimeError, match="shapes"), tracker:
        model(torch.zeros(3))
    assert tracker.current is None
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_current_component() -> None:
    model = Model(nn.Linear(2, 2))
    seen: list[Component | None] = []
    with ComponentTracker(model, lambda ran: seen.append(None if ran is None else ran.component)):
        model(torch.zeros(2))
    assert seen == [None, Component.OTHER, Component.POOLER_HEAD, Component.OTHER]
