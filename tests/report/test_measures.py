from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from duo.report.tradeoff.measures import (
    Draws,
    Measure,
    Part,
    against_rivals,
    difference,
    how,
    interval_of,
    p_value,
    told,
)
from duo.statistics import Interval, crossed_bootstrap, newcombe_difference, t_interval, wilson

DRAWS = Draws(seed=0, resamples=2000)


def measure(table: np.ndarray, *, method: str = "m", rate: bool = True, prompts: str = "set") -> Measure:
    """Of (erasures, prompts) values, one image each."""
    ones = np.ones(table.shape[1])
    return Measure(
        method=method,
        rate=rate,
        parts={seed: (Part(prompts=prompts, sums=row, counts=ones),) for seed, row in enumerate(table)},
    )


def interval(one: Measure) -> Interval:
    return interval_of(one, one.resampled(DRAWS))


def test_erasures_weigh_the_same_and_so_do_parts() -> None:
    """Erasure 0 has 1 of 4, erasure 1 has a mean of 1 of 1 and 0 of 2: (¼ + ½)/2."""
    few = Part(prompts="a", sums=np.array([1.0]), counts=np.array([1.0]))
    two = Part(prompts="b", sums=np.array([0.0, 0.0]), counts=np.array([1.0, 1.0]))
    four = Part(prompts="c", sums=np.array([1.0, 0.0]), counts=np.array([2.0, 2.0]))
    one = Measure(method="m", parts={0: (four,), 1: (few, two)})
    assert one.by_seed == {0: 0.25, 1: 0.5}
    assert (one.value, one.images) == (0.375, 7)


def test_parts_of_one_prompt_set_share_their_prompts() -> None:
    """Erasure 0 has two prompts; erasure 1 has one of these, and two of another set that both other parts have."""
    first = Part(prompts="a", sums=np.zeros(2), counts=np.array([1.0, 1.0]))
    half = Part(prompts="a", sums=np.zeros(2), counts=np.array([1.0, 0.0]))
    other = Part(prompts="b", sums=np.zeros(2), counts=np.array([2.0, 2.0]))
    assert Measure(method="m", parts={1: (half, other, other)}).prompts == 3
    assert Measure(method="m", parts={0: (first,), 1: (half, other, other)}).prompts == 2


def test_with_many_of_both_it_is_the_crossed_bootstrap() -> None:
    rng = np.random.default_rng(1)
    table = (rng.random((25, 30)) < 0.3 + 0.3 * rng.random((1, 30)) + 0.2 * rng.random((25, 1))).astype(float)
    rows, columns = np.indices(table.shape)
    wanted = crossed_bootstrap(
        table.ravel().tolist(), rows.ravel().tolist(), columns.ravel().tolist(), seed=1, resamples=2000
    )
    assert interval(measure(table)) == pytest.approx(wanted, abs=0.015)
    assert how(25) == "crossed bootstrap"


def test_few_erasures_are_widened_to_students_t() -> None:
    """Three erasures of 0.2, 0.5 and 0.8 have 4.3 standard errors to either side, beyond what rates can be."""
    table = np.array([[1.0] * k + [0.0] * (40 - k) for k in (8, 20, 32)])
    low, high = t_interval([0.2, 0.5, 0.8])
    assert interval(measure(table)) == (max(0, low), min(1, high))
    assert interval(measure(table, rate=False)) == pytest.approx((low, high))
    assert told(measure(table), DRAWS)["interval"] == "crossed bootstrap + t over erasures"


def test_an_interval_ends_where_no_image_can_be() -> None:
    """Preservation 0.98, 0.99, 1.00: Student's over three is ±0.025, and 1 less a distance is never above 1."""
    kept = measure(np.array([[0.98] * 40, [0.99] * 40, [1.0] * 40]), rate=False)
    low, high = t_interval([0.98, 0.99, 1.0])
    assert high > 1.01
    assert interval(replace(kept, most=1.0)) == pytest.approx((low, 1.0))
    assert interval(kept) == pytest.approx((low, high))


