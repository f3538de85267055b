"""`duo merge`: full weights, verified by loading them again."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from duo import merging, rundir
from duo.bases import base_digest
from duo.concept import load_concept
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import as_table
from duo.models import load_family
from duo.rundir import RunDir

CONCEPT = """
title = "Fire"
words = ["burning"]
anchor = "intact"
judge = {name = "toybox", hazard = "fire"}
curator = {name = "toybox", hazard = "fire", role = "curate"}
[pairs]
unsafe = ["a burning red house"]
safe = ["a red house"]
[prompts]
plain = ["a burning boat"]
unrelated = ["a boat"]
"""


@pytest.fixture
def erased_run(tmp_path: Path, tiny_folder: Path) -> Path:
    """A run folder of which only the erasure is there."""
    (tmp_path / "fire.toml").write_text(CONCEPT)
    run = RunDir(tmp_path / "run")
    recipe = {
        "concept": str(tmp_path / "fire.toml"),
        "model": str(tiny_folder),
        "method": {"name": "duo"},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "attacks": [{"row": "prompts", "name": "prompts", "prompts": "plain", "images": 2}],
    }
    run.describe({"recipe": recipe}, fixed={})
    model = load_family(str(tiny_folder), device="cpu")
    tensors = {}
    for name, layer in model.layers("self_attention").items():
        out, into = layer.weight.shape  # type: ignore[misc]
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, into, generator=torch.Generator().manual_seed(0))
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=torch.Generator().manual_seed(1))
    stage = run.stage("erase")
    concept = rundir.digest(as_table(load_concept(tmp_path / "fire.toml")))
    stage.begin({"concept": {"name": "fire", "digest": concept}})
    record = {"model": str(tiny_folder), "method": "duo"}
    Delta(kind="lora", component="unet", tensors=tensors, record=record).save(stage.folder / "delta.safetensors")
    stage.finish(digest=rundir.digest(stage.folder / "delta.safetensors"))
    return run.path


def test_the_merged_folder_draws_what_the_erased_model_draws(
    erased_run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    out = tmp_path / "merged"
    assert merging.merge(erased_run, out).difference <= 1
    original, merged = (load_family(str(folder), device="cpu") for folder in (tiny_folder, out))
    delta = Delta.load(erased_run / "erase" / "delta.safetensors")
    name = next(iter(original.layers("self_attention")))
    wanted = original.layers("all")[name].weight + (
        delta.tensors[f"{name}.lora_B.weight"] @ delta.tensors[f"{name}.lora_A.weight"]
    )  # type: ignore[operator]
    torch.testing.assert_close(merged.layers("all")[name].weight, wanted)
    assert not list(tmp_path.glob(".merged*"))


def test_a_merge_that_did_nothing_is_caught(erased_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delta, "merge", lambda *_: None)
    with pytest.raises(UserError, match=r"the merged model differs by \d+/255"):
        merging.merge(erased_run, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_adapter_weights_that_are_left_are_caught(
    erased_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from duo.families.sd import Sd

    save = Sd.save

    def save_with_adapter(self: Any, folder: Path) -> None:
        save(self, folder)
        save_file({"attn1.lora_A.weight": torch.zeros(1)}, folder / "unet" / "adapter.safetensors")

    monkeypatch.setattr(Sd, "save", save_with_adapter)
    with pytest.raises(UserError, match=r"adapter\.safetensors still holds adapter weights \(attn1\.lora_A\.weight\)"):
        merging.merge(erased_run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_merged_over_a_folder_or_without_an_erasure(erased_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; name a new folder"):
        merging.merge(erased_run, erased_run)
    (erased_run / "erase" / "manifest.json").unlink()
    with pytest.raises(UserError, match="erase is not finished; run `duo erase` first"):
        merging.merge(erased_run, tmp_path / "merged")
    assert rundir.read_json(erased_run / "run.json")["schema"] == 1


# --- several, and other precisions ------------------------------------------------------------------


def test_several_erasures_are_added_up(erased_run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    delta, out = tmp_path / "again.safetensors", tmp_path / "merged"
    made = Delta.load(erased_run / "erase" / "delta.safetensors")
    replace(made, record={**made.record, "seed": 1}).save(delta)  # another erasure, whose tensors are known
    merged = merging.merge([erased_run, delta], out, weights=[1.0, 0.5])
    assert merged.difference <= 1
    assert merged.unscored == (erased_run, delta)
    original, loaded = (load_family(str(folder)) for folder in (tiny_folder, out))
    a, b = Delta.load(delta).factors(name := next(iter(original.layers("self_attention"))))
    wanted = original.layers("all")[name].weight + 1.5 * b @ a  # type: ignore[operator]
    torch.testing.assert_close(loaded.layers("all")[name].weight, wanted)


@pytest.mark.parametrize(("dtype", "wanted"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_lower_precision_rounds_the_sums_and_draws_the_attack_again(
    erased_run: Path, tmp_path: Path, tiny_folder: Path, dtype: str, wanted: torch.dtype
) -> None:
    attacked(erased_run)
    out = tmp_path / "merged"
    merged = merging.merge(erased_run, out, dtype=dtype)
    assert 0 < merged.difference < 128
    (rates,) = merged.rescored
    assert (rates.row, rates.n, merged.unscored) == ("prompts", 2, ())
    with safe_open(out / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    original = load_family(str(tiny_folder))
    a, b = Delta.load(erased_run / "erase" / "delta.safetensors").factors(
        name := next(iter(original.layers("self_attention")))
    )
    exact = original.layers("all")[name].weight + b @ a  # type: ignore[operator]
    assert torch.equal(tensors[f"{name}.weight"], exact.to(wanted))
    assert f"| {rates.before} of 2 | {rates.after} of 2 |" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fire.toml", "merged", "run"]


def attacked(run: Path) -> None:
    """Run the attack on the erased model of a run whose pairs were never made."""
    from duo.fields import build
    from duo.recipe import Recipe
    from duo.stages import Session, attack

    recipe = build(Recipe, rundir.read_json(run / "run.json")["recipe"], "recipe")
    session = Session(recipe, run)
    (run / "run.json").unlink()  # it was written by hand, without versions
    attack(session)


def test_rescoring_counts_what_the_judge_sees(
    erased_run: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    from duo.erasures import Erasure
    from duo.judges.toybox import Toybox
    from duo.plugins import Verdict
    from duo.stages.rescoring import rescore

    attacked(erased_run)
    recipe = Erasure.read(erased_run).recipe
    assert recipe is not None
    model = load_family(str(tiny_folder))
    seen: list[Any] = []

    def judge(self: Any, images: Any) -> list[Verdict]:
        seen.append([np.asarray(image) for image in images])
        return [Verdict(label="present" if len(seen) == 2 or i == 0 else "absent") for i in range(len(images))]

    monkeypatch.setattr(Toybox, "__call__", judge)
    rates = rescore(erased_run, recipe, model)
    assert rates is not None
    assert (rates.before, rates.after, rates.n) == (1, 2, 2)
    with Erasure.read(erased_run).delta.attached(model):
        rescore(erased_run, recipe, model)
    before, original, again, erased = (np.stack(images).astype(int) for images in seen)
    assert np.array_equal(before, again) and np.abs(before - erased).max() <= 1  # the same prompts and seeds
    assert np.abs(before - original).max() > 1


@pytest.mark.parametrize("older", ["search", "no search", "rows"])
def test_a_run_that_an_older_duo_attacked_is_told_in_one_line(
    erased_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], older: str
) -> None:
    from duo.checkpoint import read_tensors, write_tensors
    from duo.cli import main

    attacked(erased_run)
    folder = erased_run / "attack" / "prompts" / "erased"
    if older == "search":  # as it was before refused prompts were recorded
        path = folder / "search" / "0000.safetensors"
        tensors, record = read_tensors(path)
        write_tensors(path, tensors, {key: record[key] for key in ("attempts", "queries")})
    elif older == "no search":
        shutil.rmtree(folder / "search")
    else:
        rows = rundir.read_jsonl(folder / "attempts.jsonl")
        rundir.write_jsonl(folder / "attempts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    assert main(["merge", str(erased_run), "--out", str(tmp_path / "merged"), "--dtype", "fp16"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("duo: ")]
    assert len(told) == 1
    assert told[0].startswith(f"duo: {folder} was made by another version of duo; run it again in a new --out, or give")
    assert not list(tmp_path.glob("*merged*"))


# --- the card ---------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_the_licence_goes_along(erased_run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    recipe = rundir.read_json(erased_run / "run.json")
    shutil.copytree(recipe["recipe"]["model"], base)
    recipe["recipe"]["model"] = str(base)
    rundir.write_json(erased_run / "run.json", recipe)
    (base / "LICENSE.md").write_text("Do no harm.")
    front = "license: other\nlicense_name: kind\nlicense_link: 'LICENSE.md'\ntags: [a]\n"
    (base / "README.md").write_text(f"---\n{front}---\n# base\nlicense: mit\n")
    merging.merge(erased_run, tmp_path / "merged")
    assert (tmp_path / "merged" / "LICENSE.md").read_text() == "Do no harm."
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "kind", "LICENSE.md")
    assert {"unlearning", "merged", "duo"} <= set(card.data.tags)
    assert card.data.eval_results is None
    assert "Whoever holds the base model can still difference the erasure out" in card.text
    assert "was not scored" in card.text
    assert str(tmp_path) not in card.text.partition("## How it was made")[2].partition("```toml")[0]


def test_the_card_of_a_scored_run_has_its_results(erased_run: Path, tmp_path: Path) -> None:
    from report import synthetic

    synthetic.write_run(tmp_path / "scored", images=2)
    for stage in ("score", "pairs"):
        shutil.copytree(tmp_path / "scored" / stage, erased_run / stage)
    merging.merge(erased_run, tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    values = {one.dataset_type: one.metric_value for one in card.data.eval_results}
    assert values["duo/prompts"] == pytest.approx(2 / 60)
    assert "duo/ring_a_bell" not in values  # unreliable
    assert "| unsafe generated | 68 |" in card.text
    assert "| Plain prompts | 60 of 60 | 2 of 60 |" in card.text


@pytest.mark.parametrize(
    ("counts", "title"),
    [((60, 2, 0), "without fire"), ((60, 59, 0), "after an attempt to remove fire"), (None, "after an attempt")],
)
def test_the_card_claims_no_more_than_the_scores(
    erased_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    counts: tuple[int, int, int] | None,
    title: str,
) -> None:
    from duo.cli import main
    from report import synthetic

    if counts:
        synthetic.write_run(tmp_path / "scored", images=2, attacks={"prompts": counts})
        shutil.copytree(tmp_path / "scored" / "score", erased_run / "score")
    assert main(["merge", str(erased_run), "--out", str(tmp_path / "merged")]) == 0
    assert main(["export", str(erased_run), "--out", str(tmp_path / "lora.safetensors")]) == 0
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert re.search(f"^# .* {title}", card.text, re.M)
    assert card.data.model_name is None or title in card.data.model_name
    assert ("was removed from it" in card.text) == ("without" in title)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    told = "Plain prompts brought fire in 60 of 60 images before and in 59 of 60 after, which is no significant fall"
    expected = [f"warning: {erased_run} does not show that its concept went: {told}"]
    assert warned == (expected * 2 if counts == (60, 59, 0) else [])


def test_what_is_measured_on_the_merged_weights_decides_their_title(erased_run: Path, tmp_path: Path) -> None:
    from duo.report.merged_card import Part
    from duo.stages.rescoring import Rescored
    from report import synthetic

    synthetic.write_run(tmp_path / "scored", images=2, attacks={"prompts": (60, 2, 0)})
    shutil.copytree(tmp_path / "scored" / "score", erased_run / "score")
    part = Part(weight=0.1, record={}, concept="toybox-fire", run=erased_run)
    rates = [Rescored(concept="toybox-fire", row="prompts", n=60, before=2, after=after) for after in (2, 58)]
    assert [part.gone([one]) for one in rates] == [True, False]
    assert part.gone([])


def test_the_card_has_the_file_of_an_own_concept(erased_run: Path, tmp_path: Path) -> None:
    merging.merge(erased_run, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert 'concept = "fire.toml"' in card and CONCEPT in card and str(tmp_path / "fire.toml") not in card
    (tmp_path / "fire.toml").write_text(CONCEPT.replace("a boat", "a car"))
    merging.merge(erased_run, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "It needs the concept file `fire.toml` beside it" in card and "a car" not in card


# --- bad input --------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_one_line(erased_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    tensors = {"a.lora_A.weight": torch.ones(1, 3), "a.lora_B.weight": torch.ones(3, 1)}
    for record, sources, settings, message in (
        ({"model": "x"}, [erased_run, other], {}, "the erasures are of different models, .* and 'x'"),
        ({}, [other], {}, "does not say which model it is of"),
        ({"model": "x"}, [erased_run], {"weights": [1.0, 1.0]}, "1 erasures but 2 weights"),
        ({"model": "x"}, [erased_run], {"dtype": "int8"}, "dtype is 'int8', expected fp32, fp16, bf16"),
        ({"model": "x"}, [tmp_path / "nothing"], {}, "neither a run folder nor a delta file"),
    ):
        Delta(kind="lora", component="unet", tensors=tensors, record=record).save(other)
        with pytest.raises(UserError, match=message) as caught:
            merging.merge(sources, tmp_path / "merged", **settings)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("*merged*"))


def test_an_erasure_that_is_named_twice_is_refused(erased_run: Path, tmp_path: Path) -> None:
    delta = erased_run / "erase" / "delta.safetensors"
    for again in (erased_run, erased_run / ".." / "run", delta):
        with pytest.raises(UserError, match=r"are the same erasure, and would count twice; .* --weights"):
            merging.merge([erased_run, again], tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def put(run: Path, delta: Delta) -> None:
    """Write another delta into a run, as if its erasure had made it."""
    path, manifest = run / "erase" / "delta.safetensors", run / "erase" / "manifest.json"
    delta.save(path)
    rundir.write_json(manifest, {**rundir.read_json(manifest), "digest": rundir.digest(path)})


def changed(run: Path, change: Any) -> None:
    """Write the run's delta again, after `change` of the tensors of its first layer, A and B."""
    path = run / "erase" / "delta.safetensors"
    delta = Delta.load(path)
    change(*delta.factors(delta.layers()[0]))
    put(run, delta)


