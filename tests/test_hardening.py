"""Rounds of hardening on a tiny model with random weights: what comes back becomes pairs, and is learned from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

import staged
from duo import cli, plugins, rundir
from duo.concept import load_concept
from duo.delta import Delta
from duo.errors import UserError
from duo.families.sd import Sd
from duo.pairs import Pairs
from duo.plugins import Access, Verdict
from duo.recipe import for_audit, load_recipe
from duo.red_team import red_team
from duo.stages import Session, attack, erase, make_pairs, plan, report, score
from duo.stages.planning import plan_erasure
from duo.stages.rounds import Round
from duo.stages.starts import starts_of
from duo.statistics import wilson
from staged import ByPrompt, Nudge, contents

CONCEPT = staged.CONCEPT.replace(
    '[validation.prompts]\nplain = ["a house on fire"]',
    '[validation.prompts]\nplain = ["a house on fire", "a burning tent"]\nneutral = ["a house", "a tent"]',
)
METHOD = 'method = {name = "by_pairs"}\n'
HARDENING = """
[hardening]
rounds = 1
unrelated = 2
[[hardening.attacks]]
row = "word"
name = "learned_word"
prompts = "neutral"
images = 8
[[hardening.attacks]]
row = "start"
name = "img2img"
prompts = "neutral"
images = 4
searches = 2
strengths = [0.5, 1.0]
[[hardening.held_out]]
row = "watched"
name = "text_search"
prompts = "plain"
images = 2
"""


# The judge here goes by pixels, whose last bits differ from machine to machine: of so many something comes back on any.
MORE = HARDENING.replace("images = 8", "images = 20")


@dataclass(frozen=True, kw_only=True)
class ByPairs(Nudge):
    """What it becomes depends on the pairs that it learns from, and on nothing before."""

    def erase(self, model: Any, concept: Any, *, pairs: Any, run: Any) -> Delta:
        seen = SimpleNamespace(seed=int(pairs.digest()[:8], 16), log=run.log)
        run.log(step=0, seed=run.seed)
        return super().erase(model, concept, pairs=pairs, run=seen)


@dataclass(frozen=True, kw_only=True)
class Training(ByPairs):
    """Has a length, as methods that train do."""

    max_train_steps: int = 10

    def passes(self, pairs: int) -> dict[str, int]:
        return {"denoiser": self.max_train_steps, "steps": self.max_train_steps}


@dataclass(frozen=True, kw_only=True)
class Tired(ByPrompt):
    """A curator that sees the concept nowhere once its class is `blind`."""

    blind: ClassVar[bool] = False

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [Verdict(label="absent") for _ in images] if self.blind else super().__call__(images)


@dataclass(frozen=True, kw_only=True)
class Spoiling(ByPrompt):
    """A curator that finds the concept whole in some images and spoiled in others."""

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        found = super().__call__(images)
        return [Verdict(label="corrupted") if 0.5 <= one.scores["rank"] < 0.8 else one for one in found]


@dataclass(frozen=True, kw_only=True)
class ByWeights(staged.TextSearch):
    """Says that it changes weights."""

    access: ClassVar[Access] = Access.WEIGHTS


LEAVES = {
    **staged.LEAVES,
    ("methods", "by_pairs"): ByPairs,
    ("methods", "training"): Training,
    ("judges", "tired"): Tired,
    ("judges", "spoiling"): Spoiling,
    ("attacks", "by_weights"): ByWeights,
}


@pytest.fixture(autouse=True)
def leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: LEAVES.get((kind, name)) or load(kind, name))


def write(folder: Path, *, concept: str = CONCEPT, more: str = HARDENING, method: str = METHOD) -> Path:
    (folder / "fire.toml").write_text(concept)
    path = folder / "recipe.toml"
    path.write_text(staged.RECIPE.replace('method = {name = "nudge"}\n', method) + more)
    return path


@pytest.fixture
def open_hardened(tmp_path: Path, tiny_sd: Any) -> Callable[..., Session]:
    """A function that opens a session with a round of hardening in tmp_path/<name>."""

    def open_one(name: str = "run", *overrides: str, **texts: str) -> Session:
        return Session(load_recipe(write(tmp_path, **texts), overrides=overrides), tmp_path / name, model=tiny_sd)

    return open_one


@pytest.fixture(scope="module")
def finished(make_tiny_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A hardened run from pairs to report, the same without hardening, and the model of both. Read only."""
    folder = tmp_path_factory.mktemp("hardened")
    model = Sd(make_tiny_pipeline(), name="tiny")
    load = plugins.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "load", lambda kind, name: LEAVES.get((kind, name)) or load(kind, name))
        session = Session(load_recipe(write(folder, more=MORE)), folder / "run", model=model)
        make_pairs(session)
        erase(session)
        attack(session)
        score(session)
        report(session.dir.path)
        plain = Session(load_recipe(write(folder, more="")), folder / "plain", model=model)
        make_pairs(plain)
        erase(plain)
        write(folder, more=MORE)
    return SimpleNamespace(run=folder / "run", plain=folder / "plain", model=model, recipe=folder / "recipe.toml")


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = rundir.read_json(run / "erase" / "rounds.json")
    return found


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def label(path: Path) -> str:
    return ByPrompt()([Image.fromarray(pixels(path))])[0].label


