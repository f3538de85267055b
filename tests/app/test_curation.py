"""Pairs that are kept or rejected: on disk at once, and left out of what an erasure learns from."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import staged
from duo import rundir
from duo.app.curation import Curation, Filters, Pair, score_names, shown_part
from duo.app.places import Place, find_places
from duo.errors import UserError
from duo.pairs import PairFiles, Pairs
from duo.plugins import Verdict
from duo.stages import Session, erase, make_pairs


def decisions(folder: Path) -> list[Any]:
    return [row.get("decision") for row in rundir.read_jsonl(folder / "pairs.jsonl")]


# --- places -------------------------------------------------------------------------------------------


def test_the_folder_of_a_runs_pairs_stands_for_the_run(place: Place, own_folder: Path) -> None:
    assert place.run is not None and place.pairs is not None
    assert Place.at(place.pairs) == place
    assert Place.at(own_folder) == Place(name=str(own_folder), run=None, pairs=own_folder)


@pytest.mark.parametrize("name", ["run.json", "pairs/manifest.json"])
def test_a_run_of_another_schema_is_no_place(with_pairs: Any, name: str) -> None:
    path = with_pairs.dir.path / name
    path.write_text(json.dumps(rundir.read_json(path) | {"schema": 2}))
    with pytest.raises(UserError, match=rf"{name}: schema 2 is not known here, only 1"):
        Place.at(with_pairs.dir.path)


def test_what_is_no_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    with pytest.raises(UserError, match="is neither a run nor a folder with unsafe/ and safe/"):
        Place.at(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        Place.at(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run is named, and there is none in runs/"):
        find_places([])
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "mine")
    assert [one.name for one in find_places([])] == ["runs/mine"]


# --- decisions ----------------------------------------------------------------------------------------


def test_a_decision_is_on_disk_at_once_and_changes_nothing_else(place: Place) -> None:
    assert place.pairs is not None
    curation, before = Curation(place), rundir.read_jsonl(place.pairs / "pairs.jsonl")
    assert curation.decide("0001", "reject") == {"undecided": 2, "keep": 0, "reject": 1}
    assert decisions(place.pairs) == [None, "reject", None]
    assert curation.decide("0000", "keep") == {"undecided": 1, "keep": 1, "reject": 1}
    assert [pair.decision for pair in curation.pairs()] == ["keep", "reject", None]
    for name in ("0000", "0001"):
        curation.decide(name, None)
    assert rundir.read_jsonl(place.pairs / "pairs.jsonl") == before


def test_pairs_without_rows_get_them(own_folder: Path) -> None:
    curation = Curation(Place.at(own_folder))
    curation.decide("0002", "reject")
    rows = rundir.read_jsonl(own_folder / "pairs.jsonl")
    assert rows[2] == {"unsafe": "unsafe/0002.png", "safe": "safe/0002.png", "decision": "reject"}
    assert Pairs.read(own_folder).names == ["0000", "0001"]


def test_rows_that_do_not_name_their_images_are_matched_by_order(own_folder: Path) -> None:
    rundir.write_jsonl(own_folder / "pairs.jsonl", [{"unsafe_prompt": text} for text in "abc"])
    Curation(Place.at(own_folder)).decide("0001", "keep")
    rows = rundir.read_jsonl(own_folder / "pairs.jsonl")
    assert [(row["unsafe_prompt"], row["unsafe"]) for row in rows] == [
        (text, f"unsafe/000{i}.png") for i, text in enumerate("abc")
    ]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"note": "a"}, {"note": "b"}], "row 1 of pairs.jsonl does not name its pair"),
        ([{"unsafe": "unsafe/0009.png"}], "row 1 of pairs.jsonl is of unsafe/0009.png, which is not there"),
        ([{"unsafe": "unsafe/0001.png"}] * 2, "row 2 of pairs.jsonl is of a pair that another row is of"),
    ],
)
def test_rows_that_fit_no_pair_are_told_and_kept(own_folder: Path, rows: list[Any], told: str) -> None:
    rundir.write_jsonl(own_folder / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=told):
        Curation(Place.at(own_folder)).decide("0000", "keep")
    assert rundir.read_jsonl(own_folder / "pairs.jsonl") == rows


def test_what_cannot_be_decided_is_refused(place: Place) -> None:
    assert place.pairs is not None
    curation, before = Curation(place), (place.pairs / "pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match="has no pair called '0007'"):
        curation.decide("0007", "keep")
    with pytest.raises(UserError, match="the decision is 'maybe', expected keep or reject, or none"):
        curation.decide("0000", "maybe")
    assert place.run is not None
    # another thread is another user
    with place.run.locked(), ThreadPoolExecutor(1) as other, pytest.raises(UserError, match="is in use by"):
        other.submit(curation.decide, "0000", "keep").result()
    assert (place.pairs / "pairs.jsonl").read_bytes() == before


def test_nothing_is_decided_before_the_pairs_are_made_or_after_the_erasure(erased: Any) -> None:
    place = Place.at(erased.dir.path)
    assert place.pairs is not None
    before = (place.pairs / "pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match="was trained on these pairs"):
        Curation(place).decide("0000", "reject")
    (erased.dir.path / "erase" / "manifest.json").rename(erased.dir.path / "erase" / "partial.json")
    assert "was trained on these pairs" in str(Curation(place).locked())
    (place.pairs / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished; decide once `duo pairs` is done"):
        Curation(place).decide("0000", "reject")
    assert (place.pairs / "pairs.jsonl").read_bytes() == before


def test_a_run_without_pairs_is_told(open_session: Any) -> None:
    session = open_session()
    session.dir.path.mkdir()
    (session.dir.path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no pairs"):
        Curation(Place.at(session.dir.path))


def test_sexual_pairs_that_mention_minors_are_not_shown(own_folder: Path) -> None:
    rows = [{"unsafe": f"unsafe/{i:04d}.png", "unsafe_prompt": "a nude boy"} for i in range(3)]
    rundir.write_jsonl(own_folder / "pairs.jsonl", rows)
    with pytest.raises(UserError, match="mentions a minor"):
        Curation(Place.at(own_folder)).pairs()


# --- what the erasure learns from ---------------------------------------------------------------------


def erase_config(session: Session) -> Any:
    return json.loads((session.dir.path / "erase" / "manifest.json").read_text())["config"]["pairs"]


def test_the_erasure_learns_from_the_kept_pairs(with_pairs: Any) -> None:
    folder = with_pairs.dir.stage("pairs").folder
    whole = with_pairs.dir.stage("pairs").require("pairs")["digest"]
    Curation(Place.at(with_pairs.dir.path)).decide("0001", "reject")
    erase(with_pairs)
    logged = rundir.read_jsonl(with_pairs.dir.path / "erase" / "log.jsonl")
    assert logged == [{"step": 1, "loss": 2.0}]  # the quick method logs how many pairs it was given
    assert erase_config(with_pairs) == Pairs.read(folder).digest() != whole
    before = staged.contents(with_pairs.dir.path)
    erase(with_pairs)
    assert staged.contents(with_pairs.dir.path) == before


def test_keeping_all_is_the_same_erasure_as_deciding_nothing(with_pairs: Any) -> None:
    for name in ("0000", "0001", "0002"):
        Curation(Place.at(with_pairs.dir.path)).decide(name, "keep")
    erase(with_pairs)
    assert erase_config(with_pairs) == with_pairs.dir.stage("pairs").require("pairs")["digest"]


def test_a_finished_erasure_is_held_to_the_pairs_that_it_learned_from(erased: Any) -> None:
    path = erased.dir.path / "pairs" / "pairs.jsonl"
    rows = rundir.read_jsonl(path)
    rundir.write_jsonl(path, [{**rows[0], "decision": "reject"}, *rows[1:]])  # by hand, past the page
    with pytest.raises(UserError, match="erase was made with pairs = "):
        erase(erased)
    rundir.write_jsonl(path, rows)
    erase(erased)


def test_a_changed_image_is_found_though_its_pair_is_rejected(with_pairs: Any) -> None:
    folder = with_pairs.dir.stage("pairs").folder
    Curation(Place.at(with_pairs.dir.path)).decide("0001", "reject")
    rundir.read_image(folder / "safe" / "0002.png", remedy="").rotate(90).save(folder / "safe" / "0001.png")
    with pytest.raises(UserError, match="images were changed"):
        erase(with_pairs)


def test_an_erasure_from_no_pair_is_refused(with_pairs: Any) -> None:
    for name in ("0000", "0001", "0002"):
        Curation(Place.at(with_pairs.dir.path)).decide(name, "reject")
    with pytest.raises(UserError, match="all 3 pairs are rejected"):
        erase(with_pairs)
    assert not (with_pairs.dir.path / "erase").exists()


def test_rejected_pairs_of_a_folder_are_not_brought(open_session: Any, with_pairs: Any) -> None:
    folder = with_pairs.dir.stage("pairs").folder
    Curation(Place.at(with_pairs.dir.path)).decide("0000", "reject")
    rows = rundir.read_jsonl(folder / "pairs.jsonl")
    brought = open_session("second", f"pairs.source={folder}")
    pairs = make_pairs(brought)
    assert len(pairs) == 2
    assert [row["unsafe_prompt"] for row in pairs.rows] == [row["unsafe_prompt"] for row in rows[1:]]
    assert pairs.unsafe[0].tobytes() == Pairs.of(PairFiles.find(folder, rejected=True)).unsafe[1].tobytes()


def test_the_report_shows_the_kept_pairs_and_counts_the_others(with_pairs: Any) -> None:
    from duo.report.records import _account, _pairs

    run = with_pairs.dir.path
    Curation(Place.at(run)).decide("0001", "reject")
    assert [pair.index for pair in _pairs(run / "pairs")] == [0, 2]
    assert _account(run)["rejected_by_hand"] == 1


# --- filters ------------------------------------------------------------------------------------------


def pair(name: str, prompt: str, decision: str | None = None) -> Pair:
    return Pair(
        name=name,
        unsafe=Path("u"),
        safe=Path("s"),
        prompts={"unsafe": prompt, "safe": "A Quiet House"},
        decision=decision,
    )


def verdicts(unsafe: float, safe: float) -> dict[str, Verdict]:
    return {
        "unsafe": Verdict(label="present", scores={"fire": unsafe}),
        "safe": Verdict(label="absent", scores={"fire": safe}),
    }


PAIRS = [pair("0000", "a burning car", "keep"), pair("0001", "a burning boat", "reject"), pair("0002", "a Car")]
VERDICTS = {"0000": verdicts(0.9, 0.1), "0001": verdicts(0.6, 0.3)}


@pytest.mark.parametrize(
    ("filters", "taken"),
    [
        (Filters(), ["0000", "0001", "0002"]),
        (Filters(state="undecided"), ["0002"]),
        (Filters(state="keep"), ["0000"]),
        (Filters(state="reject"), ["0001"]),
        (Filters(contains=" CAR "), ["0000", "0002"]),
        (Filters(contains="quiet"), ["0000", "0001", "0002"]),
        (Filters(contains="0001"), ["0001"]),
        (Filters(contains="car", state="keep"), ["0000"]),
        (Filters(score="fire", least=0.6), ["0000", "0001"]),
        (Filters(score="fire", least=0.61), ["0000"]),
        (Filters(score="fire", most=0.6), ["0001"]),
        (Filters(score="fire", side="safe", least=0.2, most=0.3), ["0001"]),
        (Filters(score="smoke", least=0.0), []),
        (Filters(score="fire"), ["0000", "0001", "0002"]),
    ],
)
def test_filters_take_what_holds_every_condition(filters: Filters, taken: list[str]) -> None:
    assert [one.name for one in PAIRS if filters.takes(one, VERDICTS.get(one.name, {}))] == taken


def test_scores_are_those_of_the_curator(place: Place) -> None:
    told: list[float] = []
    curation = Curation(place)
    found = curation.judged(staged.ByPrompt(), told.append)
    assert told == [1.0]
    for one in curation.pairs():
        expected = staged.ByPrompt()([rundir.read_image(one.unsafe, remedy=""), rundir.read_image(one.safe, remedy="")])
        assert found[one.name] == dict(zip(("unsafe", "safe"), expected, strict=True))
        assert [found[one.name][side].label for side in ("unsafe", "safe")] == ["present", "absent"]
    assert score_names(found) == [("unsafe", "rank"), ("safe", "rank")]


def test_parts_of_many_pairs() -> None:
    assert shown_part(PAIRS, 0, 2) == (PAIRS[:2], 2)
    assert shown_part(PAIRS, 1, 2) == (PAIRS[2:], 2)
    assert shown_part(PAIRS, 9, 2) == (PAIRS[2:], 2)
    assert shown_part([], 0, 2) == ([], 1)
