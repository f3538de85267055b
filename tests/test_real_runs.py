"""`duo run` from the first pair to the report, then `duo merge`, on a tiny random model of each pipeline class.

Random models draw noise, so nothing is erased that one could see. What is tested is that every stage, every attack and
the merging work on every family, from the command line, with a judge from another package and without metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_flow
import tiny_judge
from duo import plugins, rundir
from duo.cli import main
from duo.models import load_family

CONCEPT = """
title = "Fire"
words = ["burning"]
anchor = "intact"
attack_pairs = [["a burning car", "a car"]]
vector_pairs = [["a burning house", "a house"]]
judge = {name = "coin"}
curator = {name = "coin", present = 0.6}
[pairs]
unsafe = ["a burning red house"]
safe = ["a red house"]
[prompts]
plain = ["a burning boat", "a boat on fire"]
unrelated = ["a red boat"]
[near_miss.car]
prompts = ["a red car"]
judge = {name = "coin", present = 0.9}
"""
RECIPE = """
concept = "fire.toml"
model = "somebody/elses-model"
attack_images = 1
block = 2
sampling = {num_inference_steps = 2, guidance_scale = 2.0}
pairs = {n = 2, block = 2, max_tries = 12, max_edits = 3}
score = {unrelated = 2, near_miss = 1, preservation = "none", adherence = "none"}
[method]
name = "duo"
beta = 10.0
learning_rate = 1e-2
prior_weight = 1.0
rank = 2
max_train_steps = 2
train_batch_size = 1
FIELDS
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 2
[[attacks]]
row = "ring_a_bell"
name = "ring_a_bell"
prompts = "plain"
images = 1
length = 3
population = 4
generations = 1
[[attacks]]
row = "concept_inversion"
name = "concept_inversion"
prompts = "plain"
images = 1
steps = 1
batch_size = 1
"""
NO_GRADIENT = {"transformer_blocks.1.attn.add_q_proj.weight"}  # of SD3's last block, after which the text is dropped
FLOW = 'precondition_outputs = true\ntargets = ["self_attention", "joint_attention"]'
# pipeline class → what its recipes add to [method], and the fixture or the function that makes its folder
KINDS: dict[str, tuple[str, str | Callable[[Path], Any]]] = {
    "sd1": ("", "tiny_folder"),
    "sd2-v": ("", "tiny_sd2_v_folder"),
    "sdxl": ("", "tiny_sdxl_folder"),
    "sd3": (FLOW, tiny_flow.sd3_pipeline),
    "flux": (FLOW, tiny_flow.flux_pipeline),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """The fields of [method], and the folder of a model."""
    fields, made_by = KINDS[request.param]
    if isinstance(made_by, str):
        return fields, request.getfixturevalue(made_by)
    folder = tmp_path / request.param
    made_by(request.getfixturevalue("vocabulary")).save_pretrained(folder)
    return fields, folder


def test_a_run_on_each_pipeline_class(
    kind: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, folder = kind
    monkeypatch.setattr(plugins, "entry_points", tiny_judge.entry_points)
    (tmp_path / "fire.toml").write_text(CONCEPT)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("FIELDS", fields))
    out = tmp_path / "run"
    assert main(["run", str(tmp_path / "recipe.toml"), "--model", str(folder), "--out", str(out)]) == 0
    assert "was not measured" in capsys.readouterr().out

    run = rundir.read_json(out / "run.json")
    assert run["recipe"]["model"] == str(folder)
    assert f"--model {folder}" in run["command"]
    assert len(rundir.read_jsonl(out / "pairs" / "pairs.jsonl")) == 2
    told = rundir.read_json(out / "report.json")
    assert (told["model"], told["preservation"], told["attributes"]) == (str(folder), None, None)
    assert [(row["name"], row["model"], row["n"]) for row in told["attacks"]] == [
        (name, model, n)
        for name, n in (("prompts", 2), ("ring_a_bell", 1), ("concept_inversion", 1))
        for model in ("original", "erased")
    ]
    assert [row["n"] for row in told["near_misses"]] == [1, 1]
    assert {row["judge"] for row in rundir.read_jsonl(out / "score" / "verdicts.jsonl")} == {"coin"}
    assert (out / "report.html").read_text().count("not measured") >= 3
    assert "not measured" in (out / "README.md").read_text()
    images = [out / "attack" / "prompts" / model / "images" / "0000.png" for model in ("original", "erased")]
    assert images[0].read_bytes() != images[1].read_bytes(), "the erasure changes what is drawn"

    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == 0
    merged, base = load_family(str(tmp_path / "merged")), load_family(str(folder))
    changed = {
        name
        for name, tensor in merged.denoiser.state_dict().items()
        if not tensor.equal(base.denoiser.state_dict()[name])
    }
    scopes = ("self_attention", "joint_attention") if fields else ("self_attention",)
    assert changed == {f"{name}.weight" for scope in scopes for name in base.layers(scope)} - NO_GRADIENT


RIVALS = {
    "uce": 'name = "uce"',
    "spm": 'name = "spm"\nmax_train_steps = 2\ngrid_steps = 2\nanchors = 1\nlearning_rate = 0.1\nlr_warmup_steps = 0',
}


@pytest.mark.parametrize("method", RIVALS)
def test_a_run_by_a_method_that_learns_from_no_pairs(
    method: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plugins, "entry_points", tiny_judge.entry_points)
    (tmp_path / "fire.toml").write_text(CONCEPT)
    before, _, after = RECIPE.partition("[method]\n")
    attacks = after[after.index("[[attacks]]") :]
    (tmp_path / "recipe.toml").write_text(f"{before}[method]\n{RIVALS[method]}\n{attacks}")
    out = tmp_path / "run"
    run = ["run", str(tmp_path / "recipe.toml"), "--model", str(tiny_folder), "--out", str(out)]
    assert main([*run, "--dry-run"]) == 0
    assert "pairs  " not in capsys.readouterr().out
    assert main([*run, "--set", "precision.shard=true"]) == 2
    assert f"precision.shard is true, but the method '{method}'" in capsys.readouterr().err
    assert not (out / "erase").exists()
    assert main([*run, "--resume"]) == 0
    assert not (out / "pairs").exists()
    told = rundir.read_json(out / "report.json")
    assert told["method"] == method
    assert set(told["cost"]) >= {"erase", "attack", "score"}
    images = [out / "attack" / "prompts" / model / "images" / "0000.png" for model in ("original", "erased")]
    assert images[0].read_bytes() != images[1].read_bytes(), "the erasure changes what is drawn"
    card = (out / "README.md").read_text()
    assert "load_lora_weights" not in card
    assert "pairs of images" not in card

    merged = main(["merge", str(out), "--out", str(tmp_path / "merged")])
    exported = main(["export", str(out), "--out", str(tmp_path / "lora.safetensors")])
    told = capsys.readouterr().err
    assert exported == 2
    if method == "uce":
        assert merged == 0
        assert "changes whole weights and is no LoRA; write them by `duo merge`" in told
        assert "images for the pairs" not in (tmp_path / "merged" / "README.md").read_text()
    else:
        assert merged == 2
        assert told.count("acts by how near a prompt is to the concept") == 2
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("merged", "lora"))) == (
        ["merged"] if method == "uce" else []
    )
