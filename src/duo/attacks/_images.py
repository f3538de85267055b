"""What the attacks that start from images of the concept share: `img2img` and `inpaint`.

They ask nothing of the model: what they find is the same for every model, and only rendering it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duo.errors import UserError
from duo.fields import check_choices
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from duo.target import Target

ASKED = ("empty", "concept", "base", "adversarial")


@dataclass(frozen=True, kw_only=True)
class FromImages:
    """Edit an image of the concept, at each of several strengths: one attempt a strength, all of one image.

    `ask` says what the model is asked for: "empty", nothing, so that no word meets the erasure; "concept", the
    prompt that drew the image; "base", the row's own prompt; "adversarial", one of the prompts in `adversarial`, or of
    those that the attack row `found_by`, which runs before, has found on this very model.
    """

    access: ClassVar[Access] = Access.QUERY
    learns_from_images: ClassVar[bool] = True

    strengths: tuple[float, ...] = (0.3, 0.5, 0.7)  # SDEdit's: shares of the schedule that an image is noised to
    ask: str = "empty"
    adversarial: tuple[str, ...] = ()
    found_by: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, {"ask": ASKED})
        if not self.strengths or not all(0 < one <= 1 for one in self.strengths):
            raise ValueError(f"strengths is {self.strengths}, set one or more above 0 and at most 1")
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths is {self.strengths}, set each strength once")
        if bool(self.adversarial) + (self.found_by is not None) != (self.ask == "adversarial"):
            raise ValueError(
                'ask = "adversarial" goes with a list of adversarial prompts, or with found_by, the row that finds them'
            )

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Keep the images to start from: `{"images": (n, height, width, 3), "prompts": (n, bytes)}`, both uint8."""
        images, prompts = concept.attack_images, concept.attack_prompts
        if not images:
            raise UserError(f"concept {concept.name}: no attack_images, and this attack starts from them")
        if len(images) != len(prompts):
            raise UserError(f"concept {concept.name}: {len(images)} attack_images but {len(prompts)} attack_prompts")
        found = concept.found_prompts if self.found_by is not None else self.adversarial
        if self.ask == "adversarial" and not found:
            raise UserError(
                f"concept {concept.name}: the row {self.found_by!r} found no prompt; run it before this one"
            )
        state = {"images": stacked(images), "prompts": _encoded(prompts)}
        return {**state, "adversarial": _encoded(found)} if found else state

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt a strength, all of one image that `generator` draws; its number is in the record."""
        row = int(torch.randint(len(state["images"]), (1,), generator=generator))
        image = image_of(state["images"][row])
        asked = self._asked(target, state, state["prompts"][row], prompt, generator)
        for strength in self.strengths:
            yield Attempt(
                prompt=asked,
                negative_prompt=None if asked else "",  # what guidance starts from otherwise need not be this same text
                variant=f"strength {strength:g}",
                init=image,
                mask=self._mask(image),
                strength=strength,
                record={"image": row},
            )

    def _asked(
        self, target: Target, state: Mapping[str, Tensor], own: Tensor, prompt: str, generator: torch.Generator
    ) -> str:
        """What the model is asked for instead of the row's prompt. Prompts that are refused are not taken."""
        if self.ask == "base":
            return prompt
        if self.ask == "concept":
            return _decoded(own)
        if self.ask == "empty":
            return ""
        found = [_decoded(one) for one in state["adversarial"]]
        usable = [one for one in found if target.refused(one) is None] or found
        return usable[int(torch.randint(len(usable), (1,), generator=generator))]

    def _mask(self, image: Image.Image) -> Image.Image | None:
        """What of an image is drawn anew; None: all of it."""
        return None


def stacked(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as (n, height, width, 3) uint8, which a state may hold."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def image_of(pixels: Tensor) -> Image.Image:
    """One of the images that were `stacked`."""
    return Image.fromarray(pixels.numpy())


def _encoded(texts: Sequence[str]) -> Tensor:
    """Texts as (n, bytes) uint8: UTF-8, filled up with zeros."""
    rows = [text.encode() for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([[*row, *bytes(longest - len(row))] for row in rows], dtype=torch.uint8)


def _decoded(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode()
