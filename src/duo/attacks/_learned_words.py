"""What attacks that learn a word share: where it starts, restarts with their checkpoints, and the word's file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from duo.checkpoint import load_training_state, read_tensors, save_training_state, write_tensors
from duo.errors import UserError
from duo.plugins import Attempt, Run
from duo.seeds import seed_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from duo.target import Target

PLACEHOLDER = "<c>"


class Learning:
    """One restart on its way: its name "restart 1 (burning)", its seed, and a place for its state.

    What is learned comes out the same, to the byte, whether or not it was killed between two calls of `save`.
    """

    def __init__(self, *, name: str, seed: int, path: Path, record: Mapping[str, Any]) -> None:
        self.name, self.seed = name, seed
        self._path, self._record = path, record

    def resume(
        self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> int:
        """Take up what `save` kept of this restart, and return its step; 0 where there is nothing."""
        if not self._path.exists():
            return 0
        kept = read_tensors(self._path)[1]
        _check_record(self._path, kept, self._record)
        if kept["restart"] != self.name:  # of the one before, which was killed as it ended
            return 0
        return load_training_state(self._path, modules=modules, optimizer=optimizer, generator=generator)[0]

    def save(
        self, step: int, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Keep the state after `step` instead of the one kept before."""
        save_training_state(
            self._path,
            step=step,
            modules=modules,
            optimizer=optimizer,
            generator=generator,
            record={"run": self._record, "restart": self.name},
        )


def learn_words(
    words: Sequence[str],
    learn: Callable[[str, Learning], Tensor],
    *,
    run: Run,
    record: Mapping[str, Any],
    parts: Mapping[str, int],
) -> dict[str, Tensor]:
    """`learn` one word (vectors, width) from each of `words`: `{"restart 1 (burning)": …}`, on the CPU.

    Each is also written for other software, where the family's `word_parts`, here `parts`, say that diffusers loads
    such files: `learned_embeds.safetensors` in the run's folder, then `learned_embeds-2.safetensors`, and so on.

    While this lasts, finished words and the state of the current one lie in `checkpoints/`, and a run that was killed
    goes on from there. `record` (JSON values) is kept with them: a run with another one, or seed, is refused.
    """
    folder = run.folder / "checkpoints"
    record = {**record, "words": list(words), "seed": run.seed}
    learned = _finished(folder / "words.safetensors", record)
    for number, word in enumerate(words, start=1):
        name = f"restart {number} ({word})"
        if name not in learned:
            seed = seed_for(run.seed, "restart", number)
            state = folder / "training.safetensors"
            learned[name] = learn(word, Learning(name=name, seed=seed, path=state, record=record)).detach().cpu()
            write_tensors(folder / "words.safetensors", learned, {"run": record})
        if parts:
            path = run.folder / f"learned_embeds{'' if number == 1 else f'-{number}'}.safetensors"
            save_textual_inversion(path, {PLACEHOLDER: learned[name]}, parts)
    shutil.rmtree(folder)
    return learned


def attempts(state: Mapping[str, Tensor], prompt: str) -> Iterator[Attempt]:
    """`prompt`, which holds the placeholder, with the word of each restart, in their order."""
    for name in sorted(state, key=lambda name: int(name.split()[1])):
        yield Attempt(prompt=prompt, tokens={PLACEHOLDER: state[name]}, variant=name)


def starting_words(initializers: Sequence[str], restarts: int, *, otherwise: Sequence[str]) -> list[str]:
    """One word for each restart: the initializers in turn, or `otherwise`, where there are none."""
    words = list(initializers) or list(otherwise)
    return [words[number % len(words)] for number in range(restarts)]


def check_initializers(initializers: Sequence[str], target: Target, *, attack: str) -> None:
    """Raise `UserError` where a word of an initializer is not one token of the model."""
    tokenizer = target.tokenizer()
    for word in " ".join(initializers).split():
        pieces = tokenizer.tokenize(word)
        if len(pieces) != 1:
            raise UserError(
                f"{attack}: initializer {word!r} is no token of this model, but {len(pieces)} "
                f"({' '.join(pieces)}); name words that are one token each"
            )


def starting_embedding(target: Target, word: str, *, vectors: int, attack: str) -> Tensor:
    """The embeddings of the word's tokens in turn, repeated to fill (vectors, width), float32; its first ones where
    there are more of them."""
    ids = target.tokenizer()(word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"{attack}: initializer {word!r} has no token; name a word that the model knows")
    table = target.token_embeddings()
    return torch.stack([table[ids[row % len(ids)]] for row in range(vectors)]).detach().float()


@torch.no_grad()
def clean_latents(target: Target, concept: Any, *, attack: str, batch_size: int) -> Tensor:
    """The latents of `concept.attack_images`, in order: the posterior's means."""
    images: Sequence[Image] = concept.attack_images
    if not images:
        raise UserError(f"concept {concept.name}: no attack_images, and {attack} learns from them")
    if len(concept.attack_captions) != len(images):
        told = f"{len(images)} attack_images but {len(concept.attack_captions)} attack_captions"
        raise UserError(f"concept {concept.name}: {told}")
    starts = range(0, len(images), batch_size)
    return torch.cat([target.latents(images[start : start + batch_size], generator=None) for start in starts])


def save_textual_inversion(path: Path, tokens: Mapping[str, Tensor], parts: Mapping[str, int]) -> None:
    """Write one learned word (vectors, width) so that diffusers loads it; `parts` are the family's `word_parts`.

    Where there is one text encoder, `pipe.load_textual_inversion(path)` does it. Where there are several, the file has
    a tensor for each, under the name by which trainers for that model know it, to be loaded one by one:
    `pipe.load_textual_inversion(file["clip_g"], token=word, text_encoder=pipe.text_encoder_2,
    tokenizer=pipe.tokenizer_2)`. The word itself is in the file's metadata.

    A file holds one word; more raise ValueError. Raises `UserError` where diffusers loads no words into such a model.
    """
    if len(tokens) != 1:
        raise ValueError(f"a textual-inversion file holds one word, not {len(tokens)}")
    if not parts:
        raise UserError(f"{path}: diffusers loads no learned words into this kind of model, so none is written")
    ((word, vectors),) = tokens.items()
    if len(parts) == 1:
        write_tensors(path, tokens, {})
    else:
        columns = torch.split_with_sizes(vectors, list(parts.values()), dim=1)
        write_tensors(path, dict(zip(parts, columns, strict=True)), {"word": word})


def _finished(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    tensors, kept = read_tensors(path)
    _check_record(path, kept, record)
    return tensors


def _check_record(path: Path, kept: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    before = kept.get("run", {})
    if before != record:
        changed = sorted(key for key in {*before, *record} if before.get(key) != record.get(key))
        raise UserError(f"{path} was made with another {', '.join(changed)}; name a new --out or undo the change")
