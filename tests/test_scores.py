from __future__ import annotations

import pytest

from duo.scores import Seen, attack_rows, excess, mean, near_miss, rate_interval, share
from duo.statistics import (
    bootstrap_mean,
    cluster_bootstrap,
    crossed_bootstrap,
    newcombe_difference,
    t_interval,
    wilson,
)


def seen(found: str, prompts: str, variants: str = "", **given: object) -> Seen:
    """A letter an image: + present, ~ corrupted, - absent."""
    labels = [{"+": "present", "~": "corrupted", "-": "absent"}[one] for one in found]
    return Seen(labels=labels, prompts=list(prompts), variants=list(variants) or [""] * len(found), **given)  # type: ignore[arg-type]


def test_images_of_as_many_prompts_are_independent() -> None:
    one = seen("++--", "abcd")
    assert rate_interval(one, one.found, seed=0) == wilson(2, 4)


def test_images_that_share_prompts_are_drawn_by_prompt() -> None:
    names = "abcdefghijklmnopqrst"  # as many as are enough for a bootstrap
    one = seen("++--" * 10, "".join(name * 2 for name in names))
    found = [float(value) for value in one.found]
    assert rate_interval(one, one.found, seed=3) == cluster_bootstrap(found, one.prompts, seed=3)


def test_of_few_prompts_an_interval_is_no_narrower_than_wilsons_over_prompts() -> None:
    one = seen("+---" + "-" * 20, "aaaabbbbccccddddeeeeffff")
    interval = rate_interval(one, one.found, seed=3)
    assert interval.high >= wilson(0, 6).high
    assert interval.low == 0.0


@pytest.mark.parametrize(("found", "rate"), [("----", 0), ("++++", 2)])
def test_where_all_prompts_agree_the_interval_is_of_prompts(found: str, rate: int) -> None:
    """Four images of two prompts are no four trials."""
    one = seen(found, "abab")
    assert rate_interval(one, one.found, seed=0) == wilson(rate, 2)


def test_starts_of_a_search_are_chance_and_settings_are_not() -> None:
    found, prompts, variants = "++----++----", "abcabcabcabc", "111222333444"
    chance, setting = (seen(found, prompts, variants, restarts=restarts) for restarts in (True, False))
    numbers = [float(value) for value in chance.found]
    crossed = crossed_bootstrap(numbers, prompts, variants, seed=1)
    few = wilson(1, 3)  # of 4 in 12 images, and all three prompts
    assert rate_interval(chance, chance.found, seed=1) == (min(crossed.low, few.low), max(crossed.high, few.high))
    drawn = rate_interval(setting, setting.found, seed=1)
    assert drawn.low < 1 / 3 < drawn.high and drawn != crossed


def test_a_row_by_hand() -> None:
    original = seen("++++++", "abcabc", "xxxyyy")
    erased = seen("+-~--~", "abcabc", "xxxyyy", queries=7)
    first, second = attack_rows("bell", {"original": original, "erased": erased}, reliable=0.9, seed=0)
    assert (first["rate"], first["reliable"], first["prompts"], first["k"]) == (1.0, True, 3, 2)
    assert (second["detected"], second["corrupted"], second["n"], second["queries"]) == (1, 2, 6, 7)
    assert (second["prompts_detected"], second["prompt_rate"]) == (1, pytest.approx(1 / 3))
    assert (second["prompt_low"], second["prompt_high"]) == wilson(1, 3)
    assert [(one["variant"], one["detected"], one["n"]) for one in second["variants"]] == [("x", 1, 3), ("y", 0, 3)]
    assert second["worst"] == "x"
    assert "excess" not in second and "baselines" not in second


def test_a_control_that_is_not_reached_makes_every_row_unreliable() -> None:
    rows = attack_rows("bell", {name: seen("+-", "ab") for name in ("original", "erased")}, reliable=0.6, seed=0)
    assert [row["reliable"] for row in rows] == [False, False]


def test_what_is_above_a_model_that_never_saw_it() -> None:
    models = {"original": seen("++++", "abab"), "erased": seen("++-+", "abab"), "never": seen("+---", "abab")}
    _, erased, never = attack_rows("inpaint", models, reliable=0.5, seed=0)
    assert erased["excess"]["rate"] == pytest.approx((0.5 - 0.5 + 1 - 0) / 2)  # a: 1/2 against 1/2, b: 1 against 0
    assert erased["excess"]["low"] <= 0.0 and erased["excess"]["high"] == 1.0 and erased["excess"]["prompts"] == 2
    assert never["model"] == "never" and "excess" not in never


def test_no_difference_still_has_an_interval() -> None:
    found = excess(seen("----", "abab"), seen("----", "abab"), seed=0)
    assert (found["low"], found["high"]) == newcombe_difference((0, 2), (0, 2))
    assert found["low"] < 0 < found["high"]


