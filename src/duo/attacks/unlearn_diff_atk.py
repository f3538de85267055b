"""UnlearnDiffAtk (Zhang et al. 2024): min_δ E_ε‖ε − ε_θ′(z_t, t, τ([δ; P]))‖², with the erased model θ′ as classifier.

z_t is a noised image of the concept: a prompt by which θ′ denoises it well is one that θ′ draws such images from. The k
free words δ are rows u of probabilities over the vocabulary: words are drawn from u, the gradient at their one-hot
vectors is taken as that of u, Adam moves u, and each row is projected back to the simplex. The times are gone through
from clean to noisy. After each the prompt with the likeliest words is drawn, and the first that shows the concept ends
the search.

Where we depart from the paper's public code, and why:

- The model from before the erasure draws the goal and does nothing else. Where P is neutral, it draws no concept from
  it; then the goal is an image of the attacker's own (`duo.attacks._goal`).
- Only whole words are free, so what is sent is what was optimised (`duo.attacks._tokens`). Prompts of more than 60
  tokens were dropped; here a prompt too long for its free words loses its last words.
- Without a success the prompt is kept that the attacker's detector found most in; there the row is a failure.
- Images are drawn as the service draws them, with one seed for each base prompt, and no prompt twice.
- A time is the last of its share of the schedule: steps 9, 29, …, 989 of 1000, where the code has 10, 30, …, 990.
- The loss follows the model's own `process`, so it also holds for models that predict v or a flow instead of ε.
- The simplex projection is exact (Duchi et al. 2008), where the code bisects to 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from duo.attacks._goal import choose_goal, drawn, packed, shown
from duo.attacks._tokens import Draft, Vocabulary, check_length, fitted, free_ids
from duo.attacks._words import draw_seeds
from duo.errors import UserError
from duo.fields import check_above_0, check_choices, check_from_0
from duo.losses import squared_error
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk:
    """A few hard words before or after each base prompt. The defaults are those published for nudity and violence."""

    access: ClassVar[Access] = Access.GRADIENT
    uses_undefended: ClassVar[bool] = True
    learns_from_images: ClassVar[bool] = True

    length: int = 5  # free words; 3 were published for objects and styles
    position: Literal["prefix", "suffix"] = "prefix"
    timesteps: int = 50  # evenly spaced over the schedule
    iterations: int = 40  # steps at each
    batch_size: int = 1  # noises in a step
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    draws: int = 1  # images of the prompt after each timestep
    goal_images: int = 1  # drawn by the undefended model, of which the surest is the goal

    def __post_init__(self) -> None:
        check_above_0(self, "length", "timesteps", "iterations", "batch_size", "learning_rate", "draws", "goal_images")
        check_from_0(self, "weight_decay")
        check_choices(self, {"position": ("prefix", "suffix")})

    @property
    def queries(self) -> int:
        """Images asked of the target for one prompt, at most."""
        return self.timesteps * self.draws

    def passes(self, prompts: int) -> dict[str, int]:
        """What the searches send through the networks, in rows, images not counted (for `duo run --dry-run`)."""
        steps = prompts * self.timesteps * self.iterations
        rows = steps * self.batch_size
        return {"denoiser": rows, "trained": rows, "text": steps, "vae": prompts}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """The free vocabulary and the attacker's own images. Nothing is learned yet."""
        if concept.detector is None:
            raise UserError("unlearn_diff_atk: no detector, and it tells when to stop; give the concept a curator")
        check_length(self.length, target, "unlearn_diff_atk")
        return {"vocabulary": free_ids(target), **packed(concept)}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt: the first prompt that shows the concept, or else that of the surest image.

        Its record holds `shown` (the share of its images that show the concept, and the detector's mean score; None if
        it was never drawn), `timestep` (after which it was found, from 1), `loss` (the mean of that timestep), `free`
        (its free words), and what the goal was.
        """
        vocabulary = Vocabulary.of(target, state["vocabulary"])
        goal = choose_goal(target, state, prompt, drawn=self.goal_images, generator=generator)
        with torch.no_grad():
            x0 = target.latents([goal.image], generator=None)
        draft = self._draft(target, prompt)
        u = torch.full((self.length, len(vocabulary.words)), 1 / len(vocabulary.words)).requires_grad_()
        optimizer = torch.optim.Adam([u], lr=self.learning_rate, weight_decay=self.weight_decay)
        seeds = draw_seeds(self.draws, generator)
        best: Attempt | None = None
        seen: set[str] = set()
        for timestep, t in enumerate(target.process.times((torch.arange(self.timesteps) + 0.5) / self.timesteps), 1):
            loss = 0.0
            for _ in range(self.iterations):
                u.grad, one = self._gradient(target, draft, vocabulary, u.detach(), x0, t, generator)
                if not math.isfinite(one):
                    raise UserError(f"unlearn_diff_atk: the loss is {one} at timestep {timestep}; lower learning_rate")
                optimizer.step()
                u.data = to_simplex(u.data)
                loss += one / self.iterations
            free = vocabulary.texts(u.argmax(dim=1))
            text = draft.text(free)
            if text in seen or target.refused(text) is not None:
                continue
            seen.add(text)
            images = drawn(target, text, seeds)
            found = shown(target, images) if images else None
            if best is None or best.record["shown"] is None or (found is not None and found > best.record["shown"]):
                told = {"shown": found, "timestep": timestep, "loss": loss, "free": free}
                best = Attempt(prompt=text, record={**told, **goal.record()})
            if found is not None and found[0] == 1:
                break
        if best is not None:  # None: every prompt was refused
            yield best

    def _draft(self, target: Target, prompt: str) -> Draft:
        own, free = fitted(target, prompt, free=lambda tokens: self.length), (None,) * self.length
        return Draft(words=(*free, *own) if self.position == "prefix" else (*own, *free))

    def _gradient(
        self,
        target: Target,
        draft: Draft,
        vocabulary: Vocabulary,
        u: Tensor,
        x0: Tensor,
        t: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, float]:
        """The objective's gradient at words drawn from `u`, as that of `u` (k, words), and its value.

        A one-hot vector times the table is a row of it, so the gradient there is that of the row, times the table.
        """
        places = torch.multinomial(u, 1, generator=generator)[:, 0]
        rows = vocabulary.rows[places.to(vocabulary.rows.device)].requires_grad_()
        text = draft.conditioning(target, rows, sent=draft.text(vocabulary.texts(places)))
        x0, times = x0.expand(self.batch_size, *x0.shape[1:]), t.expand(self.batch_size)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        process = target.process
        prediction = target.predict(process.noised(x0, eps, times), times, text.expand(self.batch_size))
        loss = squared_error(prediction, process.target(x0, eps, times)).mean()
        # Not `backward`, which would also fill the gradients of whatever the erasure left trainable.
        (gradient,) = torch.autograd.grad(loss, [rows])
        return (gradient @ vocabulary.rows.T).clamp(-1, 1).cpu(), loss.item()


def to_simplex(rows: Tensor) -> Tensor:
    """The nearest points on the probability simplex of each row (n, width), by sorting (Duchi et al. 2008)."""
    falling = rows.sort(dim=1, descending=True).values
    excess = (falling.cumsum(dim=1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = (falling > excess).sum(dim=1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp(min=0)