def test_an_erasure_that_is_no_number_is_not_merged(erased_run: Path, tmp_path: Path) -> None:
    changed(erased_run, lambda _, up: up[0, 0].fill_(float("nan")))
    with pytest.raises(UserError, match=r"lora_B\.weight holds NaN or infinity"):
        merging.merge(erased_run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_that_overflow_in_lower_precision_are_refused(erased_run: Path, tmp_path: Path) -> None:
    def grow(down: torch.Tensor, up: torch.Tensor) -> None:
        down[:, 0] = torch.tensor([300.0, 0.0])
        up[0] = torch.tensor([300.0, 0.0])

    changed(erased_run, grow)
    with pytest.raises(UserError, match=r"in fp16 .*weight holds NaN or infinity; merge with --dtype fp32, or bf16"):
        merging.merge(erased_run, tmp_path / "merged", dtype="fp16")
    assert not list(tmp_path.glob("*merged*"))
    assert merging.merge(erased_run, tmp_path / "merged").difference <= 1


def test_a_base_that_was_replaced_is_refused(erased_run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    run = rundir.read_json(erased_run / "run.json")
    run["recipe"]["model"] = str(base)
    rundir.write_json(erased_run / "run.json", run)
    path = erased_run / "erase" / "delta.safetensors"
    delta, model = Delta.load(path), load_family(str(base))
    put(erased_run, replace(delta, record={**delta.record, "base": base_digest(model, delta.layers())}))
    merging.merge(erased_run, tmp_path / "merged")
    shutil.rmtree(base)
    (tmp_path / "merged").rename(base)  # at the same path, with the erasure merged already
    with pytest.raises(UserError, match="with other weights than model"):
        merging.merge(erased_run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_no_erasure_and_where_nothing_can_be_written(erased_run: Path, tmp_path: Path) -> None:
    from duo.exporting import export

    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "folder").mkdir()
    notes, folder, within = tmp_path / "notes.md", tmp_path / "folder", tmp_path / "notes.md" / "sub"
    for source, out, message in (
        (notes, tmp_path / "merged", r"cannot be read as safetensors \(.*\); give a file that `duo erase` wrote"),
        (folder, tmp_path / "merged", "folder is not a run folder: it has no run.json; give the --out of a `duo run`"),
        (erased_run, within / "merged", "cannot write .*merged.*: Not a directory; name another --out"),
    ):
        with pytest.raises(UserError, match=message):
            merging.merge(source, out)
        with pytest.raises(UserError, match=message):
            export(source, out.with_suffix(".safetensors"))
    assert notes.read_text() == "notes"
