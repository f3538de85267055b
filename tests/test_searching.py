"""A search for the strength on a tiny model: what is measured is made up, all else is the stages' own work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from duo import cli, rundir
from duo.errors import DivergedError, UserError
from duo.recipe import load_recipe
from duo.scores import Seen
from duo.stages import Session, attack, erase, make_pairs, plan_search, report, score, search_strength, searching, told
from duo.strength import StrengthSearch
from staged import CONCEPT, LEAVES, RECIPE, Nudge, contents

pytestmark = pytest.mark.usefixtures("quick_leaves")

ASKED = StrengthSearch(target_rate=0.02, min_preservation=0.9, search_images=2)
N = 50  # labels of a row, however few images were drawn


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that says what is seen at each strength: the rate of images with the concept, and what is kept."""

    def looks_like(rate: Callable[[float], float], kept: Callable[[float], float], *, original: float = 1.0) -> None:
        def seen(session: Session, row: Any, model: str) -> Seen:
            assert session.judge_config == session.concept.curator, "the judge of the scores has no part in it"
            found = round(N * (original if model == "original" else rate(session.method.size)))
            labels = ["present"] * found + ["corrupted"] * min(5, N - found)
            labels += ["absent"] * (N - len(labels))
            return Seen(labels=labels, prompts=[f"prompt {i}" for i in range(N)], variants=[""] * N)

        def preservation(session: Session, original: Any, erased: Any) -> dict[str, Any]:
            mean = kept(session.method.size)
            return {"metric": "1 - difference", "mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": N}

        monkeypatch.setattr(searching, "seen", seen)
        monkeypatch.setattr(searching, "preservation_of", preservation)

    return looks_like


def gentle(value: float) -> float:
    return 1 - 0.1 * value


def from_08(value: float) -> float:
    return 0.0 if value >= 0.8 else 0.2


def searched(session: Session, asked: StrengthSearch = ASKED) -> Any:
    make_pairs(session)
    return search_strength(session, asked)


def search_table(session: Session) -> dict[str, Any]:
    table: dict[str, Any] = rundir.read_json(session.dir.path / "search" / "search.json")
    return table


# --- a search that finds ----------------------------------------------------------------------------


def test_the_weakest_that_erases_enough_becomes_the_run_s_erasure(open_session: Any, looks: Any) -> None:
    looks(from_08, gentle)
    session = open_session()
    outcome = searched(session)
    # 0.5 → 1, then √0.5 = 0.707 (too weak), then √(0.707·1) = 0.841; 0.841/0.707 = 1.19 is near enough.
    assert [one.value for one in outcome.trials] == [0.5, 0.707, 0.841, 1.0]
    assert outcome.chosen == 0.841 and outcome.field == "size"
    best = outcome.best
    assert best is not None and best.rate is not None and best.preservation is not None and best.spoiled is not None
    assert (best.rate.mean, best.rate.low, best.rate.n) == (0.0, 0.0, N)
    assert best.rate.high == pytest.approx(0.0713, abs=1e-4), "Wilson's, of 0 in 50"
    assert (best.preservation.mean, best.spoiled.mean) == (pytest.approx(0.9159), 0.1)

    run = session.dir.path
    plainly = open_session("plainly", "method.size=0.841")
    make_pairs(plainly)
    erase(plainly)
    ours, theirs = contents(run / "erase"), contents(plainly.dir.path / "erase")
    told_by = json.loads(ours.pop("manifest.json"))
    assert told_by.pop("searched")["chosen"] == 0.841
    assert told_by == json.loads(theirs.pop("manifest.json"))
    assert ours == theirs, "byte for byte what `duo erase` makes with that value"
    assert "delta.safetensors" in ours and "log.jsonl" in ours
    described = rundir.read_json(run / "run.json")
    assert described["recipe"] == {**rundir.read_json(plainly.dir.path / "run.json")["recipe"]}
    assert {row["stage"] for row in rundir.read_jsonl(run / "timings.jsonl")} == {"pairs", "search", "erase"}


