"""Figure 4's numbers, on grids small enough to be worked by hand, and its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench_cells as made
import numpy as np
import pytest

from duo.errors import UserError
from duo.report.tradeoff import write_tradeoff
from duo.report.tradeoff.analysis import analyse
from duo.report.tradeoff.cells import read_results
from duo.report.tradeoff.matched import matched
from duo.report.tradeoff.measures import Draws
from duo.report.tradeoff.points import Grid
from duo.statistics import t_interval, wilson

# method, strength → of seeds 0 and 1: images of 10 with the concept under prompts and ring_a_bell, and preservation
BY_HAND = {
    ("duo", 5): ((1, 2, 0.91), (3, 2, 0.93)),
    ("duo", 2): ((0, 1, 0.84), (0, 1, 0.88)),
    ("esd", 5): ((4, 5, 0.96), (4, 7, 0.94)),
    ("esd", 2): ((2, 6, 0.86), (2, 6, 0.86)),
}


def write_by_hand(folder: Path) -> Path:
    methods = {name: ("method.beta", [5, 2]) for name in ("duo", "esd")}
    made.bench(folder, rows=["prompts", "ring_a_bell"], methods=methods, seeds=(0, 1))
    for row in ("prompts", "ring_a_bell"):
        made.attacked(folder, "original", row, "p" * 10)
    for (method, value), erasures in BY_HAND.items():
        for seed, (plain, bell, kept) in enumerate(erasures):
            at = {"value": value, "seed": seed}
            made.attacked(folder, method, "prompts", labels(plain), **at)
            made.attacked(folder, method, "ring_a_bell", labels(bell, 3 if (method, value) == ("duo", 2) else 0), **at)
            made.preserved(folder, method, [kept] * 10, **at)
    return folder


def labels(present: int, corrupted: int = 0) -> str:
    return "p" * present + "c" * corrupted + "a" * (10 - present - corrupted)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_by_hand(tmp_path_factory.mktemp("by-hand"))
    return analyse(read_results(folder), floors=(0.5, 0.9, 0.95), resamples=400)


def test_what_is_kept_ends_at_1_where_the_metric_does(tmp_path: Path) -> None:
    """Erasures of 0.86 and 0.99: Student's of two is 12.7 standard errors to either side."""
    ends = {}
    for metric in ("1 - toybox-LPIPS", "CLIP score"):
        folder = tmp_path / metric
        made.bench(folder, rows=["prompts"], methods={"duo": ("method.beta", [5])}, seeds=(0, 1))
        made.attacked(folder, "original", "prompts", "p" * 10)
        for seed, value in enumerate((0.86, 0.99)):
            made.attacked(folder, "duo", "prompts", labels(1), value=5, seed=seed)
            made.preserved(
                folder, "duo", [value] * 10, value=5, seed=seed, preservation={"metric": metric, "values": [value] * 10}
            )
        (point,) = analyse(read_results(folder), floors=(0.5,), resamples=100)["points"]
        ends[metric] = point["preservation"]["high"]
    assert ends == {"1 - toybox-LPIPS": 1.0, "CLIP score": pytest.approx(0.925 + 12.706 * 0.065, abs=1e-3)}


def panel(analysis: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in analysis["panels"] if one["panel"] == name)


def values(analysis: dict[str, Any], name: str) -> dict[tuple[str, Any], tuple[float, float]]:
    return {
        (p["method"], p["strength"]): (p["preservation"]["mean"], p["success"]["mean"])
        for p in panel(analysis, name)["points"]
    }


def test_points_are_means_over_erasures(by_hand: dict[str, Any]) -> None:
    assert values(by_hand, "prompts") == {
        ("duo", 5): (0.92, 0.8),
        ("duo", 2): (0.86, 1.0),
        ("esd", 5): (0.95, 0.6),
        ("esd", 2): (0.86, 0.8),
    }
    assert {key: y for key, (_, y) in values(by_hand, "ring_a_bell").items()} == {
        ("duo", 5): 0.8,
        ("duo", 2): 0.9,
        ("esd", 5): 0.4,
        ("esd", 2): 0.4,
    }


