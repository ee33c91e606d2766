"""Second-order removal and the refit, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbert import QBertError
from qbert.compress.budget import Option, share
from qbert.compress.removal import RIDGES, Drift, HeldOut, Moments, refit, remove_heads, remove_neurons

K, N, TOKENS = 48, 10, 400


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(tokens, k) correlated inputs with a mean, (n, k) weight."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(K, K, generator=generator)
    inputs = torch.randn(TOKENS, K, generator=generator) @ mixed + torch.randn(K, generator=generator)
    return inputs.double(), torch.randn(N, K, generator=generator).double()


def best(weight: Tensor, moments: Moments, kept: list[int]) -> Tensor:
    """The weight (n, k), zero but for `kept`, with the least ridge loss."""
    damped, full = moments.damped(RIDGES[0]), torch.zeros_like(weight)
    full[:, kept] = torch.linalg.solve(damped[kept][:, kept], (weight @ damped[:, kept]).T).T
    return full


def test_moments_of_batches_are_those_of_all() -> None:
    inputs, _ = problem()
    found = Moments.of(inputs.float() + 1000.0)  # far from zero, where products of float32 would drown it
    assert torch.allclose(found.mean, inputs.mean(0) + 1000.0, atol=1e-2)
    assert torch.allclose(found.covariance, torch.cov(inputs.T, correction=0), rtol=1e-2, atol=0.3)


@pytest.mark.parametrize("levels", [[40, 20, 8], [48], [47, 1]])
def test_weights_after_removal_are_the_ridge_solution_for_what_is_left(levels: list[int]) -> None:
    inputs, weight = problem()
    moments = Moments.of(inputs)
    removal = remove_neurons(weight, moments, levels)
    assert len(removal.order) == len(set(removal.order)) == K - min(levels)
    for count in levels:
        kept = removal.kept(K, count)
        assert len(kept) == count
        assert torch.allclose(removal.weights[count], best(weight, moments, kept), atol=1e-6)


def test_heads_go_as_wholes() -> None:
    inputs, weight = problem()
    moments = Moments.of(inputs)
    removal = remove_heads(weight, moments, 8, [6, 4, 1])
    kept = removal.kept(6, 4)
    columns = [unit * 8 + place for unit in kept for place in range(8)]
    assert torch.allclose(removal.weights[4], best(weight, moments, columns), atol=1e-6)
    costs = [
        float((best(weight, moments, [i for i in range(K) if i // 8 != unit]) - weight).abs().sum())
        for unit in range(6)
    ]
    assert len(costs) == 6
    assert removal.order[0] == _cheapest(weight, moments)


def _cheapest(weight: Tensor, moments: Moments) -> int:
    def loss(unit: int) -> float:
        difference = weight - best(weight, moments, [i for i in range(K) if i // 8 != unit])
        return float((difference @ moments.damped(RIDGES[0]) * difference).sum())

    return min(range(6), key=loss)


def test_of_two_twins_one_stays() -> None:
    inputs, weight = problem()
    inputs[:, 1] = inputs[:, 0]
    weight[:, :2] *= 5  # by themselves both matter most
    removal = remove_neurons(weight, Moments.of(inputs), [24])
    assert len({0, 1} & set(removal.order)) == 1


def test_constants_go_into_the_bias() -> None:
    inputs, weight = problem()
    inputs[:, 5] = 3.0
    kept = torch.tensor([index for index in range(K) if index != 5])
    done = refit(weight, Moments.of(inputs), kept, HeldOut(inputs[::3]))
    wanted = inputs @ weight.T
    assert torch.allclose(inputs[:, kept] @ done.weight.T + done.bias, wanted, atol=1e-2 * float(wanted.abs().max()))
    assert done.error < 1e-3


def test_the_held_out_tokens_choose_how_strongly_it_is_refitted() -> None:
    """Of other texts the refit is not used where it makes things worse there."""
    inputs, weight = problem()
    kept = torch.arange(0, K, 2)
    alike = refit(weight, Moments.of(inputs), kept, HeldOut(problem()[0]))
    assert alike.ridge == RIDGES[0]
    means = refit(weight, Moments.of(inputs), kept, HeldOut(inputs), means_only=True)
    assert means.ridge is None
    assert torch.equal(means.weight, weight[:, kept])
    assert alike.error < means.error
    unlike = torch.randn(TOKENS, K, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    few = Moments.of(inputs[:30])
    assert refit(weight, few, kept, HeldOut(unlike + few.mean)).ridge in (None, 1.0)


def test_what_was_lost_before_is_made_up_for_where_held_out_tokens_agree() -> None:
    inputs, weight = problem()
    more = torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / K
    lost = inputs @ more.T + 2.0
    moments, kept = Moments.of(inputs[::2]), torch.arange(K)
    about = lost[::2] - lost[::2].mean(0)
    crossed = about.T @ (inputs[::2] - inputs[::2].mean(0)) / len(about)
    drift = Drift(lost[::2].mean(0), crossed)
    found = refit(weight, moments, kept, HeldOut(inputs[1::2], lost[1::2]), drift=drift)
    without = refit(weight, moments, kept, HeldOut(inputs[1::2], lost[1::2]))
    assert found.ridge is not None
    assert found.error < 0.5 * without.error
    assert torch.equal(without.weight, weight)
    assert float((found.weight - weight - more).norm()) < float(more.norm())
    assert torch.allclose(inputs @ found.weight.T + found.bias, inputs @ weight.T + lost, atol=0.2 * float(lost.std()))
    unlike = HeldOut(inputs[1::2], -lost[1::2])
    assert torch.equal(refit(weight, moments, kept, unlike, drift=drift).weight, weight)


def test_activations_that_are_not_finite_are_said() -> None:
    inputs, weight = problem()
    inputs[0, 0] = torch.nan
    with pytest.raises(QBertError, match="not positive definite"):
        remove_neurons(weight, Moments.of(inputs), [24])


# ---- budget ---------------------------------------------------------------------------------------------------------


def test_the_budget_goes_where_it_saves_most() -> None:
    dear = [Option(2, 0.0, 10.0), Option(1, 9.0, 5.0)]
    cheap = [Option(2, 0.0, 10.0), Option(1, 1.0, 5.0)]
    found = share([dear, cheap], 15.0)
    assert found is not None
    assert [each.kept for each in found] == [2, 1]
    assert share([dear, cheap], 20.0) == [dear[0], cheap[0]]
    assert share([dear, cheap], 9.9) is None
    assert share([dear, cheap], 10.0) == [dear[1], cheap[1]]


def test_the_budget_is_kept_and_the_choice_is_the_best_one() -> None:
    """Against all combinations."""
    import itertools
    import random

    rng = random.Random(0)
    rows = [[Option(kept, rng.random() * (3 - kept), kept + rng.random()) for kept in (3, 2, 1)] for _ in range(5)]
    combinations = [each for each in itertools.product(*rows) if sum(option.cost for option in each) <= 11.0]
    least = min(sum(option.loss for option in each) for each in combinations)
    found = share(rows, 11.0)
    assert found is not None
    assert sum(option.cost for option in found) <= 11.0
    assert sum(option.loss for option in found) <= least + 0.02
