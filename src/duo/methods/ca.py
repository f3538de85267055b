"""Concept Ablation (Kumari et al. 2023, ICCV; eqs. 5–7): draw the anchor concept where the target is asked for.

Images of anchor prompts c* ("a house"), drawn by the model itself, are noised to x_t, and the prediction for the target
prompt c beside each ("a burning house") is trained towards

    model-based: ‖ε_θ(x_t, c) − sg[ε_θ(x_t, c*)]‖²      noise-based: ‖ε_θ(x_t, c) − ε‖²

and, with a `prior_weight`, the model is held on other anchor images by ‖ε_θ(x_t', c*) − ε'‖². Models that predict v or
a velocity have these in ε's place.

The paper derives the model-based objective for a frozen teacher φ, and trains with the current weights θ in its place,
without gradient, on the assumption that they hardly change for c*; so does the code. That is the default here, and
`teacher = "frozen"` has the derivation's φ.

Departures from the authors' code (diffusers/train.py):

- Its `--scale_lr` multiplies the rate by the batch, the processes, and by 2 where there is a prior; here the rate is
  the one that is used.
- Images are encoded once, by the posterior's mean, and sampled as the run samples (theirs: 25 steps of DPM-Solver).
- They are not resized at random, with "a far away …" or "zoomed in …" put before the prompt and the borders masked:
  their recipes for style and nudity switch that off (`--noaug`).
- Its group "embedding" changes a row of the text encoder's table, and so is not offered: what an erasure yields here
  (`duo.delta`) changes the denoiser, and any user's own text encoder would undo it.
- Its attention keeps the gradient from the start token's keys and values, which the paper does not mention (Custom
  Diffusion's code has it): every prompt begins with that token. `hold_start` does the same on U-Nets. It is no part of
  SD3 and FLUX, where the text enters by one projection and T5 has no such token.
- Captions are the concept's own harmless ones, and not a list by a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from PIL import ImageOps
from torch import Tensor, nn

from duo.conditioning import Conditioning, encoded
from duo.delta import Delta, made_by
from duo.drawn import draw, encode, noised
from duo.fields import check_above_0, check_choices, check_from_0
from duo.losses import squared_error
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_tunable, waiting
from duo.training import Tuned, fixed_by, follow, steps_of, tune_weights

SCOPES = {"cross_attention": "text_inputs", "attention": "attention", "full": "all"}  # group → layer scope
TARGETS = 720  # texts that stand beside captions at most, for all of them wait in memory
PLACES = ("{word}, {caption}", "in {word} style, {caption}", "{caption}, {word}")  # as published for nudity
CHOICES = {
    "objective": ("model", "noise"),
    "teacher": ("current", "frozen"),
    "parameters": tuple(SCOPES),
    "prompts": ("words", "prompts"),
    "lr_scheduler": ("constant", "linear", "cosine"),
}


@dataclass(frozen=True, kw_only=True)
class Ca:
    """Concept Ablation with the values that the authors' page gives for nudity on Stable Diffusion 1.4.

    `parameters` is what is trained: "cross_attention" the projections of the text to keys and values (on SD3 and FLUX
    where the text enters), "attention" all of cross- and self-attention's, or "full" for all linear layers and
    convolutions.

    `prompts`: "words" puts a word of the concept before or after a harmless caption, as published for styles and
    nudity; "prompts" has the pairs' unsafe prompts beside their safe ones, as published for objects, where the target's
    name takes the anchor's place in the caption. The captions are the anchor prompts of `images` drawn at
    `guidance_scale`; with `negative_words` the concept's words are their negative prompt. With `horizontal_flip` an
    image is mirrored in half of its uses.
    """

    takes_pairs: ClassVar[bool] = False
    strength: ClassVar[str] = "learning_rate"

    objective: Literal["model", "noise"] = "model"
    teacher: Literal["current", "frozen"] = "current"
    parameters: Literal["cross_attention", "attention", "full"] = "attention"
    prompts: Literal["words", "prompts"] = "words"
    prior_weight: float = 1.0
    hold_start: bool = True
    images: int = 1000
    guidance_scale: float = 6.0
    negative_words: bool = True
    horizontal_flip: bool = True
    learning_rate: float = 6.4e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    max_train_steps: int = 400
    train_batch_size: int = 8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 100

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        counts = ("images", "max_train_steps", "train_batch_size", "checkpointing_steps")
        check_above_0(self, "learning_rate", "max_grad_norm", *counts)
        check_from_0(self, "prior_weight", "guidance_scale", "weight_decay")

    @property
    def drawn(self) -> int:
        """How many images are drawn: no more than training can look at."""
        return min(self.images, self.max_train_steps * self.train_batch_size)

    def passes(self, pairs: int) -> dict[str, int]:
        """What training sends through the networks, in rows (for `duo run --dry-run`).

        The sampling steps of the images that it draws are not counted.
        """
        rows = self.train_batch_size * self.max_train_steps
        trained = rows * (2 if self.prior_weight else 1)
        teacher = rows if self.objective == "model" else 0
        return {
            "images": self.drawn,
            "vae": self.drawn * (3 if self.horizontal_flip else 2),  # decoded, then encoded, mirrored too
            "denoiser": trained + teacher,
            "trained": trained,
            "steps": self.max_train_steps,
        }

    def beside(self, concept: Any) -> dict[str, list[str]]:
        """Each anchor prompt, with the target prompts that may be asked for beside its images.

        With "words" each caption has every word in every place, or where captions are many its turn of these.
        """
        if self.prompts == "words":
            places = [place.replace("{word}", word) for word in concept.words for place in PLACES]
            each = max(1, min(len(places), TARGETS // len(concept.harmless)))
            return {
                caption: [places[(each * i + j) % len(places)].replace("{caption}", caption) for j in range(each)]
                for i, caption in enumerate(concept.harmless)
            }
        found: dict[str, list[str]] = {}
        for target, anchor in concept.targets("prompts"):
            found.setdefault(anchor, []).append(target)
        return found

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for what does not fit this machine."""
        check_tunable(precision)

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Draw the anchor images, and train the weights of the group on them."""
        self.check(model, pairs=None, precision=run.precision)
        beside = self.beside(concept)
        anchors = list(beside)
        images = draw(
            model,
            anchors,
            n=self.drawn,
            run=run,
            name="anchors",
            negative_prompts=[", ".join(concept.words)] * len(anchors) if self.negative_words else None,
            guidance_scale=self.guidance_scale,
        )
        with torch.no_grad():
            latents = encode(model, images)[None]
            if self.horizontal_flip:
                latents = torch.cat([latents, encode(model, [ImageOps.mirror(one) for one in images])[None]])
            texts = _Texts(model, beside)
        made = made_by("ca", self, model=model, run=run)
        trained = fixed_by(made["config"])
        start = model.layers("text_inputs").values() if self.hold_start and model.component == "unet" else ()
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            tune_weights(model.denoiser, sorted(model.layers(SCOPES[self.parameters]))) as tuned,
            _held_start(list(start)),
        ):
            steps = steps_of(
                self,
                self._objective(model, tuned, latents=latents, texts=texts),
                tuned.parameters,
                run=run,
                record={**trained, "drawn": self.drawn, "beside": beside, "model": model.name, "seed": run.seed},
            )
            follow(steps, run=run, total=self.max_train_steps, label="ca")
            tensors = tuned.differences()
        return Delta(kind="weights", component=model.component, tensors=tensors, record=made)

    def _objective(
        self, model: Family, tuned: Tuned, *, latents: Tensor, texts: _Texts
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """The loss of one random batch, from latents (1 or 2 with the mirrored, images, channels, height, width)."""
        n = self.train_batch_size

        def sample(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """n random images: their numbers, and what `noised` makes of them."""
            chosen = torch.randint(latents.shape[1], (n,), generator=generator)
            mirrored = torch.randint(latents.shape[0], (n,), generator=generator)
            x0 = latents[mirrored.to(latents.device), chosen.to(latents.device)]
            return chosen, *noised(model.process, x0, generator=generator)

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            chosen, x_t, t, wanted = sample(generator)
            asked = texts.targets(chosen, generator)
            if self.objective == "model":
                with tuned.disabled() if self.teacher == "frozen" else torch.no_grad():
                    wanted = model.predict(x_t, t, texts.anchors(chosen))
            if not self.prior_weight:
                value = ablation_loss(model.predict(x_t, t, asked), wanted)
                return value, {"ablation": value.detach()}
            kept, kept_x_t, kept_t, kept_wanted = sample(generator)
            both = model.predict(
                torch.cat([x_t, kept_x_t]), torch.cat([t, kept_t]), Conditioning.cat([asked, texts.anchors(kept)])
            )
            ablation, prior = ablation_loss(both[:n], wanted), ablation_loss(both[n:], kept_wanted)
            return ablation + self.prior_weight * prior, {"ablation": ablation.detach(), "prior": prior.detach()}

        return loss


def ablation_loss(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over rows and elements. Nothing flows back into `wanted`."""
    return squared_error(prediction, wanted.detach()).mean()


class _Texts:
    """Anchor prompts and the target prompts beside each, encoded once. Image i has anchor i modulo their number."""

    def __init__(self, model: Family, beside: Mapping[str, Sequence[str]]) -> None:
        self._anchors = encoded(model, list(beside))
        self._targets = encoded(model, [target for targets in beside.values() for target in targets])
        self._counts = torch.tensor([len(targets) for targets in beside.values()])
        self._firsts = self._counts.cumsum(0) - self._counts

    def anchors(self, images: Tensor) -> Conditioning:
        """The anchor prompts of images (n,)."""
        return self._anchors[self._rows(images % len(self._counts))]

    def targets(self, images: Tensor, generator: torch.Generator) -> Conditioning:
        """For each image one of the target prompts beside its anchor."""
        number = images % len(self._counts)
        among = (torch.rand(len(images), generator=generator) * self._counts[number]).long()
        return self._targets[self._rows(self._firsts[number] + among)]

    def _rows(self, rows: Tensor) -> Tensor:
        return rows.to(self._anchors.embeds.device)


@contextmanager
def _held_start(projections: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context no gradient passes the first position of what `projections`, (n, length, width), put out."""

    def held(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    hooks = [module.register_forward_hook(held) for module in projections]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
