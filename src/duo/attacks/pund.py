"""Probing unlearned diffusion models (Han et al. 2024): an adversarial embedding v that transfers, min over v, then φ:

    v:  ‖ε − ε_φ(z_t, t, τ(y + v))‖²                                 on images of the concept
    φ:  ‖ε_φ(z_t, t, τ(y + v)) − sg ε_φ(z_t, t, τ(y))‖²

with a copy φ of the undefended model as surrogate and y a text without the concept. The first player learns a word for
the concept; the second, every so often, erases that word from φ's cross-attention, so that the first has to find one
that an erasure leaves alone. Nothing is asked of the model under attack: v is found once, and tried on every erasure.

Where we depart from the paper's public code, and why:

- It takes the v that does best on another erased model, UCE, so a victim has a say. Here the surrogate alone has: kept
  is the candidate whose denoising error, relative to that of y, is lowest on average over the undefended weights and
  those of the surrogate in its last state, on noise and times that are the same for all candidates.
- Several restarts, each with a word and a surrogate of its own.
- y is the same text for both players. There the second always goes by "a photo of", the first by the image's prompt.
- `batch_size` images, and bins of the schedule by the model's own `process`, so it also holds for models that predict v
  or a flow. SD3 and FLUX have no cross-attention: there φ is the text's side of the joint attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

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
from duo.fields import check_above_0, check_above_0_or_none, check_from_0
from duo.losses import squared_error
from duo.plugins import Access, Attempt, Run
from duo.training import Tuned, tune_weights

if TYPE_CHECKING:
    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class Pund:
    """Learn words for the concept that survive an erasure of the surrogate. The defaults are the published budget.

    In each of `epochs`, times from the noisiest of `bins` of the schedule to the cleanest get `steps_per_bin` steps of
    AdamW each, on `batch_size` images. Every `erase_every` epochs (None: never) one step of Adam in each bin erases the
    word. Every `keep_every` epochs it becomes a candidate, and `probes` noised images tell which one is the best.
    """

    access: ClassVar[Access] = Access.TEXT  # of the model under attack: it must take embeddings for a word
    uses_undefended: ClassVar[bool] = True
    learns_from_images: ClassVar[bool] = True

    vectors: int = 1  # embeddings in the learned word
    restarts: int = 3  # words learned, each from the start: an attempt each
    # Where the restarts begin, in turn: each the tokens of its words, which must be one token each. None given: the
    # concept's own words, of each the last, whatever its tokens.
    initializers: tuple[str, ...] = ()
    template: str = "a photo of " + PLACEHOLDER  # the training text, y without it; {} is the image's neutral caption
    epochs: int = 3000
    batch_size: int = 1
    bins: int = 5
    steps_per_bin: int = 2
    learning_rate: float = 0.1
    weight_decay: float = 0.1
    erase_every: int | None = 200
    erase_learning_rate: float = 1e-5
    keep_every: int = 50
    probes: int = 20
    checkpointing_epochs: int = 200

    def __post_init__(self) -> None:
        check_above_0(self, "vectors", "restarts", "epochs", "batch_size", "bins", "steps_per_bin", "learning_rate")
        check_above_0(self, "erase_learning_rate", "keep_every", "probes", "checkpointing_epochs")
        check_above_0_or_none(self, "erase_every")
        check_from_0(self, "weight_decay")
        if PLACEHOLDER not in self.template.split():
            raise ValueError(f"template is {self.template!r}, and must hold the word {PLACEHOLDER}")

    def passes(self, prompts: int) -> dict[str, int]:
        """What learning the words sends through the networks, in rows (for `duo run --dry-run`)."""
        searched = self.epochs * self.bins * self.steps_per_bin * self.batch_size
        erased = 0 if self.erase_every is None else (self.epochs - 1) // self.erase_every * self.bins * self.batch_size
        probed = 2 * self.probes * (1 + math.ceil(self.epochs / self.keep_every))
        return {
            "denoiser": self.restarts * (searched + 2 * erased + probed),
            "trained": self.restarts * (searched + erased),
            "text": self.restarts * (searched + 2 * erased + probed),
        }

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Learn `{"restart 1 (word)": (vectors, width), …}` on the undefended model from `concept.attack_images`.

        Also writes the words to `learned_embeds.safetensors`, `learned_embeds-2.safetensors`, … in the run's folder,
        unless diffusers loads no learned words into this kind of model.
        """
        with target.undefended() as original:
            latents = clean_latents(original, concept, attack="pund", batch_size=max(self.batch_size, 8))
            check_initializers(self.initializers, original, attack="pund")
            last = [word.rpartition(" ")[2] for word in concept.words]
            scope = "cross_attention" if original.component == "unet" else "joint_attention"

            def learn(word: str, learning: Learning) -> Tensor:
                start = starting_embedding(original, word, vectors=self.vectors, attack="pund")
                with tune_weights(original.denoiser, sorted(original.layers(scope))) as tuned:
                    game = _Game(self, original, tuned, latents, concept.attack_captions, start, seed=learning.seed)
                    return game.play(learning, run, label=f"pund {concept.name}, {learning.name}")

            settings = {name: value for name, value in asdict(self).items() if name != "checkpointing_epochs"}
            return learn_words(
                starting_words(self.initializers, self.restarts, otherwise=last),
                learn,
                run=run,
                record={**settings, "initializers": list(self.initializers)},
                parts=original.word_parts(),
            )

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt for each restart: its learned word after the prompt."""
        yield from attempts(state, f"{prompt} {PLACEHOLDER}".strip())


class _Game:
    """One restart: the two players, and the words that the first one has found on the way."""

    def __init__(
        self,
        settings: Pund,
        original: Target,
        tuned: Tuned,
        latents: Tensor,
        captions: tuple[str, ...],
        start: Tensor,
        *,
        seed: int,
    ) -> None:
        self.settings, self.original, self.tuned = settings, original, tuned
        self.latents, self.captions = latents, captions
        self.generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(start)
        kept = math.ceil(settings.epochs / settings.keep_every)
        self.candidates = nn.Parameter(start.new_zeros(kept, *start.shape), requires_grad=False)
        # One optimizer for both, as a step moves what has a gradient. With no decay AdamW is Adam.
        searching = {"params": [self.embedding], "lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        erasing = {"params": list(tuned.parameters), "lr": settings.erase_learning_rate, "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([searching, erasing])

    def play(self, learning: Learning, run: Run, *, label: str) -> Tensor:
        """All epochs; the best candidate (vectors, width)."""
        own = self.settings
        state = {
            "words": nn.ParameterList([self.embedding, self.candidates]),
            "surrogate": self.tuned.parameters,
        }
        done = learning.resume(state, self.optimizer, self.generator)
        with run.progress(own.epochs, label) as bar:
            for epoch in range(done + 1, own.epochs + 1):
                rows = torch.randint(len(self.latents), (own.batch_size,), generator=self.generator)
                told = {"loss": self.search(rows, epoch)}
                if epoch % own.keep_every == 0 or epoch == own.epochs:
                    self.candidates[math.ceil(epoch / own.keep_every) - 1] = self.embedding.detach()
                if own.erase_every is not None and epoch % own.erase_every == 0 and epoch < own.epochs:
                    told["erased"] = self.erase(rows, epoch)
                run.log(restart=learning.name, epoch=epoch, **told)  # first: no log lacks what a state has
                if epoch % own.checkpointing_epochs == 0:
                    learning.save(epoch, state, self.optimizer, self.generator)
                bar.update(epoch, **told)
        scores = self.scores()
        best = int(scores.argmin())
        epoch = min((best + 1) * own.keep_every, own.epochs)
        run.log(restart=learning.name, chosen_epoch=epoch, score=float(scores[best]))
        return self.candidates[best].detach()

    def search(self, rows: Tensor, epoch: int) -> float:
        """The first player's steps of one epoch; the mean loss."""
        losses = []
        for t in self.times(len(rows)):
            for _ in range(self.settings.steps_per_bin):
                x_t, goal = self.noised(rows, t)
                text = self.original.text(self.texts(rows), tokens={PLACEHOLDER: self.embedding})
                loss = squared_error(self.original.predict(x_t, t, text), goal).mean()
                losses.append(self.step(loss, [self.embedding], epoch))
        return sum(losses) / len(losses)

    def erase(self, rows: Tensor, epoch: int) -> float:
        """The second player's steps: the surrogate learns to read the word as nothing; the mean loss."""
        losses = []
        for t in self.times(len(rows)):
            x_t, _ = self.noised(rows, t)
            with torch.no_grad():
                text = self.original.text(self.texts(rows), tokens={PLACEHOLDER: self.embedding})
                neutral = self.original.predict(x_t, t, self.original.text(self.neutral(rows)))
            loss = squared_error(self.original.predict(x_t, t, text), neutral).mean()
            losses.append(self.step(loss, list(self.tuned.parameters), epoch))
        return sum(losses) / len(losses)

    def step(self, loss: Tensor, parameters: list[nn.Parameter], epoch: int) -> float:
        """One step on the loss over its own value, so that all times weigh the same."""
        value = loss.item()
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"pund: a loss is {value} at epoch {epoch}; lower learning_rate")
        # Not `backward`, which would fill the gradients of the other player too. SD3's last block has unused weights.
        gradients = torch.autograd.grad(loss / value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return value

    @torch.no_grad()
    def scores(self) -> Tensor:
        """(candidates,): the error of each over that of the neutral text, on average over both states of φ."""
        n = self.settings.probes
        rows = torch.arange(n) % len(self.latents)
        t = torch.cat([self.time(number % self.settings.bins) for number in range(n)])
        x_t, goal = self.noised(rows, t)
        of_surrogate = self.relative_errors(rows, x_t, t, goal)
        with self.tuned.disabled():
            return (of_surrogate + self.relative_errors(rows, x_t, t, goal)) / 2

    def relative_errors(self, rows: Tensor, x_t: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        """(candidates,): what the prediction for each leaves of the error of that for the neutral text, as means."""
        total = torch.zeros(1 + len(self.candidates))
        size = max(self.settings.batch_size, 8)
        for part in (slice(start, start + size) for start in range(0, len(rows), size)):
            neutral = self.original.text(self.neutral(rows[part]))
            learned = [
                self.original.text(self.texts(rows[part]), tokens={PLACEHOLDER: word}) for word in self.candidates
            ]
            for number, text in enumerate([neutral, *learned]):
                total[number] += squared_error(self.original.predict(x_t[part], t[part], text), goal[part]).sum().cpu()
        return total[1:] / total[0]

    def times(self, n: int) -> Iterator[Tensor]:
        """A time in each bin, the noisiest first, the same for `n` rows."""
        for number in reversed(range(self.settings.bins)):
            yield self.time(number).expand(n)

    def time(self, number: int) -> Tensor:
        low, high = number / self.settings.bins, (number + 1) / self.settings.bins
        return self.original.process.sample_t(1, low=low, high=high, generator=self.generator)

    def noised(self, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The images of `rows` with fresh noise, and what the denoiser is to predict. Noise is drawn on the CPU."""
        x0 = self.latents[rows.to(self.latents.device)]
        eps = torch.randn(x0.shape, generator=self.generator).to(x0)
        process = self.original.process
        return process.noised(x0, eps, t), process.target(x0, eps, t)

    def texts(self, rows: Tensor) -> list[str]:
        return [self.settings.template.replace("{}", self.captions[row]).strip() for row in rows.tolist()]

    def neutral(self, rows: Tensor) -> list[str]:
        """The same texts without the word."""
        return [" ".join(word for word in text.split() if word != PLACEHOLDER) for text in self.texts(rows)]