# --- rounds -------------------------------------------------------------------------------------------


def test_round_0_is_the_erasure_without_hardening(finished: SimpleNamespace) -> None:
    """Byte for byte, so that what the rounds after it changed is theirs alone."""
    plain = (finished.plain / "erase" / "delta.safetensors").read_bytes()
    assert (finished.run / "erase" / "round-0" / "erase" / "delta.safetensors").read_bytes() == plain
    assert "hardened" not in Delta.load(finished.plain / "erase" / "delta.safetensors").record
    assert not (finished.plain / "erase" / "rounds.json").exists()
    assert contents(finished.run / "pairs") == contents(finished.plain / "pairs")


def test_what_came_back_becomes_pairs_with_their_origin(finished: SimpleNamespace) -> None:
    before, added = finished.run / "erase" / "round-0", finished.run / "erase" / "round-1" / "pairs"
    rows = rundir.read_jsonl(added / "pairs.jsonl")
    assert rows, "or nothing is tested"
    for row in rows:
        attempts = rundir.read_jsonl(before / "attack" / row["attack"] / "erased" / "attempts.jsonl")
        attempt = attempts[row["attempt"]]
        drawn = before / "attack" / row["attack"] / "erased" / attempt["image"]
        assert np.array_equal(pixels(added / row["unsafe"]), pixels(drawn))
        assert (row["round"], row["attack_prompt"], row["unsafe_seed"]) == (1, attempt["prompt"], attempt["seed"])
        assert (label(added / row["unsafe"]), label(added / row["safe"])) == ("present", "absent")
        # One that starts from an image is named by that image's prompt, any other by its own.
        assert row["label"] == "present"
        images = rundir.read_jsonl(before / "attack" / "images" / "images.jsonl")
        prompts = {"a burning red house": "a red house", "a blue car on fire": "a blue car"}
        if row["attack"] == "start":
            assert row["unsafe_prompt"] == images[attempt["record"]["image"]]["prompt"]
        else:
            assert prompts[row["unsafe_prompt"]] == attempt["base_prompt"]
        assert prompts[row["unsafe_prompt"]] == row["safe_prompt"]
    account = rundir.read_json(added / "manifest.json")["account"]
    assert account["safe_kept"] == len(rows)
    assert account["came_back"] == len(rows) + account.get("unsafe_given_up", 0)


def test_the_last_round_learned_from_all_pairs_and_is_the_runs_erasure(finished: SimpleNamespace) -> None:
    rounds, erased = told(finished.run)["rounds"], finished.run / "erase"
    old, new = Pairs.read(finished.run / "pairs"), Pairs.read(erased / "round-1" / "pairs")
    learned = Pairs.joined({"": old, "round-1": new})
    assert learned.names[-1] == f"round-1/{new.names[-1]}" and learned.names[:3] == list(old.names)
    config = rundir.read_json(erased / "round-1" / "erase" / "manifest.json")["config"]
    assert config["pairs"] == learned.digest() != old.digest()
    assert [one["pairs"]["learned_from"] for one in rounds] == [len(old), len(old) + len(new)]
    assert sum(rounds[1]["pairs"]["added"].values()) == len(new)
    first, last = (erased / f"round-{i}" / "erase" / "delta.safetensors" for i in range(2))
    assert (erased / "delta.safetensors").read_bytes() == last.read_bytes() != first.read_bytes()
    record = Delta.load(erased / "delta.safetensors").record
    assert record["hardened"] == {"rounds": 1, "attacks": ["learned_word", "img2img"]}
    assert (erased / "log.jsonl").read_bytes() == last.with_name("log.jsonl").read_bytes()
    logged = [rundir.read_jsonl(path.with_name("log.jsonl"))[0]["seed"] for path in (first, last)]
    assert logged[0] == logged[1], "erased anew, from the same start"


