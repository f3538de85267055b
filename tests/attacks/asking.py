"""A model that attacks may only ask: its images are as red as the words of the prompt say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from duo.plugins import Verdict


class Painter:
    """`word=0.4` adds 0.4 of full red to an image, wherever in the prompt it stands."""

    name = "painter"
    device = torch.device("cpu")

    def __init__(self, **levels: float) -> None:
        self.levels = levels
        self.prompts: list[str] = []
        self.seeds: list[int] = []
        self.batches: list[int] = []

    def level(self, prompt: str) -> float:
        return min(1.0, sum(level for word, level in self.levels.items() if word in prompt))

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        assert len(prompts) == len(seeds)
        self.prompts += prompts
        self.seeds += seeds
        self.batches.append(len(prompts))
        return [Image.new("RGB", (8, 8), (round(255 * self.level(prompt)), 0, 0)) for prompt in prompts]


class Asked:
    """Writes down every name that is asked of a model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.touched: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.touched.add(name)
        return getattr(self._model, name)


class Redness:
    """Present where an image is half red or more. `graded` detectors say how red it is, others only the label."""

    digest = "redness"

    def __init__(self, *, graded: bool = True) -> None:
        self.graded = graded

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        levels = [image.getpixel((0, 0))[0] / 255 for image in images]
        return [
            Verdict(
                label="present" if level >= 0.5 else "absent",
                scores={"present": level} if self.graded else {"redness": level},
            )
            for level in levels
        ]


@dataclass
class WordClip:
    """A CLIP that counts: a prompt's vector has a place for each of `words`, an image's is along `image`."""

    words: tuple[str, ...]
    image: Callable[[Image.Image], torch.Tensor] | None = None

    def prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        rows = [[float(prompt.split().count(word)) for word in self.words] + [1e-3] for prompt in prompts]
        return torch.nn.functional.normalize(torch.tensor(rows).view(len(rows), len(self.words) + 1), dim=-1)

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        assert self.image is not None
        return torch.stack([self.image(one) for one in images])
