"""Recipe files and their overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from duo.errors import UserError
from duo.fields import as_table, build
from duo.recipe import Recipe, load_recipe, recipe_names

RECIPE = """
concept = "small-fire.toml"
model = "toybox"
seed = 3
[sampling]
num_inference_steps = 2
[pairs]
n = 4
[method]
name = "duo"
beta = 20.0
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 4
[[attacks]]
row = "bell"
name = "ring_a_bell"
prompts = "plain"
generations = 50
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.concept == str(path.parent / "small-fire.toml")
    assert recipe.sampling.num_inference_steps == 2
    assert recipe.method.settings == {"beta": 20.0}
    assert [row.row for row in recipe.attacks] == ["prompts", "bell"]
    assert recipe.attacks[1].settings == {"generations": 50}


def test_a_recipe_survives_its_manifest(path: Path) -> None:
    recipe = load_recipe(path)
    assert build(Recipe, as_table(recipe), "run.json:") == recipe


def test_overrides_reach_every_level(path: Path) -> None:
    recipe = load_recipe(
        path,
        overrides=[
            "method.beta=5",
            "attacks.bell.generations=7",
            "sampling.scheduler=DDIMScheduler",
            "score.near_miss=2",
        ],
        seed=9,
    )
    assert recipe.method.settings["beta"] == 5
    assert recipe.attacks[1].settings["generations"] == 7
    assert recipe.sampling.scheduler == "DDIMScheduler"
    assert recipe.score.near_miss == 2
    assert recipe.seed == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.nn=3", r"small\.toml: pairs has no field 'nn'"),
        ("pairs.n=many", r"small\.toml: pairs\.n is 'many', expected an integer"),
        ("pairs.n=0", r"small\.toml: pairs: n is 0, expected at least 1"),
        ("pears.n=3", r"small\.toml has no field 'pears' \(did you mean 'pairs'\?\)"),
        ("attacks.bel.generations=3", r"no attack has the row 'bel' \(did you mean 'bell'\?\)"),
        ("attacks.bell=3", r"attacks\.bell is a whole attack; name a field of it"),
        ("attacks.bell.row=prompts", "two attacks have the row name 'prompts'"),
        ("attacks.bell.row=../x", r"attacks\[1\]: row is '\.\./x'"),
        ("seed.x=3", "seed is 3, which has no fields"),
        ("method.beta", "expected field=value"),
        ("pairs.strength=0.4", "less than one step"),
        ("pairs.guidance_scale=-1", "guidance_scale is -1.0, expected at least 0"),
        ("sampling.num_inference_steps=0", "num_inference_steps is 0, expected at least 1"),
        ("sampling.guidance_scale=-1", "guidance_scale is -1.0, expected at least 0"),
        ("erase_seed=-1", "erase_seed is -1, expected at least 0"),
    ],
)
def test_a_wrong_override_is_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(path, overrides=[override])


def test_a_field_of_the_row_is_meant_where_the_attack_has_none_of_that_name(path: Path) -> None:
    recipe = load_recipe(path, overrides=["attacks.prompts.imges=3"])
    with pytest.raises(UserError, match=r"attacks\.prompts has no field 'imges' \(did you mean 'images'\?\)"):
        recipe.attacks[0].make()


def test_a_wrong_set_of_a_file_names_the_file(path: Path) -> None:
    other = path.with_name("other.toml")
    other.write_text('extends = "small.toml"\nset = ["attacks.bel.images=3"]')
    with pytest.raises(UserError, match=r"other\.toml: set 'attacks\.bel\.images=3': no attack has the row 'bel'"):
        load_recipe(other)


def test_another_method_takes_nothing_over_from_the_recipe_that_is_extended(path: Path) -> None:
    other = path.with_name("other.toml")
    other.write_text('extends = "small.toml"\n[method]\nname = "esd"\neta = 2.0')
    assert load_recipe(other).method.table() == {"name": "esd", "eta": 2.0}
    assert load_recipe(other).sampling == load_recipe(path).sampling
    for same in ('name = "duo"\n', ""):
        other.write_text(f'extends = "small.toml"\n[method]\n{same}rank = 2')
        assert load_recipe(other).method.table() == {"name": "duo", "beta": 20.0, "rank": 2}


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r"runs/none is neither a recipe, .* nor a folder"):
        load_recipe("runs/none")
    with pytest.raises(UserError, match="no recipe is called 'no-such-recipe'"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).attacks
