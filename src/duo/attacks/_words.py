"""What attacks by image queries share: a vocabulary, the concept's words in a text, the detector that rewards."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from duo.clip import clip_vocabulary, find_clip
from duo.errors import UserError

if TYPE_CHECKING:
    from duo.concept import AttackConcept
    from duo.plugins import Judge, Verdict
    from duo.target import Target

PUBLISHED_CLIP = "openai/clip-vit-base-patch32"
END_OF_WORD = "</w>"
SEEDS = 2**53  # below it a seed survives JSON


@lru_cache(maxsize=4)
def words_of_clip(clip: str, *, longest: int) -> tuple[str, ...]:
    """The ASCII letters of each entry of a CLIP's tokenizer, where there are one to `longest`; each word once.

    The mark of an end of a word is cut off first, or its w would be taken for a letter: "cat</w>" is "cat".
    """
    words = (re.sub("[^A-Za-z]", "", entry.removesuffix(END_OF_WORD)) for entry in clip_vocabulary(clip))
    return tuple(dict.fromkeys(word for word in words if 0 < len(word) <= longest))


def check_clip(clip: str, attack: str) -> None:
    """Raise `UserError` where the attacker's CLIP cannot be had, before anything is asked."""
    find_clip(clip, f"attack {attack}", field="clip", whose="attack")


def check_detector(concept: AttackConcept, attack: str) -> None:
    """Raise `UserError` where the attacker has none."""
    if concept.detector is None:
        raise UserError(f"concept {concept.name}: {attack} needs a detector that tells when an image shows the concept")


def knowledge_of(target: Target) -> tuple[AttackConcept, Judge]:
    """The concept that the target hides, as the attacker knows it, and the attacker's detector of it."""
    if target.concept is None or target.concept.detector is None:
        raise ValueError("the target was made without a concept that has a detector, and the search asks for it")
    return target.concept, target.concept.detector


def spans_of(words: Collection[str], text: str) -> list[tuple[int, int]]:
    """Where `words`, whole and in either case, stand in `text`: (start, stop) in characters, the longest of each."""
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return [match.span() for match in re.finditer(rf"(?<!\w)(?:{either})(?!\w)", text, re.IGNORECASE)]


def graded(verdict: Verdict) -> float:
    """How sure a detector is of the concept, 0 to 1: its score "present", or else its label as 0 or 1."""
    return float(verdict.scores.get("present", verdict.label == "present"))


def draw(words: tuple[str, ...], n: int, generator: torch.Generator) -> list[str]:
    """`n` words, each at random."""
    return [words[i] for i in torch.randint(len(words), (n,), generator=generator).tolist()]


def draw_seeds(n: int, generator: torch.Generator) -> list[int]:
    """Fresh seeds of `n` images."""
    return [int(seed) for seed in torch.randint(SEEDS, (n,), generator=generator).tolist()]
