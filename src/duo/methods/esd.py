"""Erased Stable Diffusion (Gandikota et al. 2023, ICCV; eq. 8): steer the prediction for the concept away from it.

    minimise ‖ε_θ(x_t, c) − ( ε_φ(x_t, ∅) − η·[ε_φ(x_t, c) − ε_φ(x_t, ∅)] )‖²

with the student θ, the frozen φ, the concept's text c and the empty prompt ∅; x_t is where a sampler that was asked for
c stands after a random number of its steps. Models that predict v or a velocity have these in ε's place: at a given x_t
they are affine in ε, and the weights add up to 1, so the target is the same.

Departures from the authors' code, of which there are two, the paper's (train-scripts/train-esd.py) and today's
(esd_sd.py, esd_sdxl.py):

- η is the paper's. Today's code starts from ε_φ(c) where the paper has ε_φ(∅), so its η = 2 is the paper's 1, and the
  η = 1 of its SDXL script is 0 here. With `erase_from` its η is the paper's.
- The student itself samples x_t, as in the paper and its code; today's code has the frozen model sample it, which
  `trajectory` can repeat.
- Times are drawn evenly from the bin of the schedule below the point where sampling stopped, as the paper's code means
  to. There the bin lies above it, and the sampler has by an off-by-one gone two steps further than the bin says: x_t is
  up to 58 of 1000 steps cleaner than the model is told, pure noise is never seen, and the lowest bin sees finished
  images. `timestep = "stop"` tells the exact time, as today's code does.
- Images have the model's own size; today's code trains Stable Diffusion 1.4 at 1024 pixels, by mistake.
- Trained are linear layers and convolutions, as today; the paper's code trains norms as well, and leaves the time
  embedding and the last convolution as they are. Its Adam is AdamW without decay here, in float32.
- All rows of a batch stop after the same number of steps. The published batch is one row.

Ours, beside the published method: `base = "anchor"` has the prompt that may stand in the concept's place for ∅, and
`prompts = "prompts"` whole prompts for bare words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from duo.delta import Delta, made_by
from duo.fields import check_above_0, check_above_0_or_none, check_choices, check_from_0
from duo.losses import erased_target, squared_error
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_tunable, waiting
from duo.sampling import check_steps, grid, partly_sampled
from duo.training import Tuned, fixed_by, follow, steps_of, tune_weights

Variant = Literal["x", "x-strict", "u", "selfattn", "full"]
CHOICES = {
    "variant": get_args(Variant),
    "prompts": ("words", "prompts"),
    "base": ("unconditional", "anchor"),
    "trajectory": ("student", "frozen"),
    "timestep": ("bin", "stop"),
    "lr_scheduler": ("constant", "linear", "cosine"),
}


@dataclass(frozen=True, kw_only=True)
class Esd:
    """ESD with the values that the paper's code uses for nudity on Stable Diffusion 1.4.

    `variant` says which layers are trained: "x" the cross-attention (on SD3 and FLUX the text's side of the joint
    attention), "x-strict" only what the text enters by, "u" everything but those of "x", "selfattn", or "full".
    `prompts` are the concept's "words" or whole "prompts"; one is drawn for each row. `erase_from` is the prompt c_from
    that the concept is erased from: the student is asked for it, and ε_φ(c_from) is what η's term is taken from.
    `guidance_scale` and `sampling_steps` are those of the sampler that x_t comes from. `max_grad_norm` clips, where
    given; the published code does not.
    """

    takes_pairs: ClassVar[bool] = False
    strength: ClassVar[str] = "learning_rate"

    variant: Variant = "u"
    eta: float = 1.0
    prompts: Literal["words", "prompts"] = "words"
    erase_from: str | None = None
    base: Literal["unconditional", "anchor"] = "unconditional"
    trajectory: Literal["student", "frozen"] = "student"
    timestep: Literal["bin", "stop"] = "bin"
    guidance_scale: float = 3.0
    sampling_steps: int = 50
    learning_rate: float = 1e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    max_train_steps: int = 1000
    train_batch_size: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        counts = ("sampling_steps", "max_train_steps", "train_batch_size", "checkpointing_steps")
        check_above_0(self, "learning_rate", *counts)
        check_from_0(self, "eta", "guidance_scale", "weight_decay")
        check_above_0_or_none(self, "max_grad_norm")
        if self.erase_from is not None and self.base == "anchor":
            raise ValueError("erase_from and base = 'anchor' both say what is to be left; give one")

    def passes(self, pairs: int) -> dict[str, int]:
        """What training sends through the networks, in rows (for `duo run --dry-run`), on average over the stops.

        `steps` is left out: a single step tells little of the mean, so time is reckoned from the rows.
        """
        rows = self.train_batch_size * self.max_train_steps
        sampled = (self.sampling_steps - 1) / 2 * (1 if self.guidance_scale == 1 else 2)
        frozen = 2 if self.erase_from is None else 3
        return {"denoiser": round(rows * (sampled + frozen + 1)), "trained": rows}

    def layers(self, model: Family) -> list[str]:
        """The names of the modules that are trained."""
        crossed = "cross_attention" if model.component == "unet" else "joint_attention"
        if self.variant == "u":
            return sorted(model.layers("all").keys() - model.layers(crossed).keys())
        scopes = {"x": crossed, "x-strict": "text_inputs", "selfattn": "self_attention", "full": "all"}
        return sorted(model.layers(scopes[self.variant]))

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for what does not fit the model or this machine."""
        check_tunable(precision)
        check_steps(model, self.sampling_steps)

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Train the weights of the variant's layers on the concept's words or prompts."""
        self.check(model, pairs=None, precision=run.precision)
        targets = concept.targets(self.prompts)
        made = made_by("esd", self, model=model, run=run)
        trained = fixed_by(made["config"])
        objective = self._objective(model, targets)
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            tune_weights(model.denoiser, self.layers(model)) as tuned,
        ):
            steps = steps_of(
                self,
                lambda generator: objective(tuned, generator),
                tuned.parameters,
                run=run,
                record={**trained, "targets": [list(one) for one in targets], "model": model.name, "seed": run.seed},
            )
            follow(steps, run=run, total=self.max_train_steps, label="esd")
            tensors = tuned.differences()
        return Delta(kind="weights", component=model.component, tensors=tensors, record=made)

    def _objective(
        self, model: Family, targets: tuple[tuple[str, str], ...]
    ) -> Callable[[Tuned, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """The loss of one random batch. The texts are encoded here, once."""
        n, process = self.train_batch_size, model.process
        with torch.no_grad():
            erased, anchors = (model.text([one[side] for one in targets]) for side in (0, 1))
            empty = model.text([""]).expand(n)
            c_from = None if self.erase_from is None else model.text([self.erase_from]).expand(n)

        def loss(tuned: Tuned, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            stop = int(torch.randint(self.sampling_steps, (), generator=generator))
            rows = torch.randint(len(targets), (n,), generator=generator).to(model.device)
            eps = torch.randn(n, *model.latent_shape, generator=generator).to(model.device)
            if self.timestep == "stop":
                t = grid(model, self.sampling_steps)[stop].expand(n)
            else:
                low, high = (1 - (stop + more) / self.sampling_steps for more in (1, 0))
                t = process.sample_t(n, low=max(0.0, low), high=high, generator=generator)
            c = erased[rows]
            asked = c if c_from is None else c_from
            with tuned.disabled() if self.trajectory == "frozen" else nullcontext():
                x_t = partly_sampled(
                    model,
                    eps,
                    asked,
                    empty,
                    steps=self.sampling_steps,
                    stop=stop,
                    guidance_scale=self.guidance_scale,
                )
            with tuned.disabled():
                without = model.predict(x_t, t, anchors[rows] if self.base == "anchor" else empty)
                with_c = model.predict(x_t, t, c)
                base = without if c_from is None else model.predict(x_t, t, c_from)
                target = erased_target(base, with_c, without, eta=self.eta)
            student = model.predict(x_t, t, asked)
            numbers = {
                "stop": torch.tensor(float(stop), device=model.device),
                "concept": squared_error(with_c, without).mean(),  # what c adds to the frozen prediction here
                "to_base": squared_error(student.detach(), base).mean(),  # and what is left of it in the student's
            }
            return squared_error(student, target).mean(), numbers

        return loss
