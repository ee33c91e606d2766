"""Older ways to say which units of a sublayer go, to compare with: Kwon's Fisher information, magnitudes, chance.

They have the same budgets, the same table of milliseconds, the same sharing between layers, and the same code that takes units
out and folds means into biases. What differs is the order, and what is lost by the prediction that the budget is shared by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qbert.compress.sensitivity import Seen
from qbert.errors import QBertError

Method = Literal["second-order", "fisher", "magnitude", "random"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Ranking:
    """Units by how little they matter.

    Attributes:
        order: units, the first to go first.
        lost: (units + 1,) predicted loss when the first 0, 1, 2 ... of them are gone.
        slopes: (samples, units) gradients that say how units make up for one another; None where nothing is known.
    """

    order: list[int]
    lost: Tensor
    slopes: Tensor | None = None

    def kept(self, units: int, count: int) -> list[int]:
        """Units that are left when `count` are, ascending."""
        gone = self.order[: units - count]
        if self.slopes is not None and gone and count:
            gone = rearranged(self.slopes, self.order, len(gone))
        return sorted(set(range(units)) - set(gone))

    def losses(self, levels: Sequence[int]) -> dict[int, float]:
        """By how many units are left."""
        units = len(self.lost) - 1
        return {count: float(self.lost[units - count]) for count in levels}


def require_method(method: str) -> None:
    """Raises QBertError for one that there is not."""
    if method not in METHODS:
        raise QBertError(f"method {method!r}; allowed: {', '.join(METHODS)}")


def ranking(method: Method, seen: Seen, weight: Tensor, group: int, seed: int) -> Ranking:
    """By one of the methods that are no second-order removal.

    Args:
        weight: (n, k) float64 of the linear whose inputs go.
        group: inputs of a unit.
    """
    if method == "fisher":
        slopes = seen.slopes(weight.to(seen.inputs), group, centred=False).flatten(0, 1).double().cpu()
        return _by(slopes.pow(2).mean(0), slopes)
    if method == "magnitude":
        return _by(weight.pow(2).sum(0).unflatten(0, (-1, group)).sum(1))
    units = weight.shape[1] // group
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed)).tolist()
    share = torch.arange(units + 1, dtype=torch.float64) / units
    return Ranking(order, share.pow(2))  # convex, so that every layer gives as much


def _by(scores: Tensor, slopes: Tensor | None = None) -> Ranking:
    order = torch.argsort(scores, stable=True)
    lost = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
    return Ranking(order.tolist(), lost, slopes)


def rearranged(slopes: Tensor, order: Sequence[int], count: int) -> list[int]:
    """Which `count` units go so that their gradients together are small, as two that undo one another are (Kwon et al., 2022).

    Greedy: from those that matter least by themselves, each other unit is put in and the one taken out without which the sum of
    the gradients is shortest.

    Args:
        slopes: (samples, units).
        order: units, the least important first.
    """
    gone, vectors = list(order[:count]), slopes.T
    total = vectors[gone].sum(0)
    for unit in order[count:]:
        gone.append(unit)
        total = total + vectors[unit]
        left = (total - vectors[gone]).pow(2).sum(1)
        out = gone.pop(int(left.argmin()))
        total = total - vectors[out]
    return gone