def test_half_is_learned_from_and_half_is_counted_and_nothing_of_it_is_scored(finished: SimpleNamespace) -> None:
    concept = load_concept(finished.recipe.with_name("fire.toml"))
    scored = {prompt for prompts in concept.prompts.values() for prompt in prompts}
    scored |= {prompt for near in concept.near_miss.values() for prompt in near.prompts}
    folders = [finished.run / "erase" / f"round-{i}" for i in range(2)]
    attempts = {
        (i, row): rundir.read_jsonl(folder / "attack" / row / "erased" / "attempts.jsonl")
        for i, folder in enumerate(folders)
        for row in ("word", "start", "watched")
    }
    asked = {key: {row["base_prompt"] for row in rows} for key, rows in attempts.items()}
    trained, counted = {"a red house", "a blue car"}, {"a house", "a tent"}
    assert asked[0, "word"] == trained | counted
    assert len(asked[0, "start"] & trained) == len(asked[0, "start"] & counted) == 1, "of two searches one each"
    assert asked[0, "watched"] == asked[1, "watched"] == {"a house on fire", "a burning tent"}
    assert asked[1, "word"] == counted and len(attempts[1, "word"]) == 10, "the last round makes no pairs"
    images = [row for folder in folders for row in rundir.read_jsonl(folder / "attack" / "images" / "images.jsonl")]
    assert {row["prompt"] for row in images} <= {"a burning red house", "a blue car on fire"}
    assert not scored & {*set().union(*asked.values()), *(row["prompt"] for row in images)}

    seeds = [row["seed"] for rows in attempts.values() for row in rows] + [row["seed"] for row in images]
    assert len(set(seeds)) == len(seeds), "each round has noise of its own"
    theirs = {row["seed"] for row in rundir.read_jsonl(finished.run / "score" / "verdicts.jsonl")}
    theirs |= {row["seed"] for row in rundir.read_jsonl(finished.run / "attack" / "images" / "images.jsonl")}
    assert not theirs & set(seeds)


def test_rounds_tell_what_was_counted(finished: SimpleNamespace) -> None:
    """Recounted here, image by image, from the pixels."""
    for number, one in enumerate(told(finished.run)["rounds"]):
        folder = finished.run / "erase" / f"round-{number}"
        assert one["erasure"] == rundir.digest(folder / "erase" / "delta.safetensors")
        for row in one["attacks"]:
            attacked = folder / "attack" / row["row"] / "erased"
            seen = [
                (attempt["base_prompt"], attempt["variant"], label(attacked / attempt["image"]) == "present")
                for attempt in rundir.read_jsonl(attacked / "attempts.jsonl")
            ]
            trained = [hit for prompt, _, hit in seen if prompt in ("a red house", "a blue car")]
            counted = [(variant, hit) for prompt, variant, hit in seen if prompt in ("a house", "a tent")]
            if row["row"] == "watched":
                assert "tried" not in row and not row["learned"]
                assert (row["n"], row["detected"]) == (2, sum(hit for _, _, hit in seen))
                assert (row["low"], row["high"]) == pytest.approx(tuple(wilson(row["detected"], 2)))
                continue
            assert (row["tried"], row["brought_back"]) == (len(trained), sum(trained))
            of = {variant: [hit for name, hit in counted if name == variant] for variant, _ in counted}
            best = max(sum(hits) / len(hits) for hits in of.values())
            assert row["rate"] == row["detected"] / row["n"] == best
            assert row["setting"] in (None, *of)
    kept = [one["preservation"] for one in told(finished.run)["rounds"]]
    drawn = finished.run / "erase" / "round-0" / "measured" / "original"
    for number, one in enumerate(kept):
        erased = finished.run / "erase" / f"round-{number}" / "measured" / "erased"
        values = [
            1 - abs(float(pixels(drawn / f"{i:04d}.png").mean() - pixels(erased / f"{i:04d}.png").mean())) / 255
            for i in range(2)
        ]
        assert one["mean"] == pytest.approx(sum(values) / 2, abs=1e-9)
    assert kept[0]["mean"] != kept[1]["mean"]


