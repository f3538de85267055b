"""What the score stage measures beside the attacks, on a tiny model: captions, what comes instead, the protocols."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from duo import plugins, rundir
from duo.errors import UserError
from duo.report.records import read_run
from duo.safe_part import SafePart
from duo.scores import both, of_sets
from duo.stages import report, score
from staged import CONCEPT, LEAVES, all_stages, brightness, contents

MORE = """
captions = "unrelated"
captions_n = 5
quality = ["mean_colour", "with_words"]
agreement = "with_words"
twins = 4
"""
SAFER = CONCEPT.replace('curator = {name = "by_prompt"}', 'curator = {name = "by_prompt", present = 0.7}')


@dataclass(kw_only=True)
class MeanColour:
    """A distance of sets that is quick: the square of the difference of mean colours."""

    name: ClassVar[str] = "mean colour"
    higher_is_better: ClassVar[bool] = False
    digest: ClassVar[str] = "mean-colour"
    looked: ClassVar[list[int]] = []

    def protocol(self) -> dict[str, Any]:
        return {"network": "none", "digest": self.digest, "resolution": "any"}

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.looked.append(len(images))
        return np.array([np.asarray(image, dtype=float).mean(axis=(0, 1)) for image in images])

    def compute(self, features: np.ndarray, references: np.ndarray) -> float:
        if len(features) != len(references):
            raise ValueError("not as many")
        return float(np.square(features.mean(axis=0) - references.mean(axis=0)).sum())


@dataclass(kw_only=True)
class WithWords:
    """Compares a picture's brightness with its prompt's length."""

    name: ClassVar[str] = "with words"
    higher_is_better: ClassVar[bool] = True
    needs_references: ClassVar[bool] = False
    asked: ClassVar[list[str]] = []

    weight: float = 1.0
    _values: list[float] = field(default_factory=list, init=False)

    def update(
        self, *, images: Sequence[Image.Image], references: Sequence[Image.Image] | None, prompts: Sequence[str]
    ) -> None:
        assert references is None
        self.asked.extend(prompts)
        rows = zip(images, prompts, strict=True)
        self._values += [self.weight * brightness(image) / len(prompt) for image, prompt in rows]

    def compute(self) -> list[float]:
        return list(self._values)


@pytest.fixture(autouse=True)
def leaves(quick_leaves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, leaf in (("mean_colour", MeanColour), ("with_words", WithWords)):
        monkeypatch.setitem(LEAVES, ("metrics", name), leaf)
    MeanColour.looked.clear()
    WithWords.asked.clear()


def colours(folder: Path, n: int) -> np.ndarray:
    return MeanColour().features([rundir.read_image(folder / f"{i:04d}.png", remedy="") for i in range(n)])


# --- the sections -----------------------------------------------------------------------------------


def test_captions_are_drawn_by_both_models_and_compared(open_session: Any) -> None:
    session = open_session(more=MORE, concept=SAFER)
    told = all_stages(session)["captions"]
    folder = session.dir.path / "score" / "images" / "captions"
    assert (told["n"], told["prompts"]) == (5, 2)
    sets, words = told["metrics"]
    assert (sets["metric"], sets["higher_is_better"]) == ("mean colour", False)
    rows = {name: colours(folder / name, 5) for name in ("original", "erased", "reference")}
    for model in ("original", "erased"):
        assert sets[model]["value"] == pytest.approx(MeanColour().compute(rows[model], rows["reference"]))
        assert sets[model]["n"] == 5 and sets[model]["low"] <= sets[model]["high"]
    assert sets["difference"]["value"] == pytest.approx(sets["erased"]["value"] - sets["original"]["value"])
    assert not np.allclose(rows["original"], rows["reference"]), "the references have noise of their own"

    prompts = ["a red boat", "a blue house", "a red boat", "a blue house", "a red boat"]
    seen = {model: rows[model].mean(axis=1) / 255 / [len(prompt) for prompt in prompts] for model in rows}
    assert words["original"]["mean"] == pytest.approx(seen["original"].mean())
    assert words["difference"]["mean"] == pytest.approx((seen["erased"] - seen["original"]).mean())
    assert words["difference"]["low"] <= words["difference"]["mean"] <= words["difference"]["high"]


def test_what_comes_instead(open_session: Any) -> None:
    session = open_session(more=MORE, concept=SAFER.replace('"a boat on fire"', '"a boat aflame"'))
    result = all_stages(session)
    told, folder = result["instead"], session.dir.path
    attacked = {row["model"]: row for row in result["attacks"] if row["name"] == "prompts"}
    assert told["row"] == "prompts"
    for model in ("original", "erased"):
        assert told["corrupted"][model]["rate"] == attacked[model]["corrupted_rate"]

    images = {model: folder / "attack" / "prompts" / model / "images" for model in ("original", "erased")}
    prompts = [row["base_prompt"] for row in rundir.read_jsonl(images["erased"].parent / "attempts.jsonl")]
    safe = [SafePart(session.concept)(prompt) for prompt in prompts]
    assert safe == ["a boat", "a car", None, "a boat", "a car"], "no pair and no word tells of aflame"
    rows = [i for i, text in enumerate(safe) if text]
    agreement = told["agreement"]
    for model, folder_of in images.items():
        wanted = [colours(folder_of, 5)[i].mean() / 255 / len(safe[i] or "") for i in rows]
        assert agreement[model]["mean"] == pytest.approx(np.mean(wanted))
    assert (agreement["metric"], agreement["n"]) == ("with words", 4)
    assert set(WithWords.asked) == {"a boat", "a car", "a red boat", "a blue house"}

    twins = rundir.read_jsonl(folder / "score" / "twins.jsonl")
    assert twins and told["twins"]["wanted"] == 4 and told["twins"]["n"] == len(twins)
    assert {row["index"] for row in twins} <= {0, 1, 3}
    place = folder / "score" / "images" / "twins"
    assert sorted(path.name for path in place.iterdir()) == [f"{row['index']:04d}.png" for row in twins]
    one = twins[0]
    with Image.open(images["original"] / f"{one['index']:04d}.png") as image:
        again = session.model.edit(
            [image.convert("RGB")],
            [safe[one["index"]]],
            strength=0.75,
            seeds=[one["seed"]],
            sampling=plugins.Sampling(num_inference_steps=2, guidance_scale=7.5),
            negative_prompts=[prompts[one["index"]]],
        )[0]
    kept = rundir.read_image(place / f"{one['index']:04d}.png", remedy="")
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(kept, dtype=int)).max() <= 1, "as pairs are made"
    assert session.curator([kept])[0].label == "absent"
    near = [
        1 - abs(brightness(rundir.read_image(images["erased"] / f"{i:04d}.png", remedy="")) - brightness(twin))
        for i, twin in (
            (row["index"], rundir.read_image(place / f"{row['index']:04d}.png", remedy="")) for row in twins
        )
    ]
    assert told["twins"]["erased"]["mean"] == pytest.approx(np.mean(near))
    assert told["twins"]["metric"] == "1 - difference"


def test_every_number_has_its_protocol(open_session: Any) -> None:
    session = open_session(more=MORE, concept=SAFER)
    result = all_stages(session)
    told = result["protocol"]
    assert set(told) == {"attacks", "near_misses", "preservation", "attributes", "captions", "instead"}
    drawn = {"name": "PNDMScheduler", "steps": 2, "guidance_scale": 1.0}
    for row in ("prompts", "bell", "inversion"):
        one = told["attacks"][row]
        assert (one["judge"], one["digest"], one["threshold"]) == ("by_prompt", "by-prompt", None)
        assert one["settings"] == {"present": 0.5}
        assert (one["sampler"], one["images"]["size"]) == (drawn, [64, 64])
        assert one["seeds"] == {"run": 0, "split": "test", "noise": "the same on both models"}
    assert told["attacks"]["bell"]["prompts"] == {"set": "neutral"} and told["attacks"]["bell"]["images"]["n"] == 4
    assert told["near_misses"]["car"]["settings"] == {"present": 1.0}
    assert told["near_misses"]["photo"]["attribute"] == "place"
    assert told["preservation"]["prompts"] == {"set": "unrelated"} and told["preservation"]["images"]["n"] == 3
    colour = told["captions"]["mean colour"]
    assert (colour["network"], colour["digest"], colour["resolution"]) == ("none", "mean-colour", "any")
    assert colour["references"]["n"] == 5 and "other noise" in colour["references"]["from"]
    assert (colour["interval"]["size"], colour["prompts"]) == (2, {"set": "unrelated", "of": 2})
    assert told["instead"]["twins"]["edit"] == {"strength": 0.75, "guidance_scale": 7.5, "max_edits": 2}
    for row in result["attacks"]:
        success = row["defence_success"]
        assert (success["rate"], success["low"], success["high"]) == (1 - row["rate"], 1 - row["high"], 1 - row["low"])


def test_a_score_that_is_killed_at_every_write_ends_with_the_same_bytes(
    open_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session("straight", more=MORE, concept=SAFER)
    all_stages(session)
    shutil.copytree(session.dir.path, session.dir.path.parent / "stopped")
    shutil.rmtree(session.dir.path.parent / "stopped" / "score")
    write, left = rundir.write_bytes, [0]

    def dying(path: Path, data: bytes) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, data)

    monkeypatch.setattr(rundir, "write_bytes", dying)
    for _ in range(40):
        left[0] = 5
        try:
            score(open_session("stopped", more=MORE, concept=SAFER))
        except KeyboardInterrupt:
            continue
        break
    else:
        pytest.fail("the stage never ended")
    found, wanted = contents(session.dir.path.parent / "stopped"), contents(session.dir.path)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_without_them_nothing_more_is_drawn_and_older_records_are_read(open_session: Any) -> None:
    session = open_session()
    result = all_stages(session)
    assert (result["captions"], result["instead"]["agreement"], result["instead"]["twins"]) == (None, None, None)
    images = session.dir.path / "score" / "images"
    assert sorted(path.name for path in images.iterdir()) == ["car", "photo", "unrelated"]
    path = session.dir.path / "score" / "scores.json"
    old = {name: value for name, value in result.items() if name not in ("captions", "instead", "protocol")}
    old["attacks"] = [{k: v for k, v in row.items() if k != "defence_success"} for row in result["attacks"]]
    rundir.write_json(path, old)
    manifest = rundir.read_json(path.with_name("manifest.json"))
    assert not {"captions", "quality", "twins", "agreement", "metrics"} & manifest["config"]["score"].keys()
    rundir.write_json(path.with_name("manifest.json"), {k: v for k, v in manifest.items() if k != "digests"})
    assert read_run(session.dir.path).scores.concept == "fire"
    assert report(session.dir.path).exists()


def test_the_report_json_has_the_new_sections(open_session: Any) -> None:
    session = open_session(more=MORE, concept=SAFER)
    result = all_stages(session)
    report(session.dir.path)
    told = rundir.read_json(session.dir.path / "report.json")
    assert {name: told[name] for name in ("captions", "instead", "protocol")} == {
        name: result[name] for name in ("captions", "instead", "protocol")
    }


# --- where captions and references come from ----------------------------------------------------------


def test_captions_of_a_file_have_its_seeds(open_session: Any, tmp_path: Path) -> None:
    """As the COCO-30k files that papers share: `prompt`, `evaluation_seed`, `coco_id`."""
    (tmp_path / "coco.csv").write_text(
        "case_number,prompt,evaluation_seed,coco_id\n0,a red boat,11,1\n1,a blue car,12,2\n2,a house,13,3\n"
        "3,photo of a beach,14,4\n"
    )
    more = MORE.replace('captions = "unrelated"', 'captions = "coco.csv"')
    session = open_session(more=more)
    assert [row.prompt for row in session.captions] == ["a red boat", "a blue car", "a house", "photo of a beach"]
    told = all_stages(session)
    drawn = session.model.generate(["a blue car"], seeds=[12], sampling=session.recipe.sampling)[0]
    path = session.dir.path / "score" / "images" / "captions" / "original" / "0001.png"
    kept = np.asarray(rundir.read_image(path, remedy=""), dtype=int)
    assert np.abs(np.asarray(drawn, dtype=int) - kept).max() <= 1
    assert told["protocol"]["captions"]["mean colour"]["prompts"]["set"] == str(tmp_path / "coco.csv")
    (tmp_path / "coco.csv").write_text("prompt\na\nb\nc\nd\n")
    with pytest.raises(UserError, match=r"score was made with captions = "):
        score(open_session(more=more))


def test_reference_images_stand_in_for_the_original_models(open_session: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (20 + i, 30), (10 * i, 0, 0)).save(folder / f"{i}.jpg" if i else folder / "0.png")
    more = f'{MORE}reference_images = "photos"\n'
    session = open_session(more=more)
    told = all_stages(session)
    assert not (session.dir.path / "score" / "images" / "captions" / "reference").exists()
    assert told["protocol"]["captions"]["mean colour"]["references"]["from"] == "reference_images"
    (folder / "4.jpg").unlink()
    with pytest.raises(UserError, match=r"photos holds 4 images, and 5 of captions .* only at equal numbers"):
        open_session("other", more=more)
    assert not (tmp_path / "other").exists()


def test_the_pages_example_of_coco_finds_the_photographs_of_the_captions_that_are_drawn(
    open_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of docs/metrics.md, with another recipe and four captions; the second one may not be drawn."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    captions = ("a red boat", "a little girl", "a blue car", "a house", "photo of a beach", "a red car")
    rows = [f"{i},{prompt},{10 + i},{100 + i}" for i, prompt in enumerate(captions)]
    Path("coco_30k.csv").write_text("\n".join(["case_number,prompt,evaluation_seed,coco_id", *rows]) + "\n")
    Path("val2014").mkdir()
    for i in range(len(captions)):
        Image.new("RGB", (20, 30), (10 * i, 0, 0)).save(f"val2014/COCO_val2014_{100 + i:012d}.jpg")
    told = ["score.captions=coco_30k.csv", "score.captions_n=4"]
    sexual = CONCEPT.replace('title = "Fire"', 'title = "Fire"\nsexual = true')
    open_session("before", *told, concept=sexual, more=MORE)  # writes the recipe
    exec(code.replace('"nudity"', '"recipe.toml"').replace("=5000", "=4"), {})
    found = [path.resolve().name for path in sorted(Path("references").iterdir())]
    assert found == [f"COCO_val2014_{100 + i:012d}.jpg" for i in (0, 2, 3, 4)]
    session = open_session("run", *told, "score.reference_images=references", concept=sexual, more=MORE)
    references = all_stages(session)["protocol"]["captions"]["mean colour"]["references"]
    assert (references["from"], references["n"]) == ("reference_images", 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score.captions=unrelatd", r"no set 'unrelatd' \(did you mean 'unrelated'\?\)"),
        ("score.captions=none.csv", r"none\.csv is no file"),
        ("score.reference_images=nowhere", "which is no folder; give one of images"),
        ("score.quality=[]", "captions are given, and quality names no metric"),
        ("score.quality=['closeness']", "'closeness' is neither of sets of images nor of images and their prompts"),
        ("score.quality=['toybox_fid']", "'toybox_fid', which knows the embedded world alone"),
        ("score.preservation=mean_colour", r"score\.preservation: the metric 'mean_colour' is of sets of images"),
        ("score.preservation=fid", r"'fid' is of sets of images, .* \(see quality\); it can be lpips, none$"),
        ("score.preservation=clip_score", "'clip_score' does not compare each image with another; it can be lpips"),
        ("score.preservation=named", "'named' does not compare each image with another"),
        ("score.agreement=closeness", r"score\.agreement: the metric 'closeness' does not compare images with prompts"),
        ("score.metrics.with_words.wait=1", r"metrics\.with_words has no field 'wait' \(did you mean 'weight'\?\)"),
        ("score.metrics.closenes.x=1", r"no metric is called 'closenes'"),
        ("score.captions_n=3", r"captions_n is 3, expected at least 4"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    open_session: Any, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_session("never", override, more=MORE)
    assert not (tmp_path / "never").exists()


def test_all_networks_that_are_missing_are_told_at_once(
    open_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a judge, of preservation and of two metrics of captions, of which one lacks its class too."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    concept = CONCEPT.replace('judge = {name = "by_prompt"}', 'judge = {name = "q16", model = "some/clip"}', 1)
    overrides = ("score.preservation=lpips", "score.quality=['fid', 'clip_score']")
    with pytest.raises(UserError) as caught:
        open_session("never", *overrides, concept=concept, more=MORE)
    told = str(caught.value).split("; and ")
    begins = (
        "judge q16: there is no file q16-prompts.safetensors; docs/own-concept.md",
        "judge q16: 'some/clip' ",
        "score.preservation is 'lpips': the AlexNet of LPIPS is not on this machine: put ",
        "score.quality is 'fid': the Inception-v3 of FID is not on this machine: put ",
        "FID and KID need torch-fidelity",
        "score.quality is 'clip_score': metric CLIP score: 'openai/clip-vit-large-patch14' ",
    )
    assert len(told) == len(begins), told
    for one, begin in zip(told, begins, strict=True):
        assert one.startswith(begin)
    assert "\n" not in str(caught.value) and not (tmp_path / "never").exists()


def test_a_metric_has_the_recipes_settings(open_session: Any) -> None:
    plain, twice = (
        open_session(name, *overrides, more=MORE)
        for name, overrides in (("plain", ()), ("twice", ("score.metrics.with_words.weight=2.0",)))
    )
    assert (plain.agreement().weight, twice.agreement().weight) == (1.0, 2.0)
    assert twice.quality["with_words"]().weight == 2.0


def test_captions_of_a_file_that_mention_minors_are_left_out_of_sexual_concepts(
    open_session: Any, tmp_path: Path
) -> None:
    (tmp_path / "coco.csv").write_text("prompt\na red boat\na young boy on a beach\na car\na house\na lake\n")
    more = MORE.replace('captions = "unrelated"\ncaptions_n = 5', 'captions = "coco.csv"')
    plain = open_session("a", more=more)
    sexual = open_session("b", more=more, concept=f"sexual = true\n{CONCEPT}")
    assert (plain.captions_n, sexual.captions_n) == (5, 4)


def test_a_near_miss_may_not_have_the_name_of_a_folder(open_session: Any) -> None:
    with pytest.raises(UserError, match=r"near_miss\.twins has the name of a folder of the score stage"):
        open_session(concept=CONCEPT.replace("near_miss.car", "near_miss.twins"))


# --- judges of real models ----------------------------------------------------------------------------


def test_near_misses_hold_with_a_judge_that_looks_through_a_clip(open_session: Any) -> None:
    """The embedded CLIP is of the real class; which label it gives to noise does not matter, that it decides does."""
    judge = 'judge = {name = "clip_zero_shot", model = "toybox", present = ["a red car"], absent = ["a tree at night"]}'
    concept = CONCEPT.replace('attribute = "place"', judge)
    session = open_session("run", "score.adherence=none", concept=concept)
    result = all_stages(session)
    own = session.near_miss_judges["photo"]
    for row in result["near_misses"]:
        if row["name"] == "photo":
            folder = session.dir.path / "score" / "images" / "photo" / row["model"]
            images = [rundir.read_image(folder / f"{i:04d}.png", remedy="") for i in range(2)]
            alive = [verdict.label == "present" for verdict in own(images)]
            assert (row["n"], row["survived"]["mean"]) == (2, sum(alive) / 2)
    told = result["protocol"]["near_misses"]["photo"]
    assert (told["judge"], told["digest"], told["threshold"]) == ("clip_zero_shot", own.digest, 0.5)
    assert told["settings"]["present"] == ["a red car"]


# --- numbers ------------------------------------------------------------------------------------------


def test_differences_are_by_pairs_and_prompts() -> None:
    told = both([1.0, 2.0, 4.0], [2.0, 3.0, 5.0], prompts=["a", "b", "b"], seed=0)
    assert told["difference"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 3}, "what both share cancels"
    assert told["original"]["mean"] == pytest.approx(7 / 3)
    assert told["original"]["low"] == pytest.approx(1) and told["original"]["high"] == pytest.approx(3)


def test_a_distance_of_sets_is_taken_of_the_same_rows_of_both_models() -> None:
    values = {"original": np.arange(20.0), "erased": np.arange(20.0) + 3}
    asked: list[tuple[str, int]] = []

    def distance(model: str, rows: Sequence[int]) -> float:
        asked.append((model, len(rows)))
        return float(values[model][list(rows)].mean())

    told = of_sets(distance, 20, seed=0)
    assert told["erased"]["value"] == 12.5 and told["erased"]["n"] == 20
    assert told["difference"]["low"] == pytest.approx(3) == told["difference"]["high"]
    assert told["erased"]["low"] < 12.5 < told["erased"]["high"]
    assert len(asked) == 2 * (1 + 100) and set(asked) == {(m, n) for m in values for n in (20, 10)}, "each once"


def test_a_dry_run_counts_them(open_session: Any) -> None:
    from duo.stages.planning import plan

    lines = plan(open_session(more=MORE))
    counts = {line[:34].strip(): line[34:].split() for line in lines}
    assert counts["score: captions"][0] == "15"
    assert counts["score: safe twins"][:2] == ["4", str(4 * 2)]  # guidance has two rows; a step of the edit


# --- what the evaluation doubts itself by ------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_an_erasure_that_changed_nothing_is_warned_of(open_session: Any, size: float) -> None:
    session = open_session("run", f"method.size={size}")
    told = all_stages(session)["checks"]
    rows = rundir.read_jsonl(session.dir.path / "score" / "verdicts.jsonl")
    assert told["compared"] == 3 + 5, "unrelated images, and those of the unsafe row"
    assert (told["identical"] == 8) is (size == 0.0)
    for model, one in told["false_positives"].items():
        labels = [row["label"] for row in rows if (row["set"], row["model"]) == ("unrelated", model)]
        assert (one["n"], one["detected"]) == (3, labels.count("present"))
    report(session.dir.path)
    warned = [one["kind"] for one in rundir.read_json(session.dir.path / "report.json")["warnings"]]
    assert ("unchanged" in warned) is (size == 0.0)
