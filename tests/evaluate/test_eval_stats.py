"""Intervals and tests against brute force and published values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbert.errors import QBertError
from qbert.evaluate import stats

# A textbook's worked example: IQ against hours of television a week, rho = -29/165.
IQ = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
TELEVISION = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
SPEARMAN_IQ = -29 / 165


def test_spearman_of_the_textbook_example() -> None:
    assert stats.spearman(IQ, TELEVISION) == pytest.approx(SPEARMAN_IQ, abs=1e-12)


def test_pearson_against_numpy() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50))
    assert stats.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert stats.pearson(x, 3 * x + 1) == pytest.approx(1.0, abs=1e-12)
    assert stats.pearson(x, -x) == pytest.approx(-1.0, abs=1e-12)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_average_ranks_against_counting(values: list[int]) -> None:
    brute = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert stats.average_ranks(values).tolist() == brute


@pytest.mark.parametrize("values", [([1], [2]), ([1, 1], [1, 2]), ([1, 2], [3, 3])], ids=["one", "left", "right"])
def test_correlation_that_is_not_defined(values: tuple[list[int], list[int]]) -> None:
    with pytest.raises(QBertError, match="not defined"):
        stats.pearson(*values)
    with pytest.raises(QBertError, match="not defined"):
        stats.spearman(*values)


def test_bad_vectors() -> None:
    with pytest.raises(QBertError, match="2 values paired with 3"):
        stats.pearson([1, 2], [1, 2, 3])
    for bad in ([], [[1.0]], [1.0, math.nan]):
        with pytest.raises(QBertError, match="finite"):
            stats.bootstrap_mean(bad)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 1), (3, 3), (10, 2), (0, 7)])
def test_mcnemar_against_all_outcomes(lost: int, won: int) -> None:
    """Two-sided: as extreme or more, among all 2^n ways the disagreements could have gone."""
    n = lost + won
    outcomes = [sum(way) for way in itertools.product((0, 1), repeat=n)]
    extreme = sum(abs(k - n / 2) >= abs(lost - n / 2) for k in outcomes)
    assert stats.mcnemar_exact(lost, won) == pytest.approx(extreme / 2**n, abs=1e-15)


def test_mcnemar_of_many() -> None:
    assert stats.mcnemar_exact(2000, 2000) == 1.0
    assert 0 < stats.mcnemar_exact(3000, 1000) < 1e-200
    with pytest.raises(QBertError):
        stats.mcnemar_exact(-1, 2)


def test_wilson_known_values() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3."""
    for (successes, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert stats.wilson(successes, n) == pytest.approx(expected, abs=5e-5)
    assert stats.wilson(20, 20)[1] == 1.0
    with pytest.raises(QBertError):
        stats.wilson(3, 2)


def test_paired_proportions_known_value() -> None:
    """The documented example of R's statpsych::ci.prop.ps(.05, 12, 4, 26, 6)."""
    low, high = stats.paired_proportions(26, 4, 48)
    assert (low, high) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    assert stats.paired_proportions(4, 26, 48) == pytest.approx((-high, -low))


def test_paired_proportions_without_flips_still_has_a_width() -> None:
    low, high = stats.paired_proportions(0, 0, 500)
    assert low == -high
    assert 0.003 < high < 0.01


def test_paired_proportions_covers() -> None:
    """2,000 simulated evaluations of 300 texts with a drop of 2 points: the interval holds it 95 times in 100."""
    generator = np.random.default_rng(0)
    draws = generator.multinomial(300, [0.05, 0.03, 0.92], size=2000)
    intervals = [stats.paired_proportions(int(lost), int(won), 300) for lost, won, _ in draws]
    held = sum(low <= 0.02 <= high for low, high in intervals)
    assert 0.935 <= held / len(draws) <= 0.97


def test_bootstrap_mean_against_enumeration() -> None:
    """All 4^4 resamples of four values: the percentiles of their means."""
    values = [0.0, 1.0, 2.0, 10.0]
    means = [sum(way) / 4 for way in itertools.product(values, repeat=4)]
    exact = np.quantile(means, [0.025, 0.975])
    assert stats.bootstrap_mean(values, n_resamples=50_000) == pytest.approx(tuple(exact), abs=0.26)


def test_bootstrap_mean_of_a_normal_sample() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    low, high = stats.bootstrap_mean(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(2000), rel=0.05)
    assert stats.bootstrap_mean(values) == (low, high)
    assert stats.bootstrap_mean(values, seed=1) != (low, high)


def _similarities(seed: int, noise: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    base = generator.normal(size=(30, 30))
    other = base + noise * np.random.default_rng(seed).normal(size=(30, 30))
    return (other + other.T) / 2


def test_bootstrap_pairs_holds_the_estimate() -> None:
    human, model = _similarities(1, 0.0), _similarities(2, 1.0)
    estimate = stats.pearson(stats.pairs(human), stats.pairs(model))
    values = stats.bootstrap_pairs(human, model, n_resamples=400)
    low, high = stats.percentile_interval(values)
    assert low < estimate < high
    assert high - low < 0.5
    assert np.array_equal(values, stats.bootstrap_pairs(human, model, n_resamples=400))
    ranked = stats.percentile_interval(stats.bootstrap_pairs(human, model, stats.spearman, n_resamples=400))
    assert ranked[0] < stats.spearman(stats.pairs(human), stats.pairs(model)) < ranked[1]


def test_bootstrap_pairs_leaves_out_a_text_with_itself() -> None:
    """With a diagonal that would give it away."""
    human, model = _similarities(1, 0.0), _similarities(2, 1.0)
    plain = stats.bootstrap_pairs(human, model, n_resamples=50)
    np.fill_diagonal(human, 1e6)
    np.fill_diagonal(model, 1e6)
    assert np.array_equal(plain, stats.bootstrap_pairs(human, model, n_resamples=50))


def test_bootstrap_pairs_of_very_few_texts() -> None:
    values = stats.bootstrap_pairs(_similarities(1, 0.0)[:3, :3], _similarities(2, 1.0)[:3, :3], n_resamples=50)
    assert np.isnan(values).any()
    assert np.isfinite(stats.percentile_interval(values)).all()
    with pytest.raises(QBertError, match="two equal squares"):
        stats.bootstrap_pairs(np.ones((2, 2)), np.ones((3, 3)))
