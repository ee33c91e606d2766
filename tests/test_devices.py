"""The table of GPUs: what it must satisfy, and that choosing a kernel and predicting times ask it."""

from dataclasses import fields

import pytest

from qbert.analyze.targets import TARGETS
from qbert.devices import GPUS, datasheet_of
from qbert.target import Target


@pytest.mark.parametrize("name", GPUS)
def test_a_row_is_a_target_and_a_roofline(name):
    gpu = GPUS[name]
    target = Target(**gpu.limits)
    assert (target.device, target.sm, target.sm_count) == ("cuda", gpu.sm, gpu.sm_count)
    assert set(gpu.limits) < {each.name for each in fields(Target)}
    assert gpu.shared_memory % 1024 == 0
    assert TARGETS[name].peaks == gpu.peaks
    assert TARGETS[name].vector_flops == gpu.peaks["fp32"] < gpu.peaks["int8"]
    assert datasheet_of(gpu.driver_name) is gpu
