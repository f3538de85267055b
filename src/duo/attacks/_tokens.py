"""Prompts with free words among their own, for attacks that search hard prompts by gradients.

Searched are only tokens that stand as words of their own: joined by spaces they are read as the ids that were chosen,
so the prompt that is sent is the one that the gradients were taken at. Of SD3 and FLUX that holds for CLIP: T5 has a
vocabulary of its own, and the embedding of CLIP's token there is a mean of T5's (`Family.token_embeddings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duo.errors import UserError

if TYPE_CHECKING:
    from duo.conditioning import Conditioning
    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The words that may be chosen: their ids (n,), texts, and embeddings (n, width) in float32 on the device."""

    ids: Tensor
    words: tuple[str, ...]
    rows: Tensor

    @classmethod
    def of(cls, target: Target, ids: Tensor) -> Vocabulary:
        """The words of these ids, which `free_ids` found."""
        return cls(
            ids=ids,
            words=tuple(_texts(target.tokenizer(), ids.tolist())),
            rows=target.token_embeddings()[ids.to(target.device)].float(),
        )

    def nearest(self, embeddings: Tensor) -> Tensor:
        """For each embedding (k, width) the word with the largest cosine, as its place among `words`: (k,)."""
        return (F.normalize(embeddings, dim=1) @ self._directions.T).argmax(dim=1)

    @cached_property
    def _directions(self) -> Tensor:
        """`rows` of length 1: of a real vocabulary too many to be made anew in every step."""
        return F.normalize(self.rows, dim=1)

    def texts(self, places: Tensor) -> list[str]:
        """The words at these places (k,)."""
        return [self.words[place] for place in places.tolist()]


def free_ids(target: Target) -> Tensor:
    """The ids that may be chosen, (n,): not special, a word by themselves, and none that makes a prompt refused."""
    tokenizer = target.tokenizer()
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    texts = _texts(tokenizer, ids)
    read = tokenizer(texts, add_special_tokens=False).input_ids
    alone = [(one, text) for one, text, back in zip(ids, texts, read, strict=True) if back == [one]]
    return torch.tensor([one for one, text in alone if target.refused(text) is None], dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt with places for free words: its own words in order, None for each free one."""

    words: tuple[str | None, ...]

    @property
    def free(self) -> int:
        """How many free words it has."""
        return self.words.count(None)

    def text(self, free: Sequence[str]) -> str:
        """The prompt with these free words."""
        chosen = iter(free)
        return " ".join(next(chosen) if word is None else word for word in self.words)

    def conditioning(self, target: Target, embeddings: Tensor, *, sent: str) -> Conditioning:
        """One row for free words of these embeddings (k, width), differentiable in them. `sent` is the prompt as text:
        what an adapter that reads prompts (`duo.gating`) would be shown."""
        names = [f"<free-{i}>" for i in range(self.free)]
        tokens = {name: row[None] for name, row in zip(names, embeddings, strict=True)}
        text = target.text([self.text(names)], tokens=tokens)
        return text if text.prompts is None else replace(text, prompts=(sent,))


def fitted(target: Target, prompt: str, *, free: Callable[[int], int]) -> list[str]:
    """The prompt's words, less the last ones where they and `free(their tokens)` free ones are more than is read."""
    tokenizer, words = target.tokenizer(), prompt.split()
    while words and (tokens := len(_ids(tokenizer, " ".join(words)))) + free(tokens) > longest(target):
        words.pop()
    return words


def spread(target: Target, words: Sequence[str], *, every: int) -> Draft:
    """A free word before every `every` tokens of the prompt, so ⌊tokens / every⌋ + 1. None cuts a word in two: it
    stands before the word instead."""
    tokenizer, mixed = target.tokenizer(), list[str | None]()
    seen = due = 0
    for word in words:
        end = seen + len(_ids(tokenizer, word))
        while due < end:
            mixed.append(None)
            due += every
        mixed.append(word)
        seen = end
    if due == seen:
        mixed.append(None)
    return Draft(words=tuple(mixed))


def longest(target: Target) -> int:
    """How many tokens of a prompt the model reads, those at its two ends not counted."""
    return int(target.tokenizer().model_max_length) - 2


def check_length(length: int, target: Target, attack: str) -> None:
    """Raise `UserError` where so many free tokens are more than the model reads."""
    if length > longest(target):
        raise UserError(f"{attack}: length is {length}, but the model reads at most {longest(target)} tokens")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([one], clean_up_tokenization_spaces=False).strip() for one in ids]
