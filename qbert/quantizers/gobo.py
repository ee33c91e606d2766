"""GOBO: a dictionary of 8 or 16 values learned from each matrix, and the few weights that do not fit it kept exactly.

Zadeh, Edo, Awad, Moshovos: "GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference",
MICRO 2020 (arXiv 2005.03842). For each matrix: fit a Gaussian, set apart the weights whose log-density is below a
threshold, split the rest into equally populated bins, and move the bins' means by Lloyd's update until the L1 error
stops falling.

The weights are sorted once; with prefix sums an iteration costs 2**bits binary searches, so BERT-base takes seconds. All
sums run in float64 in one fixed order (numpy's own `sum` has one that depends on the CPU's vectors), so the same matrix gives
the same bytes on every run. The sorted copy is all the memory of the matrix's size that this takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import INT8, Scheme
from qbert.quantizers.portions import in_portions
from qbert.weight.codec import MIN_ABSMAX
from qbert.weight.layout import pack_codes
from qbert.weight.specs import column_dtype

LOG_DENSITY_THRESHOLD = -4.0  # the paper's: natural logarithm of the fitted Gaussian's density
# The threshold depends on the scale of the weights: at a standard deviation of 21.8 it calls every weight an outlier. Weights
# of encoders lie near 0.04 (0.1 to 0.5 % outliers); far above that a dictionary is no longer what is stored.
MAX_OUTLIER_FRACTION = 0.05

_BLOCK = 4096  # weights between two sums that are kept

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Dictionary:
    """What was learned from one matrix.

    Attributes:
        centroids: (2**bits,) ascending, float64.
        low, high: weights outside [low, high] are outliers.
        iterations: Lloyd updates taken until L1 stopped falling.
        l1: sum of |weight - centroid| over the weights that are not outliers.
    """

    centroids: Float64
    low: float
    high: float
    iterations: int
    l1: float


def quantize_gobo(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """(n, k) float32 to the PLAIN tensors of a dictionary scheme; outliers come back bit for bit."""
    device, values = weight.device, weight.cpu().contiguous()
    learned = learn_dictionary(values.numpy(), scheme.weight_bits)
    centroids = without_duplicates(torch.from_numpy(learned.centroids).to(torch.float32))
    tensors, decoded, merged = {"codebook": centroids}, centroids, None
    if scheme.activation is not None:
        tensors["codebook"], tensors["scale"] = _snap_to_int8(centroids)
        # Centroids that became equal share their lowest index, so that an expanded weight can be packed again.
        merged = torch.searchsorted(tensors["codebook"].to(torch.int32), tensors["codebook"].to(torch.int32))
        decoded = tensors["codebook"].to(torch.float32) * tensors["scale"]
    packed, counts, columns, deltas = [], [], [], []
    for rows in in_portions(values):
        codes = nearest_centroids(rows, centroids)
        if merged is not None:
            codes = merged[codes]
        outlying = is_outlier(rows, learned)
        at = outlying.nonzero(as_tuple=True)
        codes[at], delta = _exact_deltas(rows[at], codes[at], decoded)
        packed.append(pack_codes(codes, scheme.weight))
        counts.append(outlying.sum(dim=1))
        columns.append(at[1].to(column_dtype(values.shape[1])))
        deltas.append(delta)
    rowptr = torch.zeros(values.shape[0] + 1, dtype=torch.int32)
    rowptr[1:] = torch.cat(counts).cumsum(0)
    tensors |= {
        "qdata": torch.cat(packed),
        "outlier_rowptr": rowptr,
        "outlier_col": torch.cat(columns),
        "outlier_delta": torch.cat(deltas),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def is_outlier(values: Tensor, learned: Dictionary) -> Tensor:
    """Bool of each weight that a dictionary leaves out, in float64."""
    doubles = values.to(torch.float64)
    return (doubles < learned.low) | (doubles > learned.high)


def learn_dictionary(
    weight: NDArray[np.float32],
    bits: int,
    threshold: float = LOG_DENSITY_THRESHOLD,
    max_outlier_fraction: float = MAX_OUTLIER_FRACTION,
) -> Dictionary:
    """Learns the dictionary of one matrix. Where zeros are as many as an entry's share of the weights, one entry is 0.

    Args:
        weight: finite float32 of any shape.
        bits: the dictionary has 2**bits entries.
        threshold: a weight is an outlier if the log-density of the fitted Gaussian there is below this.
        max_outlier_fraction: more outliers than this fraction is an error, not a result.

    Raises:
        QBertError: the threshold makes outliers of more than `max_outlier_fraction` of the weights.
    """
    values = np.sort(weight, axis=None)
    # float32: beside a float64 the whole array would be made one.
    start, stop = (np.searchsorted(values, np.float32(0.0), side) for side in ("left", "right"))
    # Weights that somebody made zero in numbers stay zero: one entry is theirs, and they say nothing of how the others lie.
    pinned = values.size >> bits <= stop - start < values.size and stop > start
    ordered = _Ordered(np.concatenate((values[:start], values[stop:])) if pinned else values)
    low, high = outlier_bounds(ordered, threshold)
    first, last = ordered.below(low, "left"), ordered.below(high, "right")
    outliers = ordered.size - (last - first)
    # A handful is no fraction: a tiny matrix may keep one weight exactly.
    if outliers > max(1, max_outlier_fraction * ordered.size):
        raise QBertError(
            f"gobo: {outliers} of {ordered.size} weights (standard deviation {_deviation(ordered):.4g}) have log-density "
            f"below {threshold}; allowed: at most {max_outlier_fraction:.0%}. Exclude the module or rescale its weight"
        )
    entries = (1 << bits) - int(pinned)
    centroids, iterations, l1 = _lloyd_until_l1_rises(_Ordered(ordered.values[first:last]), entries)
    if pinned:
        centroids = np.sort(np.append(centroids, 0.0))
    return Dictionary(centroids, low, high, iterations, l1)


class _Ordered:
    """Sorted weights, and float64 sums of any first so many of them, without a float64 for each.

    A sum is a running one, kept at the beginning of every block; from there the rest is added up when it is asked for, in the
    same order, so with the same bits.

    Args:
        values: float32, ascending.
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values, self.size = values, values.size
        self._starts = [-0.0]  # which changes no sum, not even its sign
        for block in self._blocks():
            self._starts.append(_running(self._starts[-1], block)[-1])

    def _blocks(self) -> Iterator[Float64]:
        return (self.values[at : at + _BLOCK].astype(np.float64) for at in range(0, self.size, _BLOCK))

    def sum_of(self, function: Callable[[Float64], Float64]) -> float:
        """Running sum of a function of every weight."""
        total = -0.0
        for block in self._blocks():
            total = _running(total, function(block))[-1]
        return float(total)

    def total(self) -> float:
        """Sum of all."""
        return float(self._starts[-1])

    def sums(self, counts: NDArray[np.int64]) -> Float64:
        """Sums of the first so many weights, for each count."""
        return np.array([self._sum(int(count)) for count in counts])

    def _sum(self, count: int) -> float:
        if count == 0:
            return 0.0
        block = (count - 1) // _BLOCK
        rest = self.values[block * _BLOCK : count].astype(np.float64)
        return float(_running(self._starts[block], rest)[-1])

    def at(self, indices: NDArray[np.int64]) -> Float64:
        """Weights at these places."""
        return self.values[indices].astype(np.float64)

    def below(self, bound: float, side: Literal["left", "right"]) -> int:
        """How many weights are below a float64 bound ("left"), or at most that ("right")."""
        return int(self.all_below(np.array([bound]), side)[0])

    def all_below(self, bounds: Float64, side: Literal["left", "right"]) -> NDArray[np.int64]:
        """`below` for ascending bounds. Compared are float32: the next of them on the side where it changes nothing."""
        with np.errstate(over="ignore"):
            rounded = bounds.astype(np.float32)
        if side == "right":
            rounded = np.where(rounded > bounds, np.nextafter(rounded, np.float32(-np.inf)), rounded)
        else:
            rounded = np.where(rounded < bounds, np.nextafter(rounded, np.float32(np.inf)), rounded)
        return np.searchsorted(self.values, rounded, side)


