"""The shipped recipes for real models: what they hold must be what the authors' code ends up using."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duo.concept import load_concept
from duo.errors import UserError
from duo.families._flow import FlowProcess
from duo.judges import _clip
from duo.methods.duo import Duo, published
from duo.methods.fmn import Fmn
from duo.metrics import _clip_score
from duo.metrics.lpips import Lpips
from duo.recipe import FOLDER, Recipe, load_recipe, recipe_names
from duo.stages.session import Session

REAL = [name for name in recipe_names() if not name.startswith("toybox")]


def method(recipe: Recipe) -> Any:
    return recipe.method.make("methods", "method")


@pytest.mark.parametrize("name", REAL)
def test_it_names_its_concept_its_metrics_and_every_attack_that_there_is(name: str) -> None:
    recipe = load_recipe(name)
    used = method(recipe)
    assert isinstance(used, Duo) or not used.takes_pairs  # rivals are told words alone
    assert (recipe.score.preservation, recipe.score.adherence) == ("lpips", "none")
    assert (recipe.score.agreement, recipe.score.captions) == ("clip_score", "none")
    assert recipe.score.quality == ("fid", "kid", "clip_score")  # for whoever gives captions
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
    assert "ntested on real" in (FOLDER / f"{name}.toml").read_text()


IMAGENETTE = (
    "Cassette Player",
    "Chain Saw",
    "Church",
    "Gas Pump",
    "Tench",
    "Garbage Truck",
    "English Springer",
    "Golf Ball",
    "Parachute",
    "French Horn",
)
ESD = {  # of the paper's code: the defaults of train-scripts/train-esd.py
    "eta": 1,
    "prompts": "words",
    "base": "unconditional",
    "trajectory": "student",
    "guidance_scale": 3,
    "sampling_steps": 50,
    "learning_rate": 1e-5,
    "max_train_steps": 1000,
    "train_batch_size": 1,
}
CA = {  # of diffusers/README.md for styles and objects, on two GPUs, with what `--scale_lr` makes of the rate
    "objective": "model",
    "parameters": "cross_attention",
    "prompts": "prompts",
    "prior_weight": 0,
    "images": 1000,
    "guidance_scale": 6,
    "negative_words": False,
    "horizontal_flip": True,
    "learning_rate": 2e-6 * 4 * 2,
    "max_train_steps": 100,
    "train_batch_size": 4 * 2,
}
UCE = {"technique": "replace", "regularization": 0.5, "erase_scale": 1, "preserve_scale": 1}
# recipe → the words that it erases, and what its authors published
OBJECTS_AND_STYLES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sd14-style-van-gogh-esd": (("Van Gogh",), {**ESD, "variant": "x"}),
    "sd14-object-church-esd": (("church",), {**ESD, "variant": "u"}),
    "sd14-style-van-gogh-ca": (("Van Gogh",), CA),
    "sd14-object-snoopy-ca": (("snoopy",), CA),
    "sd14-style-van-gogh-uce": (
        ("Van Gogh",),
        {
            **UCE,
            "concepts": ("Van Gogh", "Picasso"),
            "anchor": "art",
            "tokens": "last",
            "preserve": ("Monet", "Rembrandt", "Warhol"),
            "preserve_empty": False,
            "preserve_tokens": "last",
        },
    ),
    "sd14-object-church-uce": (
        ("church",),
        {
            **UCE,
            "concepts": IMAGENETTE,
            "anchor": "",
            "tokens": "from_last",
            "preserve": (),
            "preserve_empty": True,
            "preserve_tokens": "all",
        },
    ),
    "sd14-object-snoopy-spm": (
        ("snoopy",),
        {
            "prompts": "words",
            "neutral": "empty",
            "gate": "prompt",
            "eta": 1,
            "anchor_weight": 1000,
            "anchors": 4,
            "rank": 1,
            "lora_alpha": 1,
            "grid_steps": 30,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine_with_restarts",
            "lr_warmup_steps": 500,
            "lr_num_cycles": 3,
            "max_train_steps": 3000,
            "train_batch_size": 1,
        },
    ),
    "sd14-person-brad-pitt-sa": (
        ("brad pitt",),
        {
            "concept_text": "words",
            "parameters": "full",
            "surrogate_images": 1000,
            "replay_images": 4999,
            "fisher_samples": 4999,
            "fisher_timesteps": 1000,
            "replay_weight": 1,
            "ewc_weight": 50,
            "learning_rate": 1e-5 * 4 * 4,
            "max_train_steps": 200 * 63,  # epochs of 1000 pairs, 16 a step
            "train_batch_size": 4 * 4,
        },
    ),
    "sd14-person-elon-musk-fmn": (
        ("elon musk",),
        {
            "captions": "template",
            "template": "a photo of {}",
            "inversion_steps": 500,
            "inversion_vectors": 4,
            "inversion_learning_rate": 1e-3,
            "inversion_weight_decay": 0.1,
            "inversion_norm": 0.4,
            "use_pooler": True,
            "parameters": "full",
            "learning_rate": 2e-6,
            "max_train_steps": 35,
            "train_batch_size": 1,
            "weight_decay": 1e-2,
            "max_grad_norm": 1,
        },
    ),
}


def test_every_recipe_of_an_object_a_style_or_a_person_is_in_the_table() -> None:
    kinds = ("sd14-object-", "sd14-style-", "sd14-person-")
    assert set(OBJECTS_AND_STYLES) == {name for name in REAL if name.startswith(kinds)}


@pytest.mark.parametrize("name", OBJECTS_AND_STYLES)
def test_objects_and_styles_have_the_published_values(name: str) -> None:
    recipe, (words, values) = load_recipe(name), OBJECTS_AND_STYLES[name]
    used = method(recipe)
    assert {field: getattr(used, field) for field in values} == {
        field: pytest.approx(value) if isinstance(value, float) else value for field, value in values.items()
    }
    assert name == f"sd14-{recipe.concept}-{recipe.method.name}"
    assert recipe.model == "CompVis/stable-diffusion-v1-4"
    assert load_concept(recipe.concept).words == words
    text = (FOLDER / f"{name}.toml").read_text()
    assert "ntested on real" in text.replace("\n# ", " ")
    assert "github.com/" in text


def test_the_pairs_are_in_the_form_of_concept_ablations_prompts() -> None:
    """Objects: the target in the anchor's place. Styles: one of three places, two of which are the same."""
    snoopy, van_gogh = (load_concept(name).targets("prompts") for name in ("object-snoopy", "style-van-gogh"))
    assert all(target == anchor.replace("a dog", "snoopy") != anchor for target, anchor in snoopy)
    after = [target == f"{anchor}, in the style of Van Gogh" for target, anchor in van_gogh]
    before = [target == f"in Van Gogh's style, {anchor}" for target, anchor in van_gogh]
    assert (sum(after), sum(before), len(van_gogh)) == (8, 16, 24)


