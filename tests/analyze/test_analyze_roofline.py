"""Roofline arithmetic and the table of targets."""

from __future__ import annotations

import pytest
import torch

from qbert.analyze import TARGETS, Component, RooflineTarget
from qbert.analyze.count import OpCount
from qbert.analyze.roofline import Prediction, predict, predict_op
from qbert.analyze.targets import get_target, measure_here
from qbert.errors import QBertError

# 1 TFLOP/s in fp32, 4 in int8, 0.1 outside of the matrix units, 10 GB/s, 2 us a launch
TOY = RooflineTarget("toy", "a toy", {"fp32": 1e12, "bf16": 2e12, "int8": 4e12}, 1e11, 1e10, 2e-6, "made up")


def op(**values: object) -> OpCount:
    return OpCount(Component.FFN, "op", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counted", "dtype", "ms", "bound"),
    [
        (op(matmul_flops=10**9, model_dtype_bytes=10**6), "fp32", 1.0, "compute"),
        (op(matmul_flops=10**9, model_dtype_bytes=10**6), "bf16", 0.5, "compute"),
        (op(matmul_flops=10**9, model_dtype_bytes=10**6, math="int8"), "fp32", 0.25, "compute"),
        (op(matmul_flops=10**6, model_dtype_bytes=10**7), "fp32", 1.0, "memory"),
        (op(matmul_flops=10**6, model_dtype_bytes=10**7), "bf16", 0.5, "memory"),  # half the bytes
        (op(matmul_flops=10**6, fixed_bytes=10**7), "bf16", 1.0, "memory"),  # quantized weights keep theirs
        (op(vector_flops=10**8, model_dtype_bytes=10**6), "bf16", 1.0, "compute"),
        (op(), "fp32", 0.0, "none"),
    ],
    ids=str,
)
def test_one_operation(counted: OpCount, dtype: str, ms: float, bound: str) -> None:
    prediction = predict_op(counted, TOY, dtype, "fp32")
    assert prediction.ms == pytest.approx(ms)
    assert prediction.bound == bound
    assert prediction.launch_ms == pytest.approx(2e-3)


def test_sum_of_operations() -> None:
    ops = [op(matmul_flops=3 * 10**9), op(model_dtype_bytes=10**7, launches=2)]
    prediction = predict(ops, TOY, "fp32", "fp32")
    assert prediction.ms == pytest.approx(4.0)
    assert prediction.bound == "compute"  # 3 of the 4 ms
    assert prediction.intensity == pytest.approx(300)
    assert prediction.launch_ms == pytest.approx(6e-3)
    assert predict([], TOY, "fp32", "fp32") == Prediction()


def test_missing_precision_is_named() -> None:
    with pytest.raises(QBertError, match="target t4 has no peak for bf16; it has fp32, fp16, int8"):
        predict_op(op(matmul_flops=1), TARGETS["t4"], "bf16", "fp32")
    with pytest.raises(QBertError, match="unknown dtype 'int8'; allowed: fp32, tf32, bf16, fp16"):
        predict_op(op(), TOY, "int8", "fp32")


def test_targets_are_dense_figures() -> None:
    assert TARGETS["h100"].peak("int8") == 1978.9e12
    assert TARGETS["h100"].bandwidth == 3.35e12
    for target in TARGETS.values():
        assert target.source
        # On these five generations int8 units are twice as fast as fp16 ones: a sparse figure would break the rule.
        assert target.peak("int8") == pytest.approx(2 * target.peak("fp16"), rel=0.02)


def test_unknown_target_is_named() -> None:
    with pytest.raises(QBertError, match="unknown target 'b900'; allowed: here, b200, h100"):
        get_target("b900", torch.device("cpu"))


def test_measure_here() -> None:
    here = measure_here()
    assert set(here.peaks) == {"fp32", "bf16", "fp16", "int8"}
    assert all(peak > 1e8 for peak in here.peaks.values())
    assert 1e8 < here.bandwidth < 1e13
    assert 0 < here.launch_s < 1e-2