def _running(start: float, values: Float64) -> Float64:
    return np.cumsum(np.concatenate(([start], values)))


def outlier_bounds(ordered: _Ordered, threshold: float) -> tuple[float, float]:
    """Weights outside [low, high] have a log-density below `threshold` under the Gaussian fitted to all weights."""
    mean = ordered.total() / ordered.size
    deviation = _deviation(ordered)
    if deviation == 0.0:  # a constant matrix has no density; nothing stands out in it
        return mean - math.inf, mean + math.inf
    room = -threshold - math.log(deviation * math.sqrt(2 * math.pi))
    radius = deviation * math.sqrt(2 * max(room, 0.0))  # no room: the density is below the threshold everywhere
    return mean - radius, mean + radius


def _lloyd_until_l1_rises(ordered: _Ordered, entries: int) -> tuple[Float64, int, float]:
    """So many centroids, updates taken and their L1 error, from sorted weights."""
    bins = np.arange(entries + 1) * ordered.size // entries
    # With fewer weights than entries some bins are empty; they start at their neighbour.
    centroids = _means(ordered, bins, ordered.at(np.minimum(bins[:-1], ordered.size - 1)))
    best, best_l1, iterations = centroids, math.inf, 0
    while True:
        cells = _cells(ordered, centroids)
        l1 = _l1(ordered, cells, centroids)
        if not l1 < best_l1:
            return best, iterations, best_l1
        best, best_l1 = centroids, l1
        centroids = _means(ordered, cells, centroids)
        iterations += 1


