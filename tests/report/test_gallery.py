"""Which images a page shows: at the same seeds, of the best setting, the worst first, no more than are wanted."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic

from duo.errors import UserError
from duo.report import gallery
from duo.report.gallery import Gallery, read_gallery
from duo.report.records import read_run
from duo.report.wording import strongest

TWO = {"prompts": (60, 2, 3), "p4d": (60, 30, 0)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic.write_run(tmp_path / "demo", images=8, attacks=TWO)


def _read(run: Path, **options: Any) -> Gallery:
    scores = read_run(run).scores
    return read_gallery(run, scores, returned=strongest(scores), **options)


def _change(path: Path, change: Callable[[dict], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    synthetic.write_rows(path, [row for row in rows if change(row) is not False])


def _verdicts(run: Path, change: Callable[[dict], object]) -> None:
    _change(run / "score/verdicts.jsonl", change)


def _seen(run: Path, scores: dict[tuple[str, int], float]) -> None:
    """The concept is seen on the erased model in these images alone, with these scores."""

    def change(row: dict) -> None:
        if row["model"] == "erased" and row["set"] in TWO:
            score = scores.get((row["set"], row["index"]))
            row.update(
                label="absent" if score is None else "present", scores={} if score is None else {"present": score}
            )

    _verdicts(run, change)


def test_the_worst_attack_comes_first_and_of_each_what_the_judge_is_surest_of(run: Path) -> None:
    _seen(run, {("prompts", 1): 0.9, ("p4d", 0): 0.6, ("p4d", 2): 0.99, ("p4d", 5): 0.6})
    first, second = _read(run).returns
    assert [(first.attack.name, p.index, p.score) for p in first.worst] == [
        ("p4d", 2, 0.99),
        ("p4d", 0, 0.6),
        ("p4d", 5, 0.6),
    ]
    assert [(second.attack.name, p.index) for p in second.worst] == [("prompts", 1)]
    assert first.worst[0].seed == 1002 and first.worst[0].path == run / "attack/p4d/erased/images/0002.png"


def test_of_a_large_run_the_worst_are_taken_from_each_attack_in_turn_and_the_rest_is_linked(run: Path) -> None:
    _seen(run, {("prompts", 1): 0.1, ("prompts", 4): 0.2} | {("p4d", i): 0.5 + i / 100 for i in range(6)})
    read = _read(run, most=3)
    first, second = read.returns
    assert [p.index for p in first.worst] == [5, 4] and [p.index for p in second.worst] == [4]
    assert first.rest == tuple(f"attack/p4d/erased/images/{i:04d}.png" for i in range(4))
    assert second.rest == ("attack/prompts/erased/images/0001.png",)
    assert (read.embedded, read.linked) == (3, 5)


def test_grids_are_of_the_first_images_at_equal_seeds(run: Path) -> None:
    _change(run / "attack/p4d/erased/attempts.jsonl", lambda row: row.update(seed=7) if row["index"] == 1 else None)
    grids = _read(run).grids
    assert [[p.index for p in pair] for pair in grids["p4d"]] == [[i, i] for i in (0, 2, 3, 4, 5, 6)]
    assert [pair[0].model + pair[1].model for pair in grids["unrelated"]] == ["originalerased"] * gallery.SHOWN_PER_SET


def test_grids_of_an_attack_in_several_settings_are_of_the_one_that_is_told(run: Path) -> None:
    part = {"n": 30, "low": 0.0, "high": 1.0}
    names = ("weak", "strong")

    def score(data: dict) -> None:
        for row in data["attacks"]:
            if row["name"] == "p4d":
                row["variants"] = [
                    {"variant": name, "detected": seen, "rate": seen / 30, **part}
                    for name, seen in zip(names, (0, 30), strict=True)
                ]

    path = run / "score/scores.json"
    data = json.loads(path.read_text())
    score(data)
    path.write_text(json.dumps(data))
    for model in ("original", "erased"):
        _change(run / f"attack/p4d/{model}/attempts.jsonl", lambda row: row.update(variant=names[row["index"] % 2]))
    assert [pair[1].index for pair in _read(run).grids["p4d"]] == [1, 3, 5, 7]


def test_labels_of_all_judges_count_in_whatever_order_they_come(run: Path) -> None:
    """A second judge's row for the last image comes after that was left out: it must not look judged by one alone."""
    path = run / "score/verdicts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    second = [{**row, "judge": "second", "label": "present"} for row in rows if row["set"] == "unrelated"]
    synthetic.write_rows(path, [*rows, *reversed(second)])
    pictures = [picture for pair in _read(run).grids["unrelated"] for picture in pair]
    assert [picture.index for picture in pictures] == [i for i in range(6) for _ in range(2)]
    assert all(picture.labels == ("absent", "present") for picture in pictures)


def test_a_verdict_without_its_attempt_is_an_error(run: Path) -> None:
    _seen(run, {("p4d", 7): 0.9, ("p4d", 1): 0.8})
    _change(run / "attack/p4d/erased/attempts.jsonl", lambda row: row["index"] != 7)
    with pytest.raises(
        UserError, match=r"verdicts\.jsonl: 2 images of 'p4d' with the concept, but 1 of them in .*attempts"
    ):
        _read(run)


def test_reading_a_large_run_holds_no_rows(run: Path) -> None:
    """30 MB of records with long prompts: no more is held than the numbers and paths of what is linked."""
    n, filler = 6000, "x" * 2000
    place = run / "attack/p4d/erased"
    attempt = json.loads((place / "attempts.jsonl").read_text().splitlines()[0])
    rows = ({**attempt, "index": i, "seed": i, "prompt": filler} for i in range(n))
    (place / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = {"set": "p4d", "model": "erased", "judge": "toybox", "label": "present", "scores": {"present": 0.5}}
    with (run / "score/verdicts.jsonl").open("w") as file:
        for i in range(n):
            file.write(json.dumps({**verdict, "index": i, "prompt": filler, "seed": i}) + "\n")
            file.write(
                json.dumps({**verdict, "set": "unrelated", "label": "absent", "index": i, "prompt": filler, "seed": i})
                + "\n"
            )
    scores = read_run(run).scores
    returned = strongest(scores)
    tracemalloc.start()
    read = read_gallery(run, scores, returned=returned)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (read.embedded, read.linked) == (gallery.WORST, n - gallery.WORST)
    assert peak < 6e6, f"{peak / 1e6:.1f} MB"
