from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo.statistics import (
    bootstrap_mean,
    cluster_bootstrap,
    holm,
    images_for_bound,
    paired_difference,
    student_t,
    subsampled,
    t_interval,
    wilson,
)


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


def test_paired_difference_draws_clusters_whole() -> None:
    """Ten copies of each pair are still four pairs, whichever order they stand in."""
    first, second = [0.9, 0.2, 0.7, 0.4], [0.1, 0.4, 0.2, 0.3]
    prompts = list("abcd") * 10
    clustered = paired_difference(first * 10, second * 10, clusters=prompts, seed=5)
    assert clustered == pytest.approx(paired_difference(first, second, seed=5))
    assert clustered == cluster_bootstrap([a - b for a, b in zip(first, second, strict=True)] * 10, prompts, seed=5)
    with pytest.raises(ValueError, match="4 values but 3 clusters"):
        paired_difference(first, second, clusters=["a", "b", "c"], seed=0)


@pytest.mark.parametrize(
    ("degrees", "confidence", "value"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.99, 5.841), (4, 0.9, 2.132), (9, 0.95, 2.262), (120, 0.95, 1.980)],
)
def test_student_t_matches_the_tables(degrees: int, confidence: float, value: float) -> None:
    assert student_t(degrees, confidence=confidence) == pytest.approx(value, abs=5e-4)


def test_student_t_by_hand_and_in_the_limit() -> None:
    """One degree of freedom is Cauchy's law, where half of all lies within 1; many are the normal one."""
    assert student_t(1, confidence=0.5) == pytest.approx(1)
    assert student_t(2, confidence=0.5) == pytest.approx((2 / 3) ** 0.5)
    assert student_t(10_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=3e-4)
    with pytest.raises(ValueError, match="degrees"):
        student_t(0)


def test_t_interval_by_hand() -> None:
    """Of 1, 2, 3 the standard error is 1/√3; half of Student's law with 2 degrees lies within √(2/3)."""
    assert t_interval([1.0, 2.0, 3.0], confidence=0.5) == pytest.approx((2 - 2**0.5 / 3, 2 + 2**0.5 / 3))
    assert t_interval([0.5] * 4) == (0.5, 0.5)
    with pytest.raises(ValueError, match="two values"):
        t_interval([1.0])


def test_holm_by_hand() -> None:
    """3·0.01; 2·0.02; 0.2 alone; a later one is never below an earlier, and none is above 1."""
    assert holm([0.2, 0.01, 0.02]) == pytest.approx([0.2, 0.03, 0.04])
    assert holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def _mean_of(values: Sequence[float]) -> object:
    return lambda rows: sum(values[row] for row in rows) / len(rows)


def test_subsamples_of_three_by_hand() -> None:
    """Two of 0, 3, 6 have the means 1.5, 3, 4.5; the spread ±1.5 is scaled by √(2/(3−2)) around the whole mean."""
    low, high = subsampled(_mean_of([0.0, 3.0, 6.0]), 3, size=2, draws=3000, seed=0)  # type: ignore[arg-type]
    assert (low, high) == pytest.approx((3 - 1.5 * 2**0.5, 3 + 1.5 * 2**0.5), abs=0.1)


def test_a_skewed_spread_is_turned_round() -> None:
    """Two of 0, 0, 9 have 0, 4.5 and 4.5: subsamples that fall short by 3 say that the whole may exceed by as much."""
    low, high = subsampled(_mean_of([0.0, 0.0, 9.0]), 3, size=2, draws=3000, seed=0)  # type: ignore[arg-type]
    assert (low, high) == pytest.approx((3 - 1.5 * 2**0.5, 3 + 3 * 2**0.5), abs=0.15)


@pytest.mark.parametrize("size", [40, 200, 320])
def test_subsamples_of_any_size_agree_with_the_normal_interval_of_a_mean(size: int) -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    half = 1.96 * values.std(ddof=1) / 20
    low, high = subsampled(_mean_of(values.tolist()), 400, size=size, draws=2000, seed=0)  # type: ignore[arg-type]
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_a_bias_that_grows_with_fewer_items_does_not_move_the_interval() -> None:
    """As FID's: the same spread around the whole statistic, with 50/size added or without."""
    values = np.random.default_rng(1).normal(size=100).tolist()
    mean = _mean_of(values)
    plain = subsampled(mean, 100, size=50, draws=200, seed=0)  # type: ignore[arg-type]
    biased = subsampled(lambda rows: mean(rows) + 50 / len(rows), 100, size=50, draws=200, seed=0)  # type: ignore[operator]
    assert biased == pytest.approx((plain.low + 0.5, plain.high + 0.5))
    assert biased.low < sum(values) / 100 + 0.5 < biased.high


def test_subsamples_have_no_item_twice_and_the_seed_fixes_them() -> None:
    seen: list[list[int]] = []

    def statistic(rows: Sequence[int]) -> float:
        seen.append(list(rows))
        return float(rows[0])

    first = subsampled(statistic, 9, size=4, draws=20, seed=3)
    assert seen[0] == list(range(9)) and len(seen) == 21
    assert all(len(rows) == 4 and rows == sorted(set(rows)) for rows in seen[1:])
    assert first == subsampled(statistic, 9, size=4, draws=20, seed=3)
    assert seen[1:21] == seen[22:]


@pytest.mark.parametrize(("size", "draws", "match"), [(1, 9, "size"), (5, 9, "size"), (2, 1, "draws")])
def test_subsamples_must_be_smaller_than_the_whole_and_several(size: int, draws: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        subsampled(lambda rows: 0.0, 5, size=size, draws=draws, seed=0)
    with pytest.raises(ValueError, match="finite"):
        subsampled(lambda rows: math.nan, 5, size=2, draws=3, seed=0)