def test_what_trials_share_is_made_once_and_is_of_the_validation_split(
    open_session: Any, looks: Any, tiny_sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(from_08, gentle)
    session = open_session()
    make_pairs(session)
    drawn: list[str] = []
    generate = type(tiny_sd).generate

    def counted(self: Any, prompts: Any, **more: Any) -> Any:
        drawn.extend(prompts)
        return generate(self, prompts, **more)

    monkeypatch.setattr(type(tiny_sd), "generate", counted)
    outcome = search_strength(session, ASKED)
    assert set(drawn) == {"a house on fire", "a blue boat"}, "validation prompts alone"
    assert len(drawn) == (2 + 2) * (1 + len(outcome.trials)), "two of each set, of the original and of each trial"

    folder = session.dir.path
    trials = [folder / "search" / f"size-{one.value!r}" for one in outcome.trials]
    for name in ("pairs/unsafe/0000.png", "pairs/pairs.jsonl"):
        assert all(one.joinpath(name).samefile(folder / name) for one in trials)
    original = "attack/prompts/original/images/0000.png"
    assert all((one / original).samefile(folder / "search/original" / original) for one in trials)
    noise = [
        [row["seed"] for row in rundir.read_jsonl(one / f"attack/prompts/{model}/attempts.jsonl")]
        for one, model in ((folder / "search/original", "original"), *((one, "erased") for one in trials))
    ]
    assert all(one == noise[0] for one in noise)

    chosen = Session(outcome.of(session.recipe), folder, model=tiny_sd)
    attack(chosen)
    score(chosen)
    scored = {row["seed"] for row in rundir.read_jsonl(folder / "score/verdicts.jsonl")}
    assert not scored & set(noise[0])


def test_images_that_a_method_draws_for_itself_are_drawn_once(
    open_session: Any, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    @dataclass(frozen=True, kw_only=True)
    class Drawing(Nudge):
        takes_pairs: ClassVar[bool] = False
        other: float = 0.5

        def erase(self, model: Any, concept: Any, *, pairs: Any, run: Any) -> Any:
            image = run.folder / "own" / "0000.png"
            if not image.exists():
                drawn.append(self.size)
                rundir.write_image(image, model.generate(["a boat"], seeds=[0], sampling=run.sampling)[0])
            return super().erase(model, concept, pairs=[], run=run)

    monkeypatch.setitem(LEAVES, ("methods", "drawing"), Drawing)
    looks(from_08, gentle)
    assert search_strength(open_session("run", 'method={name="drawing"}'), ASKED).chosen == 0.841
    assert drawn == [0.5]
    drawn.clear()
    looks(lambda value: 0.2, gentle)
    asked = StrengthSearch(target_rate=0.02, min_preservation=0.9, search_images=2, strength="method.other", max_runs=2)
    search_strength(open_session("other", 'method={name="drawing"}'), asked)
    assert drawn == [0.5, 0.5], "on another field the images may depend"


def test_a_search_that_is_killed_goes_on_and_ends_with_the_same_bytes(
    open_session: Any, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(from_08, gentle)
    straight = open_session("straight")
    searched(straight)
    make_pairs(open_session("stopped"))
    write, budget = rundir.write_bytes, SimpleNamespace(left=0)

    def dying(path: Path, data: bytes) -> None:
        if budget.left == 0:
            raise KeyboardInterrupt
        budget.left -= 1
        write(path, data)

    monkeypatch.setattr(rundir, "write_bytes", dying)
    times = 0
    while times < 40:
        times, budget.left = times + 1, 17
        try:
            outcome = search_strength(open_session("stopped"), ASKED)
        except KeyboardInterrupt:
            continue
        break
    else:
        pytest.fail("the search never ended")
    assert times > 4 and outcome.chosen == 0.841
    found, wanted = contents(straight.dir.path.parent / "stopped"), contents(straight.dir.path)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_a_search_that_is_killed_while_it_takes_its_choice_over_goes_on(
    open_session: Any, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(from_08, gentle)
    finish, run = rundir.Stage.finish, open_session().dir.path

    def dying(self: rundir.Stage, **record: Any) -> None:
        if self.folder == run / "erase":
            raise KeyboardInterrupt
        finish(self, **record)

    monkeypatch.setattr(rundir.Stage, "finish", dying)
    with pytest.raises(KeyboardInterrupt):
        searched(open_session())
    monkeypatch.setattr(rundir.Stage, "finish", finish)
    assert (run / "erase/partial.json").exists() and not (run / "erase/manifest.json").exists()
    assert search_strength(open_session(), ASKED).chosen == 0.841
    ours, theirs = contents(run / "erase"), contents(run / "search/size-0.841/erase")
    assert ours.pop("manifest.json") != theirs.pop("manifest.json"), "which says that it was searched"
    assert ours == theirs


def test_a_finished_search_is_left_alone(open_session: Any, looks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks(from_08, gentle)
    first = searched(open_session())
    monkeypatch.setattr(Nudge, "erase", lambda *_, **__: pytest.fail("it was erased already"))
    session = open_session()
    session._model = None  # nothing may need the model again
    before = contents(session.dir.path)
    assert search_strength(session, ASKED) == first
    assert contents(session.dir.path) == before


def test_a_finished_search_may_lose_its_trials(open_session: Any, looks: Any) -> None:
    looks(from_08, gentle)
    session = open_session()
    first = searched(session)
    shutil.rmtree(session.dir.path / "search")
    before = contents(session.dir.path)
    assert search_strength(open_session(), ASKED) == first, "the erasure knows what was found"
    assert told(session, first)[1].split()[-4:] == ["–", "erases", "too", "little"], "its seconds went with them"
    with pytest.raises(UserError, match="an erasure that this search did not choose"):
        search_strength(open_session(), StrengthSearch(target_rate=0.02, min_preservation=0.8, search_images=2))
    assert contents(session.dir.path) == before


@pytest.mark.parametrize(
    ("record", "refused"),
    [
        ({"schema": 2, "asked": {}}, r"search\.json: schema 2 is not known here, only 1"),
        ([], r"search\.json has no table 'asked'"),
    ],
)
def test_a_finished_search_of_another_schema_is_refused_and_left(
    open_session: Any, looks: Any, record: object, refused: str
) -> None:
    looks(from_08, gentle)
    session = open_session()
    searched(session)
    (session.dir.path / "search" / "search.json").write_text(json.dumps(record))
    before = contents(session.dir.path)
    with pytest.raises(UserError, match=refused):
        search_strength(open_session(), ASKED)
    assert contents(session.dir.path) == before


def test_a_run_goes_on_from_its_searched_erasure_and_its_report_tells_of_it(
    open_session: Any, looks: Any, tiny_sd: Any
) -> None:
    looks(from_08, gentle)
    session = open_session()
    outcome = searched(session)
    chosen = Session(outcome.of(session.recipe), session.dir.path, model=tiny_sd)
    attack(chosen)
    score(chosen)
    page = " ".join(report(session.dir.path).read_text().split())
    assert "size = 0.841" in page and "searched on validation prompts" in page
    assert "0.916" in page and "meets both" in page and "erases too little" in page
    written = rundir.read_json(session.dir.path / "report.json")
    assert written["searched"] == {name: one for name, one in search_table(session).items() if name != "schema"}


# --- a search that does not find -----------------------------------------------------------------------


def test_where_no_value_meets_both_there_is_no_erasure_and_the_trials_are_kept(open_session: Any, looks: Any) -> None:
    looks(from_08, lambda value: 0.95 if value < 0.7 else 0.8)
    session = open_session()
    outcome = searched(session)
    assert outcome.chosen is None and outcome.best is None
    assert [one.value for one in outcome.trials] == [0.5, 0.707, 1.0]
    run = session.dir.path
    assert not (run / "erase").exists()
    assert (run / "search/size-0.5/erase/delta.safetensors").exists()
    table = search_table(session)
    assert table["chosen"] is None and table["ended"].startswith("0.707 erases too little and yet keeps too little")
    lines = "\n".join(told(session, outcome))
    assert "nearest: 1 keeps too little (concept in 0.0% of 50 images, kept 0.8000)" in lines
    assert "the strongest that keeps enough: 0.5 (concept in 20.0% of 50 images, kept 0.9500)" in lines
    with pytest.raises(ValueError, match="no value was chosen"):
        outcome.of(session.recipe)


def test_another_question_has_the_trials_of_the_one_before(
    open_session: Any, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(from_08, lambda value: 0.95 if value < 0.7 else 0.8)
    searched(open_session())
    monkeypatch.setattr(Nudge, "erase", lambda *_, **__: pytest.fail("all of it was measured already"))
    easier = StrengthSearch(target_rate=0.02, min_preservation=0.8, search_images=2, max_runs=3)
    outcome = search_strength(open_session(), easier)
    assert outcome.chosen == 1.0
    with pytest.raises(UserError, match=r"holds an erasure that this search did not choose; name another --out"):
        search_strength(open_session(), ASKED)


def test_points_out_of_order_are_told_and_the_best_is_taken(open_session: Any, looks: Any) -> None:
    rates, kept = {0.5: 0.1, 1.0: 0.3, 4.0: 0.0, 2.0: 0.0, 1.41: 0.2, 1.68: 0.0}, {2.0: 0.93, 4.0: 0.97, 1.68: 0.92}
    looks(rates.__getitem__, lambda value: kept.get(value, 0.95))
    session = open_session()
    outcome = searched(session)
    assert [one.value for one in outcome.trials] == [0.5, 1.0, 1.41, 1.68, 2.0, 4.0]
    assert outcome.chosen == 4.0, "not the weakest that erases enough, but the one that keeps most"
    lines = told(session, outcome)
    assert sum("not monotone: 1 let more through than 0.5 (30.0% to 10.0%" in line for line in lines) == 1
    assert any("not monotone: 4 kept more than 2" in line for line in lines)


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(
    open_session: Any, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Nudge.erase

    def fragile(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.size > 0.9:
            raise DivergedError("step 3: loss nan")
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Nudge, "erase", fragile)
    looks(from_08, gentle)
    session = open_session()
    outcome = searched(session)
    assert outcome.chosen == 0.841
    assert [one.diverged for one in outcome.trials] == [False, False, False, True]
    assert rundir.read_json(session.dir.path / "search/size-1.0/manifest.json")["diverged"] == "step 3: loss nan"
    assert any(line.split()[0] == "1" and line.endswith("diverged") for line in told(session, outcome))
    assert search_strength(open_session(), ASKED) == outcome


# --- what is refused -----------------------------------------------------------------------------------


def test_a_row_that_does_not_bring_the_concept_out_of_the_original_is_told(open_session: Any, looks: Any) -> None:
    looks(from_08, gentle, original=0.5)
    session = open_session()
    with pytest.raises(UserError, match=r"row 'prompts' brings the concept from the original model in 25 of 50 valid"):
        searched(session)
    assert not list((session.dir.path / "search").glob("size-*"))
    assert search_strength(open_session("run", "score.reliable=0.5"), ASKED).chosen == 0.841


@pytest.mark.parametrize(
    ("overrides", "asked", "message"),
    [
        (
            [],
            {"strength": "sise"},
            "strength is 'sise', and the method 'nudge' has no such field (did you mean 'size'?)",
        ),
        (["method.size=0"], {}, "method.size is 0.0, where a search cannot begin; give a number above 0"),
        (["method.size=-1"], {}, "method.size is -1.0, where a search cannot begin"),
        (["validation=true"], {}, "validation is true, so the validation prompts are what is scored"),
        (["score.preservation=none"], {}, "score.preservation is 'none', so what is kept cannot be told"),
        ([], {"search_rows": ("prompt",)}, "search_rows: no attack has the row 'prompt' (did you mean 'prompts'?)"),
        ([], {"search_rows": ("bell",)}, "the validation prompts of concept 'fire' have no set 'neutral'"),
        ([], {"strict": True}, "2 images without the concept leave room for more than a target_rate of 0.02: strict"),
        (["attacks.prompts.name=text_search"], {}, "no attack row of the recipe asks by prompts of the concept"),
        ([], {}, "pairs is not finished; run `duo pairs` first"),
    ],
)
def test_what_cannot_be_searched_is_told_before_anything_is_written(
    open_session: Any, tmp_path: Path, overrides: list[str], asked: dict[str, Any], message: str
) -> None:
    near = [] if "validation=true" not in overrides else ["score.near_miss=0"]
    rows = [f"attacks.{row}.prompts=plain" for row in ("bell", "inversion")] if near else []
    session = open_session("never", *overrides, *near, *rows)
    wanted = {"target_rate": 0.02, "min_preservation": 0.9, "search_images": 2, **asked}
    with pytest.raises(UserError, match=re.escape(message)):
        search_strength(session, StrengthSearch(**wanted))
    assert not (tmp_path / "never").exists()


def test_what_is_no_strength_is_told(open_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mute(Nudge):
        takes_pairs: ClassVar[bool] = False
        strength: ClassVar[str | None] = None  # type: ignore[assignment]
        word: str = "fire"
        steps: int = 3

    monkeypatch.setitem(LEAVES, ("methods", "mute"), Mute)
    session = open_session("run", 'method={name="mute"}')
    for more, message in (
        ({}, "the method 'mute' does not say which field is its strength; name one as strength"),
        ({"strength": "word"}, "method.word is 'fire', where a search cannot begin"),
        ({"strength": "steps", "weakest": 1.5}, "weakest is 1.5, but method.steps counts whole numbers; give one"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            search_strength(session, StrengthSearch(target_rate=0.02, min_preservation=0.9, **more))


def test_prompts_of_other_people_s_files_choose_nothing(open_session: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs.csv").write_text("prompt\na burning hut\n")
    theirs = (
        'prompt_sets={theirs={path="PATH"}}'.replace("PATH", str(tmp_path / "theirs.csv")),
        "attacks.prompts.prompts=theirs",
    )
    with pytest.raises(UserError, match="no attack row of the recipe asks by prompts of the concept"):
        search_strength(open_session("run", *theirs), ASKED)
    named = StrengthSearch(target_rate=0.02, min_preservation=0.9, search_rows=("prompts",))
    with pytest.raises(UserError, match="the row 'prompts' has prompts of prompt_sets, which would be the scored ones"):
        search_strength(open_session("run", *theirs), named)


def test_an_erasure_that_was_not_searched_is_not_written_over(open_session: Any, looks: Any) -> None:
    looks(from_08, gentle)
    session = open_session()
    make_pairs(session)
    erase(session)
    with pytest.raises(UserError, match=r"erase holds an erasure that this search did not choose"):
        search_strength(open_session(), ASKED)
    assert not (session.dir.path / "search").exists()


def test_trials_of_other_settings_are_not_mixed_in(open_session: Any, looks: Any) -> None:
    looks(lambda value: 0.2, gentle)
    searched(open_session())
    more = StrengthSearch(target_rate=0.02, min_preservation=0.9, search_images=3)
    with pytest.raises(UserError, match=r"size-0\.5 was made with attacks\.prompts\.attack\.images = 2, not 3"):
        search_strength(open_session(), more)


# --- the command line and the plan ------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, tiny_sd: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that gives `duo VERB` the recipe of the tiny model and a run folder."""
    (tmp_path / "fire.toml").write_text(CONCEPT)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.setattr("duo.stages.session.load_family", lambda *_, **__: tiny_sd)
    where = (str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"))
    return lambda verb, *more: cli.main([verb, *where, *more])


FLAGS = ("--target-rate", "0.02", "--min-preservation", "0.9", "--search-images", "2")


def test_the_verb_prints_the_trade_off_and_its_exit_code_says_whether_it_found(
    command: Any, looks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("pairs") == 0
    looks(from_08, lambda value: 0.95 if value < 0.7 else 0.8)
    capsys.readouterr()
    assert command("erase", *FLAGS) == 1
    out = capsys.readouterr().out
    assert "no value of size that was tried meets both" in out and "delta.safetensors" not in out
    looks(from_08, gentle)
    assert command("erase", *FLAGS[:2], "--min-preservation", "0.7", *FLAGS[4:]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[:5]] == ["size", "0.5", "0.707", "0.841", "1"], "the others were there"
    assert out[3].endswith("chosen") and out[3].split()[1:6] == ["0.0%", "0.0%", "to", "7.1%", "10.0%"]
    assert out[-1] == str(tmp_path / "run/erase/delta.safetensors") and Path(out[-1]).exists()
    assert out[-2] == f"attack and score it with `duo attack {tmp_path / 'run'} --report`"
    again = rundir.read_json(tmp_path / "run/run.json")["command"]
    assert again == f"duo run {tmp_path / 'recipe.toml'} --set method.size=0.841 --seed 0 --out runs/again"
    assert command("erase", "--target-rate", "3", "--min-preservation", "0.7") == 2
    assert "target_rate is 3, expected a share" in capsys.readouterr().err


def test_a_dry_run_counts_the_runs_at_most_and_writes_nothing(
    command: Any, open_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("pairs") == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert command("erase", "--dry-run", *FLAGS, "--max-runs", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {line[:34].strip(): line[34:].split() for line in lines if ":" in line or line.startswith("un")}
    assert "erase, at most 3 times" in "\n".join(lines)
    assert counts["attack: prompts"][0] == "8", "two images of the original model and of three erasures"
    assert counts["unrelated prompts"][0] == "8"
    assert lines[-1].startswith("at most 3 runs, from size = 0.5 on; wanted: at most 2.0% with the concept")
    assert command("erase", "--dry-run") == 0
    assert "attack: prompts" not in capsys.readouterr().out
    assert contents(tmp_path / "run") == before
    assert plan_search(open_session(), ASKED)[-1].startswith("at most 6 runs")


# --- the embedded model ---------------------------------------------------------------------------------


def test_on_the_embedded_model_a_search_is_a_search(tmp_path: Path) -> None:
    """UCE at 3.4 and 1.7: nothing is made up here, and the delta is what the chosen value alone gives."""
    quick = ("sampling.num_inference_steps=2", "score.reliable=0")
    asked = StrengthSearch(target_rate=1, min_preservation=0.5, max_runs=2, search_rows=("prompts",), search_images=2)
    session = Session(load_recipe("toybox-fire-uce", overrides=quick), tmp_path / "run")
    outcome = search_strength(session, asked)
    assert [one.value for one in outcome.trials] == [1.7, 3.4]
    assert outcome.metric == "1 - toybox-LPIPS" and outcome.judge == "toybox"
    kept = {one.value: one.preservation.mean for one in outcome.trials if one.preservation is not None}
    assert outcome.chosen == max(kept, key=lambda value: (kept[value], -value)) and max(kept.values()) < 1
    alone = load_recipe("toybox-fire-uce", overrides=[*quick, f"method.erase_scale={outcome.chosen}"])
    erase(Session(alone, tmp_path / "alone", model=session.model))
    ours, theirs = (tmp_path / name / "erase/delta.safetensors" for name in ("run", "alone"))
    assert ours.read_bytes() == theirs.read_bytes()
