"""SPM, semi-permeable membranes (Lyu et al. 2024, CVPR; eqs. 3–9): adapters of rank 1, opened by the prompt.

Each step, z_t is sampled part of the way with the membranes on, and they are trained on

    ‖ε_θ(z_t, c) − (ε_φ(z_t, c_n) − η[ε_φ(z_t, c) − ε_φ(z_t, c_n)])‖² + λ ‖ε_θ(z_t, e) − ε_φ(z_t, e)‖²

where c is the concept, c_n what is neutral beside it, and e are anchors anywhere in the space of text embeddings
("latent anchoring"). Means over elements. In use, facilitated transport (`duo.gating`) opens the membrane by how
near the prompt is to the concept.

Departures from the authors' code:

- All anchors are anchored. There they are stacked as [∅, e1, ∅, e2, …], of which guidance at scale 1 keeps the second
  half: of four anchors ∅, e3, ∅, e4 are left.
- The time that z_t is labelled with is the one that the sampler left it at. There a grid of 30 DDIM steps, which begins
  at 957 of 1000, is labelled by one that begins at 999, so that z_t has less noise than the denoiser is told.
- The gate is γ, not γ² with cross terms between several SPMs (`duo.gating`).
- The size of images is the model's own; there a "dynamic" one is drawn between 256 and 448, never 512.
- AdamW keeps moments of 32 bits unless `precision.optimizer_8bit` asks for 8, as published.
- On FLUX and SD3 (theirs have none) every linear layer of the transformer blocks has a membrane, those of the adaptive
  norms, which read time and pooled text, too. An anchor has a pooled embedding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from duo.conditioning import Conditioning, encoded
from duo.delta import Delta, compose, made_by
from duo.errors import UserError
from duo.fields import check_above_0, check_choices, check_from_0
from duo.gating import gate_of
from duo.losses import erased_target
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_8bit, waiting
from duo.sampling import grid, partly_sampled
from duo.seeds import seed_for
from duo.training import Lora, attach_lora, fixed_by, follow, steps_of

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"]
CHOICES: dict[str, tuple[str, ...]] = {
    "prompts": ("words", "prompts"),
    "neutral": ("empty", "anchor"),
    "adapters": ("joint", "per_concept"),
    "gate": ("prompt", "open"),
    "anchoring": ("random", "harmless"),
    "lr_scheduler": get_args(Schedule),
}
ANCHOR_LENGTHS = (0.8, 1.2)  # of a random anchor, in lengths of the concept's embedding


@dataclass(frozen=True, kw_only=True)
class Spm:
    """SPM with the values of the authors' configurations for Stable Diffusion 1.4.

    Erased are the texts of `concepts`, or of the concept: its words, or with `prompts` = "prompts" the prompts of its
    pairs. They train one membrane together, one of them drawn for each row, or `adapters` = "per_concept" one each, at
    so many times the cost. `neutral` is the empty prompt, or what the concept has to stand in for each text (ours).

    `eta` is η and `anchor_weight` λ; `anchors` are drawn for each row of `train_batch_size`, as `random_anchors` has
    it, or from the concept's captions of harmless scenes (`anchoring` = "harmless", ours). z_t is what some of
    `grid_steps` steps, 1 to all but one, with `guidance_scale` make of noise. `max_grad_norm` 0 clips nothing.

    `gate` "prompt" is facilitated transport; it compares with `concepts`, or the concept's words. "open" leaves the
    membranes open, as a LoRA that can be merged (ours).
    """

    takes_pairs: ClassVar[bool] = False
    strength: ClassVar[str] = "learning_rate"

    concepts: tuple[str, ...] = ()
    prompts: Literal["words", "prompts"] = "words"
    neutral: Literal["empty", "anchor"] = "empty"
    adapters: Literal["joint", "per_concept"] = "joint"
    gate: Literal["prompt", "open"] = "prompt"
    eta: float = 1.0
    anchor_weight: float = 1000.0
    anchors: int = 4
    anchoring: Literal["random", "harmless"] = "random"
    targets: tuple[str, ...] = ("transformers",)
    rank: int = 1
    lora_alpha: float = 1.0
    grid_steps: int = 30
    guidance_scale: float = 3.0
    learning_rate: float = 1e-4
    lr_scheduler: Schedule = "cosine_with_restarts"
    lr_warmup_steps: int = 500
    lr_num_cycles: int = 3
    max_train_steps: int = 3000
    train_batch_size: int = 1
    weight_decay: float = 1e-2
    max_grad_norm: float = 0.0
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        above_0 = ("learning_rate", "lora_alpha", "rank", "max_train_steps", "train_batch_size", "lr_num_cycles")
        check_above_0(self, *above_0, "checkpointing_steps", "anchors")
        check_from_0(self, "eta", "anchor_weight", "guidance_scale", "weight_decay", "max_grad_norm", "lr_warmup_steps")
        if self.grid_steps < 2:
            raise ValueError(f"grid_steps is {self.grid_steps}, expected at least 2")
        if not self.targets:
            raise ValueError("targets is empty, expected at least one scope, such as 'transformers'")
        if not all(text.strip() for text in self.concepts):
            raise ValueError("concepts has an empty text, which has nothing to erase")

    def passes(self, pairs: int) -> dict[str, int]:
        """What training one adapter sends through the networks, in rows: half of the grid's steps on average."""
        sampled = (1 if self.guidance_scale == 1 else 2) * self.grid_steps // 2
        trained = (1 + self.anchors) * self.train_batch_size * self.max_train_steps
        frozen = (2 + self.anchors + sampled) * self.train_batch_size * self.max_train_steps
        return {"denoiser": frozen + trained, "trained": trained, "steps": self.max_train_steps}

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for what does not fit the model or this machine."""
        if precision.optimizer_8bit:
            check_8bit()
        for scope in self.targets:
            if not model.layers(scope):
                raise UserError(f"targets: the denoiser of model {model.name!r} has no layers of scope {scope!r}")

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Train the membranes, one adapter after the other, and set their gates."""
        self.check(model, pairs=None, precision=run.precision)
        named = [(one, concept.anchor) for one in self.concepts] or list(concept.targets(self.prompts))
        named = [(one, "" if self.neutral == "empty" else anchor) for one, anchor in dict(named).items()]
        apart = self.adapters == "per_concept"
        gated = [one for one, _ in named] if apart else list(self.concepts or concept.words)
        groups = [([pair], [pair[0]]) for pair in named] if apart else [(named, gated)]
        made = made_by("spm", self, model=model, run=run)
        parts = []
        for number, (texts, names) in enumerate(groups):
            tensors = self._trained(model, concept, texts, number=number, of=len(groups), made=made, run=run)
            record = dict(made)
            if self.gate == "prompt":
                embeds, gate = gate_of(names, model)
                tensors = {f"0.{name}": tensor for name, tensor in tensors.items()} | {"0.gate.embeds": embeds}
                record["gates"] = [gate]
            kind = "gated" if self.gate == "prompt" else "lora"
            parts.append(Delta(kind=kind, component=model.component, tensors=tensors, record=record))
        whole = compose(parts)
        gates = {key: whole.record[key] for key in ("gates",) if key in whole.record}
        return replace(whole, record={**made, **gates})

    def _trained(
        self,
        model: Family,
        concept: Any,
        named: Sequence[tuple[str, str]],
        *,
        number: int,
        of: int,
        made: Mapping[str, Any],
        run: Run,
    ) -> dict[str, Tensor]:
        """The tensors of adapter `number` of so many, for texts with what is neutral beside each."""
        layers = sorted({name for scope in self.targets for name in model.layers(scope)})
        seed = seed_for(run.seed, "spm", number)
        concepts, neutrals = (model.text(texts) for texts in zip(*named, strict=True))
        unconditional = model.unconditional()
        harmless = encoded(model, concept.harmless) if self.anchoring == "harmless" else None
        trained = fixed_by(made["config"], "gate")
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            attach_lora(
                model.denoiser, layers, rank=self.rank, alpha=self.lora_alpha, seed=seed, init="kaiming"
            ) as lora,
        ):
            steps = steps_of(
                self,
                self._objective(
                    model, lora, concepts=concepts, neutrals=neutrals, unconditional=unconditional, harmless=harmless
                ),
                lora.parameters,
                run=run,
                seed=seed,
                folder="checkpoints" if of == 1 else f"checkpoints-{number:04d}",
                record={**trained, "texts": [list(pair) for pair in named], "model": model.name, "seed": seed},
            )
            before, total = number * self.max_train_steps, of * self.max_train_steps
            counted = (replace(one, step=before + one.step, total=total) for one in steps)
            follow(counted, run=run, total=total, label="spm")
            return lora.tensors()

    def _objective(
        self,
        model: Family,
        lora: Lora,
        *,
        concepts: Conditioning,
        neutrals: Conditioning,
        unconditional: Conditioning,
        harmless: Conditioning | None,
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """The loss of one random batch. `concepts` and `neutrals` belong together row by row; anchors are `harmless`
        rows, or random ones where there are none."""
        n, a, steps = self.train_batch_size, self.anchors, self.grid_steps
        times = grid(model, steps)

        def anchored(rows: Tensor, generator: torch.Generator) -> Conditioning:
            """For each row of the batch its anchors, one after the other."""
            if harmless is not None:
                return harmless[torch.randint(len(harmless), (n * a,), generator=generator)]
            drawn = [random_anchors(concepts[row : row + 1], a, generator=generator) for row in rows.tolist()]
            return Conditioning.cat(drawn)

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            rows = torch.randint(len(concepts), (n,), generator=generator)
            stop = int(torch.randint(1, steps, (), generator=generator))
            eps = torch.randn(n, *model.latent_shape, generator=generator).to(model.device)
            c, neutral, anchors = concepts[rows], neutrals[rows], anchored(rows, generator)
            z = partly_sampled(
                model, eps, c, unconditional.expand(n), steps=steps, stop=stop, guidance_scale=self.guidance_scale
            )
            z_anchors, t = z.repeat_interleave(a, dim=0), times[stop]
            with lora.disabled():
                output = model.predict(
                    torch.cat([z, z, z_anchors]), t.expand((2 + a) * n), Conditioning.cat([neutral, c, anchors])
                )
                frozen_neutral, frozen_concept, frozen_anchors = torch.split(output, [n, n, n * a])
            output = model.predict(torch.cat([z, z_anchors]), t.expand((1 + a) * n), Conditioning.cat([c, anchors]))
            student, student_anchors = torch.split(output, [n, n * a])
            erased = erase_loss(student, concept=frozen_concept, neutral=frozen_neutral, eta=self.eta)
            anchoring = F.mse_loss(student_anchors, frozen_anchors)
            total = erased + self.anchor_weight * anchoring
            return total, {"erase": erased.detach(), "anchoring": anchoring.detach()}

        return loss


def erase_loss(student: Tensor, *, concept: Tensor, neutral: Tensor, eta: float) -> Tensor:
    """‖student − (neutral − η[concept − neutral])‖², mean over elements; the last two of the frozen model."""
    return F.mse_loss(student, erased_target(neutral, concept, neutral, eta=eta))


def random_anchors(text: Conditioning, n: int, *, generator: torch.Generator) -> Conditioning:
    """`n` random embeddings in place of `text` (one row), each 0.8 to 1.2 times as long and in a random direction.

    A direction is kept with probability 1 − its cosine to the text's: nearly always, the space being so wide.
    """
    low, high = ANCHOR_LENGTHS

    def draw(like: Tensor) -> Tensor:
        flat = like.detach().float().flatten().cpu()
        drawn: list[Tensor] = []
        while len(drawn) < n:
            direction = F.normalize(torch.randn(flat.shape, generator=generator), dim=0)
            if torch.rand((), generator=generator) < 1 - F.cosine_similarity(direction, flat, dim=0):
                length = low + (high - low) * torch.rand((), generator=generator)
                drawn.append(length * flat.norm() * direction)
        return torch.stack(drawn).view(n, *like.shape[1:]).to(like)

    return Conditioning(embeds=draw(text.embeds), pooled=None if text.pooled is None else draw(text.pooled))
