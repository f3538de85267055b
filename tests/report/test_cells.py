"""A bench's results folder: what is there, what is missing, and every broken cell told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_cells as made
import pytest

from duo.errors import UserError
from duo.report.tradeoff.cells import read_results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One method at two strengths, one row, two seeds; the second strength of seed 1 is not there yet."""
    made.bench(tmp_path, rows=["prompts"], methods={"duo": ("method.beta", [5, 2.5])}, seeds=(0, 1))
    made.attacked(tmp_path, "original", "prompts", "pppp")
    for value, seed in ((5, 0), (5, 1), (2.5, 0)):
        made.attacked(tmp_path, "duo", "prompts", "apca", value=value, seed=seed)
        more = {
            "attributes": {"unrelated": {"colour": "111", "all": "101"}},
            "near_misses": {"lantern": {"survived": "10", "labels": "aa"}},
        }
        made.preserved(tmp_path, "duo", [0.9, 0.8, 1.0], value=value, seed=seed, **more)
    return tmp_path


def test_what_is_there_is_read(folder: Path) -> None:
    results = read_results(folder)
    assert [(one.strength, one.seed) for one in results.erasures] == [(5, 0), (5, 1), (2.5, 0)]
    first = results.erasures[0]
    assert first.rows["prompts"].labels == "apca" and first.rows["prompts"].prompts == (0, 1, 2, 3)
    assert first.kept is not None and first.kept.preservation == (0.9, 0.8, 1.0)
    assert first.kept.obeyed == {"unrelated": (True, False, True)}
    assert first.kept.survived == {"lantern": (True, False)}
    assert results.original["prompts"].reliable == 0.9 and results.never == {}


def test_what_is_missing_is_told(folder: Path) -> None:
    (folder / "duo/5/seed-1/preserved.json").unlink()
    (folder / "original/prompts.json").unlink()
    results = read_results(folder)
    assert (results.done, results.expected) == (5, 8)
    assert results.missing == (
        "original: prompts",
        "duo at method.beta = 5, seed 1: preserved",
        "duo at method.beta = 2.5, seed 1: every cell",
    )


def test_what_many_erasures_lack_is_told_once(folder: Path) -> None:
    made.bench(folder, rows=["prompts", "p4d"], methods={"duo": ("method.beta", [5, 2.5, 1])}, seeds=(0, 1, 2))
    assert read_results(folder).missing == (
        "original: p4d",
        "every erasure: p4d",
        "duo at method.beta = 5, seed 2: every cell",
        "duo at method.beta = 2.5, seeds 1, 2: every cell",
        "duo at method.beta = 1, seeds 0, 1, 2: every cell",
    )
    made.attacked(folder, "duo", "prompts", "apca", value=1, seed=0)
    made.preserved(folder, "duo", [0.9, 0.8, 1.0], value=1, seed=0)
    assert read_results(folder).missing[3:] == ("duo at method.beta = 2.5, 1, seeds 1, 2: every cell",)


def test_cells_of_no_point_of_the_bench_are_left_out_and_told(folder: Path) -> None:
    made.attacked(folder, "duo", "prompts", "p", value=99)
    made.attacked(folder, "duo", "prompts", "p", value=5, seed=7)
    results = read_results(folder)
    assert len(results.erasures) == 3
    assert [line.partition(":")[0] for line in results.left_out] == ["duo/5/seed-7", "duo/99/seed-0"]


def test_a_method_without_a_strength_has_one_point(tmp_path: Path) -> None:
    made.write(
        tmp_path / "bench.json",
        {
            "schema": 1,
            "name": made.BENCH,
            "rows": [{"row": "prompts", "attack": "prompts", "prompts": "neutral"}],
            "methods": {"uce": {"recipe": "uce", "strength": None, "values": []}},
            "seeds": [0],
        },
    )
    path = made.attacked(tmp_path, "uce", "prompts", "ap", value="as-it-is")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"strength": None}))
    (one,) = read_results(tmp_path).erasures
    assert (one.strength, one.kept) == (None, None)


def test_an_attack_that_is_not_defined_is_no_missing_cell(folder: Path) -> None:
    path = folder / "duo/5/seed-0/prompts.json"
    cell = json.loads(path.read_text())
    for key in ("labels", "prompts", "variants"):
        del cell[key]
    path.write_text(json.dumps(cell | {"not_defined": "there is nothing to unload"}))
    results = read_results(folder)
    assert results.erasures[0].rows == {}
    assert results.erasures[0].not_defined == {"prompts": "there is nothing to unload"}
    assert results.missing == ("duo at method.beta = 2.5, seed 1: every cell",)