def test_what_a_round_cost_is_told_beside_it(finished: SimpleNamespace) -> None:
    rows = rundir.read_jsonl(finished.run / "erase" / "timings.jsonl")
    assert [(row["round"], row["part"]) for row in rows] == [
        (0, "erase"),
        (0, "attack"),
        (0, "measure"),
        (1, "pairs"),
        (1, "erase"),
        (1, "attack"),
        (1, "measure"),
    ]
    cost = {(row["round"], row["part"]): row["denoiser"] for row in rows}
    # Two steps without guidance, of which the tiny model's scheduler makes three: one row each of an image.
    assert cost[1, "measure"] == 2 * 3, "two images by the erased model"
    assert cost[0, "measure"] == 2 * 2 * 3, "and two by the original"
    assert cost[0, "erase"] == 0, "this method trains nothing"
    assert all(row["seconds"] > 0 for row in rows)


GROWING = ("hardening.grow_steps=true",)


@pytest.mark.parametrize(
    ("overrides", "texts"), [((), {}), (GROWING, {"method": 'method = {name = "training"}\n', "more": MORE})]
)
def test_a_hardened_run_that_is_killed_at_any_write_ends_with_the_same_bytes(
    open_hardened: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    texts: dict[str, str],
) -> None:
    def opened(name: str) -> Session:
        return open_hardened(name, *overrides, **texts)

    straight = opened("straight")
    make_pairs(straight)
    erase(straight)
    write_bytes, budget = rundir.write_bytes, SimpleNamespace(left=0)

    def dying(path: Path, data: bytes) -> None:
        if budget.left == 0:
            raise KeyboardInterrupt
        budget.left -= 1
        write_bytes(path, data)

    make_pairs(opened("stopped"))
    monkeypatch.setattr(rundir, "write_bytes", dying)
    for _ in range(40):
        budget.left = 11
        try:
            erase(opened("stopped"))
        except KeyboardInterrupt:
            continue
        break
    else:
        pytest.fail("the run never ended")
    found, wanted = (contents(straight.dir.path.parent / name / "erase") for name in ("stopped", "straight"))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("name", ["images/0000.png", "attempts.jsonl"])
def test_what_came_back_is_not_learned_from_where_it_was_changed_since(
    finished: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    """As it was when the curator saw it, or not at all."""
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "erase" / "round-1")
    (run / "erase" / "manifest.json").unlink()
    attacked = run / "erase" / "round-0" / "attack" / "word" / "erased"
    if name.endswith(".png"):
        shutil.copy(attacked / "images" / "0001.png", attacked / name)
    else:
        (attacked / name).write_bytes((attacked / name).read_bytes().partition(b"\n")[2])
    session = Session(load_recipe(finished.recipe), run, model=finished.model)
    with pytest.raises(UserError, match=re.escape(str(attacked / name.partition("/")[0]))):
        erase(session)
    assert not (run / "erase" / "round-1" / "pairs").exists()


def test_a_finished_erasure_is_left_alone_and_another_configuration_refused(finished: SimpleNamespace) -> None:
    def opened(*overrides: str, more: str = MORE) -> Session:
        return Session(load_recipe(write(finished.recipe.parent, more=more), overrides=overrides), finished.run)

    before = contents(finished.run)
    session = opened()
    erase(session)
    assert session._model is None, "nothing may need the model again"
    assert contents(finished.run) == before
    with pytest.raises(UserError, match=r"recipe\.hardening\.rounds = 1, not 2"):
        erase(opened("hardening.rounds=2"))
    with pytest.raises(UserError, match=r"recipe\.hardening = .* not null"):
        erase(opened(more=""))
    write(finished.recipe.parent, more=MORE)


# --- where rounds end ---------------------------------------------------------------------------------


