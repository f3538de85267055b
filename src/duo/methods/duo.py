"""Direct Unlearning Optimization (Park et al. 2024, NeurIPS; eqs. 8–11): prefer the safe twin, keep the prior.

Departures from the authors' code, which fine-tunes Stable Diffusion 1.4 and 3:

- β, λ and the learning rate are used as they are given; `published` turns the authors' shorthands into these values.
- Timesteps may be shared within a pair, as the derivation has it; the code draws them independently.
- Latents are the posterior's means, encoded once; the code samples them anew at every step.
- Training is at what guidance starts from: the empty prompt, as theirs is, but zeros on SDXL (`Family.unconditional`).
- The prior is taken at the end of the schedule, as theirs is on SD 1.4. Their code for SD3 labels its pure noise as
  nearly clean, which `prior_at` can repeat (with `precondition_outputs`, as there, λ then acts as λ·σ²: the published
  5e6 as 45).
- `positive_penalty` adds the safeguard of DPO-Positive (`duo.losses.duo_loss`); 0 is the published objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from duo import parallel
from duo.conditioning import Conditioning
from duo.delta import Delta, made_by
from duo.drawn import encode
from duo.errors import UserError
from duo.fields import check_above_0, check_from_0
from duo.losses import duo_loss, prior_loss, squared_error
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_8bit, check_prior, rounds, sharded, unrounded, waiting
from duo.training import Lora, attach_lora, fixed_by, follow, steps_of

Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine"
]  # names of get_scheduler in diffusers and transformers
SCHEDULES = get_args(Schedule)
LARGEST_RANK = 1024  # no layer of Stable Diffusion is wide enough to gain by more


@dataclass(frozen=True, kw_only=True)
class Duo:
    """DUO with the values that the authors use for nudity on Stable Diffusion 1.4.

    `beta` sharpens the preference and `prior_weight` (λ) holds the output on starting noise. `lr_scheduler` and
    `lr_warmup_steps` are those of diffusers' training scripts. `targets` are layer scopes
    of the family for the LoRA of `rank` and `lora_alpha` (the rank where None). `train_batch_size` counts pairs a step;
    `timestep_range` are fractions of the schedule, 0 clean; so is `prior_at`, the time that the prior's noise is given.

    On SD3 and FLUX the published targets are "self_attention"; "joint_attention" adds the text's side of it.
    `precondition_outputs` measures every error, the prior's too, on the clean image that a prediction implies: those of
    rectified flow are multiplied by σ², as in the authors' code for SD3.
    """

    takes_pairs: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    strength: ClassVar[str] = "learning_rate"

    beta: float = 500.0
    learning_rate: float = 6e-5
    lr_scheduler: Schedule = "constant"
    lr_warmup_steps: int = 0
    prior_weight: float = 5e6
    rank: int = 32
    lora_alpha: float | None = None
    max_train_steps: int = 1000
    train_batch_size: int = 4
    targets: tuple[str, ...] = ("self_attention",)
    pair_timesteps: Literal["shared", "independent"] = "independent"
    timestep_range: tuple[float, float] = (0.0, 0.75)
    prior_at: float = 1.0
    precondition_outputs: bool = False
    positive_penalty: float = 0.0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        above_0 = ("beta", "learning_rate", "max_grad_norm")
        check_above_0(self, *above_0, "rank", "max_train_steps", "train_batch_size", "checkpointing_steps")
        check_from_0(self, "prior_weight", "positive_penalty", "weight_decay", "lr_warmup_steps")
        if self.rank > LARGEST_RANK:
            raise ValueError(f"rank is {self.rank}, expected at most {LARGEST_RANK}")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}, expected a number above 0, or none for the rank")
        if self.pair_timesteps not in ("shared", "independent"):
            raise ValueError(f"pair_timesteps is {self.pair_timesteps!r}, expected 'shared' or 'independent'")
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}, expected one of {', '.join(SCHEDULES)}")
        low, high = self.timestep_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"timestep_range is {self.timestep_range}, expected two fractions, 0 ≤ low < high ≤ 1")
        if not 0 <= self.prior_at <= 1:
            raise ValueError(f"prior_at is {self.prior_at}, expected a fraction of the schedule, 0 to 1")
        if not self.targets:
            raise ValueError("targets is empty, expected at least one scope, such as 'self_attention'")

    def passes(self, pairs: int) -> dict[str, int]:
        """What training on so many pairs sends through the networks, in rows (for `duo run --dry-run`)."""
        rows = 3 * self.train_batch_size * self.max_train_steps  # unsafe, safe and prior
        return {"denoiser": 2 * rows, "trained": rows, "vae": 2 * pairs, "text": 1, "steps": self.max_train_steps}

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for what does not fit the model, the number of pairs (None: not known) or this machine."""
        if pairs is not None and self.train_batch_size > pairs:
            raise UserError(f"train_batch_size = {self.train_batch_size} but there are only {pairs} pairs")
        parallel.share(self.train_batch_size)
        self._check_scale(model)
        check_prior(self.prior_weight, precision, scale=self._prior_scale(model))
        if precision.optimizer_8bit:
            check_8bit()
        for scope in self.targets:
            if not model.layers(scope):
                raise UserError(f"targets: the denoiser of model {model.name!r} has no layers of scope {scope!r}")
        low, high = self.timestep_range
        model.process.sample_t(1, low=low, high=high, generator=torch.Generator())  # raises where no step lies there

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Train the LoRA on `pairs`; the concept is what they show, so `concept` itself is not looked at."""
        assert pairs is not None
        self.check(model, pairs=len(pairs), precision=run.precision)
        unsafe, safe = (encode(model, side) for side in (pairs.unsafe, pairs.safe))
        empty = model.unconditional()
        layers = sorted({name for scope in self.targets for name in model.layers(scope)})
        alpha = float(self.rank if self.lora_alpha is None else self.lora_alpha)
        made = made_by("duo", self, model=model, run=run)
        trained = fixed_by(made["config"])
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            sharded(model, shard=run.precision.shard),
            attach_lora(model.denoiser, layers, rank=self.rank, alpha=alpha, seed=run.seed) as lora,
        ):
            steps = steps_of(
                self,
                self._objective(model, lora, unsafe=unsafe, safe=safe, empty=empty),
                lora.parameters,
                run=run,
                record={**trained, "pairs": pairs.digest(), "model": model.name, "seed": run.seed},
                shared=True,
            )
            follow(steps, run=run, total=self.max_train_steps, label="duo")
            tensors = lora.tensors()
        return Delta(
            kind="lora",
            component=model.component,
            tensors=tensors,
            record={**made, "lora": {"rank": self.rank, "alpha": alpha, "target_modules": layers}},
        )

    def _prior_scale(self, model: Family) -> float:
        """What the prior's differences are multiplied by: with preconditioned outputs λ acts as λ·scale²."""
        if not self.precondition_outputs:
            return 1.0
        _, last = model.process.terminal(torch.zeros(1), at=self.prior_at)
        return float(model.process.x0_scale(last))

    def _check_scale(self, model: Family) -> None:
        """Raise `UserError` where errors would be measured on clean images that no prediction implies."""
        noisiest = max(self.prior_at, self.timestep_range[1])
        _, t = model.process.terminal(torch.zeros(1), at=noisiest)
        if self.precondition_outputs and not torch.isfinite(model.process.x0_scale(t)).all():
            raise UserError(
                f"precondition_outputs = true, but the noise of model {model.name!r} holds no signal at fraction "
                f"{noisiest:g} of its schedule (a zero terminal SNR), where a prediction of epsilon implies no clean "
                "image; set it to false, or lower prior_at and the end of timestep_range"
            )

    def _objective(
        self, model: Family, lora: Lora, *, unsafe: Tensor, safe: Tensor, empty: Conditioning
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """This process's share of the loss of one random batch, from cached latents (pairs, channels, height, width).

        All processes draw the same batch and its noise, and each computes other rows of it: the shares add up to the
        loss of the batch.
        """
        n, process = self.train_batch_size, model.process
        own = parallel.share(n)
        m = own.stop - own.start
        low, high = self.timestep_range

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            chosen = torch.randperm(len(unsafe), generator=generator)[:n][own].to(unsafe.device)
            x0 = torch.cat([unsafe[chosen], safe[chosen]])
            noise = torch.randn(n, *unsafe.shape[1:], generator=generator)[own].to(unsafe.device)
            eps = noise.repeat(2, 1, 1, 1)  # one noise for both images of a pair
            if self.pair_timesteps == "shared":
                t = process.sample_t(n, low=low, high=high, generator=generator)[own].repeat(2)
            else:
                t = process.sample_t(2 * n, low=low, high=high, generator=generator)
                t = torch.cat([side[own] for side in t.chunk(2)])
            terminal, last = process.terminal(noise, at=self.prior_at)
            x_t, target = process.noised(x0, eps, t), process.target(x0, eps, t)
            with lora.disabled():
                reference, reference_prior = predict(x_t, t, terminal, last)
            policy, policy_prior = predict(x_t, t, terminal, last)
            scale, prior_scale = (process.x0_scale(one) if self.precondition_outputs else None for one in (t, last))
            policy_unsafe, policy_safe = squared_error(policy, target, scale=scale).chunk(2)
            reference_unsafe, reference_safe = squared_error(reference, target, scale=scale).chunk(2)
            preference = duo_loss(
                policy_unsafe=policy_unsafe,
                policy_safe=policy_safe,
                reference_unsafe=reference_unsafe,
                reference_safe=reference_safe,
                beta=self.beta,
                positive_penalty=self.positive_penalty,
            )
            prior = prior_loss(policy_prior, reference_prior, scale=prior_scale)
            numbers = {"accuracy": preference.accuracy, "margin": preference.margin, "prior": prior.detach()}
            total = preference.loss + self.prior_weight * prior
            return total * (m / n), {name: number * (m / n) for name, number in numbers.items()}

        def predict(x_t: Tensor, t: Tensor, terminal: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
            """The denoiser's outputs on the pairs and, never rounded by autocast, on the starting noise."""
            if rounds(model.denoiser):
                pairs = model.predict(x_t, t, empty.expand(2 * m))
                with unrounded(model.denoiser):
                    return pairs, model.predict(terminal, last, empty.expand(m))
            both = model.predict(torch.cat([x_t, terminal]), torch.cat([t, last]), empty.expand(3 * m))
            return both[: 2 * m], both[2 * m :]

        return loss


def published(beta: float, *, base_lr: float = 3e-4, base_lambda: float = 1e6) -> dict[str, float]:
    """The values that the authors' script uses for its shorthands: lr = base_lr·100/β and λ = base_lambda·β/100."""
    return {"beta": beta, "learning_rate": base_lr * 100 / beta, "prior_weight": base_lambda * beta / 100}