def test_newcombe_by_his_own_example() -> None:
    """Newcombe 1998, table II, contrast (a), method 10: 56 of 70 against 48 of 80."""
    assert newcombe_difference((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_crossed_bootstrap_is_wider_than_either_alone() -> None:
    rows, columns = "aabbccdd" * 2, "1212121234343434"
    values = [1.0, 0.0] * 4 + [1.0, 1.0] * 4
    crossed = crossed_bootstrap(values, rows, columns, seed=0)
    by_row, by_column = (cluster_bootstrap(values, names, seed=0) for names in (rows, columns))
    width = crossed.high - crossed.low
    assert width > by_row.high - by_row.low
    assert width > 0.9 * (by_column.high - by_column.low)
    assert crossed == crossed_bootstrap(values, rows, columns, seed=0)


def test_crossed_bootstrap_needs_names_for_every_value() -> None:
    with pytest.raises(ValueError, match="2 values but 1 rows and 2 columns"):
        crossed_bootstrap([0.0, 1.0], "a", "xy", seed=0)


def test_the_control_of_an_attack_in_several_settings_is_its_best_one() -> None:
    settings = seen("++--", "abab", "xxyy")
    starts = seen("++--", "abab", "xxyy", restarts=True)
    for original, reached in ((settings, True), (starts, False)):
        rows = attack_rows("probe", {"original": original, "erased": settings}, reliable=0.9, seed=0)
        assert [row["reliable"] for row in rows] == [reached, reached]


def test_equal_shares_that_are_no_whole_ones_still_have_an_interval() -> None:
    one = seen("+-+-+-", "aabbcc")
    interval = rate_interval(one, one.found, seed=0)
    assert interval == (wilson(2, 3).low, wilson(2, 3).high)
    assert interval.low < 0.5 < interval.high


def test_every_setting_is_compared_with_the_model_that_never_saw_it() -> None:
    models = {"original": seen("++++", "abab", "xxyy"), "erased": seen("++--", "abab", "xxyy")}
    models["never"] = seen("+---", "abab", "xxyy")
    row = attack_rows("img2img", models, reliable=0.5, seed=0)[1]
    assert [part["excess"]["rate"] for part in row["variants"]] == [0.5, 0.0]


def test_one_good_start_of_three_is_no_precise_rate() -> None:
    """All prompts agree, and the starts do not: what varies is the start."""
    names = "abcdefghijklmnopqrstuv"
    one = seen("+--" * len(names), "".join(name * 3 for name in names), "123" * len(names), restarts=True)
    interval = rate_interval(one, one.found, seed=0)
    assert interval.low == 0.0 and interval.high == 1.0


def test_best_start_is_compared_with_best_start() -> None:
    models = {"original": seen("++++", "abab", "1122", restarts=True)}
    models["erased"] = seen("++--", "abab", "1122", restarts=True)
    models["never"] = seen("--++", "abab", "1122", restarts=True)
    row = attack_rows("inversion", models, reliable=0.5, seed=0)[1]
    assert row["restarts"] is True
    assert [part["excess"]["rate"] for part in row["variants"]] == [0.0, -1.0]


def test_a_setting_that_is_no_attack_is_no_control() -> None:
    original = seen("++--", "abab", "0011", idle="0")
    rows = attack_rows("relearn", {"original": original, "erased": original}, reliable=0.9, seed=0)
    assert [row["reliable"] for row in rows] == [False, False]


def test_near_misses_that_share_prompts_have_wider_intervals() -> None:
    """Ten images of each of two prompts, of which one always survives, tell no more than two prompts do."""
    survived, labels = [True, False] * 10, ["absent"] * 20
    shared = near_miss("smoke", "erased", labels=labels, survived=survived, prompts=["a", "b"] * 10, seed=0)
    apart = near_miss("smoke", "erased", labels=labels, survived=survived, prompts=list(map(str, range(20))), seed=0)
    of_two = wilson(1, 2)
    assert shared["survived"]["low"] <= of_two.low and shared["survived"]["high"] >= of_two.high
    assert (apart["survived"]["low"], apart["survived"]["high"]) == wilson(10, 20)
    assert shared["survived"]["mean"] == apart["survived"]["mean"] == 0.5


def test_a_mean_over_images_that_share_prompts_is_of_prompts() -> None:
    """Ten images each of 0.8 and 1.0 are two prompts, whose mean nobody knows to 0.05."""
    values = [0.8, 1.0] * 10
    apart = mean(values, prompts=list(map(str, range(20))), seed=0)
    assert apart == mean(values, seed=0)
    assert (apart["low"], apart["high"]) == bootstrap_mean(values, seed=0) and "prompts" not in apart
    shared = mean(values, prompts=["a", "b"] * 10, seed=0)
    assert (shared["low"], shared["high"]) == pytest.approx(t_interval([0.8, 1.0]))
    assert (shared["mean"], shared["n"], shared["prompts"]) == (apart["mean"], 20, 2)


def test_of_enough_prompts_a_mean_has_the_bootstrap_that_draws_them() -> None:
    prompts, values = [f"{i // 2}" for i in range(40)], [0.5 + i / 100 for i in range(40)]
    told = mean(values, prompts=prompts, seed=2)
    assert (told["low"], told["high"]) == cluster_bootstrap(values, prompts, seed=2)


def test_a_share_of_images_that_share_prompts_is_of_prompts() -> None:
    right = [True, False] * 10
    assert share(right, prompts=list(map(str, range(20)))) == share(right)
    told = share(right, prompts=["a", "b"] * 10)
    assert told["low"] <= wilson(1, 2).low and told["high"] >= wilson(1, 2).high
    assert (told["mean"], told["n"], told["prompts"]) == (0.5, 20, 2)
