"""What every family does with prompts: id rows, learned words in place of embeddings, and a cache of plain prompts."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.plugins import Span

CACHED_BYTES = 2**29


class PromptCache:
    """Encodes prompts one by one, so that a row does not depend on its neighbours, and keeps the latest.

    `encode` gives the one row of a prompt. At most `size` bytes are kept.
    """

    def __init__(self, encode: Callable[[str], Conditioning], *, size: int = CACHED_BYTES) -> None:
        self._encode = encode
        self._size = size
        self._used = 0
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of `prompts`, of which there is at least one."""
        if not prompts:
            raise ValueError("no prompts to encode")
        return Conditioning.cat([self._row(prompt) for prompt in prompts])

    def _row(self, prompt: str) -> Conditioning:
        row = self._kept.get(prompt)
        if row is None:
            row = self._kept[prompt] = self._encode(prompt)
            self._used += _bytes(row)
            while self._used > self._size:
                self._used -= _bytes(self._kept.popitem(last=False)[1])
        return row


def token_ids(tokenizer: Any, prompt: str, *, length: int | None = None) -> Tensor:
    """The padded id row (1, length) of a prompt; one too long loses its end. `length` None: as the tokenizer says."""
    ids: Tensor = tokenizer(
        prompt,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def span(tokenizer: Any, prompt: str, *, length: int | None = None, offset: int = 0) -> Span:
    """Where the words of a prompt lie in its row of `length` tokens, which begins at `offset`."""
    length = length or tokenizer.model_max_length
    start = None if tokenizer.bos_token_id is None else offset  # T5 has no such token
    first = offset if start is None else offset + 1
    words = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return Span(start=start, first=first, end=min(first + words, offset + length - 1), stop=offset + length)


def place(
    tokenizer: Any, prompt: str, tokens: Mapping[str, Tensor], *, length: int | None = None
) -> tuple[list[int], list[tuple[int, Tensor]]]:
    """The padded id row of a prompt with learned words in it, and (position, vector) of each learned vector.

    A placeholder stands for its k vectors wherever it occurs as a whole word. A prompt too long loses its end.
    """
    length = length or tokenizer.model_max_length
    longest_first = sorted(tokens, key=len, reverse=True)
    placeholder = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
    has_start = tokenizer.bos_token_id is not None  # T5 has no such token
    stand_in = tokenizer.bos_token_id if has_start else tokenizer.unk_token_id  # its embedding is replaced
    ids: list[int] = [tokenizer.bos_token_id] if has_start else []
    placed: list[tuple[int, Tensor]] = []
    for piece in placeholder.split(prompt):
        if piece in tokens:
            placed += [(len(ids) + k, vector) for k, vector in enumerate(tokens[piece])]
            ids += [stand_in] * len(tokens[piece])
        elif piece.strip():
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    ids = [*ids[: length - 1], tokenizer.eos_token_id]
    placed = [(position, vector) for position, vector in placed if position < length - 1]
    return ids + [tokenizer.pad_token_id] * (length - len(ids)), placed


def place_all(
    tokenizer: Any, prompts: Sequence[str], tokens: Mapping[str, Tensor], *, length: int | None = None
) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
    """`place` for rows of prompts: ids (n, length), and (row, position, vector) as `embedded` takes them."""
    if not prompts:
        raise ValueError("no prompts to encode")
    rows = [place(tokenizer, prompt, tokens, length=length) for prompt in prompts]
    learned = [(i, position, vector) for i, (_, placed) in enumerate(rows) for position, vector in placed]
    return torch.tensor([ids for ids, _ in rows]), learned


def id_rows(
    tokenizer: Any, prompts: Sequence[str], tokens: Mapping[str, Tensor], *, length: int | None = None
) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
    """Ids (n, length), and (row, position, vector) of each learned vector, as `embedded` takes them."""
    if tokens:
        return place_all(tokenizer, prompts, tokens, length=length)
    return torch.cat([token_ids(tokenizer, prompt, length=length) for prompt in prompts]), []


def repadded(ids: Tensor, first: Any, second: Any) -> Tensor:
    """Full id rows (n, length) of the tokenizer `first` as `second`, of the same vocabulary, pads them.

    CLIP's end token may be the padding too, so what stands after the first one is padding.
    """
    end = ids == first.eos_token_id
    return ids.masked_fill(end.cumsum(1) - end.int() > 0, second.pad_token_id)


def table(encoder: Any) -> Tensor:
    """A text encoder's input embeddings, (vocabulary, width), detached."""
    weight: Tensor = encoder.get_input_embeddings().weight
    return weight.detach()


def one_vocabulary(first: Any, second: Any, *, model: str) -> None:
    """Raise `UserError` where the ids of two tokenizers of CLIP do not mean the same."""
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            f"model {model!r}: CLIP's two tokenizers have different vocabularies, so no learned word fits both; "
            "leave out the attacks that learn words"
        )


def split_tokens(
    tokens: Mapping[str, Tensor], encoders: Sequence[Any], *, model: str | None = None
) -> list[dict[str, Tensor]]:
    """Learned words for each encoder: the columns of a word are the encoders' embeddings, side by side.

    `UserError` where a word is of another width; it names the `model` where that is given.
    """
    widths = [table(encoder).shape[1] for encoder in encoders]
    for word, vectors in tokens.items():
        if (width := vectors.shape[-1]) != sum(widths):
            takes = " + ".join(map(str, widths))
            if model is not None:
                told = f"model {model!r}: the learned word {word!r} has width {width}, expected {takes}"
            else:
                told = (
                    f"the learned word {word} has vectors of width {width}, but this model's encoders take "
                    f"{takes} = {sum(widths)}"
                )
            raise UserError(f"{told}; learn it on this model")
    parts = {word: vectors.split(widths, dim=-1) for word, vectors in tokens.items()}
    return [{word: columns[i] for word, columns in parts.items()} for i in range(len(encoders))]


@contextmanager
def embedded(encoder: Any, learned: Sequence[tuple[int, int, Tensor]]) -> Iterator[None]:
    """Within the context the text encoder's input embeddings at (row, position) are the vectors (width,) given."""

    def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not learned:
            return output
        rows, positions, vectors = zip(*learned, strict=True)
        where = torch.tensor(rows, device=output.device), torch.tensor(positions, device=output.device)
        return output.index_put(where, torch.stack(vectors).to(output))

    hook = encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _bytes(row: Conditioning) -> int:
    return sum(part.nbytes for part in (row.embeds, row.pooled) if part is not None)