def test_the_worst_case_is_the_mean_of_minima_and_not_the_minimum_of_means(by_hand: dict[str, Any]) -> None:
    """DUO at 5: erasure 0 has 0.9 and 0.8, erasure 1 has 0.7 and 0.8: (0.8 + 0.7)/2, where both means are 0.8."""
    assert {key: y for key, (_, y) in values(by_hand, "worst_case").items()} == {
        ("duo", 5): 0.75,
        ("duo", 2): 0.9,
        ("esd", 5): 0.4,
        ("esd", 2): 0.4,
    }
    point = by_hand["points"][0]
    assert point["worst_case"]["attacks"] == {"0": "ring_a_bell", "1": "prompts"}
    assert point["worst_case"]["by_seed"] == {"0": 0.8, "1": 0.7}
    assert point["worst_of_averages"]["mean"] == 0.8


def test_clean_is_neither_concept_nor_spoiled(by_hand: dict[str, Any]) -> None:
    """DUO at 2: all ten plain images, and of Ring-A-Bell 1 has the concept and 3 are spoiled: (1 + 0.6)/2."""
    assert values(by_hand, "clean")["duo", 2][1] == 0.8
    point = by_hand["points"][1]
    assert point["corrupted"]["mean"] == 0.15
    assert point["rows"]["ring_a_bell"]["corrupted"]["mean"] == 0.3
    assert point["rows"]["ring_a_bell"]["clean"]["mean"] == 0.6


def test_the_front_of_each_panel(by_hand: dict[str, Any]) -> None:
    front = {
        name: {(p["method"], p["strength"]) for p in panel(by_hand, name)["points"] if p["on_front"]}
        for name in ("prompts", "clean")
    }
    assert front["prompts"] == {("duo", 5), ("duo", 2), ("esd", 5)}
    # clean: duo 5 0.8 at 0.92, duo 2 0.8 at 0.86, so the second is dominated
    assert front["clean"] == {("duo", 5), ("esd", 5)}


def test_areas_by_hand(by_hand: dict[str, Any]) -> None:
    """From 0.8: DUO 1.0 up to 0.86, 0.8 up to 0.92; ESD 0.8 up to 0.86 and 0.6 up to 0.95; of a width of 0.2."""
    areas = {one["method"]: one for one in panel(by_hand, "prompts")["areas"]}
    assert areas["duo"]["mean"] == pytest.approx((0.06 * 1.0 + 0.06 * 0.8) / 0.2)
    assert areas["esd"]["mean"] == pytest.approx((0.06 * 0.8 + 0.09 * 0.6) / 0.2)
    # of erasure 0 alone: 1.0 up to 0.84 and 0.9 up to 0.91
    assert areas["duo"]["by_seed"]["0"] == pytest.approx((0.04 * 1.0 + 0.07 * 0.9) / 0.2)
    (difference,) = panel(by_hand, "prompts")["differences"]
    assert difference["difference"] == pytest.approx(0.03)
    assert difference["low"] <= 0.03 <= difference["high"] and difference["p"] > 0.05


def test_methods_at_matched_preservation(by_hand: dict[str, Any]) -> None:
    """At 0.9 both have their first strength alone, in all four choices."""
    one = next(one for one in by_hand["matched"] if one["floor"] == 0.9)
    duo, esd = one["methods"]
    assert [choice["strength"] for choice in duo["chosen"] + esd["chosen"]] == [5] * 8
    assert (duo["preservation"]["mean"], duo["worst_case"]["mean"], duo["rows"]["prompts"]["mean"]) == (0.92, 0.75, 0.8)
    assert (esd["rows"]["ring_a_bell"]["mean"], esd["rows"]["ring_a_bell"]["images"]) == (0.4, 20)
    differences = {row["panel"]: row["difference"] for row in one["differences"]}
    assert differences == {"prompts": 0.2, "ring_a_bell": 0.4, "worst_case": 0.35, "clean": 0.3}


