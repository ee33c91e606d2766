"""Round to nearest: scales, codes and error bounds, and what no quantizer takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import SCHEMES, W4A8_GROUP_SCALE_MAX
from qbert.quantizers import quantize
from qbert.testing import random_weight
from qbert.weight import Weight
from qbert.weight.codec import decode
from qbert.weight.layout import Layout, unpack_codes

PER_ROW = pytest.mark.parametrize("name", ["w8a8", "w8a16", "w8"])
PER_GROUP = pytest.mark.parametrize("name", ["w4a16", "w4a16-g32", "w4-g128"])
TWO_LEVEL = pytest.mark.parametrize("name", ["w4a8", "w4a8-g32", "w4a8-g128"])
INTEGER_SCHEMES = [name for name, scheme in SCHEMES.items() if not scheme.has_dictionary]
ULP = 2.0**-24  # largest relative error of one float32 rounding


def _wide(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.to(torch.float64).numpy()


def _codes(weight: Weight) -> NDArray[np.float64]:
    return _wide(unpack_codes(weight.tensors["qdata"], weight.scheme.weight, weight.shape[1]))


def _spread(values: Tensor, size: int) -> NDArray[np.float64]:
    """(n, groups) to (n, k)."""
    return np.repeat(_wide(values), size, axis=1)


# ---- one scale a row ------------------------------------------------------------------------------------------------


@PER_ROW
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 1023)], ids=str)
def test_row_scale_maps_the_largest_weight_to_127(name: str, shape: tuple[int, int]) -> None:
    w = random_weight(*shape, seed=1)
    held = quantize(w, SCHEMES[name])
    absmax = np.abs(w.numpy()).max(axis=1)
    np.testing.assert_array_equal(held.tensors["scale"].numpy(), absmax / np.float32(127))
    codes = _codes(held)
    np.testing.assert_array_equal(codes, np.rint(w.numpy() / held.tensors["scale"].numpy()[:, None]))
    np.testing.assert_array_equal(np.abs(codes).max(axis=1), 127)


@PER_ROW
@pytest.mark.parametrize("magnitude", [1e-28, 1e-3, 1.0, 1e30, 3e38], ids="{:g}".format)
def test_row_error_is_at_most_half_a_step(name: str, magnitude: float) -> None:
    w = torch.linspace(-1, 1, 1023).repeat(3, 1) * torch.tensor([[1.0], [-0.3], [0.01]]) * magnitude
    held = quantize(w, SCHEMES[name])
    error = np.abs(_codes(held) * _wide(held.tensors["scale"])[:, None] - _wide(w))
    assert (error <= _wide(held.tensors["scale"])[:, None] * (0.5 + 2 * 127 * ULP)).all()


def test_rows_do_not_mix() -> None:
    """So that Q, K and V may be quantized apart and stacked: each row's bytes depend on that row alone."""
    w = random_weight(9, 64, seed=3)
    whole, part = quantize(w, SCHEMES["w8a8"]), quantize(w[4:6], SCHEMES["w8a8"])
    for key, tensor in part.tensors.items():
        assert torch.equal(whole.tensors[key][4:6], tensor)


# ---- one scale a group ----------------------------------------------------------------------------------------------


@PER_GROUP
@pytest.mark.parametrize("shape", [(1, 128), (17, 384)], ids=str)
def test_group_scale_is_bfloat16_and_codes_are_taken_with_it(name: str, shape: tuple[int, int]) -> None:
    w, size = random_weight(*shape, seed=1), SCHEMES[name].group_size
    assert size is not None
    held = quantize(w, SCHEMES[name])
    absmax = np.abs(w.numpy().reshape(shape[0], -1, size)).max(axis=2)
    expected = torch.from_numpy(absmax / np.float32(7)).to(torch.bfloat16)
    assert torch.equal(held.tensors["scale"], expected)
    step = _spread(held.tensors["scale"], size)
    codes = _codes(held)
    np.testing.assert_array_equal(codes, np.clip(np.rint(w.numpy() / step.astype(np.float32)), -7, 7))
    # A scale rounded to bfloat16 moves the largest code to at most 7 * (1 + 2**-8) < 7.5: clipping costs nothing.
    assert (np.abs(codes * step - _wide(w)) <= step * (0.5 + 2 * 7 * ULP)).all()


