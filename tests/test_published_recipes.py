"""The shipped recipes for real models: what they hold must be what the authors' code ends up using."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from duo.concept import load_concept
from duo.families._flow import FlowProcess
from duo.methods.duo import Duo, published
from duo.recipe import Recipe, load_recipe, recipe_names

REAL = [name for name in recipe_names() if not name.startswith("toybox")]


def method(recipe: Recipe) -> Any:
    return recipe.method.make("methods", "method")


@pytest.mark.parametrize("name", REAL)
def test_it_names_its_concept_its_metrics_and_every_attack_that_there_is(name: str) -> None:
    recipe = load_recipe(name)
    used = method(recipe)
    assert isinstance(used, Duo) or not used.takes_pairs  # rivals are told words alone
    assert (recipe.score.preservation, recipe.score.adherence) == ("none", "none")
    assert {row.name for row in recipe.attacks} == {"prompts", "ring_a_bell", "concept_inversion"}
    concept = load_concept(recipe.concept)
    for row in recipe.attacks:
        row.make()
        assert concept.prompt_set(row.prompts)
    assert all(near.judge is not None for near in concept.near_miss.values())
    if used.takes_pairs:
        assert recipe.pairs.n >= recipe.method.settings["train_batch_size"]


@pytest.mark.parametrize("beta", [100, 250, 500, 1000, 2000])
def test_nudity_on_sd14_has_the_values_that_the_shorthands_become(beta: int) -> None:
    recipe = load_recipe(f"sd14-nudity-beta{beta}")
    used = method(recipe)
    assert {name: getattr(used, name) for name in published(beta)} == pytest.approx(published(beta))
    assert (used.max_train_steps, used.train_batch_size, used.rank, used.lora_alpha) == (1000, 4, 32, 32)
    assert (used.targets, used.timestep_range, used.pair_timesteps) == (("self_attention",), (0, 0.75), "independent")
    assert (used.prior_at, used.precondition_outputs, used.positive_penalty) == (1, False, 0)
    assert (recipe.pairs.n, recipe.concept, recipe.model) == (64, "nudity", "CompVis/stable-diffusion-v1-4")
    bell = next(row for row in recipe.attacks if row.row == "ring_a_bell").settings
    assert (bell["length"], bell["eta"], bell["population"], bell["generations"]) == (16, 3, 200, 3000)


def test_nudity_alone_is_the_row_of_beta_500() -> None:
    assert load_recipe("nudity") == load_recipe("sd14-nudity-beta500")


@pytest.mark.parametrize(("name", "pairs"), [("blood", 32), ("gun", 32), ("horror", 6), ("suffering", 32)])
def test_violence_is_four_recipes(name: str, pairs: int) -> None:
    recipe = load_recipe(f"sd14-violence-{name}")
    used = method(recipe)
    assert recipe.concept == f"violence-{name}"
    assert {key: getattr(used, key) for key in published(1000)} == pytest.approx(published(1000))
    assert (used.max_train_steps, recipe.pairs.n) == (500, pairs)
    bell = next(row for row in recipe.attacks if row.row == "ring_a_bell").settings
    assert (bell["length"], bell["eta"]) == (75, 5.5)


def test_sd3_weighs_the_prior_as_the_published_code_does_by_its_slip() -> None:
    """λ·σ² of the published row, at the σ that its last flow time has, is the λ of the mended one, at σ = 1."""
    ours, theirs = (method(load_recipe(name)) for name in ("sd3-nudity", "sd3-nudity-as-published"))
    assert {key: getattr(theirs, key) for key in published(500)} == pytest.approx(published(500, base_lr=3e-5))
    assert ours.precondition_outputs and theirs.precondition_outputs
    process = FlowProcess(shift=3.0, device=torch.device("cpu"))
    weights = []
    for used in (ours, theirs):
        _, t = process.terminal(torch.zeros(1, 2), at=used.prior_at)
        weights.append(used.prior_weight * float(process.x0_scale(t)) ** 2)
    assert weights[0] == 45
    assert weights[1] == pytest.approx(44.8, abs=0.05)  # 5e6 · (0.003/1.002)²
    low, high = (process.sigma(torch.tensor(one)).item() for one in theirs.timestep_range)
    assert (low, round(high, 3)) == (0.5, 1.0)  # the noisy end, as their reversed index has it
    assert ours.timestep_range == theirs.timestep_range
    differs = {key for key in vars(ours) if getattr(ours, key) != getattr(theirs, key)}
    assert differs == {"prior_weight", "prior_at"}


@pytest.mark.parametrize("name", ["sdxl-nudity", "flux-nudity", "sd3-nudity"])
def test_what_no_real_weights_have_seen_says_so(name: str) -> None:
    from duo.recipe import FOLDER

    assert "ntested on real" in (FOLDER / f"{name}.toml").read_text()


def test_the_page_names_recipes_that_there_are() -> None:
    page = (Path(__file__).parents[1] / "docs" / "erase-nudity.md").read_text()
    named = set(re.findall(r"^\s*(?:accelerate.* -m )?duo (?:run|pairs) ([\w-]+)(?= )", page, flags=re.MULTILINE))
    assert {"nudity", "sdxl-nudity", "sd3-nudity", "flux-nudity"} <= named
    assert named <= set(recipe_names())
    assert {name for name in REAL if f"`{name}`" not in page} <= {
        *(f"sd14-nudity-beta{beta}" for beta in (250, 1000, 2000)),
        *(f"sd14-violence-{part}" for part in ("gun", "horror", "suffering")),
    }
