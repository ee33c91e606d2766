"""Peak activations of an example small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qbert.analyze import Component
from qbert.analyze.memory import peak_memory

N = 256
UNIT = 4 * N  # bytes of one float32 vector of N


class TwoVectors(nn.Module):
    """Allocates one unit, then two more; the first one dies with the call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = x + 1
        return torch.cat([one, one])


class Halve(nn.Module):
    """Allocates two units and then one more; a view and an in-place operation allocate nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        return doubled.mul_(3)[:N].clone()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = TwoVectors()
        self.pooler = Halve()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(x)  # 2 units stay
        return self.pooler(hidden)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_by_hand(device: str) -> None:
    peak = peak_memory(Toy(), {"x": torch.zeros(N, device=device)})
    assert peak.total == 5 * UNIT
    assert peak.at_peak == {Component.EMBEDDINGS: 2 * UNIT, Component.POOLER_HEAD: 3 * UNIT}
    assert peak.while_running == {Component.EMBEDDINGS: 3 * UNIT, Component.POOLER_HEAD: 5 * UNIT}


def test_weights_and_inputs_are_no_activations() -> None:
    model = nn.Linear(N, 1, bias=False)
    assert peak_memory(model, {"input": torch.zeros(1, N)}).total == 4