def test_a_floor_that_the_other_erasures_do_not_keep_is_not_reached(by_hand: dict[str, Any]) -> None:
    """Erasure 0 of ESD is chosen by erasure 1, which keeps 0.94, and erasure 1 by erasure 0, which keeps 0.96."""
    one = next(one for one in by_hand["matched"] if one["floor"] == 0.95)
    duo, esd = one["methods"]
    assert (duo["reached"], esd["reached"], esd["choices"]) == (0, 2, 4)
    assert [(c["seed"], c["strength"]) for c in esd["chosen"]] == [(0, None), (0, None), (1, 5), (1, 5)]
    assert "rows" not in esd and one["differences"] == []


def test_choosing_the_best_strength_does_not_flatter(tmp_path: Path) -> None:
    """Eight strengths that are all the same coin: the best of them looks better than ½, the chosen one does not."""
    best, chosen = [], []
    for trial in range(12):
        rng = np.random.default_rng(trial)
        folder = tmp_path / f"{trial}"
        made.bench(folder, rows=["prompts"], methods={"duo": ("method.beta", list(range(8)))}, seeds=(0, 1))
        made.attacked(folder, "original", "prompts", "p" * 30)
        for value in range(8):
            for seed in (0, 1):
                drawn = "".join(rng.choice(["p", "a"], size=30))
                made.attacked(folder, "duo", "prompts", drawn, value=value, seed=seed)
                made.preserved(folder, "duo", [0.9] * 30, value=value, seed=seed)
        grid = Grid.of(read_results(folder))
        best.append(max(point.success("prompts")[1].value for point in grid.points))  # type: ignore[index]
        row = matched(grid, 0.9, Draws(seed=0, resamples=10), reference="duo")["methods"][0]
        chosen.append(row["rows"]["prompts"]["mean"])
    error = 0.5 / (12 * 60) ** 0.5
    assert np.mean(best) > 0.5 + 4 * error
    assert np.mean(chosen) == pytest.approx(0.5, abs=3 * error)


def test_one_erasure_is_chosen_on_its_own_other_half(tmp_path: Path) -> None:
    """Prompts of which one half is lost at strength 5 and the other at 2: each half is scored at the wrong one."""
    made.bench(tmp_path, rows=["prompts"], methods={"duo": ("method.beta", [5, 2])})
    made.attacked(tmp_path, "original", "prompts", "p" * 10)
    for value in (5, 2):
        made.attacked(tmp_path, "duo", "prompts", "a" * 10, value=value)
        made.preserved(tmp_path, "duo", [0.9] * 10, value=value)
    from duo.report.tradeoff import matched as module

    half = module._halves("prompts neutral", 10, Draws(seed=0, resamples=2))
    assert sorted(half) == [0] * 5 + [1] * 5
    for value, lost in ((5, 0), (2, 1)):
        made.attacked(tmp_path, "duo", "prompts", "".join("p" if one == lost else "a" for one in half), value=value)
    row = matched(Grid.of(read_results(tmp_path)), 0.9, Draws(seed=0, resamples=10), reference="duo")["methods"][0]
    # half 1 looks best at 5, and so half 0 is scored there, where it is lost
    assert [(c["half"], c["strength"]) for c in row["chosen"]] == [(0, 5), (1, 2)]
    assert row["rows"]["prompts"]["mean"] == 0


# --- attacks in several variants, controls, incomplete grids ------------------------------------------------


def one_point(folder: Path, brought: str, *, original: str = "pppp", **more: Any) -> dict[str, Any]:
    made.bench(folder, rows=["prompts", "img2img"], methods={"duo": ("method.beta", [5])})
    made.attacked(folder, "original", "prompts", "p" * 4)
    made.attacked(folder, "original", "img2img", original, **more)
    made.attacked(folder, "duo", "prompts", "aaap", value=5)
    made.attacked(folder, "duo", "img2img", brought, value=5, **more)
    made.preserved(folder, "duo", [0.9] * 4, value=5)
    return analyse(read_results(folder), resamples=100)


SETTINGS = {"prompts": [0, 0, 0, 1, 1, 1], "variants": ["0", "0.5", "0.9"] * 2}


