"""For all tests: after an illegal access a process can do nothing more on its GPU, and every later test would fail for it."""

import os

import pytest
import torch


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another process takes this one's place; this test counts as failed
        pytest.exit(f"a test before {item.nodeid} has broken the GPU's context: {error}", returncode=3)
