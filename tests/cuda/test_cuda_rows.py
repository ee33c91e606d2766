"""Row kernels of csrc/cuda without a GPU: their own source on an emulated one."""

from __future__ import annotations

import builds
import pytest
import torch

from qbert import testing
from qbert.ops import cuda, reference
from qbert.ops.abi import Keeps
from qbert.ops.operations import AddNorm, Norm

pytestmark = pytest.mark.skipif(bool(builds.emulator_missing()), reason=builds.emulator_missing() or "runs")

OPERATION = "add_norm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def on_emulator(emulated):
    """Launchers take CPU tensors."""


def run(a):
    return cuda.add_norm(a)


@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "k"), [(1, 8), (3, 264), (5, 768)])
def test_matches_the_reference(t, k, y_dtype, dtype):
    a = testing.random_problem(OPERATION, t, 0, k, dtype=dtype, seed=k)
    a = a._replace(y=a.y.to(y_dtype))
    testing.assert_matches_reference(a, run(a))


@pytest.mark.parametrize("k", [16, 248, 256, 384, 512, 520, 1016, 1024, 1032, 2048])
def test_every_width(k):
    a = testing.random_problem(OPERATION, 2, 0, k, seed=k)
    testing.assert_matches_reference(a, run(a))


def test_parameters_of_another_type():
    a = testing.random_problem(OPERATION, 2, 0, 128, dtype=torch.bfloat16)
    a = a._replace(norm=Norm(a.norm.gamma.float(), a.norm.beta.half(), a.norm.eps))
    testing.assert_matches_reference(a, run(a))


def test_codes_are_those_of_the_scale():
    """Given the norm in float32, codes and scales are IEEE operations: bit for bit `quantize_rows`'s."""
    normed, codes, scale = run(testing.random_problem(OPERATION, 6, 0, 768))
    expected = reference.codes_and_scales(normed)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_alone(value):
    a = testing.random_problem(OPERATION, 5, 0, 264)
    a.y[3, 263] = value
    found = run(a)
    testing.assert_matches_reference(a, found)
    assert found[2].isnan().tolist() == [False, False, False, True, False]
    assert not found[1][3].any()


def test_rows_without_deviation_and_rows_of_zeros():
    """Nothing but eps to divide by, then nothing to scale: the scale stays a normal number."""
    y, residual, zeros = torch.full((2, 64), 3.0), torch.zeros(2, 64), torch.zeros(64)
    for beta in (zeros, zeros + 0.5):
        a = AddNorm(y, residual, Norm(torch.ones(64), beta, 1e-12), Keeps.NORM)
        for found, expected in zip(run(a), reference.add_norm(a), strict=True):
            assert torch.equal(found, expected)


def test_nothing_beyond_the_rows_is_written(monkeypatch):
    """Outputs in the middle of poisoned memory, and blocks with more warps than rows are left."""
    t, k = 3, 520
    held = []

    def poisoned(*shape, dtype):
        length = shape[0] * (shape[1] if len(shape) > 1 else 1)
        memory = torch.full((length + 64,), 77, dtype=dtype)
        held.append((memory, length))
        return memory[32 : 32 + length].view(shape)

    residual = testing.random_problem(OPERATION, t, 0, k).residual
    a = AddNorm(residual, residual, Norm(torch.ones(k), torch.zeros(k), 1e-12), Keeps.NORM)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: poisoned(*tensor.shape, dtype=tensor.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, dtype: poisoned(*shape, dtype=dtype))
    found = run(a)
    monkeypatch.undo()
    testing.assert_matches_reference(a, found)
    for memory, length in held:
        assert bool((memory[:32] == 77).all())
        assert bool((memory[32 + length :] == 77).all())