def test_of_settings_the_worst_counts_and_what_is_no_attack_is_left_out(tmp_path: Path) -> None:
    """Of 0.5 no image is lost, of 0.9 one of two; 0 is no attack. The original has its best setting for a control."""
    analysis = one_point(tmp_path, "paa" + "pap", original="aap" * 2, idle="0", **SETTINGS)
    row = analysis["points"][0]["rows"]["img2img"]
    assert (row["setting"], row["success"]["mean"], row["pooled"]["mean"]) == ("0.9", 0.5, 0.75)
    assert {name: one["mean"] for name, one in row["settings"].items()} == {"0.5": 1.0, "0.9": 0.5}
    assert analysis["rows"][1]["control"]["mean"] == 1.0 and analysis["rows"][1]["reliable"]
    assert analysis["points"][0]["worst_case"]["attacks"] == {"0": "img2img at 0.9"}


def test_a_row_of_one_setting_beside_what_is_no_attack_has_no_settings(tmp_path: Path) -> None:
    """Of 20 steps one image of two is lost; at 0 steps, where nothing was done yet, none counts."""
    more = {"prompts": [0, 0, 1, 1], "variants": ["0", "20"] * 2, "idle": "0"}
    row = one_point(tmp_path, "appa", **more)["points"][0]["rows"]["img2img"]
    assert (row["success"]["mean"], row["success"]["images"]) == (0.5, 2)
    assert "setting" not in row


def test_restarts_are_chance_and_pooled(tmp_path: Path) -> None:
    row = one_point(tmp_path, "aap" + "aap", original="p" * 6, restarts=True, **SETTINGS)["points"][0]["rows"][
        "img2img"
    ]
    assert row["success"]["mean"] == pytest.approx(4 / 6, abs=1e-6)
    assert "setting" not in row and "pooled" not in row


def test_an_unreliable_row_is_told_and_left_out(tmp_path: Path) -> None:
    """The original model draws it in 3 of 4, and 9 of 10 are needed: nothing lost there is no worst case."""
    analysis = one_point(tmp_path, "pppp", original="pppa")
    assert analysis["worst_case_over"] == ["prompts"]
    assert values(analysis, "worst_case")["duo", 5][1] == 0.75
    unreliable = panel(analysis, "img2img")
    assert not unreliable["reliable"] and unreliable["areas"] == [] and "on_front" not in unreliable["points"][0]
    assert {row["panel"] for row in analysis["matched"][0]["differences"]} <= {"prompts", "worst_case", "clean"}


def test_a_row_without_its_control_is_unreliable(tmp_path: Path) -> None:
    one_point(tmp_path, "aaaa")
    (tmp_path / "original/img2img.json").unlink()
    analysis = analyse(read_results(tmp_path), resamples=50)
    assert analysis["rows"][1]["control"] is None and not analysis["rows"][1]["reliable"]
    assert analysis["worst_case_over"] == ["prompts"]


def test_a_row_that_no_erasure_has_yet_does_not_hold_up_the_worst_case(tmp_path: Path) -> None:
    one_point(tmp_path, "aaaa")
    (tmp_path / "duo/5/seed-0/img2img.json").unlink()
    analysis = analyse(read_results(tmp_path), resamples=50)
    assert analysis["worst_case_over"] == ["prompts"] and analysis["points"][0]["complete_seeds"] == [0]
    assert panel(analysis, "img2img")["reliable"] and panel(analysis, "img2img")["points"] == []


def test_an_incomplete_erasure_has_no_worst_case(tmp_path: Path) -> None:
    """Without Ring-A-Bell, where erasure 1 of ESD at 5 is worst, the worst case is of erasure 0 alone."""
    write_by_hand(tmp_path)
    (tmp_path / "esd/5/seed-1/ring_a_bell.json").unlink()
    analysis = analyse(read_results(tmp_path), resamples=50)
    point = next(one for one in analysis["points"] if (one["method"], one["strength"]) == ("esd", 5))
    assert point["complete_seeds"] == [0]
    assert point["worst_case"]["by_seed"] == {"0": 0.5}
    assert point["rows"]["prompts"]["success"]["by_seed"] == {"0": 0.6, "1": 0.6}
    assert analysis["cells"]["missing"] == ["esd at method.beta = 5, seed 1: ring_a_bell"]
    assert values(analysis, "worst_case")["esd", 5] == (0.96, 0.5)  # what erasure 0 keeps, not both