def test_an_outlier_costs_its_own_group_only() -> None:
    w = torch.full((1, 128), 0.01)
    w[0, 40] = 0.05
    error = (decode(quantize(w, SCHEMES["w4a16-g32"])) - w).abs()[0]
    others = torch.cat((error[:32], error[64:]))
    assert float(others.max()) < 1e-4
    assert float(error[32:64].max()) > 1e-3


# ---- integer group scales inside a row scale ------------------------------------------------------------------------


@TWO_LEVEL
@pytest.mark.parametrize("shape", [(1, 128), (17, 384)], ids=str)
def test_operand_of_w4a8_fits_int8(name: str, shape: tuple[int, int]) -> None:
    held = quantize(random_weight(*shape, seed=1), SCHEMES[name])
    groups, size = held.tensors["group_scale"], SCHEMES[name].group_size
    assert size is not None
    assert 1 <= int(groups.min()) <= int(groups.max()) == W4A8_GROUP_SCALE_MAX
    assert bool((groups.amax(dim=1) == W4A8_GROUP_SCALE_MAX).all())  # every row's largest group uses the whole range
    operand = _codes(held) * _spread(groups, size)
    assert np.abs(operand).max() <= 127
    np.testing.assert_array_equal(_wide(held.to_layout(Layout.INT8_EXPANDED).tensors["qdata"]), operand)


@TWO_LEVEL
def test_group_scale_is_the_better_of_the_two_integers_around_the_ideal(name: str) -> None:
    """Against trying both in float64."""
    n, k, size = 9, 384, SCHEMES[name].group_size
    assert size is not None
    w = random_weight(n, k, seed=5)
    held = quantize(w, SCHEMES[name])
    groups = _wide(w).reshape(n, -1, size)
    ideal = np.abs(groups).max(axis=2) / 7
    scale = _wide(held.tensors["scale"])
    np.testing.assert_allclose(scale, ideal.max(axis=1) / 18, rtol=4 * ULP)

    def error_of(group_scale: NDArray[np.float64]) -> NDArray[np.float64]:
        step = (scale[:, None] * group_scale)[:, :, None]
        return ((np.clip(np.rint(groups / step), -7, 7) * step - groups) ** 2).sum(axis=2)

    floor = np.floor(ideal / scale[:, None] * (1 + 1e-6))
    candidates = [np.clip(each, 1, W4A8_GROUP_SCALE_MAX) for each in (floor, floor + 1)]
    found = _wide(held.tensors["group_scale"])
    assert ((found == candidates[0]) | (found == candidates[1])).all()
    best = np.minimum(error_of(candidates[0]), error_of(candidates[1]))
    assert (error_of(found) <= best * (1 + 1e-5)).all()
    assert (found == candidates[0]).any()
    assert (found == candidates[1]).any()


@TWO_LEVEL
def test_w4a8_error_is_half_a_step_or_what_was_clipped(name: str) -> None:
    w, size = random_weight(9, 384, seed=5), SCHEMES[name].group_size
    assert size is not None
    held = quantize(w, SCHEMES[name])
    step = _spread(held.tensors["group_scale"], size) * _wide(held.tensors["scale"])[:, None]
    allowed = np.maximum(step / 2, np.abs(_wide(w)) - 7 * step)
    assert (np.abs(_codes(held) * step - _wide(w)) <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
@pytest.mark.parametrize("exponent", [-80, 110])
def test_a_power_of_two_changes_scales_only(name: str, exponent: int) -> None:
    """Codes and integer group scales of tiny and huge weights are those of ordinary ones."""
    w = random_weight(5, 384, seed=2)
    ordinary, scaled = quantize(w, SCHEMES[name]), quantize(w * 2.0**exponent, SCHEMES[name])
    for key, tensor in ordinary.tensors.items():
        expected = tensor * 2.0**exponent if key == "scale" else tensor
        assert torch.equal(scaled.tensors[key], expected), key


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-38, 2.0**-100], ids=str)
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_rows_of_next_to_nothing_are_zeros_with_a_usable_scale(name: str, value: float) -> None:
    w = torch.full((3, 128), value)
    w[1] = 0.5
    held = quantize(w, SCHEMES[name])
    scale = held.tensors["scale"].to(torch.float32)
    assert bool((scale >= torch.finfo(torch.float32).tiny).all())
    restored = decode(held)
    assert not restored[[0, 2]].any()
    assert torch.allclose(restored[1], w[1], rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(SCHEMES))
