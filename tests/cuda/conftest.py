"""What the tests of csrc/cuda share."""

from __future__ import annotations

import builds
import pytest
import torch

from qbert.ops import table
from qbert.ops.cuda import launch
from qbert.target import Target


@pytest.fixture
def emulated(monkeypatch):
    """`qbert._cuda` on an emulated H100 of three multiprocessors; the launchers of `qbert.ops.cuda` take CPU tensors."""
    if builds.emulator_missing():
        pytest.skip(builds.emulator_missing())
    module = builds.emulated_module()
    monkeypatch.setattr(launch, "extension", lambda: module)
    target = Target("cuda", "", sm=90, sm_count=3, shared_memory=232_448, native=True)
    monkeypatch.setattr(launch, "target_of", lambda device: target)
    monkeypatch.setattr(launch, "stream_of", lambda device: 0)
    return module


@pytest.fixture
def fresh_choice(monkeypatch):
    """`table.select` asks the rows each time: a test may change what they say."""
    monkeypatch.setattr(table, "_remembered", table._first)


@pytest.fixture
def poisoned(emulated, monkeypatch):
    """Results and workspaces come with wrong bytes, inside and around; those around must stay."""
    held = []

    def new_empty(self, *shape, dtype=None):
        shape, dtype = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape), dtype or self.dtype
        memory = torch.full((shape.numel() * dtype.itemsize + 128,), 77, dtype=torch.uint8)
        held.append(memory)
        return memory[64:-64].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for memory in held:
        assert bool((memory[:64] == 77).all())
        assert bool((memory[-64:] == 77).all())
