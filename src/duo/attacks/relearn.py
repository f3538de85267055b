"""Relearning: min_θ E‖ε − ε_θ(x_t, t, τ(c))‖² from the erased weights θ, for a few steps, on images and captions c.

What an attacker does who has the weights (Gao et al. 2025, Meta-Unlearning, ICCV) and what a user does who means no
harm (Li et al. 2025, ResAlign, NeurIPS): plain fine-tuning, on a few images of the concept (`on` = "concept") or on
images that have nothing of it ("harmless"). The result is a curve over the steps, so every checkpoint of it is an
attempt of its own, and 0 steps, the erased model as it is, is its first point. A curve says something beside that of a
model which never knew the concept: relearning teaches that one too.

The defaults are ResAlign's evaluation: the whole denoiser, AdamW at a constant 1e-5 with decay 0.01, gradients clipped
at 1, batches of 4, up to its 200 steps and on to 500. Where we depart from it, and why:

- No average of the weights over the steps (EMA): after few steps it is mostly the erased model.
- No flips: concepts here may have a left and a right, and text to keep. The whole image is seen, without crops.
- Batches of 4, not 4 gradients of 1 added up, and float32 unless the run's precision says otherwise.
- The loss follows the model's own `process`, so it also holds for models that predict v or a flow instead of ε; times
  are drawn evenly from the schedule.
- Latents are the posterior's means, encoded once. Captions are too: the text encoders are not trained.
- `parameters`, `dropout` (of captions, as models are trained for classifier-free guidance) and `k` are ours.

It works on whatever the model under attack is: changed weights, as of a merged model, are where training starts; a
gated erasure (`duo.gating`) stays as it is beside the weights, opened by each caption, and training works around it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from duo import parallel
from duo.conditioning import Conditioning
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import as_table, check_above_0, check_above_0_or_none, check_choices, check_from_0
from duo.losses import squared_error
from duo.plugins import Access, Attempt, Precision, Run
from duo.precision import check_tunable
from duo.seeds import seed_for
from duo.training import Step, attach_lora, fit, fixed_by, follow, tune_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from duo.target import Target

Parameters = Literal["full", "attention", "cross_attention", "text_inputs", "lora"]
CHOICES = {"on": ("concept", "harmless"), "captions": ("prompts", "neutral"), "parameters": get_args(Parameters)}
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Relearn:
    """Fine-tune the model under attack, and try it after each number of steps in `at`.

    `k` of the images are learned from, the first ones; all where None. `captions` of the concept's images are the
    "prompts" that drew them, or "neutral": what they show besides the concept, so that the concept needs no word.
    `parameters` are the whole denoiser, its attention, its cross-attention (on SD3 and FLUX the text's side of the
    joint attention), what the text enters by, or a LoRA of `rank` on the attention, which wants a larger
    `learning_rate` (1e-4). Several runs of one curve need several rows with a `k` or `learning_rate` of their own.
    """

    access: ClassVar[Access] = Access.WEIGHTS
    queries: ClassVar[int] = 0
    idle: ClassVar[str] = "0 steps"  # the variant that is no attack yet

    on: Literal["concept", "harmless"] = "concept"
    k: int | None = None
    captions: Literal["prompts", "neutral"] = "prompts"
    parameters: Parameters = "full"
    rank: int = 4
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    batch_size: int = 4
    dropout: float = 0.0  # the share of captions that are left empty
    at: tuple[int, ...] = (1, 10, 50, 100, 200, 500)  # the curve's numbers of steps, rising; the last ends the training
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        check_above_0(self, "rank", "learning_rate", "max_grad_norm", "batch_size", "checkpointing_steps")
        check_from_0(self, "weight_decay")
        check_above_0_or_none(self, "k")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, set it to 0 or more, and below 1")
        if not self.at or self.at[0] < 1 or sorted({*self.at}) != [*self.at]:
            raise ValueError(f"at is {[*self.at]}, set it to numbers of steps from 1, each larger than the one before")

    @property
    def learns_from_images(self) -> bool:
        return self.on == "concept"

    @property
    def learns_from_harmless(self) -> bool:
        return self.on == "harmless"

    def passes(self, prompts: int) -> dict[str, int]:
        """What relearning sends through the networks, in rows, for any number of prompts (for `duo run --dry-run`)."""
        rows = self.at[-1] * self.batch_size
        return {"denoiser": rows, "trained": rows}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Fine-tune, and write what has changed after each number of steps to `relearned-<steps>.safetensors`.

        These are deltas over the model under attack, so they do not name a base. A run that was stopped goes on from
        its checkpoints, with the same bytes; they are removed when the curve is whole. There is no state.
        """
        if self.parameters != "lora":
            check_tunable(run.precision)
        images, captions = self._examples(concept)
        record = {**fixed_by(as_table(self), "at"), "attack": "relearn", "seed": run.seed}
        loss = self._objective(target, images, captions, precision=run.precision)
        with parallel.alone(), self._trainable(target, seed=run.seed) as (parameters, changes):

            def curve() -> Iterator[Step]:
                for steps in self.at:
                    path = run.folder / f"{_name(steps)}.safetensors"
                    made = {**record, "steps": steps}
                    if path.exists():
                        _refuse_other(path, made)
                        continue
                    yield from fit(
                        loss,
                        parameters,
                        steps=steps,
                        learning_rate=self.learning_rate,
                        weight_decay=self.weight_decay,
                        max_grad_norm=self.max_grad_norm,
                        seed=run.seed,
                        folder=run.folder / CHECKPOINTS,
                        checkpointing_steps=self.checkpointing_steps,
                        record=record,
                        optimizer_8bit=run.precision.optimizer_8bit,
                    )
                    kind = "lora" if self.parameters == "lora" else "weights"
                    Delta(kind=kind, component=target.component, tensors=changes(), record=made).save(path)

            follow(curve(), run=run, total=self.at[-1], label=f"relearning {concept.name}")
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)  # each is three times as large as the weights
        return {}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """The prompt as it stands, to the model as it is and after each number of steps."""
        yield Attempt(prompt=prompt, variant=self.idle, record={"steps": 0})
        for steps in self.at:
            yield Attempt(prompt=prompt, variant=f"{steps} steps", weights=_name(steps), record={"steps": steps})

    def _examples(self, concept: Any) -> tuple[Sequence[Image], list[str]]:
        """The first k images and their captions."""
        images, captions, called = {
            "harmless": (concept.harmless_images, concept.harmless_captions, "harmless_captions"),
            "prompts": (concept.attack_images, concept.attack_prompts, "attack_prompts"),
            "neutral": (concept.attack_images, concept.attack_captions, "attack_captions"),
        }["harmless" if self.on == "harmless" else self.captions]
        kind = "harmless_images" if self.on == "harmless" else "attack_images"
        if not images:
            raise UserError(f"concept {concept.name}: no {kind}, and relearn learns from them")
        if len(captions) != len(images):
            raise UserError(f"concept {concept.name}: {len(images)} {kind} but {len(captions)} {called}")
        if self.k is not None and self.k > len(images):
            raise UserError(
                f"relearn: k is {self.k}, but there are {len(images)} {kind}; lower k, or draw more of them"
            )
        return images[: self.k], list(captions[: self.k])

    @contextmanager
    def _trainable(
        self, target: Target, *, seed: int
    ) -> Iterator[tuple[nn.ParameterList, Callable[[], dict[str, Tensor]]]]:
        """What is trained, and a way to read what has changed of it; the model is as it was afterwards."""
        denoiser = target.denoiser
        if self.parameters == "lora":
            layers = sorted(target.layers("attention"))
            start = seed_for(seed, "relearn", "lora")
            with attach_lora(denoiser, layers, rank=self.rank, alpha=self.rank, seed=start) as lora:
                yield lora.parameters, lora.tensors
            return
        scope: str = self.parameters
        if scope == "full":
            names = sorted(name for name, module in denoiser.named_modules() if [*module.parameters(recurse=False)])
        else:
            joint = scope == "cross_attention" and target.component != "unet"
            names = sorted(target.layers("joint_attention" if joint else scope))
        with tune_weights(denoiser, names) as tuned:
            yield tuned.parameters, tuned.differences

    def _objective(
        self, target: Target, images: Sequence[Image], captions: Sequence[str], *, precision: Precision
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """The loss of one random batch. Noise is drawn on the CPU: the same on every device."""
        n, process = self.batch_size, target.process
        parts = [slice(first, first + n) for first in range(0, len(images), n)]
        with torch.no_grad():
            latents = torch.cat([target.latents(images[part], generator=None).float() for part in parts])
            texts = [target.text(captions[part]) for part in parts]
            empty = target.unconditional()
        if texts[0].prompts is not None:  # gates ask for it, and a family's unconditional row may not be of a prompt
            if precision.gradient_checkpointing:
                raise UserError(
                    "relearn: precision.gradient_checkpointing runs layers again in the backward pass, where no prompt "
                    "opens the gates of this erasure; set it to false"
                )
            empty = replace(empty, prompts=("",))
        text = Conditioning.cat([*texts, empty])

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            rows = torch.randint(len(latents), (n,), generator=generator)
            dropped = torch.rand(n, generator=generator) < self.dropout
            t = process.sample_t(n, low=0.0, high=1.0, generator=generator)
            eps = torch.randn(n, *latents.shape[1:], generator=generator).to(latents)
            x0 = latents[rows.to(latents.device)]
            said = text[torch.where(dropped, len(latents), rows).to(latents.device)]
            output = target.predict(process.noised(x0, eps, t), t, said)
            return squared_error(output, process.target(x0, eps, t)).mean(), {}

        return loss


def _name(steps: int) -> str:
    return f"relearned-{steps:05d}"


def _refuse_other(path: Path, made: Mapping[str, Any]) -> None:
    """Raise `UserError` where the file of a run that was stopped was not made with these settings."""
    before = Delta.load(path).record
    if before != made:
        other = ", ".join(sorted(key for key in {*before, *made} if before.get(key) != made.get(key)))
        raise UserError(f"{path} was made with another {other}; name a new --out or undo the change")
