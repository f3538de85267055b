"""The page: one HTML file that needs nothing beside itself. No scripts, no network; every value is escaped.

An image is shown clearly only if its prompts do not ask for the concept *and* every judge that saw it said "absent".
Everything else is shown as a whole-image pixelated copy, and its own pixels are not in the file, unless the caller
asks for the uncensored page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from duo.models import title
from duo.purged import removed
from duo.report import figures, templates
from duo.report.answers import UNRELATED, answers, outcome, strongest_first
from duo.report.gallery import SHOWN_PER_SET, Gallery, Picture, Returns, read_gallery
from duo.report.images import SMALL, data_uri, pixelated, read_image
from duo.report.inline_svg import inlined, read_svg
from duo.report.own_concept import OwnConcept, portable
from duo.report.plain_text import shown, visible
from duo.report.quality import protocols
from duo.report.records import MODELS, Attack, RunRecords, Scores
from duo.report.toml_text import toml_text
from duo.report.warnings import cautions
from duo.report.wording import (
    ALL_ATTRIBUTES,
    attack_words,
    concept_word,
    duration,
    findings,
    headline_attack,
    name_shown,
    no_fall,
    not_tried,
    number,
    percent,
    percent_range,
    points,
    signed,
    strongest,
)
from duo.strength import standing, verdict

SHOWN_PAIRS = 6
SHOWN_AT_ONCE = 6  # images of one attack that stand open where the concept came back; the others behind a click
GRIDS_AT_ONCE = 2  # attacks whose before and after stand open, beside the headline's
TRADEOFF = "tradeoff.svg"  # in the run folder: the figure of the bench that the run is part of

NAMED = ("fifth", "sixth", "seventh", "eighth", "ninth", "tenth")  # of `MORE`, in the style sheet
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
    **dict(zip(figures.MORE, [f"var(--{name})" for name in NAMED], strict=True)),
    figures.PAPER: "var(--paper)",
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
    small: bool  # of so few pixels that they are to be seen as they are
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
    """A titled row of cells; a `clear` one is of images that are shown as they are, and larger."""

    title: str
    note: str
    first: str
    second: str
    cells: tuple[Cell, ...]
    clear: bool = False

    @property
    def uncensored(self) -> list[Shown]:
        return [shown for cell in self.cells for shown in (cell.first, cell.second) if shown.uncensored]


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Before and after: what stands open, what else was attacked, and what must have stayed as it was."""

    attacked: tuple[Strip, ...]
    folded: tuple[Strip, ...]
    harmless: tuple[Strip, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image of the erased model in which the concept was seen, and what brought it."""

    picture: Picture
    shown: Shown


@dataclass(frozen=True, kw_only=True)
class Cases:
    """What one attack brought back. `rest` are links, relative to the run folder, with what they are called."""

    title: str
    needs: str
    open: tuple[Case, ...]
    folded: tuple[Case, ...]
    rest: tuple[tuple[str, str], ...]


def render(records: RunRecords, *, uncensored: bool, tradeoff: Path) -> str:
    """The HTML text of a run's report, with the figure `tradeoff` where there is such a file."""
    scores = records.scores
    environment = templates.environment(autoescape=True, finalize=_finalized)
    environment.filters.update(
        percent=percent, duration=duration, shown=shown, name=name_shown, number=number, signed=signed
    )
    environment.globals.update(percent_range=percent_range, attack_words=attack_words, points=points)
    varied = [attack for attack in scores.attacks if attack.erased.variants]
    show = _Show(concept_word(scores.concept), uncensored=uncensored)
    returned = strongest(scores)
    gallery = read_gallery(records.folder, scores, returned=returned)
    style = resources.files("duo.report").joinpath("report.css").read_text(encoding="utf-8")
    return environment.get_template("template.html").render(
        scores=scores,
        title=title(scores.model),
        concept=concept_word(scores.concept),
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        outcome=outcome(scores),
        answers=answers(scores),
        findings=findings(scores),
        cautions=cautions(scores, erasure=records.kind),
        tradeoff=_themed(read_svg(tradeoff, name="tradeoff")) if tradeoff.exists() else None,
        attacks=_groups(scores),
        hardening=records.hardening,
        hardening_figure=_figure(figures.hardening_rounds(records.hardening), "hardening")
        if records.hardening and len(records.hardening.rounds) > 1
        else None,
        strips=_strips(gallery, scores, show),
        cases=[_cases(one, show) for one in gallery.returns],
        gallery=gallery,
        unheeded=[one for one in scores.attacks if one.erased.detected and one not in returned],
        unsafe=(scores.attributes or {}).get("unsafe"),
        protocols=protocols(scores.protocol),
        not_tried=not_tried(scores),
        pairs=_pairs(records, show),
        account=list(_flat(records.account)),
        variants_figure=_figure(figures.variant_rates(varied), "variants") if varied else None,
        varied=varied,
        curves_figure=_figure(figures.training_curves(records.curves), "curves") if records.curves else None,
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
        searched=records.searched,
        standing=standing,
        verdict_of_search=() if records.searched is None else verdict(records.searched),
        compared=any(attack.erased.excess for attack in scores.attacks),
        asked=any(attack.erased.of_prompts for attack in scores.attacks),
        baselines=any(scores.beside(attack) for attack in scores.attacks),
    )


def _groups(scores: Scores) -> list[tuple[str, list[Attack]]]:
    """The attack rows, the strongest first after the headline's; those that were used to harden last, and titled."""
    ordered = strongest_first(scores.attacks, first=headline_attack(scores))
    used = "Used to harden: the erasure learned from what these had brought back"
    groups = [("", [one for one in ordered if not one.hardened]), (used, [one for one in ordered if one.hardened])]
    return [group for group in groups if group[1]]


def _finalized(value: object) -> object:
    """What every text goes through before it is escaped; markup of ours is left as it is."""
    return visible(value, lines=True) if type(value) is str else value


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
            alt=f"{alt}; removed by duo purge" if removed(path) else f"{alt}; shown pixelated" if hidden else alt,
            tag=tag,
            tone=tone,
            hidden=hidden,
            small=max(image.size) <= SMALL,
            uncensored=data_uri(image) if hidden and self.uncensored else None,
        )


