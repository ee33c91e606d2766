"""Which inputs of a linear may go, and what the others must be for that: second-order removal and a refit in closed form.

Optimal Brain Surgeon (Hassibi and Stork, 1993) for a linear layer, as ZipLM (Kurtic et al., 2023) has it for whole heads and
neurons: with the covariance C of the inputs, taking out the inputs S costs tr(W_S [(C + rI)^-1_SS]^-1 W_S^T) once
the others have made up for it, so that of two twins the second is dear when the first is gone. C is taken around the mean:
what is constant goes into the bias. The ridge r pulls to the old weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qbert.errors import QBertError

RIDGES = (1e-2, 1e-1, 1.0)  # of the mean variance of the inputs; the held-out texts choose
_WIDEST_FACTOR = 10.0
_BLOCK = 32  # neurons between two updates of the weights; within a block the inverse alone is kept up to date


@dataclass(frozen=True)
class Moments:
    """Of a linear's inputs.

    Attributes:
        mean: (k,) float64.
        covariance: (k, k) float64.
        tokens: seen.
    """

    mean: Tensor
    covariance: Tensor
    tokens: int

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Of (tokens, k)."""
        total = Sums.empty(inputs.shape[1])
        total.add(inputs)
        return total.moments()

    def damped(self, ridge: float) -> Tensor:
        """The covariance with a ridge on its diagonal."""
        level = ridge * float(self.covariance.diagonal().mean())
        return self.covariance + max(level, 1e-12) * torch.eye(len(self.mean), dtype=torch.float64)


@dataclass
class Sums:
    """Sums that moments are made of, batch after batch.

    Attributes:
        first, second: (k,) and (k, k) float64, of the inputs and of their products, less `shift`, which keeps them small.
    """

    first: Tensor
    second: Tensor
    shift: Tensor | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, k: int) -> Sums:
        return cls(torch.zeros(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64))

    def add(self, inputs: Tensor) -> None:
        """(tokens, k) more."""
        given = inputs.detach().float().cpu()
        if self.shift is None:
            self.shift = given.mean(0)
        given = given - self.shift
        self.first += given.double().sum(0)
        self.second += (given.T @ given).double()
        self.tokens += len(given)

    def moments(self) -> Moments:
        """Of all that was added."""
        assert self.shift is not None
        mean = self.first / self.tokens
        return Moments(mean + self.shift.double(), self.second / self.tokens - torch.outer(mean, mean), self.tokens)


@dataclass(frozen=True)
class Removal:
    """An order of removal.

    Attributes:
        order: units, the first to go first; those that stay to the end are not in it.
        weights: how many units are left -> (n, k) weight that makes up for those that are gone, whose columns are 0.
    """

    order: list[int]
    weights: dict[int, Tensor]

    def kept(self, units: int, count: int) -> list[int]:
        """Units that are left when `count` are, ascending."""
        gone = set(self.order[: units - count])
        return [unit for unit in range(units) if unit not in gone]


def remove_heads(weight: Tensor, moments: Moments, group: int, levels: Sequence[int]) -> Removal:
    """Takes out units of `group` columns, one at a time, down to the least level.

    Args:
        weight: (n, k) float64.
        levels: counts whose weights are wanted.
    """
    units, w = weight.shape[1] // group, weight.clone()
    inverse = _inverse(moments.damped(RIDGES[0]))
    alive, order, weights = list(range(units)), [], {units: weight.clone()}
    while len(alive) > min(levels):
        costs = []
        for unit in alive:
            part = slice(unit * group, (unit + 1) * group)
            costs.append(float((torch.linalg.solve(inverse[part, part], w[:, part].T) * w[:, part].T).sum()))
        unit = alive[min(range(len(alive)), key=costs.__getitem__)]
        part = slice(unit * group, (unit + 1) * group)
        rows = torch.linalg.solve(inverse[part, part], inverse[part])
        w -= w[:, part] @ rows
        inverse -= inverse[:, part] @ rows
        w[:, part] = 0
        _dead(inverse, list(range(part.start, part.stop)))
        alive.remove(unit)
        order.append(unit)
        if len(alive) in levels:
            weights[len(alive)] = w.clone()
    return Removal(order, weights)


def remove_neurons(weight: Tensor, moments: Moments, levels: Sequence[int]) -> Removal:
    """Takes out single columns down to the least level; the inverse is kept up to date one by one, the weights in blocks.

    Args:
        weight: (n, k) float64.
        levels: counts whose weights are wanted.
    """
    units, w = weight.shape[1], weight.clone()
    inverse = _inverse(moments.damped(RIDGES[0]))
    left, order, weights = units, [], {units: weight.clone()}
    stops = sorted({*levels, *range(units, min(levels), -_BLOCK), min(levels)}, reverse=True)
    gone = torch.zeros(units, dtype=torch.bool)
    for stop in stops[1:] if stops[0] == units else stops:
        block, columns = _block(w, inverse, gone, left - stop)
        scaled = columns / torch.stack([columns[index, place] for place, index in enumerate(block)])
        # The columns as they were when each went: each has what those before it left to it, a triangular system.
        columns_of_w = torch.linalg.solve_triangular(scaled[block].T, w[:, block], upper=True, left=False)
        w -= columns_of_w @ scaled.T
        inverse -= scaled @ columns.T
        w[:, block] = 0
        _dead(inverse, block)
        order += block
        left = stop
        if left in levels:
            weights[left] = w.clone()
    return Removal(order, weights)


