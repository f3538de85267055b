"""A family in which hard prompts can be reasoned about: a prompt is the mean of its words, and drawn as it is spelt."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

import tiny_flow
from duo.concept import AttackConcept
from duo.conditioning import Conditioning
from duo.families.flux import Flux
from duo.families.sd3 import Sd3
from duo.plugins import Access, Sampling, Verdict
from duo.target import Target

WORD = (
    "q"  # the concept: an image shows it where the prompt that is drawn has this word, and grey images are near to it
)
GREY = 128
LENGTH, WIDTH = 12, 16
LATENT = (2, 2, 2)


class Process:
    """x_t = x0 + eps at every time; times are fractions of the schedule."""

    def __init__(self) -> None:
        self.times_asked: list[float] = []

    def sample_t(self, n: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def times(self, fractions: Tensor) -> Tensor:
        return fractions

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        self.times_asked += t.tolist()
        return x0 + eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps


class SpellingFamily:
    """`predict` is right about the image of a prompt whose words have the mean embedding of `WORD` alone."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        letters = string.ascii_lowercase
        words = [*letters, *(f"{letter}</w>" for letter in letters), "ab</w>", "<|startoftext|>", "<|endoftext|>"]
        table = {word: index for index, word in enumerate(words)}
        self._tokenizer = CLIPTokenizer(vocab=table, merges=[("a", "b</w>")], model_max_length=LENGTH)
        generator = torch.Generator().manual_seed(0)
        self._table = torch.randn(len(words), WIDTH, generator=generator)
        self.projection = torch.randn(WIDTH, 8, generator=generator) / 4
        self.denoiser: nn.Module = nn.Linear(1, 1)  # trainable, as an attached LoRA is
        self.process = Process()
        self.drawn: list[str] = []
        self.seeds: list[int] = []
        self.lent = False  # to somebody who must not ask it then

    def tokenizer(self) -> CLIPTokenizer:
        return self._tokenizer

    def token_embeddings(self) -> Tensor:
        return self._table

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        assert not self.lent
        rows = []
        for prompt in prompts:
            words = [(tokens or {}).get(word, self.row_of(word)) for word in prompt.split()]
            rows.append(torch.cat(words) if words else torch.zeros(1, WIDTH))
        return Conditioning(embeds=torch.stack(rows))

    def row_of(self, text: str) -> Tensor:
        return self._table[self._tokenizer(text, add_special_tokens=False).input_ids]

    def latents(self, images: Sequence[Image.Image], *, generator: torch.Generator | None) -> Tensor:
        assert generator is None
        return (self.row_of(WORD) @ self.projection).view(1, *LATENT).expand(len(images), *LATENT)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        assert not self.lent
        scale = self.denoiser.weight.square() / self.denoiser.weight.square()
        return x_t - scale * (text.embeds.mean(dim=1) @ self.projection).view_as(x_t)

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        assert not self.lent
        self.drawn += prompts
        self.seeds += seeds
        return [self.image_of(prompt) for prompt in prompts]

    def image_of(self, prompt: str) -> Image.Image:
        """White where the prompt has the word; else the darker, the farther its mean is from the word's."""
        if WORD in prompt.split():
            return Image.new("L", (4, 4), 255)
        off = float((self.text([prompt]).embeds.mean(1) - self.row_of(WORD)).norm())
        return Image.new("L", (4, 4), max(0, GREY - round(4 * off)))


class Blind(SpellingFamily):
    """One that never shows the concept."""

    def image_of(self, prompt: str) -> Image.Image:
        return Image.new("L", (4, 4), min(GREY, super().image_of(prompt).getpixel((0, 0))))


class Eye:
    """The attacker's detector: white is the concept, and the brighter, the surer."""

    digest = "eye"

    def __call__(self, images: Sequence[Image.Image]) -> list[Verdict]:
        levels = [image.convert("L").getpixel((0, 0)) / 255 for image in images]
        return [Verdict(label="present" if one > 0.9 else "absent", scores={"present": one}) for one in levels]


def target_of(
    family: Any, *, original: Any = None, access: Access = Access.GRADIENT, limit: int | None = None
) -> Target:
    """`family` behind a fence, with a model from before its erasure; while that is lent, `family` may not be asked."""

    @contextmanager
    def lend() -> Iterator[Any]:
        family.lent = original is not None
        try:
            yield original or family
        finally:
            family.lent = False

    sampling = Sampling(num_inference_steps=1)
    known = AttackConcept(
        name="letters", words=("ab",), anchor="d", vector_pairs=(), attack_images=(), attack_captions=(), detector=Eye()
    )
    return Target(family, access=access, sampling=sampling, query_limit=limit, undefended=lend, concept=known)


def attack_concept(concept: AttackConcept, **changed: Any) -> AttackConcept:
    """The concept of conftest with what attackers by hard prompts are given."""
    given = {"attack_prompts": ("q a", "q c", "q b"), "attack_captions": ("a", "c", "b"), "detector": Eye()}
    return dataclasses.replace(concept, **{**given, **changed})


def tiny(name: str, request: Any) -> Any:
    """A tiny model of a family, with random weights."""
    flows: dict[str, Callable[[], Any]] = {
        "sd3": lambda: Sd3(tiny_flow.sd3_pipeline(request.getfixturevalue("vocabulary")), name="tiny"),
        "flux": lambda: Flux(tiny_flow.flux_pipeline(request.getfixturevalue("vocabulary")), name="tiny"),
    }
    return flows[name]() if name in flows else request.getfixturevalue(name)


TINY = ("tiny_sd", "tiny_sdxl", "sd3", "flux")
