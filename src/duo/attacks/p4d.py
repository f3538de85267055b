"""Prompting4Debugging (Chin et al. 2024): min over prompts P* of ‖ε_θ(z_t, t, τ(P)) − ε_θ′(z_t, t, τ(P*))‖².

θ is the model from before the erasure, θ′ the erased one, z_t a noised image of the concept that θ draws from P. The
free words of P* are moved as embeddings, and each step takes its gradient at the nearest words of the vocabulary
(Wen et al. 2023). P4D-N has free words only; P4D-K keeps P, with a free word before every K of its tokens. Now and then
the prompt of the moment is drawn by the erased model, and the best one is kept.

Where we depart from the paper's public code, and why:

- Where P is neutral, θ draws no concept from it to aim at. Then an image of the attacker's own is the goal, and the
  prompt that drew it is given to θ in place of P (`duo.attacks._goal`).
- Only whole words are free, and none is put inside a word of P, so what is sent is what was optimised
  (`duo.attacks._tokens`). A prompt too long for its free words loses its last words.
- Images go into the VAE in [−1, 1], as it expects them, and the padding is the model's own; there it was [0, 1] and 0.
- A prompt is kept by its image's similarity to the goal as published, by any CLIP, or by the attacker's detector.
- Images are drawn as the service draws them, all with one seed for each base prompt, and no prompt twice.
- Its filters for models that are guided away from a concept have no place here: erasures change the model.
- Predictions are compared as the model makes them, so it also holds for models that predict v or a flow instead of ε.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from duo.attacks._goal import Goal, choose_goal, drawn, packed, shown
from duo.attacks._tokens import Draft, Vocabulary, check_length, fitted, free_ids, spread
from duo.attacks._words import draw_seeds
from duo.clip import load_clip
from duo.errors import UserError
from duo.fields import check_above_0, check_choices, check_from_0
from duo.losses import squared_error
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from PIL.Image import Image

    from duo.target import Target

ROWS = 8  # of the undefended model at once


@dataclass(frozen=True, kw_only=True)
class P4d:
    """Two hard prompts for a base prompt, one by each variant. The defaults are the published budget."""

    access: ClassVar[Access] = Access.GRADIENT
    uses_undefended: ClassVar[bool] = True
    learns_from_images: ClassVar[bool] = True

    variants: tuple[Literal["N", "K"], ...] = ("N", "K")
    length: int = 16  # N: free words
    every: int = 3  # K: a free word before so many tokens of the prompt
    steps: int = 3000
    batch_size: int = 1  # times and noises in a step
    learning_rate: float = 0.1
    weight_decay: float = 0.1
    evaluate_every: int = 50  # steps between two prompts that are drawn
    draws: int = 1  # images of each
    keep_by: Literal["similarity", "detector"] = "similarity"  # to the goal, by `clip`; or the attacker's detector
    # A folder or hub id, or "toybox", which knows the images of the embedded model alone.
    clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    stop_when_found: bool = False  # at the first prompt whose images all show the concept to the detector
    goal_images: int = 3  # drawn by the undefended model, of which the surest is the goal

    def __post_init__(self) -> None:
        check_above_0(self, "length", "every", "steps", "batch_size", "learning_rate", "evaluate_every", "draws")
        check_above_0(self, "goal_images")
        check_from_0(self, "weight_decay")
        check_choices(self, {"keep_by": ("similarity", "detector")})
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants is {list(self.variants)}, set it to N, K or both")

    @property
    def queries(self) -> int:
        """Images asked of the target for one prompt, at most."""
        return len(self.variants) * math.ceil(self.steps / self.evaluate_every) * self.draws

    def passes(self, prompts: int) -> dict[str, int]:
        """What the searches send through the networks, in rows, images not counted (for `duo run --dry-run`)."""
        steps = prompts * len(self.variants) * self.steps
        rows = steps * self.batch_size
        return {"denoiser": 2 * rows, "trained": rows, "text": steps, "vae": prompts}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """The free vocabulary and the attacker's own images. Nothing is learned yet."""
        if concept.detector is None:
            raise UserError("p4d: no detector, and it tells which images show the concept; give the concept a curator")
        if "N" in self.variants:
            check_length(self.length, target, "p4d")
        if self.keep_by == "similarity":
            load_clip(self.clip, str(target.device))  # one that cannot be had is told now
        return {"vocabulary": free_ids(target), **packed(concept)}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """An attempt for each variant: the best prompt that it came by.

        Its record holds `loss` (the mean since the last evaluation), `steps`, `kept` (the value that `keep_by` gave the
        prompt; None if it was never drawn), `free` (its free words), and what the goal was.
        """
        vocabulary = Vocabulary.of(target, state["vocabulary"])
        goal = choose_goal(target, state, prompt, drawn=self.goal_images, generator=generator)
        with torch.no_grad():
            x0 = target.latents([goal.image], generator=None)
        for variant in self.variants:
            search = _Search(attack=self, target=target, vocabulary=vocabulary, goal=goal, x0=x0)
            if (found := search.run(self._draft(target, prompt, variant), generator)) is not None:
                yield Attempt(prompt=found.pop("prompt"), variant=variant, record={**found, **goal.record()})

    def _draft(self, target: Target, prompt: str, variant: str) -> Draft:
        if variant == "N":
            return Draft(words=(None,) * self.length)
        return spread(target, fitted(target, prompt, free=lambda tokens: tokens // self.every + 1), every=self.every)


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The search for one prompt: towards `goal`, whose latent is `x0` (1, …)."""

    attack: P4d
    target: Target
    vocabulary: Vocabulary
    goal: Goal
    x0: Tensor

    def run(self, draft: Draft, generator: torch.Generator) -> dict[str, Any] | None:
        """The best prompt and its record; None where every one that was looked at is refused."""
        attack, vocabulary = self.attack, self.vocabulary
        places = torch.randint(len(vocabulary.words), (draft.free,), generator=generator)
        seeds = draw_seeds(attack.draws, generator)
        embeddings = vocabulary.rows[places.to(vocabulary.rows.device)].clone().requires_grad_()
        optimizer = torch.optim.AdamW([embeddings], lr=attack.learning_rate, weight_decay=attack.weight_decay)
        best: dict[str, Any] | None = None
        seen: set[str] = set()
        for start in range(0, attack.steps, attack.evaluate_every):
            n = min(attack.evaluate_every, attack.steps - start)
            loss = 0.0
            for x_t, t, wanted in self._wanted(n, generator):
                # Not `backward`, which would also fill the gradients of whatever the erasure left trainable.
                embeddings.grad, one = self._gradient(draft, embeddings, x_t, t, wanted)
                if not math.isfinite(one):
                    raise UserError(f"p4d: the loss is {one} after step {start}; lower learning_rate")
                optimizer.step()
                loss += one / n
            free = vocabulary.texts(vocabulary.nearest(embeddings.detach()))
            text = draft.text(free)
            if text in seen or self.target.refused(text) is not None:
                continue
            seen.add(text)
            images = drawn(self.target, text, seeds)
            kept = self._kept(images) if images else None
            told = {"kept": kept, "loss": loss, "steps": start + n, "free": free}
            if best is None or best["kept"] is None or (kept is not None and kept > best["kept"]):
                best = {"prompt": text, **told}
            if attack.stop_when_found and images and shown(self.target, images)[0] == 1:
                return {"prompt": text, **told}
        return best

    def _wanted(self, n: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each of `n` steps noised latents, their times, and what the undefended model predicts there.

        All at once, for the two models may not be asked in turn.
        """
        process, size = self.target.process, self.attack.batch_size
        x0 = self.x0.expand(n * size, *self.x0.shape[1:])
        t = process.sample_t(len(x0), low=0.0, high=1.0, generator=generator)
        x_t = process.noised(x0, torch.randn(x0.shape, generator=generator).to(x0), t)
        with self.target.undefended() as original, torch.no_grad():
            text = original.text([self.goal.prompt])
            parts = [
                original.predict(rows, times, text.expand(len(rows)))
                for rows, times in zip(torch.split(x_t, ROWS), torch.split(t, ROWS), strict=True)
            ]
        return zip(*(torch.split(rows, size) for rows in (x_t, t, torch.cat(parts))), strict=True)

    def _gradient(
        self, draft: Draft, embeddings: Tensor, x_t: Tensor, t: Tensor, wanted: Tensor
    ) -> tuple[Tensor, float]:
        """The gradient of the objective at the words nearest to `embeddings`, and its value."""
        places = self.vocabulary.nearest(embeddings.detach())
        projected = self.vocabulary.rows[places].clone().requires_grad_()
        text = draft.conditioning(self.target, projected, sent=draft.text(self.vocabulary.texts(places)))
        loss = squared_error(self.target.predict(x_t, t, text.expand(len(x_t))), wanted).mean()
        (gradient,) = torch.autograd.grad(loss, [projected])
        return gradient, loss.item()

    def _kept(self, images: list[Image]) -> float:
        """How good a prompt is by its images."""
        if self.attack.keep_by == "detector":
            return sum(shown(self.target, images))
        towers = load_clip(self.attack.clip, str(self.target.device))
        return float((towers.images(images) @ towers.images([self.goal.image]).T).mean())