def _block(w: Tensor, inverse: Tensor, gone: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The next units to go, and (k, count) the columns of the inverse as they were when each went."""
    squares, diagonal = w.pow(2).sum(0), inverse.diagonal().clone()
    columns = torch.zeros(len(gone), count, dtype=w.dtype)
    pivots = torch.ones(count, dtype=w.dtype)
    block: list[int] = []
    for place in range(count):
        costs = (squares / diagonal.clamp(min=1e-300)).masked_fill(gone, torch.inf)
        index = int(costs.argmin())
        column = inverse[index] - columns[:, :place] @ (columns[index, :place] / pivots[:place])
        columns[:, place], pivots[place] = column, column[index]
        diagonal -= column.pow(2) / column[index]
        gone[index] = True
        block.append(index)
    return block, columns


def _dead(inverse: Tensor, columns: list[int]) -> None:
    inverse[:, columns] = 0
    inverse[columns] = 0
    inverse[columns, columns] = 1


def _inverse(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise QBertError("the inputs' covariance is not positive definite; are there NaN or infinite activations?")
    return torch.cholesky_inverse(factor)


# ---- refit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refit:
    """Weights of a linear for the inputs that are left.

    Attributes:
        weight: (n, kept) float64.
        bias: (n,) float64, to be added to the old one.
        error: relative error of the linear's output on held-out tokens.
        ridge: None where only means were folded into the bias.
    """

    weight: Tensor
    bias: Tensor
    error: float
    ridge: float | None


@dataclass(frozen=True)
class Drift:
    """How far what a linear's output is added up to has gone from the original's, by what was taken out before it.

    Attributes:
        mean: (n,) float64.
        crossed: (n, k) float64, covariance with the linear's inputs.
    """

    mean: Tensor
    crossed: Tensor


@dataclass(frozen=True)
class HeldOut:
    """Tokens that are not in the moments.

    Attributes:
        inputs: (tokens, k).
        drift: (tokens, n); None where there is none.
    """

    inputs: Tensor
    drift: Tensor | None = None


def refit(
    weight: Tensor,
    moments: Moments,
    kept: Tensor,
    held_out: HeldOut,
    *,
    means_only: bool = False,
    scales: int | None = None,
    drift: Drift | None = None,
) -> Refit:
    """The weights for the inputs `kept` that give most of what all gave; held-out tokens choose the ridge, or none.

    Args:
        weight: (n, k) float64, with all inputs.
        moments: of the inputs, of at least as many tokens as inputs.
        kept: (kept,) indexes, ascending.
        held_out: tokens that choose.
        means_only: leave the weights; the means of what is gone go into the bias.
        scales: in place of a refit one factor for each unit of so many inputs, see `tuned`.
        drift: to be made up for too, where the held-out tokens say that it helps (K-prune's idea, Park et al., 2024).
    """
    every = torch.ones(weight.shape[1], dtype=torch.bool)
    every[kept] = False
    gone = every.nonzero().flatten()
    plain = _judged(weight, weight[:, kept], moments, kept, held_out, None, None)
    if means_only or (not len(gone) and drift is None):
        return plain
    if scales is not None:
        return _judged(weight, tuned(weight, moments, kept, scales), moments, kept, held_out, None, None)
    found = [plain]
    for followed in [None] if drift is None else [None, drift]:
        crossed = weight[:, gone] @ moments.covariance[gone][:, kept]
        crossed = crossed if followed is None else crossed + followed.crossed[:, kept]
        for ridge in RIDGES:
            moved = torch.linalg.solve(moments.damped(ridge)[kept][:, kept], crossed.T).T
            found.append(_judged(weight, weight[:, kept] + moved, moments, kept, held_out, ridge, followed))
    return min(found, key=lambda each: each.error)


def tuned(weight: Tensor, moments: Moments, kept: Tensor, group: int) -> Tensor:
    """(n, kept) weight with one factor for each unit that is left, by least squares on what all units gave (mask tuning).

    Kwon et al. (2022) have it with LSMR, damped around 1. A layer one of whose factors is beyond 10 stays as it is, too.
    """
    products = (weight.T @ weight) * moments.covariance  # of the outputs of two inputs each, mean over tokens
    units = products.unflatten(1, (-1, group)).sum(2).unflatten(0, (-1, group)).sum(1)
    alive = kept[::group] // group
    damp = torch.eye(len(alive), dtype=torch.float64) / max(1, moments.tokens)
    wanted = units[alive].sum(1) + damp.diagonal()
    factors = torch.linalg.lstsq(units[alive][:, alive] + damp, wanted[:, None]).solution[:, 0]
    if not bool((factors.abs() <= _WIDEST_FACTOR).all()):  # NaN too
        return weight[:, kept]
    return weight[:, kept] * factors.repeat_interleave(group)


def _judged(
    weight: Tensor,
    fitted: Tensor,
    moments: Moments,
    kept: Tensor,
    held_out: HeldOut,
    ridge: float | None,
    drift: Drift | None,
) -> Refit:
    missing = weight.clone()
    missing[:, kept] -= fitted
    bias = missing @ moments.mean + (0.0 if drift is None else drift.mean)
    centred = held_out.inputs.float() - moments.mean.float()
    left = centred @ missing.T.float()
    if held_out.drift is not None:
        left += held_out.drift.float() - (0.0 if drift is None else drift.mean.float())
    spread = (centred @ weight.T.float()).pow(2).sum()
    return Refit(fitted, bias, float((left.pow(2).sum() / spread.clamp(min=1e-30)).sqrt()), ridge)
