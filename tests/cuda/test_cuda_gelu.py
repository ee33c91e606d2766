"""GELU is one function on GPUs: CUDA C++ and Triton's kernels give the same bits, by the same instructions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import builds
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(bool(builds.emulator_missing()), reason=builds.emulator_missing() or "runs")
TRITON_TESTS = Path(__file__).parents[1] / "kernels"


@pytest.fixture
def triton_tests(monkeypatch):
    """What the tests of Triton's kernels use can be imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'qbert[triton]'")
    monkeypatch.setattr(sys, "path", [*sys.path, str(TRITON_TESTS)])


def gelu(x):
    y = torch.empty_like(x)
    builds.emulator_kernels().gelu(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def test_gelu_is_closer_to_the_truth_than_torch():
    """By the largest error: relative to the result where x is positive, and absolute below, where torch's 1 + erf cancels."""
    along = torch.linspace(-14, 14, 560_001)
    x = torch.cat((along[along != 0], torch.logspace(-30, 30, 10_001), -torch.logspace(-30, 30, 10_001)))
    exact = torch.nn.functional.gelu(x.double())
    relative = lambda y: float(((y.double() - exact) / exact).abs()[x > 0].max())
    absolute = lambda y: float((y.double() - exact).abs()[x < 0].max())
    torchs = torch.nn.functional.gelu(x)
    assert relative(gelu(x)) <= min(relative(torchs), 1.5e-7)
    assert absolute(gelu(x)) <= min(absolute(torchs), 8e-8)


def test_gelu_of_what_is_not_finite():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 3e38, -3e38])
    y = gelu(x)
    assert y[:3].isnan().all()
    assert y[3:].tolist() == [0.0, x[4].item(), 0.0]


# ---- the same as Triton's -------------------------------------------------------------------------------------------


def numbers():
    """float32 of every exponent and sign, with its first and last mantissas: 0, subnormals, infinities and NaN too; and all
    along where the tail is neither 1 / 2 nor 0."""
    generator = np.random.default_rng(0)
    mantissas = np.concatenate((np.arange(8), 2**23 - 1 - np.arange(8), generator.integers(2**23, size=240)))
    every = (np.arange(512, dtype=np.uint32)[:, None] << 23 | mantissas.astype(np.uint32)).ravel().view(np.float32)
    along = generator.uniform(-14, 14, 2**19).astype(np.float32)
    return np.concatenate((every, along))


@pytest.mark.interpreter
def test_bits_are_triton_s(tmp_path, triton_tests):
    import interpreted

    x = numbers()
    x.tofile(tmp_path / "x")
    interpreted.run("int8_gemm_cases:gelu_of_file", [[str(tmp_path / "x")]])
    triton = np.fromfile(tmp_path / "x", np.float32)
    cuda = gelu(torch.from_numpy(x)).numpy()
    assert (np.isnan(triton) == np.isnan(cuda)).all()
    assert (np.isnan(cuda) == ~np.isfinite(x)).all()
    finite = np.isfinite(x)
    different = finite & (triton.view(np.uint32) != cuda.view(np.uint32))
    assert not different.any(), list(zip(x[different][:5], triton[different][:5], cuda[different][:5], strict=True))


def arithmetic(ptx):
    """Operations of PTX on floats in their order, with the constants among their operands."""
    for register, value in re.findall(r"mov\.[bf]32\s+(%\w+), (0f[0-9A-F]{8});", ptx):
        ptx = re.sub(rf"{register}\b", value, ptx)
    lines = re.findall(r"^\s*((?:abs|neg|mul|add|sub|fma|ex2|rcp|div|max|min)\.\S*f32)\s+(.*?);", ptx, re.MULTILINE)
    return [(operation, *re.findall(r"0f[0-9A-F]{8}", operands)) for operation, operands in lines]


@pytest.mark.compile
def test_instructions_are_triton_s(tmp_path, triton_tests):
    try:
        nvcc, _ = builds.setup()["find_nvcc"]()
    except builds.setup()["NoCuda"] as missing:
        pytest.skip(str(missing))
    import sm90
    from int8_gemm_cases import gelu_kernel

    source = tmp_path / "gelu.cu"
    source.write_text(
        '#include "cuda/common/gelu.cuh"\n'
        "__global__ void kernel(const float* x, float* y) { y[threadIdx.x] = qbert::cuda::gelu(x[threadIdx.x]); }\n"
    )
    flags = ["-std=c++17", "-O3", "-arch=sm_90a", "-I", str(builds.ROOT / "csrc"), "-ptx", "-o", str(tmp_path / "ptx")]
    subprocess.run([nvcc, *flags, str(source)], check=True)
    cuda = arithmetic((tmp_path / "ptx").read_text())
    triton = arithmetic(sm90.build(gelu_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": sm90.Constant(128)}).ptx)
    assert len(cuda) == 13  # abs and neg are signs of other instructions' operands
    assert sorted(cuda) == sorted(triton)
    assert [each for each in cuda if each[0] == "fma.rn.f32"] == [each for each in triton if each[0] == "fma.rn.f32"]