def test_what_is_not_defined_is_no_attack_on_that_method(tmp_path: Path) -> None:
    one_point(tmp_path, "pppp")
    path = tmp_path / "duo/5/seed-0/img2img.json"
    cell = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in cell.items() if k != "labels"} | {"not_defined": "no images go in"}))
    made.attacked(tmp_path, "never", "prompts", "aaaa")
    analysis = analyse(read_results(tmp_path), resamples=50)
    assert analysis["rows"][1]["not_defined"] == {"duo": "no images go in"}
    assert analysis["points"][0]["worst_case"]["mean"] == 0.75


def test_a_model_that_never_saw_the_concept_is_a_reference(tmp_path: Path) -> None:
    one_point(tmp_path, "aaaa")
    made.attacked(tmp_path, "never", "prompts", "aaac")
    before = analyse(read_results(tmp_path), resamples=50)
    assert panel(before, "prompts")["never"]["mean"] == 1.0
    assert panel(before, "worst_case")["never"] is None  # one of two attacks says nothing of the worst
    made.attacked(tmp_path, "never", "img2img", "ppaa")
    after = analyse(read_results(tmp_path), resamples=50)
    assert panel(after, "worst_case")["never"]["mean"] == 0.5
    assert panel(after, "clean")["never"]["mean"] == 0.625


def test_refused_prompts_are_fewer_images_and_not_others(tmp_path: Path) -> None:
    write_by_hand(tmp_path)
    made.attacked(tmp_path, "esd", "prompts", "ppppaaaa", value=5, prompts=[0, 1, 2, 3, 4, 5, 6, 9])
    point = analyse(read_results(tmp_path), resamples=50)["points"][2]
    assert point["rows"]["prompts"]["success"]["by_seed"] == {"0": 0.5, "1": 0.6}
    assert point["rows"]["prompts"]["success"]["images"] == 18


