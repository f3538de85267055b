from __future__ import annotations

from pathlib import Path

import pytest

from duo.errors import UserError
from duo.recipe import AttackRow, load_recipe
from duo.red_team import budgets, chosen, red_team, with_baselines

QUICK = """
attack_images = 4
[score]
unrelated = 3
[references]
toybox-fire = "toybox-never-fire"
[random]
length = 3
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 6
[[attacks]]
row = "ring_a_bell"
name = "ring_a_bell"
prompts = "neutral"
images = 4
generations = 1
length = 4
[[attacks]]
row = "concept_inversion"
name = "concept_inversion"
prompts = "neutral"
images = 4
steps = 1
"""


@pytest.fixture
def quick(tmp_path: Path) -> str:
    (tmp_path / "quick.toml").write_text(QUICK)
    return str(tmp_path / "quick.toml")


def test_a_budget_lies_over_the_recipe(quick: str) -> None:
    recipe = red_team(load_recipe("toybox-fire"), budget=quick)
    assert (recipe.attack_images, recipe.score.unrelated, recipe.reference) == (4, 3, "toybox-never-fire")
    assert recipe.score.near_miss == load_recipe("toybox-fire").score.near_miss
    assert [row.row for row in recipe.attacks] == [
        "prompts", "ring_a_bell", "concept_inversion", "plain_neutral", "random_neutral_0"
    ]  # fmt: skip
    bell, inversion, plain, random = recipe.attacks[1:]
    assert bell.baselines == inversion.baselines == ("plain_neutral", "random_neutral_0")
    assert (plain.baseline, random.baseline, bell.baseline) == (True, True, False)
    assert (random.name, random.settings) == ("random_prompts", {"length": 3, "queries": 0})
    assert (plain.images, plain.prompts) == (4, "neutral")


def test_other_images_or_queries_have_baselines_of_their_own() -> None:
    rows = [
        AttackRow(row="a", name="ring_a_bell", prompts="neutral", images=4),
        AttackRow(row="b", name="ring_a_bell", prompts="neutral", images=6),
        AttackRow(row="c", name="sneaky_prompt", prompts="neutral", images=6, settings={"queries": 9}),
    ]
    found = {row.row: row for row in with_baselines(rows, {})}
    assert found["a"].baselines == ("plain_neutral", "random_neutral_0")
    assert found["b"].baselines == ("plain_neutral_2", "random_neutral_0_2")
    assert found["c"].baselines == ("plain_neutral_2", "random_neutral_9")
    assert found["random_neutral_9"].settings["queries"] == 9


def test_a_row_that_is_there_already_is_its_baseline() -> None:
    plain = AttackRow(row="prompts", name="prompts", prompts="neutral", images=4)
    rows = with_baselines([plain, AttackRow(row="a", name="ring_a_bell", prompts="neutral", images=4)], {})
    assert rows[1].baselines[0] == "prompts"
    assert not rows[0].baseline


def test_attacks_are_chosen_by_name_or_row(quick: str) -> None:
    recipe = red_team(load_recipe("toybox-fire"), budget=quick, attacks=["ring_a_bell"])
    assert [row.row for row in recipe.attacks] == ["prompts", "ring_a_bell", "plain_neutral", "random_neutral_0"]
    with pytest.raises(UserError, match=r"--attack: no attack here is called 'ring_a_bel'"):
        chosen(recipe.attacks, ["ring_a_bel"])


def test_bad_budgets(tmp_path: Path, quick: str) -> None:
    recipe = load_recipe("toybox-fire")
    with pytest.raises(UserError, match="--budget: the red team 'toybox' has no budget 'quik'"):
        red_team(recipe, budget="quik")
    with pytest.raises(UserError, match=r"cannot read .*none\.toml"):
        red_team(recipe, budget=str(tmp_path / "none.toml"))
    (tmp_path / "empty.toml").write_text("block = 2")
    with pytest.raises(UserError, match=r"empty.toml: attacks is missing"):
        red_team(recipe, budget=str(tmp_path / "empty.toml"))
    (tmp_path / "typo.toml").write_text(QUICK.replace("attack_images", "atack_images"))
    with pytest.raises(UserError, match=r"typo.toml has no field 'atack_images' \(did you mean 'attack_images'"):
        red_team(recipe, budget=str(tmp_path / "typo.toml"))


@pytest.mark.parametrize("team", ["toybox", "diffusion"])
def test_every_team_has_every_budget(team: str) -> None:
    assert set(budgets(team)) >= {"quick", "standard", "published"}


@pytest.mark.parametrize("budget", ["quick", "standard", "published"])
@pytest.mark.parametrize("name", ["toybox-fire", "sd14-nudity-beta500", "sdxl-nudity", "sd3-nudity", "flux-nudity"])
def test_every_shipped_recipe_takes_every_budget(name: str, budget: str) -> None:
    """Every attack is made, every set of prompts is one of the concept's, and nothing but baselines has no baseline."""
    from duo import plugins
    from duo.concept import load_concept

    recipe = red_team(load_recipe(name), budget=budget)
    concept = load_concept(recipe.concept)
    rows = {row.row: row for row in recipe.attacks}
    for row in recipe.attacks:
        row.make()
        assert concept.prompt_set(row.prompts)
        if row.name not in ("prompts", "random_prompts"):
            assert {rows[one].name for one in row.baselines} == {"prompts", "random_prompts"}
    tried = {row.name for row in recipe.attacks}
    assert tried == set(plugins.names("attacks")), "--attack all is all of them"


def test_no_attack_has_a_field_that_its_row_has() -> None:
    """A recipe's table holds both, side by side."""
    import dataclasses

    from duo import plugins
    from duo.recipe import ROW_FIELDS

    for name in plugins.names("attacks"):
        own = {field.name for field in dataclasses.fields(plugins.load("attacks", name))}
        assert not own & set(ROW_FIELDS), name


def test_an_attack_that_takes_another_rows_prompts_brings_it_along() -> None:
    recipe = red_team(load_recipe("toybox-fire"), budget="standard", attacks=["img2img_adversarial"])
    rows = [row.row for row in recipe.attacks if not row.baseline]
    assert rows == ["prompts", "ring_a_bell", "img2img_adversarial"]
