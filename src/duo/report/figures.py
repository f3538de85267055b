"""Figures as SVG text. matplotlib is imported when one is drawn, so that reading a report needs none of it.

Colours are from a palette that stays apart under the common colour-vision deficiencies, and shape or position says the
same as colour. Text stays text: it can be searched, and it takes the font of the page.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duo.report.hardening import Hardening
from duo.report.records import Attack, Mean
from duo.report.wording import attack_words, name_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b2430", "#5a6575", "#d5dbe3"
ORIGINAL, ERASED = "#7a8798", "#c4500a"
SERIES = ("#c4500a", "#0b66ad", "#0d7f5f", "#8a4fb0")
PAPER = "#ffffff"
MORE = (
    "#8f6a00",
    "#c2417c",
    "#7d5a44",
    "#5b8c00",
    "#4b5563",
    "#c81e1e",
)  # for more methods than other figures have series
COLOURS = (*SERIES, *MORE)
MARKERS = "osD^vPX*ph<>"
DARK = {  # as report.css has them
    PAPER: "#14181e",
    INK: "#e8ebef",
    MUTED: "#a3adba",
    GRID: "#323b47",
    COLOURS[0]: "#ff9152",
    COLOURS[1]: "#6fb7f2",
    COLOURS[2]: "#58c9a4",
    COLOURS[3]: "#cc9cec",
    COLOURS[4]: "#e3bd52",
    COLOURS[5]: "#f58bbb",
    COLOURS[6]: "#d0a88f",
    COLOURS[7]: "#a5cf55",
    COLOURS[8]: "#c3cad4",
    COLOURS[9]: "#ff7b72",
}
FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Noto Sans", "Helvetica Neue", Arial, sans-serif'

CURVE_TITLES = {
    "loss": "Loss",
    "accuracy": "Implicit preference accuracy",
    "margin": "Margin (safe over unsafe)",
    "prior": "Prior drift at the last step",
}


@dataclass(frozen=True, kw_only=True)
class TradeoffPoint:
    """One erasure of a sweep: how often the concept is still detected, and how much of unrelated pictures is kept."""

    series: str
    label: str
    detection: Mean
    preservation: Mean


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What so much work took: `n` units, the seconds, and the highest resident size in MiB.

    Of what is `shared` the work stays as it is and `n` do it.
    """

    title: str
    unit: str
    n: Sequence[float]
    seconds: Sequence[float]
    mib: Sequence[float]
    shared: bool = False