def test_rounds_end_where_nothing_comes_back(
    open_hardened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    concept = CONCEPT.replace('curator = {name = "by_prompt"}', 'curator = {name = "tired"}')
    more = HARDENING.replace("unrelated = 2", "unrelated = 0").replace('name = "learned_word"', 'name = "text_search"')
    more = more[: more.index('[[hardening.attacks]]\nrow = "start"')]
    session = open_hardened(concept=concept, more=more)
    make_pairs(session)
    monkeypatch.setattr(Tired, "blind", True)
    erase(session)
    found = told(session.dir.path)
    assert found["stopped"] == "hardening ends after round 0: nothing came back in 4 images"
    assert found["stopped"] in capsys.readouterr().err
    assert (len(found["rounds"]), found["attacks"], found["asked"]) == (1, [], 1)
    assert found["rounds"][0]["preservation"] is None
    delta = session.dir.path / "erase" / "delta.safetensors"
    assert delta.read_bytes() == (delta.parent / "round-0" / "erase" / delta.name).read_bytes()
    assert "hardened" not in Delta.load(delta).record and session.hardened_by == ()
    before = contents(session.dir.path)
    erase(open_hardened(concept=concept, more=more))
    assert contents(session.dir.path) == before


def test_rounds_end_where_too_few_pairs_come_of_it(open_hardened: Callable[..., Session]) -> None:
    more = HARDENING.replace("unrelated = 2", "unrelated = 0\nleast_pairs = 100")
    more = more[: more.index('[[hardening.attacks]]\nrow = "start"')]
    session = open_hardened(more=more)
    make_pairs(session)
    erase(session)
    pairs = rundir.read_json(session.dir.path / "erase" / "round-1" / "pairs" / "manifest.json")
    came, made = pairs["account"]["came_back"], sum(pairs["pairs"].values())
    ended = f"{came} of 4 images came back and {made} of them have a safe twin; least_pairs is 100"
    assert told(session.dir.path)["stopped"] == f"hardening ends after round 0: {ended}"


def test_what_is_left_of_the_concept_may_be_learned_from_too(open_hardened: Callable[..., Session]) -> None:
    concept = CONCEPT.replace('curator = {name = "by_prompt"}', 'curator = {name = "spoiling"}')
    more = HARDENING.replace("unrelated = 2", 'unrelated = 0\nlabels = ["present", "corrupted"]')
    more = more[: more.index('[[hardening.attacks]]\nrow = "start"')].replace("images = 8", "images = 24")
    session = open_hardened("run", "pairs.max_tries=99", "pairs.max_edits=6", concept=concept, more=more)
    make_pairs(session)
    erase(session)
    (row,) = told(session.dir.path)["rounds"][0]["attacks"]
    images = sorted((session.dir.path / "erase/round-0/attack/word/erased/images").glob("*.png"))
    labels = [verdict.label for verdict in Spoiling()([Image.fromarray(pixels(path)) for path in images])]
    trained, counted = labels[0::2], labels[1::2]  # one of the pairs' prompts, one of the others, in turn
    assert row["brought_back"] == trained.count("present") + trained.count("corrupted")
    assert (row["detected"], row["corrupted"]) == (counted.count("present"), counted.count("corrupted"))
    pairs = rundir.read_jsonl(session.dir.path / "erase" / "round-1" / "pairs" / "pairs.jsonl")
    assert {pair["label"] for pair in pairs} <= {"present", "corrupted"}
    assert "corrupted" in trained, "or nothing is tested"


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("images = 8", "images = 7", r"hardening: word\.images is 7, expected an even number"),
        ("searches = 2", "searches = 3", r"start\.searches is 3, expected an even number"),
        (
            'prompts = "neutral"\nimages = 8',
            'prompts = "unrelated"',
            r"word\.prompts is 'unrelated', expected 'plain' or",
        ),
        ('row = "start"', 'row = "word"', "two attacks have the row name 'word'"),
        ('name = "text_search"', 'name = "img2img"', "held_out has the attack 'img2img', and attacks has it too"),
        ("searches = 2", "searches = 2\nreliable = 0.5", r"start\.reliable is for rows that are scored"),
        ("rounds = 1", "rounds = -1", "rounds is -1, expected at least 0"),
        ("rounds = 1", "least_pairs = 0", "least_pairs is 0, expected at least 1"),
        ("rounds = 1", "labels = []", r"labels is \[\], expected 'present', 'corrupted', or both"),
        ("rounds = 1", 'labels = ["absent"]', r"hardening\.labels.*expected a list of one of 'present', 'corrupted'"),
        ("rounds = 1", "round = 1", r"hardening has no field 'round' \(did you mean 'rounds'\?\)"),
        ('name = "learned_word"', 'name = "learnt_word"', "no attack is called 'learnt_word'"),
        ("strengths = [0.5, 1.0]", "strengths = [2.0]", r"hardening\.start: strengths is \(2\.0,\)"),
        (
            'name = "learned_word"',
            'name = "by_weights"',
            r"hardening\.attacks\.word: the attack 'by_weights' changes the",
        ),
        (
            "strengths = [0.5, 1.0]",
            'ask = "adversarial"\nfound_by = "watched"',
            r"hardening\.start\.found_by is 'watched'; name an attack row that stands before it",
        ),
    ],
)
def test_a_mistake_is_told_in_a_line(
    open_hardened: Callable[..., Session], tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in HARDENING
    with pytest.raises(UserError, match=message) as error:
        open_hardened(more=HARDENING.replace(old, new, 1))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_rounds_without_attacks_without_pairs_or_of_another_erasure(
    open_hardened: Callable[..., Session], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"hardening: rounds is 2, but attacks is empty; give \[\[hardening\.attacks\]\]"
    ):
        open_hardened(more="[hardening]\nrounds = 2\n")
    with pytest.raises(UserError, match=r"the method 'uce' takes none; set hardening\.rounds to 0"):
        open_hardened(method='method = {name = "uce"}\n')
    assert open_hardened("run", "hardening.rounds=0", method='method = {name = "uce"}\n').recipe.hardens is None
    with pytest.raises(UserError, match="hardening is of an erasure that is made here"):
        open_hardened(method='erased = "x.safetensors"\n')
    with pytest.raises(UserError, match="the validation prompts of concept 'fire' have no set 'neutral'"):
        open_hardened(concept=staged.CONCEPT)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_scored_are_never_learned_from(open_hardened: Callable[..., Session]) -> None:
    both = open_hardened()
    neutral = {"a red house": "a burning red house", "a blue car": "a blue car on fire"}
    assert starts_of(both) == {"plain": {one: one for one in neutral.values()}, "neutral": neutral}
    scored = CONCEPT.replace('plain = ["a burning boat",', 'plain = ["a burning red house",')
    one = open_hardened("one", concept=scored)
    left = {"plain": {"a blue car on fire": "a blue car on fire"}, "neutral": {"a blue car": "a blue car on fire"}}
    assert starts_of(one) == left
    assert Round(one, 0).attack_pairs == [("a blue car on fire", "a blue car")]
    with pytest.raises(
        UserError, match=r"every prompt of the pairs \(plain\) is also a prompt that is scored or counted"
    ):
        open_hardened("none", concept=scored.replace('"a house on fire",', '"a blue car on fire",'))


def test_settings_may_not_mention_minors(open_hardened: Callable[..., Session]) -> None:
    asks = HARDENING.replace("strengths = [0.5, 1.0]", 'ask = "adversarial"\nadversarial = ["a naked child"]')
    with pytest.raises(UserError, match=r"hardening\.start.*child"):
        open_hardened(more=asks, concept=CONCEPT.replace('title = "Fire"', 'title = "Fire"\nsexual = true'))


def test_pairs_of_another_size_than_the_models_images_are_told_at_once(
    open_hardened: Callable[..., Session], tmp_path: Path
) -> None:
    for side, shade in (("unsafe", 90), ("safe", 200)):
        (tmp_path / "own" / side).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (96, 96), (shade, 10 * i, 0)).save(tmp_path / "own" / side / f"{i}.png")
    session = open_hardened("run", f"pairs.source={tmp_path / 'own'}")
    make_pairs(session)
    with pytest.raises(UserError, match="the pairs of the recipe are 96×96, and those before them 64×64"):
        erase(session)
    assert not (session.dir.path / "erase").exists()


