"""How sure a figure is: intervals and paired tests, in numpy alone. Every resampling is seeded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qbert.errors import QBertError

Array = NDArray[np.float64]
Interval = tuple[float, float]  # (low, high)

CONFIDENCE = 0.95
Z = 1.959963984540054  # the standard normal's 97.5% quantile
N_RESAMPLES = 10_000
N_PAIR_RESAMPLES = 2_000  # of documents; each costs a correlation over all pairs
CHUNK_ELEMENTS = 4_000_000  # resampled values held at a time (32 MB)


def bootstrap_mean(values: Any, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap 95% interval of the mean (Efron and Tibshirani 1993, section 13.3).

    Args:
        values: (n,) numbers, n >= 1.
    """
    data = _vector(values)
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_ELEMENTS // len(data))
    means = [
        data[generator.integers(0, len(data), size=(min(rows, n_resamples - start), len(data)))].mean(axis=1)
        for start in range(0, n_resamples, rows)
    ]
    return percentile_interval(np.concatenate(means))


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score 95% interval of a proportion (Wilson 1927): sound at 0 and n, where a bootstrap has no width."""
    if not 0 <= successes <= n or n < 1:
        raise QBertError(f"{successes} of {n}: allowed are 0 to n, n at least 1")
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_proportions(lost: int, won: int, n: int) -> Interval:
    """95% interval of (lost - won) / n: the drop of an accuracy measured on the same n texts.

    Bonett and Price 2012, adjusted Wald: one text is added to each kind of disagreement, so the interval keeps a width
    when there is none (a bootstrap would claim certainty). Recommended by Fagerland, Lydersen and Laake 2014.
    """
    if min(lost, won) < 0 or lost + won > n or n < 1:
        raise QBertError(f"{lost} lost and {won} won of {n}: allowed are 0 or more, together at most n")
    down, up = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = Z * math.sqrt((down + up - (down - up) ** 2) / (n + 2))
    return max(-1.0, down - up - half), min(1.0, down - up + half)


def mcnemar_exact(lost: int, won: int) -> float:
    """Two-sided exact p that the two kinds of disagreement are equally likely (McNemar 1947, binomial form)."""
    if min(lost, won) < 0:
        raise QBertError(f"{lost} lost and {won} won: allowed are counts of 0 or more")
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**n)  # whole numbers up to the last division: exact for any n


def pearson(x: Any, y: Any) -> float:
    """Pearson's correlation, -1 to 1.

    Raises:
        QBertError: fewer than two pairs, different lengths, or a side that is constant (the value is not defined).
    """
    a, b = _vectors(x, y)
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        raise QBertError(f"correlation of {len(a)} pair(s) is not defined: needed are 2, and no side constant")
    return _pearson(a, b)


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties at their average rank (Kendall 1948). Raises alike."""
    a, b = _vectors(x, y)
    return pearson(average_ranks(a), average_ranks(b))


def average_ranks(values: Any) -> Array:
    """Ranks from 1; equal values share the mean of the ranks they cover."""
    _, inverse, counts = np.unique(_vector(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def pairs(matrix: Any) -> Array:
    """The n(n-1)/2 values above the diagonal of an (n, n) matrix, row by row."""
    square = np.asarray(matrix, dtype=np.float64)
    return square[np.triu_indices(len(square), 1)]


def bootstrap_pairs(
    human: Any,
    model: Any,
    statistic: Callable[[Any, Any], float] = pearson,
    *,
    n_resamples: int = N_PAIR_RESAMPLES,
    seed: int = 0,
) -> Array:
    """Bootstrap distribution of a correlation between two (n, n) similarity matrices.

    Texts are drawn, not pairs: the pairs of one text are not independent. A pair of a text with itself, which drawing
    with replacement brings about, is left out (Nili et al. 2014, doi 10.1371/journal.pcbi.1003553). The same seed draws
    the same texts, so two distributions may be subtracted: that is the paired bootstrap of a difference.

    Returns:
        (n_resamples,) values of `statistic`; NaN where a draw has too few different texts for one.
    """
    left, right = np.asarray(human, dtype=np.float64), np.asarray(model, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 2 or left.shape[0] != left.shape[1]:
        raise QBertError(f"similarities of shapes {left.shape} and {right.shape}: needed are two equal squares")
    generator = np.random.default_rng(seed)
    upper = np.triu_indices(len(left), 1)
    values = np.empty(n_resamples)
    for k in range(n_resamples):
        drawn = generator.integers(0, len(left), size=len(left))
        rows, columns = drawn[upper[0]], drawn[upper[1]]
        apart = rows != columns
        try:
            values[k] = statistic(left[rows[apart], columns[apart]], right[rows[apart], columns[apart]])
        except QBertError:
            values[k] = np.nan
    return values


def percentile_interval(distribution: Array) -> Interval:
    """The middle 95% of a bootstrap distribution; resamples where the statistic is not defined (NaN) do not count."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(distribution, [tail, 1 - tail])
    return float(low), float(high)


def _pearson(a: Array, b: Array) -> float:
    a, b = a - a.mean(), b - b.mean()
    value = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return min(1.0, max(-1.0, value))


def _vector(values: Any) -> Array:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise QBertError(f"values of shape {data.shape}: needed is one row of at least one finite number")
    return data


def _vectors(x: Any, y: Any) -> tuple[Array, Array]:
    a, b = _vector(x), _vector(y)
    if len(a) != len(b):
        raise QBertError(f"{len(a)} values paired with {len(b)}: needed are as many")
    return a, b
