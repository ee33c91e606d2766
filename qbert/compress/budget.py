"""How a budget is shared among the layers: the least predicted loss whose costs fit, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BINS = 4000  # of the budget; costs are rounded up, so it is kept


class Option(NamedTuple):
    """One way to leave a sublayer: units that stay, predicted loss, cost."""

    kept: int
    loss: float
    cost: float


def share(sublayers: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option of each sublayer, with the least sum of losses among those whose costs are within the budget.

    Returns:
        None where even the cheapest are not.
    """
    least = [min(each.cost for each in options) for options in sublayers]
    spare = budget - sum(least)
    if spare < -1e-9 * abs(budget):
        return None
    unit = max(spare, 1e-12) / _BINS
    best = np.zeros(_BINS + 1)  # best[b]: least loss of the sublayers so far with b bins spent at most
    chosen: list[np.ndarray] = []
    for options, floor in zip(sublayers, least, strict=True):
        sums = np.full((len(options), _BINS + 1), np.inf)
        for row, option in enumerate(options):
            bins = int(np.ceil((option.cost - floor) / unit - 1e-9))
            if bins <= _BINS:
                sums[row, bins:] = best[: _BINS + 1 - bins] + option.loss
        chosen.append(sums.argmin(0))
        best = sums.min(0)
    return _walked_back(sublayers, least, chosen, unit)


def _walked_back(
    sublayers: Sequence[Sequence[Option]], least: list[float], chosen: list[np.ndarray], unit: float
) -> list[Option]:
    found, left = [], _BINS
    for options, floor, rows in reversed(list(zip(sublayers, least, chosen, strict=True))):
        option = options[int(rows[left])]
        found.append(option)
        left -= int(np.ceil((option.cost - floor) / unit - 1e-9))
    return found[::-1]
