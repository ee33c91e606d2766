"""Weights side by side as one: exact, in every layout, and without a second copy of the codes where they fill their pieces."""

from __future__ import annotations

import pytest
import torch
from small_encoders import A8

from qbert.formats import SCHEMES
from qbert.metrics import sqnr_db
from qbert.modules import QLinear
from qbert.ops import Activation, checked_run
from qbert.ops.operations import Linear
from qbert.quantizers import quantize
from qbert.testing import random_weight
from qbert.weight import Layout
from qbert.weight.codec import decode
from qbert.weight.layout import layouts_of
from qbert.weight.stack import joined, rescaled, share_rows, stacked


@pytest.mark.parametrize("scheme", A8)
def test_stacked_and_scaled_weights_are_exact(scheme: str) -> None:
    weights = [quantize(random_weight(32, 128, seed=seed), SCHEMES[scheme]) for seed in range(3)]
    factors = (0.5, 4.0, 1.0)
    together = stacked([rescaled(each, factor) for each, factor in zip(weights, factors, strict=True)])
    assert together.shape == (96, 128)
    expected = torch.cat([decode(each) * factor for each, factor in zip(weights, factors, strict=True)])
    if "codebook" not in together.tensors:
        assert torch.equal(decode(together), expected)
    q = torch.randint(-127, 128, (5, 128), dtype=torch.int8)
    y = checked_run(Linear(q, torch.ones(5), together, None, Activation.NONE, False, torch.float32))
    assert sqnr_db(q.double() @ expected.t().double(), y) > 120


@pytest.mark.parametrize("rows", [(64, 64, 64), (64, 128, 5), (16, 32, 16), (24, 24, 24), (5, 1, 70)], ids=str)
@pytest.mark.parametrize("scheme", A8)
def test_weights_stack_in_every_layout(scheme: str, rows: tuple[int, ...]) -> None:
    """Matrices that fill the strips or panels of their layout, and such as leave padding between them."""
    if SCHEMES[scheme].has_dictionary:  # of as many rows each
        rows = rows[:1] * 3
    plain = [quantize(random_weight(n, 128, seed=n), SCHEMES[scheme]) for n in rows]
    expected = stacked(plain)
    for layout in layouts_of(SCHEMES[scheme]):
        found = stacked([weight.to_layout(layout) for weight in plain])
        assert (found.shape, found.layout) == (expected.shape, layout)
        for name, tensor in expected.to_layout(layout).tensors.items():
            assert torch.equal(found.tensors[name], tensor), (layout, name)


@pytest.mark.parametrize("scheme", ["w4a8", "gobo3a8"])
@pytest.mark.parametrize(
    ("rows", "shared"), [((64, 64, 64), True), ((128, 64, 5), True), ((5, 64, 64), False)], ids=str
)
def test_modules_share_strips_that_they_fill(scheme: str, rows: tuple[int, ...], shared: bool) -> None:
    modules = []
    for n in rows:
        weight = quantize(random_weight(n, 128, seed=n), SCHEMES[scheme]).to_layout(Layout.FRAGMENTS_S8)
        modules.append(QLinear(weight, None))
        modules[-1]._hold(weight)
    before = [decode(module.quantized) for module in modules]
    views = share_rows([module.quantized for module in modules])
    assert (views is not None) == shared
    for module, view in zip(modules, views or (), strict=False):
        module.register_buffer("qdata", view)
    first = modules[0].get_buffer("qdata")
    together = stacked([module.quantized for module in modules])
    assert (together.qdata.data_ptr() == first.data_ptr()) == shared
    assert not shared or share_rows([module.quantized for module in modules]) is None  # they lie so already
    for module, values in zip(modules, before, strict=True):
        assert torch.equal(decode(module.quantized), values)
        assert module.get_buffer("qdata").data_ptr() % 16 == 0


def test_neighbours_are_joined_without_a_copy() -> None:
    whole = torch.arange(24).view(6, 4)
    parts = list(whole.split([1, 2, 3]))
    assert joined(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(joined(parts), whole)
    for others in (parts[::-1], [parts[0], parts[2]], [each.clone() for each in parts], [whole.t()[:2], whole.t()[2:]]):
        assert torch.equal(joined(others), torch.cat(others))
