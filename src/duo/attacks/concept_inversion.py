"""Concept Inversion (Pham et al. 2023): min_v E‖ε − ε_θ(z_t, t, τ(prompt with v))‖² on the erased model θ.

That is textual inversion (Gal et al. 2022): with every weight frozen, the embedding v of a new word is learned from
images of the concept, and then stands before each prompt. If the erased model can still draw the concept, v is a way to
ask for it.

Where we depart from the paper's public code, and why:

- Only v is a parameter. The public code trains the whole embedding table and puts the other rows back after each step.
- Adam at 5e-3 for 3000 steps of 4 images, the setting reported for DUO; the public code has AdamW and 5000 steps, at a
  learning rate that its `--scale_lr` flag multiplies by 16.
- One template for all captions, no flips: concepts here may have a left and a right, and text to keep.
- `vectors` may be more than one: a word of several embeddings, which attacks harder than the published one.
- The loss follows the model's own `process`, so it also holds for models that predict v or a flow instead of ε.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from duo.checkpoint import write_tensors
from duo.errors import UserError
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from duo.target import Target

PLACEHOLDER = "<c>"


@dataclass(frozen=True, kw_only=True)
class ConceptInversion:
    """Learn a word for the concept on the model under attack. The learned word belongs to that model alone."""

    access: ClassVar[Access] = Access.GRADIENT

    vectors: int = 1  # embeddings in the learned word
    # Where they start: the tokens of these words, in turn, of which each must be one token; None: the concept's first
    # word, whatever its tokens.
    initializer: str | None = None
    template: str = PLACEHOLDER + " {}"  # of a training caption; {} is the image's own neutral caption
    learning_rate: float = 5e-3
    steps: int = 3000
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("vectors", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, set it to 1 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, set it above 0")
        if PLACEHOLDER not in self.template.split():
            raise ValueError(f"template is {self.template!r}, and must hold the word {PLACEHOLDER}")

    def passes(self, prompts: int) -> dict[str, int]:
        """What learning the word sends through the networks, in rows (for `duo run --dry-run`)."""
        rows = self.steps * self.batch_size
        return {"denoiser": rows, "trained": rows, "text": rows}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Learn `{"<c>": (vectors, width)}` from `concept.attack_images` and their captions `concept.attack_captions`.

        Also writes the word to `learned_embeds.safetensors` in the run's folder, for other software, unless diffusers
        loads no learned words into this kind of model.
        """
        if not concept.attack_images:
            raise UserError(f"concept {concept.name}: no attack_images, and concept_inversion learns from them")
        captions = [self.template.replace("{}", prompt).strip() for prompt in concept.attack_captions]
        with torch.no_grad():
            images = concept.attack_images
            latents = torch.cat(
                [
                    target.latents(images[start : start + self.batch_size], generator=None)
                    for start in range(0, len(images), self.batch_size)
                ]
            )
        if len(captions) != len(latents):
            raise UserError(f"concept {concept.name}: {len(latents)} attack_images but {len(captions)} attack_captions")

        generator = torch.Generator().manual_seed(run.seed)
        embedding = self._start(target, concept).requires_grad_()
        optimizer = torch.optim.Adam([embedding], lr=self.learning_rate)
        with run.progress(self.steps, f"inverting {concept.name}") as bar:
            for step in range(1, self.steps + 1):
                rows = torch.randint(len(captions), (self.batch_size,), generator=generator)
                prompts = [captions[row] for row in rows.tolist()]
                loss = self._loss(target, latents[rows.to(latents.device)], prompts, embedding, generator)
                if not math.isfinite(loss.item()):
                    raise UserError(f"concept_inversion: the loss is {loss.item()} at step {step}; lower learning_rate")
                # Not `backward`, which would also fill the gradients of whatever the erasure left trainable.
                (embedding.grad,) = torch.autograd.grad(loss, [embedding])
                optimizer.step()
                run.log(step=step, loss=loss.item())
                bar.update(step, loss=loss.item())
        tokens = {PLACEHOLDER: embedding.detach().cpu()}
        if parts := target.word_parts():
            save_textual_inversion(run.folder / "learned_embeds.safetensors", tokens, parts)
        return tokens

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt: the learned word before the prompt."""
        yield Attempt(prompt=f"{PLACEHOLDER} {prompt}".strip(), tokens={PLACEHOLDER: state[PLACEHOLDER]})

    def _start(self, target: Target, concept: Any) -> Tensor:
        """The initial embeddings, (vectors, width) float32: the initializer's tokens, repeated to fill."""
        words, tokenizer = concept.words[0] if self.initializer is None else self.initializer, target.tokenizer()
        for word in (self.initializer or "").split():
            pieces = tokenizer.tokenize(word)
            if len(pieces) != 1:
                raise UserError(
                    f"concept_inversion: initializer {word!r} is no token of this model, but {len(pieces)} "
                    f"({' '.join(pieces)}); name words that are one token each"
                )
        ids = tokenizer(words, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"concept_inversion: initializer {words!r} has no token; name a word that the model knows")
        table = target.token_embeddings()
        return torch.stack([table[ids[row % len(ids)]] for row in range(self.vectors)]).detach().float()

    def _loss(
        self, target: Target, x0: Tensor, prompts: list[str], embedding: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The objective on one batch, as a mean. Noise is drawn on the CPU: the same on every device."""
        process = target.process
        t = process.sample_t(len(x0), low=0.0, high=1.0, generator=generator)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        text = target.text(prompts, tokens={PLACEHOLDER: embedding})
        prediction = target.predict(process.noised(x0, eps, t), t, text)
        return mse_loss(prediction.float(), process.target(x0, eps, t).float())


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
