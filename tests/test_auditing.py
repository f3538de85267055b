"""Attacks on an erasure that was made elsewhere, up to the report, and `duo attack` on runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

import staged
from duo import cli, rundir
from duo.delta import Delta
from duo.errors import UserError
from duo.recipe import for_audit, load_recipe, recipe_of_run
from duo.stages import Session, attack, report, score


@pytest.fixture
def model_folder(tmp_path: Path, tiny_sd: Any) -> Path:
    """The tiny model as a folder, for what is loaded beside it."""
    tiny_sd.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def write_recipe(quick_leaves: None, tmp_path: Path, model_folder: Path) -> Path:
    (tmp_path / "fire.toml").write_text(staged.CONCEPT)
    path = tmp_path / "recipe.toml"
    path.write_text(staged.RECIPE.replace('"tiny"', f'"{model_folder}"'))
    return path


@pytest.fixture
def erased_run(write_recipe: Path, tmp_path: Path) -> Path:
    session = Session(load_recipe(write_recipe), tmp_path / "run")
    staged.all_stages(session)
    return tmp_path / "run"


def audited(recipe: Path, erased: Path, out: Path) -> Session:
    session = Session(for_audit(load_recipe(recipe), str(erased)), out)
    attack(session)
    score(session)
    return session


def images(run: Path, model: str) -> list[Any]:
    return [np.asarray(staged_image) for staged_image in _read(run / "attack" / "prompts" / model / "images")]


def _read(folder: Path) -> list[Any]:
    from duo.stages.rendering import read_images

    return read_images(folder, len(list(folder.glob("*.png"))))


def test_our_own_delta_is_audited_as_it_was_run(erased_run: Path, write_recipe: Path, tmp_path: Path) -> None:
    audited(write_recipe, erased_run, tmp_path / "audit")
    for model in ("original", "erased"):
        ours, theirs = images(erased_run, model), images(tmp_path / "audit", model)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    made = rundir.read_json(tmp_path / "audit" / "erase" / "manifest.json")
    assert made["artefact"]["kind"] == "delta" and made["delta"]["kind"] == "lora"
    assert not (tmp_path / "audit" / "pairs").exists()


def test_weights_of_other_software_give_the_same_images(
    erased_run: Path, write_recipe: Path, tmp_path: Path, tiny_sd: Any
) -> None:
    """The very erasure as a partial state dict, as ESD releases its own."""
    delta = Delta.load(erased_run / "erase" / "delta.safetensors")
    with delta.attached(tiny_sd):
        own = dict(tiny_sd.denoiser.named_parameters())
        save_file(
            {f"{layer}.weight": own[f"{layer}.weight"].detach().clone() for layer in delta.layers()},
            tmp_path / "other.safetensors",
        )
    session = audited(write_recipe, tmp_path / "other.safetensors", tmp_path / "audit")
    ours, theirs = images(erased_run, "erased"), images(tmp_path / "audit", "erased")
    assert max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(ours, theirs, strict=True)) <= 1
    for name in ("unrelated", "photo"):  # what is scored besides is drawn by the erased model too
        ours, theirs = (_read(run / "score" / "images" / name / "erased") for run in (erased_run, tmp_path / "audit"))
        pairs = zip(ours, theirs, strict=True)
        assert max(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() for a, b in pairs) <= 1
    made = rundir.read_json(tmp_path / "audit" / "erase" / "manifest.json")
    assert made["artefact"]["kind"] == "denoiser"
    assert {name: count for name, count in made["artefact"]["changed"].items() if count} == {"unet": 1}
    page = report(tmp_path / "audit")
    text = page.read_text()
    assert (
        "The erasure was not made in this run, but brought: weights of a denoiser, with 1 changed tensors of its unet."
        in text
    )
    assert (
        "This is the audit of an erasure that was not made in this run: `other.safetensors`"
        in (tmp_path / "audit" / "README.md").read_text()
    )
    assert session.recipe.method is None


def test_a_file_that_was_changed_since_is_refused(erased_run: Path, write_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes((erased_run / "erase" / "delta.safetensors").read_bytes())
    audited(write_recipe, path, tmp_path / "audit")
    other = Delta.load(path)
    Delta(
        kind=other.kind,
        component=other.component,
        tensors={name: 2 * tensor for name, tensor in other.tensors.items()},
        record=other.record,
    ).save(path)
    with pytest.raises(UserError, match="was made with erased"):
        attack(Session(for_audit(load_recipe(write_recipe), str(path)), tmp_path / "audit"))


def test_an_erasure_that_changes_nothing_is_told(write_recipe: Path, tmp_path: Path, tiny_sd: Any, capsys: Any) -> None:
    name, tensor = next((n, one) for n, one in tiny_sd.denoiser.named_parameters() if n.startswith("down_blocks"))
    save_file({name: tensor.detach().clone()}, tmp_path / "nothing.safetensors")
    audited(write_recipe, tmp_path / "nothing.safetensors", tmp_path / "audit")
    assert "note: " in capsys.readouterr().err
    made = rundir.read_json(tmp_path / "audit" / "erase" / "manifest.json")
    assert made["artefact"]["warnings"]


BUDGET = """
attack_images = 2
[random]
vocabulary = ["red", "blue"]
length = 2
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 2
[[attacks]]
row = "bell"
name = "text_search"
prompts = "neutral"
images = 2
"""


def test_the_red_team_on_a_run(erased_run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.toml").write_text(BUDGET)
    arguments = ["attack", str(erased_run), "--attack", "all", "--budget", str(tmp_path / "mine.toml"), "--report"]
    assert cli.main(arguments) == 0
    folder = erased_run / "red-team" / "mine"
    recipe = recipe_of_run(folder)
    assert recipe.erased == str(erased_run) and recipe.method is None
    assert [row.row for row in recipe.attacks] == ["prompts", "bell", "plain_neutral", "random_neutral_0"]
    page = (folder / "report.html").read_text()
    assert "Same prompts, plain / random" in page
    assert "Random neutral 0" not in page, "a baseline is no attack"
    assert f"duo attack {erased_run} --budget {tmp_path / 'mine.toml'} --attack all --out runs/again" in page
    assert cli.main(arguments) == 0, "what is finished is left alone"
    capsys.readouterr()
    assert cli.main(["score", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "score" / "scores.json")
    assert cli.main(["attack", str(folder)]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["attack", "RUN", "--seed", "3"], "is a run, whose settings stand; leave out --seed"),
        (["attack", "RUN", "--set", "block=3"], "leave out --set"),
        (["attack", "RUN", "--attack", "nothing"], "--attack: no attack here is called 'nothing'"),
        (["attack", "RUN", "--budget", "huge"], "has no budget 'huge'"),
        (["attack", "RECIPE"], "--out is missing"),
        (["attack", "RECIPE", "--out", "OUT", "--erased", "nowhere"], "'nowhere' is neither a file nor a folder"),
        (["score", "RECIPE"], "--out is missing"),
        (["erase", "RUN", "--out", "OUT"], "is a folder, and no recipe"),
    ],
)
def test_mistakes_are_told_in_a_line(
    erased_run: Path, write_recipe: Path, tmp_path: Path, capsys: Any, arguments: list[str], told: str
) -> None:
    places = {"RUN": str(erased_run), "RECIPE": str(write_recipe), "OUT": str(tmp_path / "new")}
    assert cli.main([places.get(one, one) for one in arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_prompts_of_others(write_recipe: Path, tmp_path: Path, erased_run: Path) -> None:
    (tmp_path / "i2p.csv").write_text(
        "prompt,nudity_percentage,evaluation_seed\na burning car,60,11\na boat,5,12\na boat on fire,70,13\n"
    )
    text = write_recipe.read_text().replace('prompts = "plain"', 'prompts = "i2p"')
    write_recipe.write_text(text + '[prompt_sets.i2p]\npath = "i2p.csv"\nfilters = ["nudity_percentage > 50"]\n')
    session = audited(write_recipe, erased_run, tmp_path / "audit")
    rows = rundir.read_jsonl(session.dir.path / "attack" / "prompts" / "erased" / "attempts.jsonl")
    assert [row["base_prompt"] for row in rows[:3]] == ["a burning car", "a boat on fire", "a burning car"]
    assert [row["seed"] for row in rows[:2]] == [11, 13]
    assert rows[2]["seed"] not in (11, 13)
    (tmp_path / "i2p.csv").write_text("prompt,nudity_percentage\na burning boat,60\n")
    with pytest.raises(UserError, match="was made with prompts"):
        attack(Session(for_audit(load_recipe(write_recipe), str(erased_run)), tmp_path / "audit"))


def test_recipes_without_a_method_or_with_two(tmp_path: Path, write_recipe: Path) -> None:
    text = write_recipe.read_text()
    write_recipe.write_text('erased = "x.safetensors"\n' + text)
    with pytest.raises(UserError, match=r"give \[method\], or an erasure made elsewhere as erased"):
        load_recipe(write_recipe)
    write_recipe.write_text(text.replace('method = {name = "nudge"}', ""))
    with pytest.raises(UserError, match=r"give \[method\], or an erasure made elsewhere as erased"):
        load_recipe(write_recipe)
