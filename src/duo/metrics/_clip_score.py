"""What the CLIP scores share: 100 · max(cos, 0) of a picture and its prompt, by one CLIP (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor

from duo.clip import find_clip, load_clip


def clip_scores(pictures: Tensor, prompts: Tensor) -> list[float]:
    """100 · max(cos, 0) of unit vectors (n, width) of pictures and of their prompts, row by row."""
    cosines: list[float] = (pictures * prompts).sum(dim=-1).clamp(min=0).tolist()
    return [100 * cosine for cosine in cosines]


@dataclass(kw_only=True)
class ClipScores:
    """One score an image. `model` is a CLIP as `duo.clip.load_clip` reads it, `device` as torch names it."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    needs_references: ClassVar[bool] = False

    model: str
    device: str = "cpu"
    _values: list[float] = field(default_factory=list, init=False, repr=False)

    def check(self) -> None:
        """Raise `UserError` where there is no such CLIP; no weights are read."""
        find_clip(self.model, f"metric {self.name}", whose="metric")

    def protocol(self) -> dict[str, Any]:
        """Which CLIP looks, and that it prepares the pictures itself."""
        clip = load_clip(self.model, self.device)
        return {"network": f"CLIP {self.model}", "digest": clip.digest, "resolution": "as the CLIP prepares pictures"}

    def update(self, *, images: Sequence[Image], references: Sequence[Image] | None, prompts: Sequence[str]) -> None:
        """Add images with the prompts that they are compared with; `references` is not looked at."""
        if len(prompts) != len(images):
            raise ValueError(f"{self.name} needs one prompt an image, not {len(prompts)} for {len(images)}")
        clip = load_clip(self.model, self.device)
        texts = list(dict.fromkeys(prompts))  # of prompts that recur, each is encoded once
        rows = clip.prompts(texts)[[texts.index(prompt) for prompt in prompts]]
        self._values += clip_scores(clip.images(images), rows)

    def compute(self) -> list[float]:
        """One value an image, in the order of the updates."""
        return list(self._values)