CELL, KEPT, BENCH = "duo/5/seed-0/prompts.json", "duo/5/seed-0/preserved.json", "bench.json"
BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "unknown letter": (CELL, lambda c: c | {"labels": "apxa"}, "'labels' has the letter 'x'"),
    "no images": (CELL, lambda c: c | {"labels": ""}, "'labels' is empty"),
    "labels too short": (CELL, lambda c: c | {"labels": "apc"}, "'prompts' has 4 values for 3 labels"),
    "variants too short": (CELL, lambda c: c | {"variants": [""] * 3}, "'variants' has 3 values for 4 labels"),
    "prompts as texts": (CELL, lambda c: c | {"prompts": list("0123")}, "'prompts' must be a list of whole numbers"),
    "negative prompt": (CELL, lambda c: c | {"prompts": [0, 1, 2, -1]}, "'prompts' must be a list of whole numbers"),
    "only the idle variant": (CELL, lambda c: c | {"idle": ""}, "'variants' has nothing but ''"),
    "bar above 1": (CELL, lambda c: c | {"reliable": 90}, "'reliable' is 90"),
    "other version": (CELL, lambda c: c | {"schema": 2}, "'schema' is 2"),
    "other bench": (CELL, lambda c: c | {"bench": "other"}, "'bench' is 'other'"),
    "other method": (CELL, lambda c: c | {"method": "esd"}, "'method' is 'esd'"),
    "other seed": (CELL, lambda c: c | {"seed": 1}, "'seed' is 1"),
    "other row": (CELL, lambda c: c | {"row": "p4d"}, "'row' is 'p4d'"),
    "other attack": (CELL, lambda c: c | {"attack": "p4d"}, "'attack' is 'p4d'"),
    "other strength": (CELL, lambda c: c | {"strength": c["strength"] | {"label": "6"}}, "its place says method.beta"),
    "no strength": (CELL, lambda c: c | {"strength": None}, "name several strengths"),
    "values disagree": (CELL, lambda c: c | {"strength": c["strength"] | {"value": 6}}, "name several strengths"),
    "not a number": (KEPT, lambda c: c | {"preservation": c["preservation"] | {"values": [0.9, float("nan"), 1]}},
                     "'values[1]' is nan"),
    "no values": (KEPT, lambda c: c | {"preservation": c["preservation"] | {"values": []}}, "'values' must be a list"),
    "fewer values": (KEPT, lambda c: c | {"preservation": c["preservation"] | {"values": [0.9]}},
                     "number of values of field 'preservation'"),
    "other metric": (KEPT, lambda c: c | {"preservation": c["preservation"] | {"metric": "1 - LPIPS"}},
                     "metric of field 'preservation'"),
    "preserved prompts as texts": (KEPT, lambda c: c | {"prompts": list("010")},
                                   "'prompts' must be a list of whole numbers"),
    "preserved prompts too few": (KEPT, lambda c: c | {"prompts": [0, 1]},
                                  "'prompts' has 2 values for 3 of the preservation"),
    "digits": (KEPT, lambda c: c | {"attributes": {"unrelated": {"all": "102"}}}, "'all' must have one 0 or 1"),
    "survived": (KEPT, lambda c: c | {"near_misses": {"lantern": {"labels": "aa"}}}, "'survived' is missing"),
    "a list": (CELL, lambda c: [c], "expected an object"),
    "bench of no rows": (BENCH, lambda c: c | {"rows": []}, "'rows' must name"),
    "a row twice": (BENCH, lambda c: c | {"rows": c["rows"] * 2}, "each once"),
    "seeds twice": (BENCH, lambda c: c | {"seeds": [0, 0]}, "'seeds' must be"),
    "strength without values": (BENCH, lambda c: c | {"methods": {"duo": {"strength": "method.beta", "values": []}}},
                                "go together"),
    "no methods": (BENCH, lambda c: c | {"methods": {}}, "'methods' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_in_one_line_that_names_file_and_field(folder: Path, name: str) -> None:
    place, change, said = BROKEN[name]
    path = folder / place
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as told:
        read_results(folder)
    message = str(told.value)
    assert said in message and "\n" not in message
    assert str(folder) in message
    todo = ("remove the file, and run the bench again", "remove the cells of the other bench", "folder, and run the")
    assert any(one in message for one in (*todo, "use the version that wrote it")), "what is to be done"


def test_a_cell_that_is_cut_off_is_told(folder: Path) -> None:
    (folder / CELL).write_text('{"schema": 1')
    with pytest.raises(UserError, match=r"prompts\.json is not valid JSON .*; remove the file, and run the bench agai"):
        read_results(folder)


def test_erasures_whose_unrelated_images_have_other_prompts_are_refused(folder: Path) -> None:
    cells = [folder / f"duo/5/seed-{seed}/preserved.json" for seed in (0, 1)]
    for path, prompts in zip(cells, ([0, 1, 0], [0, 1, 1]), strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": prompts}))
    with pytest.raises(UserError, match=r"'prompts' of what duo at 5, seed 1 kept is another than that of duo at 5"):
        read_results(folder)


def test_a_strength_in_two_folders_is_refused(folder: Path) -> None:
    made.attacked(folder, "duo", "prompts", "apca", value=5.0)
    with pytest.raises(UserError, match=r"strength 5(\.0)?, seed 0 is in two folders"):
        read_results(folder)


def test_a_folder_without_a_bench_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench\.json is missing"):
        read_results(tmp_path)


def test_a_method_may_have_seeds_of_its_own(folder: Path) -> None:
    """One seed is all that there is of a method without chance: nothing is missing, and other seeds are not of it."""
    bench = json.loads((folder / "bench.json").read_text())
    bench["methods"]["duo"]["seeds"] = [0]
    (folder / "bench.json").write_text(json.dumps(bench))
    found = read_results(folder)
    assert (found.expected, found.done, found.missing) == (4, 4, ())
    assert found.left_out == ("duo/5/seed-1: not a strength and seed of bench.json",)