def test_few_prompts_are_widened_to_wilsons() -> None:
    """All of 8 prompts on one erasure: the bootstrap has no width, Wilson's over prompts has."""
    one = measure(np.ones((1, 8)))
    assert interval(one) == wilson(8, 8)
    assert told(one, DRAWS)["interval"] == "bootstrap + Wilson"
    kept = measure(np.array([[0.8, 0.9, 1.0]]), rate=False)
    assert interval(kept) == pytest.approx(t_interval([0.8, 0.9, 1.0]))
    assert told(kept, DRAWS)["interval"] == "bootstrap + t over prompts"


def test_no_difference_among_many_prompts_is_not_certainty() -> None:
    assert interval(measure(np.zeros((1, 50)))) == wilson(0, 50)


def test_a_difference_is_paired_by_prompt() -> None:
    """What prompts share cancels: half of the prompts are lost by both, and one more by the second."""
    first = np.tile([1.0, 0.0], 30)
    second = first.copy()
    second[0] = 0.0
    found = difference("x", measure(first[None]), measure(second[None], method="other"), DRAWS)
    assert found.value == pytest.approx(1 / 60)
    low, high = found.at(0.95)
    assert (low, high) == pytest.approx((0, 4 / 60), abs=0.02)  # unpaired it would be ±0.18


def test_erasures_of_two_methods_are_no_pairs() -> None:
    """Welch: 0.2, 0.5, 0.8 less 0.5 thrice has the spread of the first alone; less themselves it has both's."""
    tables = [np.array([[1.0] * k + [0.0] * (40 - k) for k in ks]) for ks in ((8, 20, 32), (20, 20, 20))]
    varied, steady = (measure(table, method=name) for table, name in zip(tables, "ab", strict=True))
    t = t_interval([0.2, 0.5, 0.8])
    assert difference("x", varied, steady, DRAWS).at(0.95) == pytest.approx((t.low - 0.5, t.high - 0.5), abs=1e-9)
    low, high = difference("x", varied, replace(varied, method="b"), DRAWS).at(0.95)
    assert (low, high) == pytest.approx((-2.776 * 0.06**0.5, 2.776 * 0.06**0.5), abs=1e-3)  # 4 degrees, 2·0.09/3


def test_few_prompts_widen_a_difference_to_newcombes() -> None:
    found = difference("x", measure(np.ones((1, 8))), measure(np.zeros((1, 8)), method="b"), DRAWS)
    low, high = newcombe_difference((8, 8), (0, 8))
    assert found.at(0.95) == pytest.approx((low, high))


def test_p_value_is_where_the_interval_lets_go_of_zero() -> None:
    """An interval of 1 ± confidence/0.8 leaves 0 out below a confidence of 0.8, so p is 0.2."""
    assert p_value(lambda c: Interval(1 - c / 0.8, 1 + c / 0.8), least=1e-3) == pytest.approx(0.2, abs=1e-4)
    assert p_value(lambda c: Interval(-1, 1), least=1e-3) == pytest.approx(1, abs=1e-4)
    assert p_value(lambda c: Interval(1, 2), least=1e-3) == 1e-3


def test_p_values_are_adjusted_for_the_rivals() -> None:
    rng = np.random.default_rng(0)
    ours = measure((rng.random((1, 60)) < 0.95).astype(float))
    rivals = [measure((rng.random((1, 60)) < rate).astype(float), method=f"{rate}") for rate in (0.2, 0.8, 0.95)]
    rows = against_rivals([difference(one.method, ours, one, DRAWS) for one in rivals], DRAWS)
    assert rows[0]["p"] == pytest.approx(2 / 2000) and rows[0]["p_holm"] == pytest.approx(3 * 2 / 2000)
    assert rows[0]["low"] > 0 and rows[2]["p_holm"] > 0.3


def test_strengths_of_a_method_share_their_draws_and_methods_do_not() -> None:
    """Erasure 0 has 1 on all prompts and erasure 1 has 0, so a resample is the share of draws of erasure 0."""
    table = np.array([[1.0] * 20, [0.0] * 20])
    one, same, other = (measure(table, method=name).resampled(DRAWS) for name in ("a", "a", "b"))
    assert (one == same).all() and set(one) == {0.0, 0.5, 1.0}
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