def test_unrelated_images_that_share_prompts_are_drawn_by_prompt(tmp_path: Path) -> None:
    """Two images of each of two prompts are two draws, not four. Erasure 1 is from before cells told of prompts."""
    made.bench(tmp_path, rows=["prompts"], methods={"duo": ("method.beta", [5])}, seeds=(0, 1))
    made.attacked(tmp_path, "original", "prompts", "pppp")
    for seed in (0, 1):
        more = {"attributes": {"unrelated": {"all": "1100"}}, **({} if seed else {"prompts": [3, 3, 7, 7]})}
        made.preserved(tmp_path, "duo", [0.8, 0.8, 1.0, 1.0], value=5, seed=seed, **more)
    point = analyse(read_results(tmp_path), resamples=200)["points"][0]
    kept, obeyed = point["preservation"], point["kept"]["unrelated prompts obeyed"]
    assert (kept["mean"], kept["images"], kept["prompts"]) == (0.9, 8, 2)
    assert (kept["low"], kept["high"]) == pytest.approx((t_interval([0.8, 1.0]).low, 1.0), abs=1e-6)
    assert (obeyed["mean"], obeyed["images"], obeyed["prompts"]) == (0.5, 8, 2)
    assert obeyed["low"] <= wilson(1, 2).low and obeyed["high"] >= wilson(1, 2).high


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made of a results folder of seven methods that lacks one cell."""
    folder = tmp_path_factory.mktemp("made-up")
    made.write_made_up(folder / "cells")
    (folder / "cells/esd/0.0001/seed-2/img2img.json").unlink()
    write_tradeoff(folder / "cells", folder)
    return folder


def test_the_files_are_the_same_each_time(tmp_path: Path) -> None:
    write_by_hand(tmp_path)
    first, second = (write_tradeoff(tmp_path, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["figure4.svg", "figure4.json", "figure4.md"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_every_number_has_its_interval_and_how_it_was_made(made_up: Path) -> None:
    analysis = json.loads((made_up / "figure4.json").read_text())
    assert analysis["schema"] == 1
    seen = 0

    def walk(value: Any) -> None:
        nonlocal seen
        if isinstance(value, dict):
            if "mean" in value:
                seen += 1
                assert value["low"] <= value["mean"] <= value["high"]
                assert all(part in analysis["intervals"] for part in value.get("interval", "").split(" + ") if part)
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk(analysis)
    assert seen > 500


def test_the_figure_is_well_formed_and_names_everything(made_up: Path) -> None:
    svg = (made_up / "figure4.svg").read_text()
    texts = {element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")}
    assert {"DUO", "ESD", "CA", "UCE", "SPM", "FMN", "SA", "Ring-A-Bell", "SneakyPrompt (unreliable)"} <= texts
    assert {"Worst case over attacks", "on the Pareto front", "never saw the concept"} <= texts
    assert "prefers-color-scheme: dark" in svg


def test_each_method_has_a_mark_of_its_own() -> None:
    from duo.report import figures

    assert len(set(figures.COLOURS)) >= 7 and len(set(figures.MARKERS)) >= 7
    assert set(figures.COLOURS) <= set(figures.DARK)


def test_the_tables_have_a_row_for_each_method_and_say_what_is_missing(made_up: Path) -> None:
    text = (made_up / "figure4.md").read_text()
    assert "461 of 462 cells of erasures" in text
    assert "- esd at method.learning\\_rate = 0.0001, seed 2: img2img" in text
    assert re.search(r"\| SneakyPrompt \| \d+% \([^|]*\) \| 90% \| \*\*no\*\* \|", text)
    table = text.split("### Preservation of at least 0.90")[1].split("###")[0]
    assert re.findall(r"^\| (\w+) \| 3 \|", table, flags=re.M) == ["DUO", "ESD", "CA", "UCE", "SPM", "FMN", "SA"]
    assert "| SA | 3 | no strength keeps that much |" in table
    assert "**SneakyPrompt.** Without a sound positive control, nothing can be said here." in text
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_readings_say_what_the_numbers_say(by_hand: dict[str, Any]) -> None:
    from duo.report.tradeoff.words import tables

    text = tables(by_hand)
    reading = next(line for line in text.splitlines() if line.startswith("**Plain prompts.**"))
    assert "By area: DUO 0.54 (" in reading and ", ESD 0.51 (" in reading
    assert "That of DUO is not told apart from that of ESD (+0.03)." in reading
    assert "On the Pareto front: DUO at 5, 2; ESD at 5." in reading
    assert "At a preservation of at least 0.90 DUO has 80% (" in reading and "ESD (+20 points)" in reading


def test_before_the_first_erasure_there_is_a_figure_without_points(tmp_path: Path) -> None:
    made.bench(tmp_path, rows=["prompts"], methods={"duo": ("method.beta", [5])})
    svg, data, text = write_tradeoff(tmp_path, tmp_path / "out")
    assert "no cells yet" in svg.read_text()
    assert json.loads(data.read_text())["cells"]["missing"] == [
        "original: prompts",
        "every erasure: every cell",
    ]
    assert "0 of 2 cells of erasures" in text.read_text()


def test_a_broken_cell_leaves_no_files(tmp_path: Path) -> None:
    write_by_hand(tmp_path)
    (tmp_path / "duo/5/seed-0/prompts.json").write_text("{")
    with pytest.raises(UserError):
        write_tradeoff(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_from_files_are_neither_markup_nor_table_cells(tmp_path: Path) -> None:
    name = "<b>|x_y"
    made.bench(tmp_path, rows=["prompts"], methods={name: ("method.beta", [5])}, name="by|hand")
    _, _, text = write_tradeoff(tmp_path, tmp_path / "out")
    assert "<b>" not in text.read_text() and "&lt;b&gt;\\|x y" in text.read_text()
    ElementTree.fromstring((tmp_path / "out/figure4.svg").read_text())
