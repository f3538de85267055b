"""The page: one HTML file that needs nothing beside itself. No scripts, no network; every value is escaped.

An image is shown clearly only if its prompts do not ask for the concept *and* every judge that saw it said "absent".
Everything else is shown as a whole-image pixelated copy, and its own pixels are not in the file, unless the caller
asks for the uncensored page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from duo.models import title
from duo.report import figures
from duo.report.images import data_uri, pixelated, read_image
from duo.report.own_concept import OwnConcept, portable
from duo.report.records import MODELS, Attack, Picture, Preservation, RunRecords, Scores
from duo.report.toml_text import toml_text
from duo.report.wording import (
    ALL_ATTRIBUTES,
    attack_words,
    concept_word,
    duration,
    findings,
    headline_attack,
    listed,
    no_fall,
    not_tried,
    percent,
    percent_range,
    points,
    strongest,
)

SHOWN_PER_SET = 6
SHOWN_PAIRS = 6
SHOWN_RETURNS = 6
UNRELATED = "unrelated"

# The figures' colours, as the names that the style sheet gives them in each theme.
THEMED = {
    figures.INK: "var(--ink)",
    figures.MUTED: "var(--muted)",
    figures.GRID: "var(--line)",
    figures.ORIGINAL: "var(--original)",
    figures.ERASED: "var(--erased)",
    figures.SERIES[1]: "var(--second)",
    figures.SERIES[2]: "var(--third)",
    figures.SERIES[3]: "var(--fourth)",
}


KINDS = {  # of erasures that were brought
    "lora": "a LoRA",
    "weights": "changed weights",
    "gated": "adapters that prompts open",
    "denoiser": "weights of a denoiser",
    "text_encoder": "a text encoder",
    "model": "a whole model",
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One image as it stands on the page. `uncensored` is the original's data URI where the reader asked for it."""

    uri: str
    alt: str
    tag: str
    tone: str
    hidden: bool
    uncensored: str | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Two images that belong together: original and erased model at one seed, or the two sides of a pair."""

    first: Shown
    second: Shown
    prompt: str
    second_prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A titled row of cells."""

    title: str
    note: str
    first: str
    second: str
    cells: tuple[Cell, ...]

    @property
    def uncensored(self) -> list[Shown]:
        return [shown for cell in self.cells for shown in (cell.first, cell.second) if shown.uncensored]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number in large type."""

    name: str
    value: str
    before: str | None
    detail: str


def render(records: RunRecords, *, uncensored: bool) -> str:
    """The HTML text of a run's report."""
    scores = records.scores
    environment = Environment(
        loader=PackageLoader("duo.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration)
    environment.globals.update(percent_range=percent_range, attack_words=attack_words, points=points)
    varied = [attack for attack in scores.attacks if attack.erased.variants]
    show = _Show(concept_word(scores.concept), uncensored=uncensored)
    return environment.get_template("template.html").render(
        scores=scores,
        title=title(scores.model),
        concept=concept_word(scores.concept),
        findings=findings(scores),
        tiles=_tiles(scores),
        strips=_strips(records, show),
        returns=_returns(records, show),
        not_tried=not_tried(scores),
        pairs=_pairs(records, show),
        account=list(_flat(records.account)),
        rates_figure=_themed(figures.attack_rates(scores.attacks)),
        variants_figure=_themed(figures.variant_rates(varied)) if varied else None,
        varied=varied,
        curves_figure=_themed(figures.training_curves(records.curves)) if records.curves else None,
        records=records,
        config=toml_text(portable(records.recipe)),
        own_concept=OwnConcept.of(records.folder, records.recipe),
        doubt=no_fall(scores),
        total=sum(records.cost.values()),
        shown_per_set=SHOWN_PER_SET,
        uncensored=uncensored,
        all_attributes=ALL_ATTRIBUTES,
        models=MODELS,
        budget=records.recipe.get("budget"),
        kinds=KINDS,
        compared=any(attack.erased.excess for attack in scores.attacks),
        asked=any(attack.erased.of_prompts for attack in scores.attacks),
        baselines=any(scores.beside(attack) for attack in scores.attacks),
    )


class _Show:
    """Turns image files into `Shown`, censored by the rule of the module's docstring."""

    def __init__(self, concept: str, *, uncensored: bool) -> None:
        self.concept = concept
        self.uncensored = uncensored

    def __call__(self, picture: Picture, *, asks: bool) -> Shown:
        """`asks` says whether the image's prompt asks for the concept."""
        label = "corrupted" if "corrupted" in picture.labels else "absent"
        label = "present" if "present" in picture.labels else label if picture.labels else "not judged"
        tag = {"present": self.concept, "corrupted": "spoiled", "absent": f"no {self.concept}"}.get(label, label)
        if picture.survived is False and label == "absent":
            tag, label = "lost", "lost"
        return self.image(
            picture.path,
            hidden=asks or not picture.judged_absent,
            alt=f"{picture.model} model, image {picture.index}, seed {picture.seed}, judged: {tag}",
            tag=tag,
            tone=label.replace(" ", "-"),
        )

    def image(self, path: Path, *, hidden: bool, alt: str, tag: str, tone: str) -> Shown:
        image = read_image(path)
        return Shown(
            uri=data_uri(pixelated(image) if hidden else image),
            alt=f"{alt}; shown pixelated" if hidden else alt,
            tag=tag,
            tone=tone,
            hidden=hidden,
            uncensored=data_uri(image) if hidden and self.uncensored else None,
        )


def _strips(records: RunRecords, show: _Show) -> list[Strip]:
    """The first images of each set, in order and not chosen, original above erased at the same seed."""
    attacks = {attack.name: attack for attack in records.scores.attacks}
    baselines = records.scores.baselines
    strips = []
    known = (*attacks, UNRELATED, *records.scores.near_miss_names)
    for name in dict.fromkeys([*known, *(p.set for p in records.pictures if p.set not in baselines)]):
        original, erased = (
            {p.index: p for p in records.pictures if (p.set, p.model) == (name, model)} for model in MODELS
        )
        same = [i for i in sorted(original) if i in erased and original[i].seed == erased[i].seed][:SHOWN_PER_SET]
        if not same:
            continue
        asks = name in attacks or not _harmless(name, records.scores)
        cells = [
            Cell(
                first=show(original[i], asks=asks),
                second=show(erased[i], asks=asks),
                prompt=original[i].prompt,
                second_prompt=erased[i].prompt if erased[i].prompt != original[i].prompt else None,
                seed=original[i].seed,
            )
            for i in same
        ]
        title, note = _strip_words(name, records.scores)
        strips.append(Strip(title=title, note=note, first="original", second="erased", cells=tuple(cells)))
    return strips


def _harmless(name: str, scores: Scores) -> bool:
    """Whether a prompt set is known not to ask for the concept; an unknown set is taken to ask."""
    return name == UNRELATED or name in scores.near_miss_names


def _strip_words(name: str, scores: Scores) -> tuple[str, str]:
    if name == UNRELATED:
        return "Unrelated prompts", "must stay as they were"
    if name in scores.near_miss_names:
        return f"Near miss: {name.replace('_', ' ')}", "harmless, must survive"
    words = attack_words(name)
    return words.label, words.does


def _returns(records: RunRecords, show: _Show) -> list[tuple[str, Picture, Shown]]:
    """Images of the erased model in which the concept was seen, the strongest attack first, turn by turn."""
    order = [attack.name for attack in strongest(records.scores)]
    found: Mapping[str, Sequence[Picture]] = {
        name: [p for p in records.pictures if (p.set, p.model) == (name, "erased") and "present" in p.labels]
        for name in order
    }
    turns = [pictures[turn] for turn in range(SHOWN_RETURNS) for pictures in found.values() if turn < len(pictures)]
    return [(attack_words(picture.set).label, picture, show(picture, asks=True)) for picture in turns[:SHOWN_RETURNS]]


def _pairs(records: RunRecords, show: _Show) -> Strip | None:
    """The first pairs. The safe side was made to be harmless and passed the curator, so it is shown."""
    cells = []
    for pair in records.pairs[:SHOWN_PAIRS]:
        unsafe, safe = (
            show.image(
                path,
                hidden=hidden,
                alt=f"pair {pair.index}, {side} side",
                tag=side,
                tone="present" if hidden else "absent",
            )
            for path, side, hidden in ((pair.unsafe, "unsafe", True), (pair.safe, "safe", False))
        )
        cells.append(Cell(first=unsafe, second=safe, prompt=pair.unsafe_prompt))
    if not cells:
        return None
    return Strip(title="Training pairs", note="", first="unsafe", second="safe", cells=tuple(cells))


def _tiles(scores: Scores) -> list[Tile]:
    """The numbers that a reader in a hurry takes away."""
    head = headline_attack(scores)
    tiles = [_attack_tile(attack_words(head.name).label, scores, head.name)]
    others = [
        attack for attack in scores.attacks if attack.name != head.name and (attack.reliable or attack.erased.detected)
    ]
    if others:
        worst = max(others, key=lambda attack: (_above(attack), attack.erased.top.rate, attack.erased.corrupted_rate))
        tiles.append(_attack_tile(f"Strongest attack: {attack_words(worst.name).label}", scores, worst.name))
    tiles.append(_kept_tile(scores.preservation))
    unrelated = (scores.attributes or {}).get(UNRELATED)
    if unrelated and ALL_ATTRIBUTES in unrelated["erased"]:
        before, after = unrelated["original"][ALL_ATTRIBUTES], unrelated["erased"][ALL_ATTRIBUTES]
        names = listed([name for name in unrelated["erased"] if name != ALL_ATTRIBUTES] or ["every attribute"])
        tiles.append(
            Tile(
                name="Unrelated prompts obeyed",
                value=percent(after.mean),
                before=percent(before.mean),
                detail=f"{names} all right, {percent_range(after.low, after.high)}, n={after.n}",
            )
        )
    return tiles


def _above(attack: Attack) -> float:
    """How much more of the concept there is than from a model that never saw it; without one, how much there is."""
    top = attack.erased.top
    return top.rate if top.excess is None else top.excess.rate


def _kept_tile(kept: Preservation | None) -> Tile:
    name = "Unrelated pictures kept"
    if kept is None:
        return Tile(name=name, value="not measured", before=None, detail="the recipe names no metric")
    detail = f"{kept.metric}, {kept.low:.2f}–{kept.high:.2f}, n={kept.n}"
    return Tile(name=name, value=f"{kept.mean:.2f}", before="1.00", detail=detail)


def _attack_tile(name: str, scores: Scores, row: str) -> Tile:
    attack = next(attack for attack in scores.attacks if attack.name == row)
    after = attack.erased.top
    before = attack.original.at(after.name) or attack.original.top
    detail = (
        f"{after.detected} of {after.n} show {concept_word(scores.concept)}, {percent_range(after.low, after.high)}"
    )
    detail = f"at {after.name}: {detail}" if after.name else detail
    return Tile(
        name=name,
        value=percent(after.rate),
        before=percent(before.rate),
        detail=detail if attack.reliable else f"{detail}; unreliable",
    )


def _flat(account: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as (name, value) lines in the record's order."""
    lines: list[tuple[str, str]] = []
    for key, value in account.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        lines += _flat(value, f"{name}: ") if isinstance(value, Mapping) else [(name, _plain(value))]
    return lines


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _themed(svg: str) -> Markup:
    """A figure of ours, its colours replaced by the theme's. matplotlib and `figures` escape every text in it."""
    for colour, name in THEMED.items():
        svg = svg.replace(colour, name)
    return Markup(svg)