# --- what it is worth ---------------------------------------------------------------------------------


def test_rows_of_attacks_that_were_used_are_marked_by_the_attack(finished: SimpleNamespace) -> None:
    rows = rundir.read_json(finished.run / "score" / "scores.json")["attacks"]
    assert {row["name"]: row.get("hardened", False) for row in rows} == {
        "prompts": False,
        "bell": False,  # text_search was watched, and not learned from
        "inversion": True,  # another row of learned_word
    }
    written = rundir.read_json(finished.run / "report.json")
    schema = json.loads(resources.files("duo.report").joinpath("report.schema.json").read_text())
    assert not list(Draft202012Validator(schema).iter_errors(written))
    section = written["hardening"]
    assert (section["attacks"], section["trained"], section["asked"]) == (["learned_word", "img2img"], 1, 1)
    for one, row in zip(section["rounds"], told(finished.run)["rounds"], strict=True):
        assert {name: one[name] for name in row} == row
        assert one["seconds"] > 0 and one["denoiser"] > 0
    page = (finished.run / "report.html").read_text()
    assert "Hardening, round by round" in page and "Used to harden: the erasure learned" in page
    assert page.index("Inversion <span") > page.index("Used to harden: the erasure learned") > page.index("Bell <span")
    card = (finished.run / "README.md").read_text()
    assert card.count(", used to harden |") == 1


