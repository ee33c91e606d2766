"""How a product is cut into tiles, how long the array takes for them, and what passes between two levels of memory. Pure.

Waves: tiles come in waves of as many as there are units; the last one is rarely full, and the edges of a matrix rarely fill
their tiles. Traffic: an operand is read again for each block of what stays (Chen et al., Eyeriss, ISCA 2016, has the names).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SUM_BYTES = 4  # of a partial sum: int32, float32
_KEPT = 0.5  # share of a level that holds what stays, the rest takes what streams by


@dataclass(frozen=True)
class Matrices:
    """`count` products of (t, k) activations and (n, k) weights.

    Attributes:
        weight_bytes, activation_bytes: of one value as it lies in memory, with its share of scales.
        result_bytes: of one result.
    """

    t: int
    n: int
    k: int
    weight_bytes: float
    activation_bytes: float
    result_bytes: float
    count: int = 1

    @property
    def operations(self) -> float:
        """A multiply-add is two."""
        return 2.0 * self.t * self.n * self.k * self.count

    @property
    def weights(self) -> float:
        """Bytes of one product's weights."""
        return self.n * self.k * self.weight_bytes

    @property
    def activations(self) -> float:
        """Bytes of one product's activations."""
        return self.t * self.k * self.activation_bytes

    @property
    def results(self) -> float:
        """Bytes of one product's results."""
        return self.t * self.n * self.result_bytes


Tile = tuple[int, int, int]


def array_operations(problem: Matrices, tile: Tile, units: int, dataflow: str, split_k: int = 1) -> float:
    """Operations that all units could do in the time that the tiles take: at least those of the problem.

    Args:
        tile: tokens, output channels, input channels of one unit.
        dataflow: what stays in a unit: ``"output"``, ``"weight"``, ``"activation"``.
        split_k: units that share an output's input channels.
    """
    t, n, k = (math.ceil(size / side) for size, side in zip((problem.t, problem.n, problem.k), tile, strict=True))
    # What stays is a tile of two sides, shared out over the units; the third side streams through, and its edge is cut off.
    stays, streams = {"output": (t * n, k), "weight": (n * k, t), "activation": (t * k, n)}[dataflow]
    if dataflow == "output":
        streams = math.ceil(k / split_k)
        stays *= split_k
    waves = math.ceil(stays * problem.count / units)
    return 2.0 * waves * units * streams * math.prod(tile)


def tiles_of(problem: Matrices, tile: Tile, split_k: int = 1) -> int:
    """Tiles of results."""
    return problem.count * math.ceil(problem.t / tile[0]) * math.ceil(problem.n / tile[1]) * split_k


def array_traffic(problem: Matrices, tile: Tile, dataflow: str) -> float:
    """Bytes between the innermost memory and the units."""
    t, n, k = (math.ceil(size / side) for size, side in zip((problem.t, problem.n, problem.k), tile, strict=True))
    sums = 2.0 * problem.t * problem.n * SUM_BYTES * (k - 1)  # read and written for each further tile of k
    reads = {
        "output": problem.activations * n + problem.weights * t,
        "weight": problem.activations * n + problem.weights + sums,
        "activation": problem.activations + problem.weights * t + sums,
    }[dataflow]
    return problem.count * (reads + problem.results)


def level_traffic(problem: Matrices, capacity: float) -> float:
    """Bytes of one product that pass into a level of so many bytes, by the best of three orders: weights stay, activations
    stay, or a block of results does."""
    weights, activations, kept = problem.weights, problem.activations, capacity * _KEPT
    side = max(1.0, math.sqrt(kept / SUM_BYTES))
    best = min(
        weights + activations * max(1, math.ceil(weights / kept)),
        activations + weights * max(1, math.ceil(activations / kept)),
        activations * math.ceil(problem.n / side) + weights * math.ceil(problem.t / side),
    )
    return problem.count * best
