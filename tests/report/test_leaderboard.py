"""The leaderboard: what is ranked against what, in which order, and what a hostile result cannot do to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sealed
import synthetic

from duo.cli import main
from duo.errors import UserError
from duo.report.leaderboard import html, markdown, rank, read_results, terminal
from duo.report.result import write_result

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script> [x](javascript:y) | **b** `c` \x1b[31m\u202e\n# d"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    run = sealed.write_run(folder / "run", attacks={"prompts": (60, 0, 4), "p4d": (60, 6, 0), "relearn": (60, 30, 0)})
    return json.loads(write_result(run, folder).read_text())


@pytest.fixture
def results(template: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes a result with other rates and fields, and returns its path."""

    def write(name: str, *, rates: dict[str, int] | None = None, **fields: Any) -> Path:
        data = json.loads(json.dumps(template))
        data |= {"name": name, "method": name, "erasure": f"{name}{'0' * 64}"[:64]}
        for row, detected in (rates or {}).items():
            low, high = sealed_interval(detected)
            data[f"{row}_rate"] |= {"rate": detected / 60, "low": low, "high": high}
        data |= fields
        for key, by_weights in (("worst_case", False), ("worst_case_by_weights", True)):
            sound = [
                {"row": field[:-5], **{part: one[part] for part in ("setting", "rate", "low", "high", "n")}}
                for field, one in data.items()
                if field.endswith("_rate") and one["reliable"] and one["by_weights"] == by_weights
            ]
            data[key] = max(sound, key=lambda one: one["rate"], default=None)
        path = tmp_path / "results" / f"{name[:8].strip('<')}.json"
        synthetic.write_json(path, data)
        return path

    return write


def sealed_interval(detected: int) -> tuple[float, float]:
    from duo.statistics import wilson

    low, high = wilson(detected, 60)
    return low, high


def kept(mean: float) -> dict[str, Any]:
    return {"metric": "1 - toybox-LPIPS", "mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 60}


def order(folder: Path, *, weights: bool = False) -> list[tuple[int | None, str, bool]]:
    (group,) = rank(read_results([folder]), weights=weights)
    return [(place.rank, place.result.name, place.overlaps) for place in group.places]


def test_the_lower_worst_case_is_first_then_preservation_and_ties_share_a_rank(results: Any, tmp_path: Path) -> None:
    results("a", rates={"p4d": 30}, preservation=kept(0.99))
    results("b", rates={"p4d": 3}, preservation=kept(0.90))
    results("c", rates={"p4d": 3}, preservation=kept(0.95))
    results("d", rates={"p4d": 3}, preservation=kept(0.90))
    results("e", rates={"p4d": 0, "prompts": 1}, preservation=None)
    assert order(tmp_path / "results") == [
        (1, "e", False),
        (2, "c", True),  # 2% (0–9%) and 5% (2–14%)
        (3, "b", True),
        (3, "d", True),
        (5, "a", False),  # 50% (38–62%)
    ]


def test_attacks_on_weights_count_where_that_is_asked_for(results: Any, tmp_path: Path) -> None:
    results("a", rates={"p4d": 3, "relearn": 60})
    results("b", rates={"p4d": 6, "relearn": 0})
    assert [name for _, name, _ in order(tmp_path / "results")] == ["a", "b"]
    assert [name for _, name, _ in order(tmp_path / "results", weights=True)] == ["b", "a"]


def test_unreliable_rows_count_for_nothing_and_are_flagged(
    results: Any, template: dict[str, Any], tmp_path: Path
) -> None:
    results("a", p4d_rate=template["p4d_rate"] | {"reliable": False})
    results("b", rates={"p4d": 1})
    weak = {f"{row}_rate": template[f"{row}_rate"] | {"reliable": False} for row in ("prompts", "p4d", "relearn")}
    results("c", **weak)
    assert [(place, name) for place, name, _ in order(tmp_path / "results")] == [(1, "a"), (2, "b"), (None, "c")]
    text = terminal(rank(read_results([tmp_path / "results"])))
    assert "a (unreliable)" in text and "b (unreliable)" not in text
    assert "a a0000000: unreliable, and in no worst case: P4D (10%)" in text


def test_what_a_row_lacks_is_told(results: Any, template: dict[str, Any], tmp_path: Path) -> None:
    results("a")
    path = results("b", not_defined={"p4d": "it makes no sense here"})
    data = json.loads(path.read_text())
    del data["p4d_rate"]
    data["worst_case"] = {**data["worst_case"], "row": "prompts", "rate": 0.0}
    synthetic.write_json(path, data)
    assert "b b0000000: lacks P4D: it was put to fewer attacks" in terminal(rank(read_results([tmp_path / "results"])))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", {"name": "toybox-quick", "digest": "another"}),
        ("judge", {"name": "toybox", "digest": "another", "tells_spoiled": True}),
        ("model", "another"),
        ("concept", "toybox-flood"),
        ("concept_digest", "another"),
        ("world_digest", None),
    ],
)
def test_what_was_not_measured_alike_is_never_in_one_table(
    results: Any, tmp_path: Path, field: str, value: Any
) -> None:
    results("a")
    results("b", **{field: value})
    groups = rank(read_results([tmp_path / "results"]))
    assert [[place.rank for place in group.places] for group in groups] == [[1], [1]]