def test_half_precision_weights_are_quantized_as_float32(name: str, dtype: torch.dtype) -> None:
    w = random_weight(5, 128, seed=2).to(dtype)
    held, wide = quantize(w, SCHEMES[name]), quantize(w.to(torch.float32), SCHEMES[name])
    for key, tensor in wide.tensors.items():
        assert torch.equal(held.tensors[key], tensor), key


@pytest.mark.parametrize("name", list(SCHEMES))
def test_strided_parameters_are_taken_and_left_alone(name: str) -> None:
    w = torch.nn.Parameter(random_weight(128, 128, seed=2))
    before = w.detach().clone()
    strided, contiguous = quantize(w.t(), SCHEMES[name]), quantize(before.t().contiguous(), SCHEMES[name])
    assert torch.equal(w, before)
    for key, tensor in contiguous.tensors.items():
        assert torch.equal(strided.tensors[key], tensor), key
        assert strided.tensors[key].is_contiguous(), key
        assert not strided.tensors[key].requires_grad, key


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", list(SCHEMES))
def test_weights_that_are_not_finite_are_an_error(name: str, bad: float) -> None:
    w = random_weight(3, 128)
    w[2, 100] = bad
    with pytest.raises(QBertError, match="weight has 1 NaN or infinite values; allowed: finite values only"):
        quantize(w, SCHEMES[name])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 128, dtype=torch.float64), "weight is float64; allowed: float32, bfloat16, float16"),
        (torch.zeros(3, 128, dtype=torch.int64), "weight is int64; allowed"),
        (torch.zeros(128), r"weight has shape \(128,\); allowed: \(n, k\) with n, k >= 1"),
        (torch.zeros(2, 3, 128), r"weight has shape \(2, 3, 128\)"),
        (torch.zeros(0, 128), r"weight has shape \(0, 128\)"),
        (torch.zeros(3, 0), r"weight has shape \(3, 0\)"),
    ],
    ids=["float64", "int64", "1d", "3d", "no-rows", "no-columns"],
)
@pytest.mark.parametrize("name", ["w8a8", "w4a16", "gobo3"])
def test_what_is_no_matrix_is_an_error(name: str, weight: Tensor, message: str) -> None:
    with pytest.raises(QBertError, match=message):
        quantize(weight, SCHEMES[name])


@pytest.mark.parametrize(("name", "k"), [("w4a16", 96), ("w4a8-g128", 64), ("w4-g32", 33)])
def test_a_k_that_groups_do_not_divide_is_an_error(name: str, k: int) -> None:
    size = SCHEMES[name].group_size
    with pytest.raises(QBertError, match=rf"k is {k}, which groups of {size} do not divide \(scheme {name}\)"):
        quantize(torch.ones(2, k), SCHEMES[name])


@pytest.mark.parametrize("name", ["w8a8", "gobo3a8"])
def test_a_row_too_long_for_int32_sums_is_an_error(name: str) -> None:
    with pytest.raises(QBertError, match="k is 133145; int8 activations allow at most 133144"):
        quantize(torch.ones(1, 133_145), SCHEMES[name])
    assert quantize(torch.ones(1, 133_145), SCHEMES["w8a16"]).shape == (1, 133_145)
