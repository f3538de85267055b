"""The image that an attack by gradients aims at: one of the concept, for one base prompt.

It is drawn by the model from before the erasure, from the base prompt. That shows the concept only where the prompt
asks for it, in whatever words. Where the attacker's detector finds the concept in none of a few such images, the base
prompt is neutral, and the goal is one of the attacker's own images (`AttackConcept.attack_images`): one whose caption
has most words in common with the base prompt. The prompt that drew it names the concept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duo.attacks._words import draw_seeds
from duo.errors import UserError

if TYPE_CHECKING:
    from duo.target import Target

TEXTS = "texts"  # of a state: the attack images' prompts and captions, as JSON in bytes
IMAGE = "image{:04d}"  # (height, width, 3), uint8


@dataclass(frozen=True, kw_only=True)
class Goal:
    """An image of the concept, the prompt that drew it, and whether that is the base prompt."""

    image: Image.Image
    prompt: str
    own: bool

    def record(self) -> dict[str, Any]:
        """What an attempt's record keeps of it."""
        return {"goal_prompt": self.prompt, "goal_from": "base prompt" if self.own else "attack images"}


def packed(concept: Any) -> dict[str, Tensor]:
    """The attacker's own images and their texts as `choose_goal` reads them from a state."""
    if len(concept.attack_prompts) != len(concept.attack_images):
        told = f"{len(concept.attack_images)} attack_images but {len(concept.attack_prompts)} attack_prompts"
        raise UserError(f"concept {concept.name}: {told}")
    texts = json.dumps(list(zip(concept.attack_prompts, concept.attack_captions, strict=True)))
    images = [torch.from_numpy(np.array(image.convert("RGB"))) for image in concept.attack_images]
    named = {IMAGE.format(i): pixels for i, pixels in enumerate(images)}
    return {TEXTS: torch.tensor(list(texts.encode()), dtype=torch.uint8), **named}


def choose_goal(
    target: Target, state: Mapping[str, Tensor], prompt: str, *, drawn: int, generator: torch.Generator
) -> Goal:
    """Of `drawn` images by the undefended model the one that shows the concept most surely, or else an attack image."""
    seeds = draw_seeds(drawn, generator)
    with target.undefended() as original, torch.no_grad():
        images = [original.generate([prompt], seeds=[seed])[0] for seed in seeds]
    found = [shown(target, [image]) for image in images]
    best = max(range(drawn), key=found.__getitem__)
    if found[best][0] > 0:
        return Goal(image=images[best], prompt=prompt, own=True)
    texts = json.loads(bytes(state[TEXTS].tolist()))
    if not texts:
        raise UserError(f"no image shows the concept: the prompt {prompt!r} draws none, and there are no attack_images")
    alike = torch.tensor([_overlap(prompt, caption) for _, caption in texts])
    nearest = (alike == alike.max()).nonzero()[:, 0]
    one = int(nearest[torch.randint(len(nearest), (1,), generator=generator)])
    pixels = state[IMAGE.format(one)]
    return Goal(image=Image.fromarray(pixels.cpu().numpy()), prompt=texts[one][0], own=False)


def drawn(target: Target, text: str, seeds: Sequence[int]) -> list[Image.Image]:
    """What the model under attack draws from a prompt; fewer images, or none, where that many may not be asked."""
    left = target.queries_left
    return [target.generate([text], seeds=[seed])[0] for seed in (seeds if left is None else seeds[:left])]


def shown(target: Target, images: Sequence[Image.Image]) -> tuple[float, float]:
    """How far images show the concept to the attacker's own detector: the share that do, and then the mean of its
    score "present", 0 of a detector that has none. Larger is surer."""
    assert target.concept is not None and target.concept.detector is not None  # `prepare` saw to it
    verdicts = target.concept.detector(images)
    return (
        sum(verdict.label == "present" for verdict in verdicts) / len(verdicts),
        sum(verdict.scores.get("present", 0.0) for verdict in verdicts) / len(verdicts),
    )


def _overlap(one: str, other: str) -> float:
    """Words that two texts share, as a fraction of all their words."""
    own, others = set(one.lower().split()), set(other.lower().split())
    return len(own & others) / max(len(own | others), 1)
