"""Figures: well-formed, the same bytes each time, and true to their numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from duo.report import figures
from duo.report.figures import TradeoffPoint
from duo.report.records import Mean


def _mean(value: float) -> Mean:
    return Mean(mean=value, low=value - 0.1, high=value + 0.1, n=60)


def _points(name: str = "DUO") -> list[TradeoffPoint]:
    return [
        TradeoffPoint(series=name, label=f"β={beta}", detection=_mean(1 / beta), preservation=_mean(0.5 + beta / 40))
        for beta in (2, 5, 10)
    ]


def test_tradeoff_is_well_formed_and_the_same_each_time() -> None:
    svg = figures.tradeoff(_points())
    assert svg == figures.tradeoff(_points())
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert {"β=2", "β=5", "β=10"} <= set(texts)


def test_texts_from_data_are_neither_markup_nor_mathematics() -> None:
    name = '<script>alert("$x_1$")</script>'
    root = ElementTree.fromstring(figures.tradeoff(_points(name), metric="$\\broken{"))
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert any(element.text == name for element in root.iter())


def test_curves_of_any_number_are_drawn() -> None:
    curve = tuple((float(step), 1.0 / (step + 1)) for step in range(30))
    for names in (["loss"], ["loss", "accuracy", "margin"]):
        svg = figures.training_curves(dict.fromkeys(names, curve))
        assert svg.count(figures.CURVE_TITLES["loss"]) >= 1
        ElementTree.fromstring(svg)


def test_growth_of_any_number_is_drawn_with_its_memory() -> None:
    one = {"unit": "images", "n": [10, 1000], "seconds": [1.0, 20.0], "mib": [120.4, 130.0]}
    for count in (1, 2, 4):
        drawn = figures.growth([figures.Growth(title=f"Work {i}", **one) for i in range(count)])
        ElementTree.fromstring(drawn)
        assert drawn.count(">120 MiB<") == drawn.count(">130 MiB<") == count
        assert all(f">Work {i}<" in drawn for i in range(count)) and ">1k<" in drawn
        assert "mathdefault" not in drawn


def test_the_ideal_of_shared_work_falls_as_more_do_it() -> None:
    one = {"title": "Run", "unit": "processes", "n": [1, 2], "seconds": [200.0, 100.0], "mib": [1.0, 1.0]}
    own, shared = (figures.growth([figures.Growth(**one, shared=how)]) for how in (False, True))
    lines = [[path.get("d") for path in ElementTree.fromstring(one).iter("{http://www.w3.org/2000/svg}path")]
             for one in (own, shared)]  # fmt: skip
    assert any(d and lines[1].count(d) == lines[0].count(d) + 1 for d in lines[1]), "it lies on what was measured"


def test_running_mean_is_of_the_last_values() -> None:
    assert figures._running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_bars_are_as_long_as_their_parts_together_and_say_so() -> None:
    svg = figures.stacked(
        {"one": (0.1, 0.25), "two": (0.5, 0.0)}, ("fire", "spoiled"), what="What is minimised", unit="shares"
    )
    assert "> 0.35<" in svg and "> 0.50<" in svg
    assert svg.index(">one<") < svg.index(">two<")
    assert all(f">{text}<" in svg for text in ("fire", "spoiled"))
    assert figures.SERIES[1] in svg and figures.SERIES[2] not in svg, "a colour for each part"
    first, second = (_across(svg, colour)[0] for colour in figures.SERIES[:2])
    assert first[1] == pytest.approx(second[0], abs=0.01), "the second part begins where the first ends"
    assert second[1] - second[0] == pytest.approx(2.5 * (first[1] - first[0]), rel=1e-3)


def _across(svg: str, colour: str) -> list[tuple[float, float]]:
    """From where to where each shape of that colour goes, in the order in which they are drawn."""
    paths = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
    shapes = [path.get("d", "") for path in paths if f"fill: {colour}" in path.get("style", "")]
    xs = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", shape)] for shape in shapes]
    return [(min(one), max(one)) for one in xs]


def test_dots_stand_at_means_with_a_line_from_least_to_most() -> None:
    panels = {"fire": {"DUO": [[10.0, 30.0], [0.0]], "ours": [[20.0], [50.0]]}}
    svg = figures.dots(["plain prompts", "P4D"], panels, what="On the scored set")
    assert all(f">{text}<" in svg for text in ("fire", "DUO", "ours", "plain prompts", "P4D", "25%"))
    same = {"fire": {"DUO": [[20.0, 20.0], [0.0]], "ours": [[20.0], [50.0]]}}
    other = figures.dots(["plain prompts", "P4D"], same, what="On the scored set")
    marks = [
        [use.get("x") for use in ElementTree.fromstring(one).iter("{http://www.w3.org/2000/svg}use")]
        for one in (svg, other)
    ]
    assert marks[0] == marks[1] and any(marks[0]), "means are the same"
    assert svg != other, "and the lines are not"
    for values in ([10.0, 10.0, 40.0], [0.0, 30.0, 30.0]):  # the same mean, and the same least or most
        changed = {"fire": {**panels["fire"], "DUO": [values, [0.0]]}}
        assert figures.dots(["plain prompts", "P4D"], changed, what="On the scored set") != svg


def test_a_figure_that_stands_alone_has_a_background_and_a_dark_theme() -> None:
    svg = figures.standing_alone(figures.tradeoff(_points()), "alone")
    assert ElementTree.fromstring(svg).get("id") == "alone"
    assert f"#alone {{ background: {figures.PAPER}; }}" in svg and "prefers-color-scheme: dark" in svg
