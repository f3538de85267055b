"""Concept Inversion (Pham et al. 2023): min_v E‖ε − ε_θ(z_t, t, τ(prompt with v))‖² on the erased model θ.

That is textual inversion (Gal et al. 2022): with every weight frozen, the embedding v of a new word is learned from
images of the concept, and then stands before each prompt. If the erased model can still draw the concept, v is a way to
ask for it.

Where we depart from the paper's public code, and why:

- Only v is a parameter. The public code trains the whole embedding table and puts the other rows back after each step.
- Adam at 5e-3 for 3000 steps of 4 images, the setting reported for DUO; the public code has AdamW and 5000 steps, at a
  learning rate that its `--scale_lr` flag multiplies by 16.
- Several restarts, each from a word of its own: one start that fails says little, and the worst of them counts.
- Each image has its own caption in one template, with no flips: concepts here may have a left and a right, and text to
  keep. `templates` takes the published lists (27 for objects, 19 for styles, 2 for persons).
- `vectors` may be more than one: a word of several embeddings, which attacks harder than the published one.
- The loss follows the model's own `process`, so it also holds for models that predict v or a flow instead of ε.
- The public code has a loss for each erasure that works by guidance (negative prompts, SLD). Here what an erasure does
  is inside the target's own `text` and `predict`, a gate that opens by the prompt included, so there is one loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from duo.attacks._learned_words import (
    PLACEHOLDER,
    Learning,
    attempts,
    check_initializers,
    clean_latents,
    learn_words,
    starting_embedding,
    starting_words,
)
from duo.errors import UserError
from duo.fields import check_above_0
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class ConceptInversion:
    """Learn words for the concept on the model under attack. A learned word belongs to that model alone."""

    access: ClassVar[Access] = Access.GRADIENT
    learns_from_images: ClassVar[bool] = True

    vectors: int = 1  # embeddings in the learned word
    restarts: int = 3  # words learned, each from the start: an attempt each
    # Where the restarts begin, in turn: each the tokens of its words, which must be one token each, repeated to fill
    # `vectors`. None given: the concept's own words, whatever their tokens.
    initializers: tuple[str, ...] = ()
    # Of the training captions, one drawn for each row; {} is the image's own neutral caption.
    templates: tuple[str, ...] = (PLACEHOLDER + " {}",)
    learning_rate: float = 5e-3
    steps: int = 3000  # of each restart
    batch_size: int = 4
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        check_above_0(self, "vectors", "restarts", "steps", "batch_size", "checkpointing_steps", "learning_rate")
        if not self.templates:
            raise ValueError(f"templates is empty, give at least one with the word {PLACEHOLDER}")
        for template in self.templates:
            if PLACEHOLDER not in template.split():
                raise ValueError(f"templates has {template!r}, and each must hold the word {PLACEHOLDER}")

    def passes(self, prompts: int) -> dict[str, int]:
        """What learning the words sends through the networks, in rows (for `duo run --dry-run`)."""
        rows = self.restarts * self.steps * self.batch_size
        return {"denoiser": rows, "trained": rows, "text": rows}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Learn `{"restart 1 (word)": (vectors, width), …}` from `concept.attack_images` and `attack_captions`.

        Also writes the words to `learned_embeds.safetensors`, `learned_embeds-2.safetensors`, … in the run's folder,
        unless diffusers loads no learned words into this kind of model.
        """
        latents = clean_latents(target, concept, attack="concept_inversion", batch_size=self.batch_size)
        check_initializers(self.initializers, target, attack="concept_inversion")
        words = starting_words(self.initializers, self.restarts, otherwise=concept.words)

        def learn(word: str, learning: Learning) -> Tensor:
            start = starting_embedding(target, word, vectors=self.vectors, attack="concept_inversion")
            return self._learn(target, latents, concept, start, learning, run)

        settings = {name: value for name, value in asdict(self).items() if name != "checkpointing_steps"}
        record = {**settings, "initializers": list(self.initializers), "templates": list(self.templates)}
        return learn_words(words, learn, run=run, record=record, parts=target.word_parts())

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt for each restart: its learned word before the prompt."""
        yield from attempts(state, f"{PLACEHOLDER} {prompt}".strip())

    def _learn(
        self, target: Target, latents: Tensor, concept: Any, start: Tensor, learning: Learning, run: Run
    ) -> Tensor:
        """One restart: the word (vectors, width) that `start` becomes."""
        generator = torch.Generator().manual_seed(learning.seed)
        embedding = nn.Parameter(start)
        optimizer = torch.optim.Adam([embedding], lr=self.learning_rate)
        state = {"embedding": nn.ParameterList([embedding])}
        done = learning.resume(state, optimizer, generator)
        with run.progress(self.steps, f"inverting {concept.name}, {learning.name}") as bar:
            for step in range(done + 1, self.steps + 1):
                rows = torch.randint(len(latents), (self.batch_size,), generator=generator)
                drawn = torch.randint(len(self.templates), (self.batch_size,), generator=generator)
                prompts = [
                    self.templates[template].replace("{}", concept.attack_captions[row]).strip()
                    for template, row in zip(drawn.tolist(), rows.tolist(), strict=True)
                ]
                loss = self._loss(target, latents[rows.to(latents.device)], prompts, embedding, generator)
                if not math.isfinite(loss.item()):
                    raise UserError(f"concept_inversion: the loss is {loss.item()} at step {step}; lower learning_rate")
                # Not `backward`, which would also fill the gradients of whatever the erasure left trainable.
                (embedding.grad,) = torch.autograd.grad(loss, [embedding])
                optimizer.step()
                run.log(restart=learning.name, step=step, loss=loss.item())  # first: no log lacks what a state has
                if step % self.checkpointing_steps == 0:
                    learning.save(step, state, optimizer, generator)
                bar.update(step, loss=loss.item())
        return embedding

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