def test_the_template_of_a_likeness_is_what_draws_it() -> None:
    used = method(load_recipe("sd14-person-elon-musk-fmn"))
    assert isinstance(used, Fmn)
    concept = load_concept("person-elon-musk")
    assert [used.template.replace("{}", word) for word in concept.words] == list(concept.pairs.unsafe)


@pytest.mark.parametrize("name", OBJECTS_AND_STYLES)
@pytest.mark.parametrize("validation", [False, True])
def test_a_session_of_each_begins_without_weights(
    name: str, validation: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a run checks before it loads a model, and its plan; the CLIPs and AlexNet are not asked for."""
    monkeypatch.setattr(_clip, "find_clip", lambda source, where: None)
    monkeypatch.setattr(_clip_score, "find_clip", lambda source, where, **told: None)
    monkeypatch.setattr(Lpips, "check", lambda self: None)
    session = Session(replace(load_recipe(name), validation=validation), tmp_path / "run")
    assert (session.judge.network == session.curator.network) == validation  # values are not chosen by the judge
    assert set(session.near_miss_judges) == set(session.near_misses)
    assert session.method.passes(0)
    assert session.prompts("held_out_words")
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_not_there_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_clip, "find_clip", lambda source, where: None)
    monkeypatch.setattr(_clip_score, "find_clip", lambda source, where, **told: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    recipe = load_recipe("sd14-object-church-esd")
    with pytest.raises(UserError) as caught:
        Session(recipe, tmp_path / "run")
    told = str(caught.value)
    assert told.startswith("score.preservation is 'lpips': the AlexNet of LPIPS is not on this machine: put ")
    assert "alexnet-owt-7be5be79.pth" in told and str(tmp_path / "torch" / "hub" / "checkpoints") in told
    assert "\n" not in told and not (tmp_path / "run").exists()
    without = load_recipe("sd14-object-church-esd", overrides=["score.preservation=none"])
    assert Session(without, tmp_path / "run").twins == 0


def test_the_page_names_recipes_that_there_are() -> None:
    page = (Path(__file__).parents[1] / "docs" / "erase-nudity.md").read_text()
    named = set(re.findall(r"^\s*(?:accelerate.* -m )?duo (?:run|pairs) ([\w-]+)(?= )", page, flags=re.MULTILINE))
    assert {"nudity", "sdxl-nudity", "sd3-nudity", "flux-nudity"} <= named
    assert named <= set(recipe_names())
    assert {name for name in REAL if f"`{name}`" not in page} <= {
        *(f"sd14-nudity-beta{beta}" for beta in (250, 1000, 2000)),
        *(f"sd14-violence-{part}" for part in ("gun", "horror", "suffering")),
    }
