"""Zero-shot classification by CLIP (Radford et al. 2021, §3.1): a picture is what the nearer prompts say.

P(present) is the softmax of the model's scaled cosines over all prompts, summed over those of `present`. So prompts of
one list compete with every prompt of the other: name the near misses in `absent`. Any CLIP of transformers serves, from
a folder or the hub, and "toybox" is the embedded one. It never says "corrupted", and how well it separates two lists
must be looked at for every concept: a threshold of 0.5 is a convention, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL.Image import Image
from torch import Tensor

from duo.judges._clip import ClipJudge
from duo.plugins import Verdict


@dataclass(frozen=True, kw_only=True)
class ClipZeroShot(ClipJudge):
    """Present where P(present) reaches `threshold`.

    `model` is a folder, a hub id, or "toybox" for the embedded CLIP; `device` is as torch names it.
    """

    present: tuple[str, ...]
    absent: tuple[str, ...]
    model: str = "openai/clip-vit-large-patch14"
    threshold: float = 0.5
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("present", "absent"):
            if not getattr(self, name) or not all(prompt.strip() for prompt in getattr(self, name)):
                raise ValueError(f"{name} is empty or has an empty prompt")
        if both := set(self.present) & set(self.absent):
            raise ValueError(f"{min(both)!r} is in both present and absent")
        self._check_threshold()
        self._find_clip("clip_zero_shot")

    @cached_property
    def digest(self) -> str:
        """sha256 over CLIP's weights, the prompts and what the tokenizer makes of them, and the threshold."""
        return self._digest_of(self.present, self.absent, self._prompts.tolist())

    @cached_property
    def _prompts(self) -> Tensor:
        return self._clip.prompts([*self.present, *self.absent])

    def __call__(self, images: Sequence[Image]) -> list[Verdict]:
        """One verdict an image; `scores` are the two probabilities, `record` the cosine of every prompt."""
        verdicts = []
        cosines = self._clip.images(images) @ self._prompts.T
        for row, chances in zip(cosines.tolist(), (self._clip.scale * cosines).softmax(dim=-1), strict=True):
            named = dict(zip((*self.present, *self.absent), row, strict=True))
            verdicts.append(self._verdict(float(chances[: len(self.present)].sum()), cosines=named))
        return verdicts
