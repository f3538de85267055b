"""A family small enough to reason about: the text encoder is a table lookup, and the denoiser is linear in the text."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from duo.concept import AttackConcept
from duo.conditioning import Conditioning

LENGTH, WIDTH = 10, 16
LATENT = (2, 2, 2)


def letter_tokenizer() -> CLIPTokenizer:
    """Letters within and at the end of a word, and one merge, so that decoding and tokenizing again is lossy."""
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("a", "b</w>")], model_max_length=LENGTH)


class LinearProcess:
    """x_t = x0 + eps at every time, so that eps is known where x0 is."""

    def sample_t(self, n: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []  # the image's level and the time of each noised row

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        self.seen += zip(x0.flatten(1).mean(1).tolist(), t.tolist(), strict=True)
        return x0 + eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def terminal(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        return eps, torch.ones(len(eps))


class LinearFamily:
    """`predict` subtracts a linear image of the prompt's learned vectors from x_t: it is right if that image is x0."""

    name = "linear"
    device = torch.device("cpu")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokenizer = letter_tokenizer()
        self._table = torch.randn(len(self._tokenizer), WIDTH, generator=generator)
        self.projection = torch.randn(WIDTH, 8, generator=generator) / 4
        self.denoiser: nn.Module = nn.Linear(1, 1)  # trainable, as an attached LoRA is
        self.process = LinearProcess()
        self.encoded = 0  # rows through the text encoder, one token or more
        self.prompts: list[str] = []  # prompts that were conditioned on

    def tokenizer(self) -> CLIPTokenizer:
        return self._tokenizer

    def token_embeddings(self) -> Tensor:
        return self._table

    def word_parts(self) -> dict[str, int]:
        return {"": WIDTH}

    def encode_ids(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] == LENGTH, "rows are padded to the model's length"
        self.encoded += len(ids)
        return self._table[ids]

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        self.prompts += prompts
        (learned,) = (tokens or {}).values()
        return Conditioning(embeds=learned.expand(len(prompts), *learned.shape))

    def unconditional(self) -> Conditioning:
        return Conditioning(embeds=torch.zeros(1, 1, WIDTH))

    def latents(self, images: Sequence[Image.Image], *, generator: torch.Generator | None) -> Tensor:
        assert generator is None
        levels = torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])
        return levels.view(-1, 1, 1, 1).expand(-1, *LATENT)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        scale = self.denoiser.weight.square() / self.denoiser.weight.square()
        return x_t - scale * (text.embeds.mean(dim=1) @ self.projection).view_as(x_t)

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[Image.Image]:
        return [Image.new("RGB", (4, 4)) for _ in prompts]


class FakeRun:
    """What a stage lends, with its log kept in a list."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed, self.device = folder, seed, torch.device("cpu")
        self.logged: list[dict[str, float | int | str]] = []

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Any]:
        class Bar:
            def update(self, step: int, **numbers: float) -> None:
                assert step <= total

        yield Bar()

    def log(self, **numbers: float | int | str) -> None:
        self.logged.append(numbers)


@pytest.fixture
def family() -> LinearFamily:
    return LinearFamily()


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


@pytest.fixture
def concept() -> AttackConcept:
    return AttackConcept(
        name="letters",
        words=("ab", "c"),
        anchor="d",
        vector_pairs=(("a b", "c b"), ("x a", "x c")),
        attack_images=[Image.new("RGB", (8, 8), (51 * level, 0, 0)) for level in (2, 2, 2)],
        attack_captions=("a tree", "a car", "a boat"),
    )
