"""Kwon's Fisher information, magnitudes and chance, beside second-order removal."""

from __future__ import annotations

import pytest
import torch
from compress_cases import make_texts, same_state, tokenizer
from small_encoders import float_model

from qbert import QBertError, prune_
from qbert.compress import Size
from qbert.compress.baselines import METHODS, Method, ranking, rearranged
from qbert.compress.removal import HeldOut, Moments, refit, tuned
from qbert.compress.sensitivity import Seen
from qbert.shapes import plan_of

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
TEXTS = make_texts(120)


def seen(tokens: int = 24, k: int = 12, n: int = 5, texts: int = 6) -> Seen:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return Seen(draw(tokens, k) + 1, draw(2, tokens, n), torch.arange(tokens) % texts, texts)


@pytest.mark.parametrize("group", [1, 3])
def test_slopes_are_gradients_of_a_factor_at_each_unit(group: int) -> None:
    given, weight = seen(), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    factors = torch.ones(12 // group, requires_grad=True)
    found = given.slopes(weight, group, centred=False)
    for projection, gradients in enumerate(given.gradients):
        outputs = (given.inputs * factors.repeat_interleave(group)) @ weight.T
        for text in range(given.count):
            scalar = (gradients * outputs)[given.texts == text].sum()
            (wanted,) = torch.autograd.grad(scalar, factors, retain_graph=True)
            assert torch.allclose(found[projection, text], wanted, atol=1e-5)
    centred = given.slopes(weight, group)
    assert torch.allclose(centred.double().pow(2).mean((0, 1)), given.importance(weight, group))
    assert not torch.allclose(centred, found)


def test_units_that_undo_one_another_go_together() -> None:
    """The first and the third unit nearly cancel, though the third matters more than the second by itself."""
    slopes = torch.tensor([[1.0, 0.0, -1.2, 2.0], [0.0, 1.05, 0.0, 2.0]], dtype=torch.float64)
    order = torch.argsort(slopes.pow(2).sum(0)).tolist()
    assert order == [0, 1, 2, 3]
    assert sorted(rearranged(slopes, order, 2)) == [0, 2]
    total = lambda gone: float(slopes[:, gone].sum(1).pow(2).sum())
    for count in range(1, 4):
        assert total(rearranged(slopes, order, count)) <= total(order[:count])


def test_rankings_say_what_their_names_say() -> None:
    given, weight = seen(), torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    by = {method: ranking(method, given, weight, 3, 7) for method in METHODS if method != "second-order"}
    norms = weight.pow(2).sum(0).unflatten(0, (-1, 3)).sum(1)
    assert by["magnitude"].order == torch.argsort(norms).tolist()
    assert by["magnitude"].losses([4, 3, 1]) == pytest.approx(
        {4: 0.0, 3: float(norms.min()), 1: float(norms.sum() - norms.max())}
    )
    assert by["random"].order == ranking("random", given, weight, 3, 7).order
    assert len({tuple(ranking("random", given, weight, 1, seed).order) for seed in range(5)}) == 5
    slopes = given.slopes(weight.float(), 3, centred=False).flatten(0, 1)
    assert by["fisher"].lost[-1] == pytest.approx(float(slopes.double().pow(2).mean(0).sum()))
    for each in by.values():
        assert bool((each.lost.diff() >= 0).all())
        assert each.kept(4, 4) == [0, 1, 2, 3]
        assert len(each.kept(4, 2)) == 2


def test_a_factor_makes_up_for_a_twin() -> None:
    inputs = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([inputs, inputs[:, :1]], 1)  # the last input is the first once more
    weight = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[:, 3] = weight[:, 0]
    kept = torch.tensor([0, 1, 2])
    found = tuned(weight, Moments.of(inputs), kept, 1)
    assert torch.allclose(found, weight[:, kept] * torch.tensor([2.0, 1.0, 1.0]), atol=1e-2)
    with_scales = refit(weight, Moments.of(inputs[:300]), kept, HeldOut(inputs[300:]), scales=1)
    means = refit(weight, Moments.of(inputs[:300]), kept, HeldOut(inputs[300:]), means_only=True)
    assert with_scales.error < 0.05 < means.error
    weight[:, 3] = 50 * weight[:, 0]  # a factor of 51, which is none to trust
    assert torch.equal(tuned(weight, Moments.of(inputs), kept, 1), weight[:, kept])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "second-order"])
def test_every_method_keeps_the_budget(method: Method) -> None:
    model, again = (float_model(pad_token_id=1, **SIZES) for _ in range(2))
    before = Size.of(model).macs
    report = prune_(model, TEXTS, macs=0.7, tokenizer=tokenizer(), method=method, refit="scales", seed=3)
    assert 0.5 * before < Size.of(model).macs <= 0.7 * before
    assert report.agreement is not None
    prune_(again, TEXTS, macs=0.7, tokenizer=tokenizer(), method=method, refit="scales", seed=3)
    assert same_state(model, again)
    assert plan_of(model) == report.plan


def test_what_there_is_not_is_said() -> None:
    model = float_model(**SIZES)
    with pytest.raises(QBertError, match="method 'kwon'; allowed: second-order, fisher"):
        prune_(model, TEXTS, macs=0.7, tokenizer=tokenizer(), method="kwon")  # type: ignore[arg-type]
    with pytest.raises(QBertError, match="refit is 'yes'"):
        prune_(model, TEXTS, macs=0.7, tokenizer=tokenizer(), refit="yes")  # type: ignore[arg-type]
    assert same_state(model, float_model(**SIZES))
