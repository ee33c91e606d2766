"""The probe finds what can be found, and nothing random is in it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qbert.errors import QBertError
from qbert.evaluate import fit_probe


def _blobs(n: int, classes: int = 4, features: int = 8, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, features, generator=generator)
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, features, generator=generator), labels


def test_separable_data() -> None:
    x, labels = _blobs(400)
    probe = fit_probe(x[:200], labels[:200], 4, l2=1.0)
    assert (probe.predict(x[200:]) == labels[200:]).double().mean() > 0.99
    assert probe.n_train == 200


def test_the_minimum_is_reached() -> None:
    """At the minimum the gradient vanishes; the bias is not penalized."""
    x, labels = _blobs(120, spread=1.0)
    l2 = 3.0
    probe = fit_probe(x, labels, 4, l2=l2)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    z = (x.double() - probe.mean) / probe.scale
    loss = F.cross_entropy(F.linear(z, weight, bias), labels, reduction="sum") + l2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) / len(x) < 1e-5


def test_two_fits_are_equal() -> None:
    x, labels = _blobs(100)
    first, second = fit_probe(x, labels, 4), fit_probe(x, labels, 4)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_scale_of_a_feature_does_not_matter() -> None:
    x, labels = _blobs(100, spread=1.0)
    stretched = x * torch.logspace(-3, 3, x.shape[1]) + 5
    a, b = fit_probe(x, labels, 4).logits(x), fit_probe(stretched, labels, 4).logits(stretched)
    assert torch.allclose(a, b, atol=1e-3)


def test_constant_feature_and_missing_class() -> None:
    x, labels = _blobs(90, classes=3)
    probe = fit_probe(torch.cat([x, torch.ones(90, 1)], dim=1), labels, 5)
    assert torch.isfinite(probe.weight).all()
    assert set(probe.predict(torch.cat([x, torch.ones(90, 1)], dim=1)).tolist()) == {0, 1, 2}


def test_errors() -> None:
    x, labels = _blobs(10)
    with pytest.raises(QBertError, match="l2 penalty 0"):
        fit_probe(x, labels, 4, l2=0)
    with pytest.raises(QBertError, match=r"1 class\(es\)"):
        fit_probe(x, torch.zeros(10, dtype=torch.int64), 4)
    with pytest.raises(QBertError, match=r"0\.\.\.3, allowed are 0\.\.\.2"):
        fit_probe(x, labels, 3)
    with pytest.raises(QBertError, match="10 texts and 9 labels"):
        fit_probe(x, labels[:9], 4)
    with pytest.raises(QBertError, match="7 columns, the probe has 8"):
        fit_probe(x, labels, 4).predict(x[:, :7])