def _cells(ordered: _Ordered, centroids: Float64) -> NDArray[np.int64]:
    """Bounds (entries + 1,) of the run of sorted weights nearest to each centroid; a tie goes to the lower one."""
    inner = ordered.all_below((centroids[1:] + centroids[:-1]) / 2, "right")
    return np.concatenate(([0], inner, [ordered.size]))


def _means(ordered: _Ordered, cells: NDArray[np.int64], otherwise: Float64) -> Float64:
    """Mean of each cell; an empty cell keeps `otherwise`."""
    counts, sums = np.diff(cells), ordered.sums(cells)
    return np.where(counts > 0, (sums[1:] - sums[:-1]) / np.maximum(counts, 1), otherwise)


def _l1(ordered: _Ordered, cells: NDArray[np.int64], centroids: Float64) -> float:
    """Sum of |weight - centroid|: in each sorted cell, weights below the centroid, then weights above it."""
    first, last = cells[:-1], cells[1:]
    split = np.clip(ordered.all_below(centroids, "right"), first, last)
    sums, at_split = ordered.sums(cells), ordered.sums(split)
    below = centroids * (split - first) - (at_split - sums[:-1])
    above = (sums[1:] - at_split) - centroids * (last - split)
    return float(np.sum(below + above))


def without_duplicates(centroids: Tensor) -> Tensor:
    """Centroids that are equal become one, and 0 takes the free entries: any outlier is a float32 away from it."""
    distinct = centroids.unique()
    return torch.cat((distinct, centroids.new_zeros(centroids.numel() - distinct.numel()))).sort().values


def nearest_centroids(values: Tensor, centroids: Tensor) -> Tensor:
    """Index (n, k) int64 of the nearest centroid, a tie to the lower one."""
    exact = centroids.to(torch.float64)
    middles = (exact[1:] + exact[:-1]) / 2
    # Comparing float32 weights with a middle rounded down to float32 decides as comparing with the middle itself.
    rounded = middles.to(torch.float32)
    rounded = torch.where(rounded.to(torch.float64) > middles, rounded.nextafter(torch.tensor(-torch.inf)), rounded)
    return torch.bucketize(values, rounded, out_int32=True).to(torch.int64)


def _snap_to_int8(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids as int8 codes times one scale (1,) float32: what an INT8 matrix unit multiplies."""
    absmax = centroids.abs().max()
    scale = absmax / INT8.qmax if float(absmax) > MIN_ABSMAX else torch.ones_like(absmax)
    return torch.round(centroids / scale).clamp(-INT8.qmax, INT8.qmax).to(torch.int8), scale.view(1)


def _exact_deltas(outliers: Tensor, codes: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and float32 deltas (outliers,) such that decoded[code] + delta, rounded to float32, is the outlier itself.

    The difference from the nearest centroid is finer than the outlier as long as that lies on the same side of zero, and
    then it does. Where it does not, no other difference from that centroid would: another centroid is taken.
    """
    codes, delta = codes.clone(), outliers - decoded[codes]
    for candidate in range(decoded.numel()):
        wrong = (decoded[codes] + delta != outliers).nonzero().flatten()
        if wrong.numel() == 0:
            return codes, delta
        codes[wrong] = candidate
        delta[wrong] = outliers[wrong] - decoded[candidate]
    wrong = (decoded[codes] + delta != outliers).nonzero().flatten()
    if wrong.numel():  # an outlier near zero, say, while every centroid is far from it
        raise QBertError(
            f"gobo: {wrong.numel()} outliers, the first {float(outliers[wrong[0]]):.9g}, cannot be kept exactly: no "
            f"float32 difference from a centroid ({float(decoded[0]):.4g} ... {float(decoded[-1]):.4g}) gives them. "
            "Exclude the module"
        )
    return codes, delta


def _deviation(ordered: _Ordered) -> float:
    """Population standard deviation."""
    mean = ordered.total() / ordered.size
    return math.sqrt(ordered.sum_of(lambda values: (values - mean) ** 2) / ordered.size)
