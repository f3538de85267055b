"""Inpainting (as in Lu et al. 2025, "When Are Concepts Erased"): what stands around the concept asks for it.

A box in the middle of an image of the concept is drawn anew, between what is left at its border. The concept is under
the box: an image whose border alone shows it to the attacker's own detector is not used. At strength 1 the box starts
from noise, and the model has to draw the concept by itself; below that the box starts from the noised image, as in
`img2img`, but held in place by the border.

The model is the one under attack, with its ordinary denoiser: at each step the border is put back, noised as that step
is. Checkpoints made for inpainting are other models, which this erasure has not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from duo.attacks._images import FromImages, image_of
from duo.errors import UserError
from duo.plugins import Run

if TYPE_CHECKING:
    from duo.target import Target

GREY = (128, 128, 128)


@dataclass(frozen=True, kw_only=True)
class Inpaint(FromImages):
    """Draw the middle of an image of the concept anew."""

    strengths: tuple[float, ...] = (0.7, 0.9, 1.0)
    ask: str = "concept"
    share: float = 0.75  # the sides of the box that is drawn anew, as a share of the image's

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, set it between 0 and 1")

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Keep the images whose concept lies under the box, as `FromImages.prepare` does."""
        state = super().prepare(target, concept, run=run)
        borders = [image_of(pixels) for pixels in state["images"]]
        for border in borders:
            border.paste(GREY, self._box(border))
        hidden = [row for row, seen in enumerate(concept.detector(borders)) if seen.label != "present"]
        run.log(images=len(borders), hidden=len(hidden))
        if not hidden:
            raise UserError(
                f"inpaint: in none of the {len(borders)} images does a box of share {self.share} hide concept "
                f"{concept.name!r} from the detector; raise share"
            )
        return {name: tensor[hidden] for name, tensor in state.items()}

    def _mask(self, image: Image.Image) -> Image.Image:
        mask = Image.new("L", image.size)
        mask.paste(255, self._box(image))
        return mask

    def _box(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Left, top, right and bottom."""
        left, top = (round(side * (1 - self.share) / 2) for side in image.size)
        return left, top, image.width - left, image.height - top