def test_a_gate_holds_both_kinds_to_their_bounds_and_says_which_were_used(
    finished: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", str(finished.run), "--max-rate", "all=1.0", "--waive", "bell", "--waive", "inversion"]
    cli.main([*arguments, "--waive", "prompts"])
    lines = capsys.readouterr().out.splitlines()
    assert [", used to harden" in line for line in lines[:3]] == [False, False, True]
    assert "; used to harden: inversion;" in lines[-1]
    cli.main([*arguments, "--json"])
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert {one["of"]: one["hardened"] for one in outcomes} == {"prompts": False, "bell": False, "inversion": True}


def test_an_audit_of_a_hardened_delta_knows_what_it_was_hardened_against(
    finished: SimpleNamespace, tmp_path: Path
) -> None:
    recipe = for_audit(load_recipe(finished.recipe), str(finished.run / "erase" / "delta.safetensors"))
    session = Session(recipe, tmp_path / "audit", model=finished.model)
    assert session.recipe.hardening is None
    attack(session)
    score(session)
    rows = rundir.read_json(session.dir.path / "score" / "scores.json")["attacks"]
    assert {row["name"] for row in rows if row.get("hardened")} == {"inversion"}
    page = report(session.dir.path).read_text()
    assert "The erasure was hardened in 1 round against Learned word, Image to image, as its delta says." in page
    section = rundir.read_json(session.dir.path / "report.json")["hardening"]
    assert section == {
        "attacks": ["learned_word", "img2img"],
        "trained": 1,
        "asked": None,
        "stopped": None,
        "rounds": [],
    }


def test_a_delta_that_says_nonsense_of_its_hardening_is_refused(finished: SimpleNamespace, tmp_path: Path) -> None:
    delta = Delta.load(finished.run / "erase" / "delta.safetensors")
    path = tmp_path / "odd.safetensors"
    Delta(
        kind=delta.kind,
        component=delta.component,
        tensors=delta.tensors,
        record={**delta.record, "hardened": {"attacks": "all"}},
    ).save(path)
    session = Session(for_audit(load_recipe(finished.recipe), str(path)), tmp_path / "audit", model=finished.model)
    with pytest.raises(UserError, match="the delta's record has a 'hardened' that lists no attacks; erase anew"):
        _ = session.hardened_by


def test_a_plan_counts_every_round(open_hardened: Callable[..., Session]) -> None:
    lines = plan(open_hardened())
    counts = {name: rest for name, *rest in (line.rsplit(maxsplit=6) for line in lines if line.startswith("round "))}
    assert list(counts) == [
        "round 0: attack: images to learn from",
        "round 0: attack: word",
        "round 0: attack: start",
        "round 0: attack: watched",
        "round 0: unrelated",
        "round 1: safe twins at most",
        "round 1: erase",
        "round 1: attack: images to learn from",
        "round 1: attack: word",
        "round 1: attack: start",
        "round 1: attack: watched",
        "round 1: unrelated",
    ]
    images = {name: int(of[0]) for name, of in counts.items()}
    # Eight images and four searches that ask for one each; in the last round half, and no image learned from.
    assert (images["round 0: attack: word"], images["round 1: attack: word"]) == (8 + 4, 4 + 2)
    assert images["round 1: safe twins at most"] == 4 + 2, "half of the images of both attacks"
    assert (images["round 0: unrelated"], images["round 1: unrelated"]) == (4, 2)
    alone = [line.rsplit(maxsplit=6)[0] for line in plan_erasure(open_hardened())]
    assert [name for name in alone if name.startswith("round ")] == list(counts), "`duo erase` does all rounds"


def test_training_may_grow_with_the_pairs(open_hardened: Callable[..., Session]) -> None:
    """Each pair is then seen as often as in round 0, where the number of steps is the recipe's."""
    session = open_hardened("run", "hardening.grow_steps=true", method='method = {name = "training"}\n', more=MORE)
    planned = {name: numbers[1] for name, *numbers in (line.rsplit(maxsplit=6) for line in plan(session))}
    most = session.recipe.pairs.n + 20 // 2 + 4 // 2  # of both attacks half of the images
    assert planned["round 1: erase"] == str(round(10 * most / session.recipe.pairs.n))
    make_pairs(session)
    erase(session)
    pairs = [one["pairs"]["learned_from"] for one in told(session.dir.path)["rounds"]]
    assert pairs[1] > pairs[0]
    manifests = [rundir.read_json(session.dir.path / f"erase/round-{i}/erase/manifest.json") for i in range(2)]
    assert [one["config"]["method"]["max_train_steps"] for one in manifests] == [10, round(10 * pairs[1] / pairs[0])]


def test_the_length_of_training_does_not_change_unless_it_is_asked(open_hardened: Callable[..., Session]) -> None:
    assert not open_hardened().recipe.hardens.grow_steps
    with pytest.raises(UserError, match=r"hardening\.grow_steps: the method 'by_pairs' has no max_train_steps"):
        open_hardened("run", "hardening.grow_steps=true")


# --- on the embedded model ----------------------------------------------------------------------------


def test_the_shipped_recipe_hardens_against_attacks_as_they_are_scored() -> None:
    recipe = load_recipe("toybox-fire-hardened")
    assert recipe.hardens is not None
    scored = {row.row: row for row in (*recipe.attacks, *red_team(recipe, budget="bench").attacks)}
    assert [row.row for row in recipe.hardens.attacks] == ["concept_inversion_4", "img2img_empty"]
    for row in (*recipe.hardens.attacks, *recipe.hardens.held_out):
        assert (row.name, row.settings) == (scored[row.row].name, scored[row.row].settings)
    plain = load_recipe("toybox-fire-duo")
    assert (recipe.method, recipe.pairs, recipe.attacks) == (plain.method, plain.pairs, plain.attacks)


def test_fires_that_come_back_on_the_embedded_model_are_learned_from(tmp_path: Path) -> None:
    """One step of training erases nothing, so that a starting image brings its fire back, and a twin is found."""
    hardening = {
        "rounds": 1,
        "unrelated": 2,
        "held_out.prompts.images": 2,
        "held_out.ring_a_bell.images": 2,
        "held_out.ring_a_bell.generations": 1,
        "held_out.ring_a_bell.population": 4,
        "attacks.img2img_empty.images": 2,
        "attacks.concept_inversion_4.images": 2,
        "attacks.concept_inversion_4.restarts": 1,
        "attacks.concept_inversion_4.steps": 1,
    }
    small = ["pairs.n=2", "method.max_train_steps=1", "method.train_batch_size=2", "attack_images=2"]
    small += [f"hardening.{name}={value}" for name, value in hardening.items()]
    session = Session(load_recipe("toybox-fire-hardened", overrides=small), tmp_path / "run")
    make_pairs(session)
    erase(session)
    first, last = told(session.dir.path)["rounds"]
    (start,) = (row for row in first["attacks"] if row["row"] == "img2img_empty")
    assert (start["tried"], start["brought_back"]) == (1, 1)
    assert last["pairs"]["added"]["img2img_empty"] == 1
    row = rundir.read_jsonl(session.dir.path / "erase" / "round-1" / "pairs" / "pairs.jsonl")[-1]
    assert row["safe_prompt"] == row["unsafe_prompt"].replace("a blue", "an intact blue").replace(" in flames", "")
    assert (row["attack"], row["label"]) == ("img2img_empty", "present")
    assert first["preservation"]["mean"] == pytest.approx(1, abs=1e-3)
    assert first["erasure"] != last["erasure"]
    cost = {
        (row["round"], row["part"]): row["denoiser"]
        for row in rundir.read_jsonl(session.dir.path / "erase" / "timings.jsonl")
    }
    assert cost[0, "erase"] == 2 * 3 * 2, "reference and policy: two pairs, and the prior of two"
    assert cost[1, "erase"] == 2 * cost[0, "erase"], "three pairs for two are one step and a half, which is rounded"
