"""What the tests of csrc/cuda share."""

from __future__ import annotations

import builds
import pytest

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