def _strips(gallery: Gallery, scores: Scores, show: _Show) -> Strips:
    """The first images of each set, in order and not chosen, original above erased at the same seed."""
    order = [attack.name for attack in strongest_first(scores.attacks, first=headline_attack(scores))]
    harmless = [name for name in (UNRELATED, *scores.near_miss_names) if name in gallery.grids]
    unknown = [name for name in gallery.grids if name not in (*order, *harmless)]
    asking = [_strip(name, gallery, scores, show, asks=True) for name in (*order, *unknown) if name in gallery.grids]
    return Strips(
        attacked=tuple(asking[: 1 + GRIDS_AT_ONCE]),
        folded=tuple(asking[1 + GRIDS_AT_ONCE :]),
        harmless=tuple(_strip(name, gallery, scores, show, asks=False) for name in harmless),
    )


def _strip(name: str, gallery: Gallery, scores: Scores, show: _Show, *, asks: bool) -> Strip:
    """A set that is not known to be harmless is taken to ask for the concept."""
    cells = tuple(
        Cell(
            first=show(original, asks=asks),
            second=show(erased, asks=asks),
            prompt=original.prompt,
            second_prompt=erased.prompt if erased.prompt != original.prompt else None,
            seed=original.seed,
        )
        for original, erased in gallery.grids[name]
    )
    title, note = _strip_words(name, scores)
    return Strip(title=title, note=note, first="original", second="erased", cells=cells, clear=not asks)


def _strip_words(name: str, scores: Scores) -> tuple[str, str]:
    if name == UNRELATED:
        return "Unrelated prompts", "must stay as they were"
    if name in scores.near_miss_names:
        return f"Near miss: {name_shown(name)}", "harmless, must survive"
    words = attack_words(name)
    return words.label, words.does


def _cases(returns: Returns, show: _Show) -> Cases:
    words = attack_words(returns.attack.name)
    cases = [Case(picture=picture, shown=show(picture, asks=True)) for picture in returns.worst]
    return Cases(
        title=words.label,
        needs=words.needs,
        open=tuple(cases[:SHOWN_AT_ONCE]),
        folded=tuple(cases[SHOWN_AT_ONCE:]),
        rest=tuple((quote(path), Path(path).stem) for path in returns.rest),
    )


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


def _flat(account: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested counts as (name, value) lines in the record's order."""
    lines: list[tuple[str, str]] = []
    for key, value in account.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        lines += _flat(value, f"{name}: ") if isinstance(value, Mapping) else [(name, _plain(value))]
    return lines


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figure(svg: str, name: str) -> Markup:
    """A figure of ours; what is in it is written anew all the same, as its texts are from records."""
    return _themed(inlined(svg, name=name, where=f"the figure {name!r}"))


def _themed(svg: str) -> Markup:
    """A figure that `inline_svg` wrote, its colours replaced by the theme's."""
    for colour, name in THEMED.items():
        svg = svg.replace(colour, name)
    return Markup(svg)
