from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo.statistics import bootstrap_mean, cluster_bootstrap, images_for_bound, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_newcombe_1998_table_1(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand() -> None:
    """z = 1 at 68.27%: for 1 of 2, centre (½ + ¼)/(3/2) = ½ and margin sqrt(⅛ + 1/16)/(3/2) = 1/(2√3)."""
    confidence = 2 * NormalDist().cdf(1) - 1
    assert wilson(1, 2, confidence=confidence) == pytest.approx((0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5))


def test_wilson_at_the_ends() -> None:
    z2 = 1.959963984540054**2
    assert wilson(0, 7) == (0.0, pytest.approx(z2 / (7 + z2)))
    assert wilson(7, 7) == (pytest.approx(7 / (7 + z2)), 1.0)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_holds_the_rate_stays_within_bounds_and_mirrors(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    low, high = wilson(successes, n, confidence=confidence)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1
    mirrored = wilson(n - successes, n, confidence=confidence)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="trial"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=confidence)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean([1.0, 2.0], seed=0, confidence=confidence)


def test_bootstrap_of_two_values_has_the_three_means_it_must_have() -> None:
    """Means 0, ½ and 1 come with probabilities ¼, ½ and ¼."""
    assert bootstrap_mean([0.0, 1.0], seed=0, confidence=0.95) == (0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], seed=0, confidence=0.4) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    half = 1.96 * values.std() / 20
    low, high = bootstrap_mean(values.tolist(), seed=0)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_is_fixed_by_its_seed_and_wider_for_more_confidence() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    wide, narrow = bootstrap_mean(values, seed=3, confidence=0.99), bootstrap_mean(values, seed=3, confidence=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_draws_all_its_resamples_however_they_are_cut() -> None:
    """More values than fit one block: each resample is drawn alone, and the interval is still that of the mean."""
    values = np.random.default_rng(2).normal(size=1_200_000)
    half = 1.96 / len(values) ** 0.5
    low, high = bootstrap_mean(values, seed=0, resamples=40)  # type: ignore[arg-type]
    assert low < values.mean() < high
    assert 0.5 * half < (high - low) / 2 < 1.5 * half


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_mean([0.25] * 3, seed=0) == (0.25, 0.25)
    assert bootstrap_mean([2.0], seed=0) == (2.0, 2.0)


def test_clusters_of_one_are_no_clusters() -> None:
    values = [0.1, 0.7, 0.4, 0.9]
    assert cluster_bootstrap(values, [3, 1, 2, 0], seed=5) == bootstrap_mean(values, seed=5)


def test_copies_within_a_cluster_add_nothing() -> None:
    """Ten copies of each value are still four units; taken as forty they would look √10 times as sure."""
    values = [0.1, 0.7, 0.4, 0.9]
    copies = [value for value in values for _ in range(10)]
    prompts = [name for name in "abcd" for _ in range(10)]
    assert cluster_bootstrap(copies, prompts, seed=5) == pytest.approx(bootstrap_mean(values, seed=5))
    low, high = bootstrap_mean(copies, seed=5)
    wide = cluster_bootstrap(copies, prompts, seed=5)
    assert (wide.high - wide.low) / (high - low) == pytest.approx(10**0.5, rel=0.1)


def test_cluster_mean_is_over_values_not_over_clusters() -> None:
    """Two clusters, 0 three times and 1 once: means 0, ¼ and 1 with probabilities ¼, ½ and ¼."""
    values, prompts = [0.0, 1.0, 0.0, 0.0], ["a", "b", "a", "a"]
    assert cluster_bootstrap(values, prompts, seed=0, confidence=0.4) == (0.25, 0.25)
    assert cluster_bootstrap(values, prompts, seed=0) == (0.0, 1.0)


def test_paired_difference_cancels_what_pairs_share() -> None:
    shared = np.random.default_rng(0).normal(0, 10, size=50)
    after, before = (shared - 0.5).tolist(), shared.tolist()
    assert paired_difference(after, before, seed=0) == pytest.approx((-0.5, -0.5))
    assert paired_difference(before, after, seed=0) == pytest.approx((0.5, 0.5))


def test_paired_difference_is_the_bootstrap_of_the_differences() -> None:
    first, second = [1.0, 3.0, 2.0], [0.5, 1.0, 2.5]
    assert paired_difference(first, second, seed=2) == bootstrap_mean([0.5, 2.0, -0.5], seed=2)


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_nothing_to_average_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="value"):
        bootstrap_mean(values, seed=0)
    with pytest.raises(ValueError, match="value"):
        cluster_bootstrap(values, list(range(len(values))), seed=0)
    with pytest.raises(ValueError, match="value"):
        paired_difference(values, values, seed=0)


def test_lengths_must_match() -> None:
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        cluster_bootstrap([1.0, 2.0], ["a"], seed=0)
    with pytest.raises(ValueError, match="equal lengths, not 2 and 1"):
        paired_difference([1.0, 2.0], [1.0], seed=0)


def test_at_least_one_resample() -> None:
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean([1.0], seed=0, resamples=0)


@pytest.mark.parametrize("limit", [0.01, 0.02, 0.05, 0.1, 0.5])
def test_images_for_a_bound_are_the_fewest_that_do(limit: float) -> None:
    n = images_for_bound(0.0, limit)
    assert wilson(0, n).high <= limit < wilson(0, n - 1).high
    hits = 3
    n = next(n for n in range(4, 2000) if wilson(hits, n).high <= limit)  # by trying
    assert images_for_bound(hits / n, limit) <= n
    assert images_for_bound(hits / (n - 1), limit) > n - 1


def test_images_for_a_bound_as_published() -> None:
    table = {(0.0, 0.1): 35, (0.01, 0.1): 43, (0.02, 0.1): 55, (0.0, 0.05): 73, (0.01, 0.05): 115, (0.02, 0.05): 203}
    table |= {(0.0, 0.02): 189, (0.01, 0.02): 753, (0.0, 0.01): 381}
    assert {key: images_for_bound(*key) for key in table} == table
    with pytest.raises(ValueError, match="cannot be shown"):
        images_for_bound(0.05, 0.05)
