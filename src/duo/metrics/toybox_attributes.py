"""Prompt adherence in the embedded world: does an image show the subject, colour, place and extra that were asked for?

In the manner of GenEval (Ghosh et al. 2023): attributes are read from the prompt's words and looked for by a
classifier, here the one trained on the renderer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import nn

from duo.toybox.language import EXTRA_WORDS, PLACE_WORDS
from duo.toybox.networks import ATTRIBUTES, load_network, pixels

BATCH = 64
PHRASES = {**PLACE_WORDS, **EXTRA_WORDS}  # value → the other ways to say it


def asked_for(prompt: str) -> dict[str, str]:
    """The attributes that a prompt names in whole words: {"subject": "house", "colour": "red", …}.

    What it does not name is not there; nor is an attribute that it names with two values, since a scene shows but one.
    """
    found = {}
    for attribute, values in ATTRIBUTES.items():
        named = [value for value in values if value != "none" and _mentions(prompt, (value, *PHRASES.get(value, ())))]
        if len(named) == 1:
            found[attribute] = named[0]
    return found


def _mentions(prompt: str, phrases: Sequence[str]) -> bool:
    return any(re.search(rf"\b{re.escape(phrase)}\b", prompt, re.IGNORECASE) for phrase in phrases)


class ToyboxAttributes:
    """The share of the named attributes that each image shows."""

    name: ClassVar[str] = "toybox attributes"
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self._right: list[dict[str, bool]] = []

    @cached_property
    def _network(self) -> nn.Module:
        return load_network("attributes")

    @torch.no_grad()
    def update(self, *, images: Sequence[Image], references: Sequence[Image] | None, prompts: Sequence[str]) -> None:
        """Add images with the prompts that they were made from; `references` is not looked at."""
        if len(prompts) != len(images):
            raise ValueError(f"{self.name} needs one prompt an image, not {len(prompts)} for {len(images)}")
        for first in range(0, len(images), BATCH):
            logits = self._network(pixels(images[first : first + BATCH]))
            seen = {name: [ATTRIBUTES[name][i] for i in rows.argmax(dim=1).tolist()] for name, rows in logits.items()}
            for row, prompt in enumerate(prompts[first : first + BATCH]):
                self._right.append({name: seen[name][row] == value for name, value in asked_for(prompt).items()})

    def compute(self) -> list[float]:
        """One value an image, in the order of the updates; images whose prompt names no attribute are left out."""
        return [sum(right.values()) / len(right) for right in self._right if right]

    def by_attribute(self) -> dict[str, list[bool]]:
        """For each attribute, whether it was right, over the images whose prompt names it."""
        return {name: [right[name] for right in self._right if name in right] for name in ATTRIBUTES}