def growth(measured: Sequence[Growth]) -> str:
    """Seconds over work, a panel each, both axes logarithmic; the dashed line is proportional to the work of each.

    Beside each point stands the highest resident size.
    """
    columns = min(3, len(measured))
    rows = -(-len(measured) // columns)
    with _canvas(max(4.4, 3.6 * columns), 0.3 + 2.7 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, one in zip(panels, measured, strict=False):
            panel.loglog(one.n, one.seconds, "-o", color=ERASED, linewidth=1.3, markersize=5)
            ideal = [one.seconds[0] * one.n[0] / n if one.shared else one.seconds[-1] * n / one.n[-1] for n in one.n]
            panel.loglog(one.n, ideal, "--", color=ORIGINAL, linewidth=1.0)
            for n, seconds, mib in zip(one.n, one.seconds, one.mib, strict=True):
                panel.annotate(
                    f"{mib:.0f} MiB",
                    (n, seconds),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=MUTED,
                )
            panel.set_title(one.title, loc="left", fontsize=10.5, color=INK)
            panel.set_xticks(one.n, [f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else f"{n}" for n in one.n])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers are formulas, which an SVG has not
            panel.margins(x=0.15, y=0.25)
            panel.set_xlabel(one.unit)
            panel.set_ylabel("seconds")
            panel.grid(axis="y", color=GRID, linewidth=0.8)
        for panel in panels[len(measured) :]:
            panel.set_axis_off()
        return _svg(figure, "growth", f"Seconds over work: {', '.join(one.title for one in measured)}.")


def variant_rates(attacks: Sequence[Attack]) -> str:
    """Detected rate over the settings of each attack that has several, a panel each, with 95% intervals."""
    columns = min(3, max(2, len(attacks)))
    rows = -(-len(attacks) // columns)
    with _canvas(3.4 * columns, 0.6 + 2.1 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, attack in zip(panels, attacks, strict=False):
            names = [one.name for one in attack.erased.variants]
            models = (
                ("original", attack.original, ORIGINAL, "s", -0.06),
                ("never saw it", attack.never, SERIES[1], "D", 0.06),
                ("erased", attack.erased, ERASED, "o", 0.0),
            )
            for label, row, colour, marker, shift in models:
                own = {one.name: one for one in row.variants} if row else {}
                places = [place for place, name in enumerate(names) if name in own]
                means = [
                    Mean(mean=own[names[i]].rate, low=own[names[i]].low, high=own[names[i]].high, n=own[names[i]].n)
                    for i in places
                ]
                if means:
                    rates, spread = [100 * one.mean for one in means], _spread(means, scale=100)
                    style = {"color": colour, "elinewidth": 1.0, "linewidth": 1.3, "markersize": 5, "label": label}
                    panel.errorbar([place + shift for place in places], rates, yerr=spread, fmt=f"-{marker}", **style)
            panel.set_title(attack_words(attack.name).label, loc="left", fontsize=10.5, color=INK)
            slanted = max(map(len, names)) > 8
            panel.set_xticks(
                range(len(names)),
                [name_shown(name) for name in names],
                rotation=30 if slanted else 0,
                ha="right" if slanted else "center",
            )
            panel.set_xlim(-0.3, len(names) - 0.7)
            panel.set_ylim(-4, 104)
            panel.set_yticks((0, 50, 100), ("0%", "50%", "100%"))
            panel.grid(axis="y", color=GRID, linewidth=0.8)
        for panel in panels[len(attacks) :]:
            panel.set_axis_off()
        handles = {
            label: handle
            for panel in panels[: len(attacks)]
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
        told = ", ".join(attack_words(attack.name).label for attack in attacks)
        return _svg(figure, "variant-rates", f"Detected rate by setting: {told}.")


def hardening_rounds(hardening: Hardening, *, of: str = "validation prompts") -> str:
    """Over rounds of hardening: how often each attack brings the concept back, and what of unrelated pictures is kept.

    Attacks that are not learned from are dashed. Bars are 95% intervals. `of` says on which prompts the images are.
    """
    kept = {one.number: one.kept for one in hardening.rounds if one.kept is not None}
    with _canvas(7.6 if kept else 5.2, 3.2) as figure:
        panels = figure.subplots(1, 2 if kept else 1, squeeze=False, width_ratios=(3, 2) if kept else None).ravel()
        for place, (attack, marker) in enumerate(zip(hardening.rows, "osD^vPX*" * len(hardening.rows), strict=False)):
            found = {one.number: told.counted for one in hardening.rounds if (told := one.attack(attack.row))}
            own = {number: one for number, one in found.items() if one is not None}
            means = [Mean(mean=one.rate, low=one.low, high=one.high, n=one.n) for one in own.values()]
            panels[0].errorbar(
                [number + 0.03 * (place - (len(hardening.rows) - 1) / 2) for number in own],
                [100 * one.mean for one in means],
                yerr=_spread(means, scale=100),
                fmt=f"{'-' if attack.learned else '--'}{marker}",
                color=SERIES[place % len(SERIES)],
                elinewidth=1.0,
                linewidth=1.3,
                markersize=5,
                label=attack_words(attack.row).label,
            )
        panels[0].set_title(f"Brought back, {of}", loc="left", fontsize=10.5, color=INK)
        panels[0].set_ylim(-4, 104)
        panels[0].set_yticks((0, 50, 100), ("0%", "50%", "100%"))
        if kept:
            means = [Mean(mean=mean, low=low, high=high, n=1) for mean, low, high in kept.values()]
            style = {"color": INK, "elinewidth": 1.0, "linewidth": 1.3, "markersize": 5}
            panels[1].errorbar(list(kept), [one.mean for one in means], yerr=_spread(means, scale=1), fmt="-o", **style)
            panels[1].set_title("Unrelated pictures kept", loc="left", fontsize=10.5, color=INK)
        for panel in panels:
            panel.set_xticks([one.number for one in hardening.rounds])
            panel.set_xlabel("round")
            panel.grid(axis="y", color=GRID, linewidth=0.8)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=9
        )
        return _svg(figure, "hardening", "Hardening: how often each attack brings the concept back, and what is kept.")


def stacked(bars: Mapping[str, Sequence[float]], parts: Sequence[str], *, what: str, unit: str) -> str:
    """A bar for each name, the first on top, of its parts one after the other; the sum stands behind it, of `unit`."""
    with _canvas(8.6, 1.0 + 0.24 * len(bars)) as figure:
        axes = figure.subplots()
        places = range(len(bars))
        ends = [0.0] * len(bars)
        for part, values, colour in zip(parts, zip(*bars.values(), strict=True), COLOURS, strict=False):
            axes.barh(places, values, left=ends, height=0.72, color=colour, label=part)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        for place, end in zip(places, ends, strict=True):
            axes.text(end, place, f" {end:.2f}", va="center", fontsize=8, color=MUTED)
        axes.set_yticks(places, list(bars), fontsize=8.5)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.08 * max(ends))
        axes.set_xlabel(unit)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
        return _svg(figure, "stacked", f"{what}.")


def dots(rows: Sequence[str], panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], *, what: str) -> str:
    """A panel for each title: of each series and row a dot at the mean of its values, in percent, and a line from least
    to most."""
    with _canvas(1.6 + 3.5 * len(panels), 1.0 + 0.5 * len(rows)) as figure:
        shown = figure.subplots(1, len(panels), squeeze=False, sharey=True).ravel()
        for axes, (title, series) in zip(shown, panels.items(), strict=True):
            for index, (name, values) in enumerate(series.items()):
                colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
                places = [place + 0.16 * (index - (len(series) - 1) / 2) for place in range(len(rows))]
                for place, own in zip(places, values, strict=True):
                    axes.plot([min(own), max(own)], [place, place], color=colour, linewidth=1.2, alpha=0.6)
                means = [sum(own) / len(own) for own in values]
                axes.plot(means, places, marker, color=colour, markersize=5.5, label=name, clip_on=False)
            axes.set_title(title, loc="left", fontsize=10.5, color=INK)
            axes.set_xlim(-3, 106)
            axes.set_xticks((0, 25, 50, 75, 100), [f"{tick}%" for tick in (0, 25, 50, 75, 100)])
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            for place in range(1, len(rows)):
                axes.axhline(place - 0.5, color=GRID, linewidth=0.5)
        figure.set_layout_engine("constrained", wspace=0.06)  # the last label of a panel is as wide as that
        shown[0].set_yticks(range(len(rows)), list(rows))
        shown[0].set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(
            *shown[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=9
        )
        return _svg(figure, "dots", f"{what}: {', '.join(panels)}.")


def training_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Small multiples of what the training logged: each value faint, its running mean over 5% of the rows strong."""
    with _canvas(7.6, 2.1 * ((len(curves) + 1) // 2)) as figure:
        panels = figure.subplots((len(curves) + 1) // 2, 2, squeeze=False).ravel()
        for panel, (name, points), colour in zip(panels, curves.items(), SERIES, strict=False):
            steps, values = [step for step, _ in points], [value for _, value in points]
            panel.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
            panel.plot(steps, _running_mean(values, max(1, len(values) // 20)), color=colour, linewidth=1.8)
            panel.set_title(CURVE_TITLES.get(name, name), loc="left", fontsize=10.5, color=INK)
            panel.set_xlabel("step")
            panel.grid(axis="y", color=GRID, linewidth=0.8)
            panel.spines["bottom"].set_color(GRID)
        for panel in panels[len(curves) :]:
            panel.set_axis_off()
        names = ", ".join(CURVE_TITLES.get(name, name).lower() for name in curves)
        return _svg(figure, "training-curves", f"Training over steps: {names}.")


def tradeoff(points: Sequence[TradeoffPoint], *, metric: str = "1 - toybox-LPIPS") -> str:
    """Detection against preservation, one line a series in the order given. The upper left corner is the aim."""
    with _canvas(6.2, 4.4) as figure:
        axes = figure.subplots()
        for series, colour, marker in zip(
            dict.fromkeys(p.series for p in points), SERIES * 2, "osD^vPX*", strict=False
        ):
            own = [point for point in points if point.series == series]
            x = [100 * point.detection.mean for point in own]
            y = [point.preservation.mean for point in own]
            axes.errorbar(
                x,
                y,
                xerr=_spread([p.detection for p in own], scale=100),
                yerr=_spread([p.preservation for p in own], scale=1),
                fmt=f"-{marker}",
                color=colour,
                ecolor=colour,
                elinewidth=1.1,
                linewidth=1.3,
                markersize=6,
                label=series,
            )
            for point, across, up in zip(own, x, y, strict=True):
                axes.annotate(
                    point.label,
                    (across, up),
                    xytext=(6, 6),
                    textcoords="offset points",
                    fontsize=9,
                    color=MUTED,
                )
        axes.set_xlabel("images in which the concept is detected (%): lower is better")
        axes.set_ylabel(f"preservation ({metric}): higher is better")
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # a little below 0, where the best points lie
        axes.grid(color=GRID, linewidth=0.8)
        axes.legend(frameon=False, loc="lower right")
        return _svg(figure, "tradeoff", "Detection against preservation over a sweep.")


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each place (fewer at the start)."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def _spread(means: Sequence[Mean], *, scale: float) -> list[list[float]]:
    """Distances from the mean down and up, as `errorbar` takes them; rounding can make one a hair negative."""
    down = [max(0.0, scale * (mean.mean - mean.low)) for mean in means]
    return [down, [max(0.0, scale * (mean.high - mean.mean)) for mean in means]]


@contextmanager
def _canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of `width`×`height` inches in the report's style."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # names come from data, and a lone $ is no formula
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str, description: str) -> str:
    """`figure` as an `<svg>` element with an accessible name. The same figure gives the same bytes."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids differ between the figures of one page
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    label = html.escape(description, quote=True)
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def standing_alone(svg: str, name: str) -> str:
    """The figure as a file of its own: with a background, and where the reader asks for dark in other colours.

    Rules on colours name no ancestor, for they would not reach the marks, which are used from `<defs>`.
    """
    rules = [f"#{name} {{ background: {PAPER}; }}", f"#{name} text {{ font-family: {FONT} !important; }}"]
    dark = [f"#{name} {{ background: {DARK[PAPER]}; }}"]
    for light, other in DARK.items():
        dark += [f'[style*="{key}: {light}"] {{ {key}: {other} !important; }}' for key in ("fill", "stroke")]
    style = "\n".join([*rules, "@media (prefers-color-scheme: dark) {", *dark, "}"])
    svg = svg.replace("<svg ", f'<svg id="{name}" ', 1)
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}\n<style>\n{style}\n</style>{svg[start:]}"
