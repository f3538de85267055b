"""Figure 4 as SVG: a panel for each attack, for the worst case over them, and for clean outcomes. No torch.

Methods differ by marker and colour, and filled marks are on the Pareto front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from duo.report.figures import COLOURS, GRID, INK, MARKERS, MUTED, PAPER, _canvas, _svg, standing_alone
from duo.report.tradeoff.words import method_words, panel_title
from duo.report.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

FRONT: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 2))}
NEVER: dict[str, Any] = {"linewidth": 1.3, "linestyle": ":"}
# Preservation is drawn on a logarithmic scale of what is lost, for most of the field lies within a few hundredths of 1;
# what is lost below NOTHING is drawn together.
NOTHING = 0.002
TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.995, 1)


def figure4(analysis: Mapping[str, Any]) -> str:
    """The figure of what `duo.report.tradeoff.analyse` gives, as an `<svg>` element."""
    panels = analysis["panels"]
    columns = 4 if len(panels) > 4 and len(panels) % 3 == 1 else 3  # no panel alone in its row
    rows = -(-len(panels) // columns)
    drawn = {point["method"] for panel in panels for point in panel["points"]}
    styles = {
        one["method"]: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for index, one in enumerate(analysis["methods"])
        if one["method"] in drawn
    }
    with _canvas(0.6 + (3 if columns == 3 else 2.7) * columns, 0.9 + 2.75 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        places = grid.ravel()
        for panel, axes in zip(panels, places, strict=False):
            _draw(axes, panel, styles, analysis)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        for axes in places[max(0, len(panels) - columns) : len(panels)]:
            axes.tick_params(labelbottom=True)
        left = _left_end(panels, analysis["over"][0])
        for axes in places[: len(panels)]:
            axes.set_xscale("function", functions=(_spread, _gathered))
        places[0].set_xlim(left, 1 + 0.25 * NOTHING)
        ticks = [tick for tick in TICKS if tick >= left]
        places[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        places[0].set_ylim(-0.05, 1.05)
        places[0].set_yticks((0, 0.25, 0.5, 0.75, 1), ("0%", "25%", "50%", "75%", "100%"))
        figure.supxlabel(
            f"preservation ({analysis['metric'] or 'not measured yet'}), what is lost on a logarithmic scale: "
            "further right is better",
            color=MUTED,
            fontsize=10,
        )
        figure.supylabel("images without the concept: higher is better", color=MUTED, fontsize=10)
        _key(figure, places[0], styles, never=any(panel["never"] for panel in panels))
        return standing_alone(_svg(figure, "figure4", _spoken(panels, analysis)), "figure4")


def _draw(axes: Axes, panel: Mapping[str, Any], styles: Mapping[str, Any], analysis: Mapping[str, Any]) -> None:
    title = panel_title(panel["panel"]) + ("" if panel["reliable"] else " (unreliable)")
    axes.set_title(title, loc="left", fontsize=10.5, color=INK if panel["reliable"] else MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=9)
    if panel["never"]:
        axes.axhline(panel["never"]["mean"], color=INK, zorder=1.5, **NEVER)
    front = sorted((p["preservation"]["mean"], p["success"]["mean"]) for p in panel["points"] if p.get("on_front"))
    if front:
        corners = [(-1.0, front[0][1]), *front, (front[-1][0], 0.0)]
        axes.plot(*zip(*corners, strict=True), color=MUTED, drawstyle="steps-pre", zorder=1.8, **FRONT)
    alpha = 1.0 if panel["reliable"] else 0.45
    for name, style in styles.items():
        own = [point for point in panel["points"] if point["method"] == name]
        x, y = ([point[axis]["mean"] for point in own] for axis in ("preservation", "success"))
        axes.plot(x, y, "-", color=style["color"], linewidth=2.0 if name == analysis["reference"] else 1.2, alpha=alpha)
        for point, across, up in zip(own, x, y, strict=True):
            bars = {"color": style["color"], "linewidth": 0.9, "alpha": 0.4 * alpha, "solid_capstyle": "butt"}
            axes.plot([across, across], [point["success"][end] for end in ("low", "high")], **bars)
            axes.plot([point["preservation"][end] for end in ("low", "high")], [up, up], **bars)
            face = style["color"] if point.get("on_front") else PAPER
            axes.plot(
                across,
                up,
                style["marker"],
                color=style["color"],
                markerfacecolor=face,
                markersize=6,
                markeredgewidth=1.2,
                alpha=alpha,
                zorder=3,
            )
    if not panel["points"]:
        axes.text(0.5, 0.5, "no cells yet", transform=axes.transAxes, ha="center", color=MUTED)


def _key(figure: Figure, axes: Axes, styles: Mapping[str, Any], *, never: bool) -> None:
    """The legend above the panels: methods, and below them what marks and lines mean."""

    def mark(*style: str, **more: Any) -> Any:
        return axes.plot([], [], *style, **more)[0]

    methods = [(mark("-", **style, markersize=6, linewidth=1.4), method_words(name)) for name, style in styles.items()]
    lines = [
        (mark("o", color=MUTED, markersize=6), "on the Pareto front"),
        (mark("o", color=MUTED, markerfacecolor=PAPER, markersize=6), "not on it"),
        (mark(color=MUTED, **FRONT), "best of all methods"),
    ]
    if never:
        lines.append((mark(color=INK, **NEVER), "never saw the concept"))
    filler, columns = mark(linestyle="none"), max(4, min(8, len(methods)))
    widest = 0.9 * figure.bbox.width  # letters of the reader's font may be wider than those that are measured here
    while _legend(figure, methods, lines, columns, filler=filler).get_window_extent().width > widest:
        figure.legends[-1].remove()
        columns -= 1


def _legend(
    figure: Figure, methods: list[tuple[Any, str]], lines: list[tuple[Any, str]], columns: int, *, filler: Any
) -> Legend:
    entries = [*_padded(methods, columns), *_padded(lines, columns)]
    downwards = [entry for column in range(columns) for entry in entries[column::columns]]  # as matplotlib fills them
    return figure.legend(
        [handle if handle else filler for handle, _ in downwards],
        [label for _, label in downwards],
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.4,
        fontsize=9.5,
    )


def _padded(entries: list[tuple[Any, str]], columns: int) -> list[tuple[Any, str]]:
    """Whole rows of a legend."""
    return entries + [(None, "")] * (-len(entries) % columns)


def _spread(preservation: Any) -> Any:
    return -np.log10(np.maximum(1 + NOTHING - np.asarray(preservation, dtype=float), 1e-9))


def _gathered(spread: Any) -> Any:
    return 1 + NOTHING - 10.0 ** -np.asarray(spread, dtype=float)


def _left_end(panels: Sequence[Mapping[str, Any]], low: float) -> float:
    """Where the preservation axis begins: a little left of all points and of `low`, where the area begins."""
    least = min((point["preservation"]["mean"] for panel in panels for point in panel["points"]), default=low)
    return min(least, low) - 0.03 * (1 - min(least, low))


def _spoken(panels: Sequence[Mapping[str, Any]], analysis: Mapping[str, Any]) -> str:
    low, high = analysis["over"]
    said = [
        f"{panel_title(panel['panel'])}: "
        + ", ".join(f"{method_words(one['method'])} {percent(one['mean'])}" for one in panel["areas"])
        for panel in panels
        if panel["areas"]
    ]
    areas = f" Area under each method's points between {low:g} and {high:g}. {'; '.join(said)}." if said else ""
    return f"Defence success against preservation, a panel for each attack.{areas}"
