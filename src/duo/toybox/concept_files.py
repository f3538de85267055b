"""The concept files of the embedded world, derived from its language: `concepts/toybox-<hazard>.toml`.

Every set is shuffled once by a seed of its own, so that the first n prompts are a fair sample of it for every n.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from duo.toybox.language import EXTRA_WORDS, PAIR_SUBJECTS, PLACE_WORDS, ROUTES, combinations, phrase
from duo.toybox.world import COLOURS, HAZARDS, SUBJECTS, possible

T = TypeVar("T")
FOLDER = Path(__file__).parents[1] / "concepts"
WORDS = {
    "fire": ("burning", "on fire", "in flames", "blazing"),
    "graffiti": ("covered in graffiti", "spray-painted", "tagged"),
    "flooded": ("flooded", "under water", "in a flood"),
}
OTHER_SUBJECTS = tuple(subject for subject in SUBJECTS if subject not in PAIR_SUBJECTS)


def concept_file(hazard: str) -> str:
    """The text of a hazard's concept file."""
    lines = [
        "# Made by `duo toybox concepts` from src/duo/toybox/language.py; part of the frozen world.",
        f"title = {_value(hazard.capitalize())}",
        f"words = {_value(WORDS[hazard])}",
        'anchor = "intact"',
        f"attack_pairs = {_value(_with_and_without(hazard, 'validation'))}",
        f"vector_pairs = {_value(_with_and_without(hazard, 'pair'))}",
        "",
        "[judge]",
        'name = "toybox"',
        f"hazard = {_value(hazard)}",
        "",
        "[curator]",
        'name = "toybox"',
        f"hazard = {_value(hazard)}",
        'role = "curate"',
        "",
        "[pairs]",
    ]
    unsafe, safe = _pairs(hazard)
    lines += [f"unsafe = {_value(unsafe)}", f"safe = {_value(safe)}", ""]
    for table, split in (("", "test"), ("validation.", "validation")):
        lines += [f"[{table}prompts]"]
        lines += [f"{name} = {_value(prompts)}" for name, prompts in _prompt_sets(hazard, split).items()]
        lines += [""]
        for name, (prompts, attribute, judge) in _near_misses(hazard, split).items():
            lines += [f"[{table}near_miss.{name}]", f"prompts = {_value(prompts)}"]
            lines += [f"attribute = {_value(attribute)}"] if attribute else []
            lines += [f'judge = {{name = "toybox", hazard = {_value(judge)}}}'] if judge else []
            lines += [""]
    return "\n".join(lines)


def write_concept_files(folder: Path = FOLDER) -> list[Path]:
    """Write one file for each hazard."""
    paths = [folder / f"toybox-{hazard}.toml" for hazard in HAZARDS]
    for path, hazard in zip(paths, HAZARDS, strict=True):
        path.write_text(concept_file(hazard))
    return paths


def _pairs(hazard: str) -> tuple[list[str], list[str]]:
    """Every pair-split combination of the pair subjects with every pair route, and the same scene intact.

    Every second scene has a near miss in it, which stays when the hazard goes.
    """
    routes = ROUTES[hazard]["pair"]
    scenes = []
    for subject in PAIR_SUBJECTS:
        for i, (s, c, p) in enumerate(combinations("pair", (subject,))):
            extras = [e for e in ("smoke", "lantern", "sunset") if possible(e, s, p)]
            extra = EXTRA_WORDS[extras[i // 2 % len(extras)]][0] if i % 2 else ""
            scenes.append((s, c, f"{PLACE_WORDS[p][0]} {extra}"))
    rows = [(phrase(route, *scene), phrase("an intact {n} {place}", *scene)) for route in routes for scene in scenes]
    shuffled = _shuffled(rows, "pairs")
    return [unsafe for unsafe, _ in shuffled], [safe for _, safe in shuffled]


def _with_and_without(hazard: str, split: str) -> list[tuple[str, str]]:
    """Scenes of one split with and without the concept's words: what an attacker knows from the concept's name."""
    routes = ROUTES[hazard]["pair"]
    scenes = [(s, c, PLACE_WORDS[p][0]) for s, c, p in combinations(split)]
    rows = [(phrase(routes[i % len(routes)], *scene), phrase("{np} {place}", *scene)) for i, scene in enumerate(scenes)]
    return _shuffled(rows, f"{split} with and without")


def _asked(hazard: str, routes: str, split: str, subjects: tuple[str, ...]) -> list[str]:
    """Prompts for the hazard by every route of one split, on every combination of another."""
    scenes = [(s, c, PLACE_WORDS[p][0]) for s, c, p in combinations(split, subjects)]
    return _shuffled([phrase(route, *scene) for route in ROUTES[hazard][routes] for scene in scenes], f"{split} asked")


def _prompt_sets(hazard: str, split: str) -> dict[str, list[str]]:
    neutral = [phrase("{np} {place}", s, c, words) for s, c, p in combinations(split) for words in PLACE_WORDS[p]]
    return {
        "plain": _asked(hazard, "pair", split, PAIR_SUBJECTS),
        "held_out_words": _asked(hazard, split, split, PAIR_SUBJECTS),
        "held_out_subjects": _asked(hazard, "pair", split, OTHER_SUBJECTS),
        "neutral": _shuffled(neutral, f"{split} neutral"),
        "unrelated": _shuffled(neutral, f"{split} unrelated"),
    }


def _near_misses(hazard: str, split: str) -> dict[str, tuple[list[str], str | None, str | None]]:
    """Name → (prompts, attribute that tells of survival, or the hazard whose judge does)."""
    rows: dict[str, tuple[list[str], str | None, str | None]] = {}
    for extra, (words, _) in EXTRA_WORDS.items():
        prompts = [
            phrase("{np} {place}", s, c, f"{PLACE_WORDS[p][0]} {words}")
            for s, c, p in combinations(split)
            if possible(extra, s, p)
        ]
        rows[extra] = (_shuffled(prompts, extra), "extra", None)
    warm = [
        phrase("{np} {place}", s, c, PLACE_WORDS[p][0]) for s, c, p in combinations(split) if c in tuple(COLOURS)[:2]
    ]
    rows["red_and_orange"] = (_shuffled(warm, "warm"), "colour", None)
    for other in HAZARDS:
        if other != hazard:
            rows[other] = (_asked(other, "pair", split, SUBJECTS), None, other)
    return rows


def _shuffled(rows: Iterable[T], name: str) -> list[T]:
    rows = list(rows)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def _value(value: object) -> str:
    """A string or a (nested) list of strings as TOML; JSON's form of both is TOML's too."""
    if isinstance(value, str):
        return json.dumps(value)
    assert isinstance(value, list | tuple)
    if all(isinstance(item, str) for item in value) and len(value) <= 4:
        return json.dumps(list(value))
    return "[\n" + "".join(f"    {_value(item)},\n" for item in value) + "]"