def test_the_same_erasure_twice_is_refused(results: Any, template: dict[str, Any], tmp_path: Path) -> None:
    first = results("a")
    second = results("b", erasure=json.loads(first.read_text())["erasure"])
    with pytest.raises(UserError, match="the same erasure, measured alike"):
        read_results([tmp_path / "results"])
    second.unlink()
    assert len(read_results([first, tmp_path / "results"])) == 1, "one file named twice is one"


def test_other_records_in_a_folder_are_no_results(results: Any, tmp_path: Path) -> None:
    first = results("a")
    for name, text in (("manifest.json", '{"schema": 1, "config": {}}'), ("cell.json", '{"labels": "pac"}')):
        (first.parent / name).write_text(text)
    assert [one.path for one in read_results([tmp_path / "results"])] == [first.resolve()]
    with pytest.raises(UserError, match=r"cell\.json"):
        read_results([first.parent / "cell.json"])  # which was named
    (first.parent / "torn.json").write_text('{"schema": 1,')
    with pytest.raises(UserError, match=r"torn\.json"):
        read_results([tmp_path / "results"])


def test_nothing_to_rank_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no result; write one"):
        read_results([tmp_path])
    with pytest.raises(UserError, match="is not there"):
        read_results([tmp_path / "nowhere"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run is a run and no result; write one with `duo report .*run --result`"):
        read_results([tmp_path / "run"])


@pytest.mark.parametrize(("text", "fault"), [("{", "is not valid JSON"), ("[]", "an object"), ("{}", "'schema' is")])
def test_a_file_that_is_no_result_is_told_with_what_to_do(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "notes.json").write_text(text)
    todo = "write the result again with `duo report RUN --result`, or leave this file out"
    with pytest.raises(UserError, match=f"notes.json.*{fault}.*; {re.escape(todo)}$"):
        read_results([tmp_path / "notes.json"])


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_texts_of_others_are_escaped_everywhere(results: Any, template: dict[str, Any], tmp_path: Path) -> None:
    preservation = {**template["preservation"], "metric": HOSTILE}
    hostile = {
        "footnote": HOSTILE,
        "authors": HOSTILE,
        "doubt": HOSTILE,
        "model": HOSTILE,
        "preservation": preservation,
    }
    setting = template["p4d_rate"] | {"setting": HOSTILE}
    results(HOSTILE, **hostile, p4d_rate=setting, budget={"name": HOSTILE, "digest": HOSTILE})
    groups = rank(read_results([tmp_path / "results"]))
    text = terminal(groups)
    assert "\x1b" not in text and "\u202e" not in text and "\n# d" not in text
    page = html(groups)
    tags = Tags(page).found
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert {attributes["href"] for tag, attributes in tags if tag == "a"} == {"https://arxiv.org/abs/2407.21035"}
    assert "\x1b" not in page and "\u202e" not in page
    marked = markdown(groups)
    assert "\x1b" not in marked and "<script" not in marked and "\n# d" not in marked
    assert "](javascript" not in marked.replace("\\]", "")
    (row,) = (line for line in marked.splitlines() if line.startswith("| 1 "))
    assert len(re.findall(r"(?<!\\)\|", row)) == 11, "ten cells"


def test_the_page_asks_nothing_of_anybody(results: Any, tmp_path: Path) -> None:
    results("a")
    page = html(rank(read_results([tmp_path / "results"])))
    loaded = [attributes for tag, attributes in Tags(page).found if tag != "a" and {"src", "href"} & attributes.keys()]
    assert not loaded and "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_the_command_in_each_form(results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results("a", rates={"p4d": 3})
    folder = str(tmp_path / "results")
    assert main(["leaderboard", folder]) == 0
    assert "1  a       a0000000  5% (2–14%)  P4D" in capsys.readouterr().out
    assert main(["leaderboard", folder, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["groups"][0]["results"]
    assert (row["rank"], row["worst_case"]["row"], row["worst_case"]["rate"]) == (1, "p4d", 0.05)
    out = tmp_path / "board.html"
    assert main(["leaderboard", folder, "--html", "--out", str(out)]) == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert main(["leaderboard", folder, "--html", "--json"]) == 2
    capsys.readouterr()
    assert main(["leaderboard", folder, "--html", "--out", folder]) == 2
    assert f"{folder} is a folder; name a file in it" in capsys.readouterr().err
    assert main(["leaderboard", str(tmp_path / "nowhere")]) == 2


def test_the_published_page_is_what_the_command_writes() -> None:
    published = (ROOT / "docs" / "leaderboard.md").read_text()
    assert markdown(rank(read_results([ROOT / "docs" / "results" / "leaderboard"]))) == published, (
        "run `duo leaderboard docs/results/leaderboard --markdown --out docs/leaderboard.md`"
    )
