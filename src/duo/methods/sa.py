"""Selective Amnesia (Heng & Soh 2023, eq. 10): surrogate for the concept, replay for the rest, and EWC on the weights.

    L = MSE(ε, ε_θ(z_t^q, t, c_f)) + γ·MSE(ε, ε_θ(z_t^r, t, c_r)) + λ·Σ_i F_i·(θ_i − θ*_i)²

q are surrogate images under a text of the concept, r images of other things under their own captions, and F the
diagonal of the Fisher information at the original weights θ*: elastic weight consolidation (Kirkpatrick et al. 2017).
On models that predict v or a flow, that takes ε's place.

Departures from the paper and its public code, and why:

- There is no ½ before λ, as in the public code; the paper has one.
- F is published as the mean over images of (Σ_t ∂MSE_t/∂θ)² over all 1000 times, about five million passes forward
  and back. `fisher_timesteps` takes k of them for each image, evenly spaced round the 1000 from a random start, so
  that each time has the chance k/1000, and the gradient that it sums stands for 1000/k. That estimates the sum without
  bias, but not its square, which comes out too large by the sum's variance: about 1000/k − 1 times Σ_t (∂MSE_t/∂θ)²,
  so λ has to be chosen anew. At 1000 it is the published F.
- The penalty is summed over the trained weights alone. The public code sums it, and keeps F and θ*, for all weights:
  those that are not trained add nothing but memory and time.
- Replay draws from all its images. The public code pairs surrogate and replay by index, up to the shorter set, so of
  4999 replay images it never looks at 3999.
- Replay captions are the concept's own harmless ones, not the authors' 4999, and surrogates are drawn from
  its safe prompts. Latents are the posterior's means. The model draws all images itself.
- `concept_text` = "prompts" is ours: a surrogate image gets the unsafe twin of the prompt that drew it.
- On DiTs, which the authors do not treat, "noxattn" leaves out what the text's side of the attention has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from duo import parallel
from duo.checkpoint import read_tensors, write_tensors
from duo.conditioning import Conditioning, encoded
from duo.delta import Delta, made_by
from duo.drawn import draw, encode, noised
from duo.errors import UserError
from duo.fields import check_above_0, check_above_0_or_none, check_from_0
from duo.losses import squared_error
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_tunable, waiting
from duo.seeds import seed_for
from duo.training import follow, steps_of, tune_weights

# Settings that a run may go on with in another value.
FREE = ("max_train_steps", "checkpointing_steps", "fisher_batch_size", "fisher_checkpointing")
TIMES = 1000  # that the published Fisher sums over: the steps of DDPM, and as many even ones of a flow's schedule
# What "noxattn" leaves as it is: cross-attention, the time embedding and the last layers. In a DiT that is the text's
# side of joint attention and where it enters.
NOXATTN = {
    "unet": re.compile(r"\.attn2\.|^time_embedding\.|^conv_(norm_)?out$"),
    "transformer": re.compile(
        r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])$|^context_embedder$|^time_text_embed\.|^(norm|proj)_out"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sa:
    """Selective Amnesia with the authors' values for nudity on Stable Diffusion 1.4.

    `learning_rate` and `train_batch_size` are of their four GPUs together, and `max_train_steps` are their 500 epochs.
    `parameters` are the weights that are trained. `concept_text` is what a surrogate image is called: one of the
    concept's words, drawn for each row, or an unsafe prompt. `ewc_weight` is λ and `replay_weight` γ.

    F is estimated on the first `fisher_samples` replay images at `fisher_timesteps` times each, `fisher_batch_size` of
    them in one pass, and kept after every `fisher_checkpointing` images.
    """

    takes_pairs: ClassVar[bool] = False
    strength: ClassVar[str] = "learning_rate"

    surrogate_images: int = 1000
    replay_images: int = 4999
    concept_text: Literal["words", "prompts"] = "words"
    parameters: Literal["noxattn", "full"] = "noxattn"
    replay_weight: float = 1.0
    ewc_weight: float = 50.0
    fisher_samples: int = 4999
    fisher_timesteps: int = TIMES
    fisher_batch_size: int = 8
    fisher_checkpointing: int = 10
    learning_rate: float = 1.6e-4
    max_train_steps: int = 31_500
    train_batch_size: int = 16
    weight_decay: float = 1e-2
    max_grad_norm: float | None = None
    checkpointing_steps: int = 250

    def __post_init__(self) -> None:
        images = ("surrogate_images", "replay_images", "fisher_samples")
        fisher = ("fisher_timesteps", "fisher_batch_size", "fisher_checkpointing")
        steps = ("max_train_steps", "train_batch_size", "checkpointing_steps")
        check_above_0(self, *images, *fisher, *steps, "learning_rate")
        check_from_0(self, "replay_weight", "ewc_weight", "weight_decay")
        check_above_0_or_none(self, "max_grad_norm")
        if self.fisher_timesteps > TIMES:
            raise ValueError(f"fisher_timesteps is {self.fisher_timesteps}, expected at most {TIMES}")
        if self.fisher_samples > self.replay_images:
            raise ValueError(
                f"fisher_samples is {self.fisher_samples}, expected at most replay_images, {self.replay_images}"
            )
        if self.concept_text not in ("words", "prompts"):
            raise ValueError(f"concept_text is {self.concept_text!r}, expected 'words' or 'prompts'")
        if self.parameters not in ("noxattn", "full"):
            raise ValueError(f"parameters is {self.parameters!r}, expected 'noxattn' or 'full'")

    def passes(self, pairs: int) -> dict[str, int]:
        """What training sends through the networks, in rows, whatever the number of pairs (for `duo run --dry-run`).

        The sampling steps of the images that it draws are not counted.
        """
        rows = 2 * self.train_batch_size * self.max_train_steps + self.fisher_samples * self.fisher_timesteps
        images = self.surrogate_images + self.replay_images
        return {"images": images, "denoiser": rows, "trained": rows, "vae": 2 * images, "text": images}

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for what training would refuse once all images are drawn."""
        check_tunable(precision)

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Draw surrogates and replays, estimate the Fisher information, and train."""
        self.check(model, pairs=None, precision=run.precision)
        twins, harmless = concept.targets("prompts"), concept.harmless
        safe = [one for _, one in twins]
        surrogate = encode(model, draw(model, safe, n=self.surrogate_images, run=run, name="surrogate"))
        replay = encode(model, draw(model, harmless, n=self.replay_images, run=run, name="replay"))
        called = list(concept.words) if self.concept_text == "words" else [one for one, _ in twins]
        with torch.no_grad():
            concept_text, replay_text = encoded(model, called), encoded(model, harmless)
        made = made_by("sa", self, model=model, run=run)
        told = {"safe": safe, "called": called, "harmless": list(harmless), "model": model.name, "seed": run.seed}
        record = {**made["config"], **told}
        denoiser = model.denoiser
        trained = trained_modules(denoiser, self.parameters, component=model.component)
        # The tensors from before: what is trained is a copy of them.
        before = {name: one.detach() for name, one in denoiser.named_parameters()}
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            tune_weights(denoiser, trained) as tuned,
        ):
            weights = {name: one for name, one in denoiser.named_parameters() if one.requires_grad}
            fisher = self._fisher(model, weights, replay, replay_text, record=record, run=run)
            steps = steps_of(
                self,
                self._objective(
                    model,
                    [(one, before[name], fisher[name]) for name, one in weights.items()],
                    surrogate=surrogate,
                    replay=replay,
                    concept_text=concept_text,
                    replay_text=replay_text,
                ),
                tuned.parameters,
                run=run,
                record={key: v for key, v in record.items() if key not in FREE},
            )
            follow(steps, run=run, total=self.max_train_steps, label="sa")
            tensors = tuned.differences()
        return Delta(kind="weights", component=model.component, tensors=tensors, record=made)

    def _fisher(
        self,
        model: Family,
        weights: Mapping[str, nn.Parameter],
        latents: Tensor,
        text: Conditioning,
        *,
        record: Mapping[str, Any],
        run: Run,
    ) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of each weight, kept in `fisher.safetensors` as far as it is summed.

        Each image has a generator of its own, and images are summed in their order, so a run that was stopped ends with
        the same bytes. Several processes share the times of an image.
        """
        path = run.folder / "fisher.safetensors"
        parts = ("fisher_samples", "fisher_timesteps", "replay_images", "parameters", "harmless", "model", "seed")
        made_of = {key: record[key] for key in parts}
        sums, done = {name: torch.zeros_like(one, requires_grad=False) for name, one in weights.items()}, 0
        if path.exists():
            found, kept = read_tensors(path)
            of: Any = kept.get("of", {})
            if other := ", ".join(sorted(key for key, value in made_of.items() if of.get(key) != value)):
                raise UserError(f"{path} was made with another {other}; name a new --out or undo the change")
            sums, done = {name: found[name].to(one.device) for name, one in weights.items()}, int(str(kept["images"]))
        parallel.barrier()  # nobody writes before all have read
        scale = TIMES / self.fisher_timesteps
        with run.progress(self.fisher_samples, "fisher information") as bar:
            for i in range(done, self.fisher_samples):
                generator = torch.Generator().manual_seed(seed_for(run.seed, "fisher", i))
                t = fisher_times(model, self.fisher_timesteps, generator=generator)
                eps = torch.randn(len(t), *latents.shape[1:], generator=generator).to(latents)
                own = slice(parallel.rank(), None, parallel.size())
                caption = text[i % len(text) : i % len(text) + 1]
                x0, rows = latents[i : i + 1], self.fisher_batch_size
                gradient = summed_gradient(model, [*weights.values()], x0, caption, t[own], eps[own], rows=rows)
                parallel.add_up(gradient)
                for total, one in zip(sums.values(), gradient, strict=True):
                    total += (scale * one).square()
                if parallel.is_main() and ((i + 1) % self.fisher_checkpointing == 0 or i + 1 == self.fisher_samples):
                    write_tensors(path, sums, {"images": i + 1, "of": made_of})
                bar.update(i + 1)
        return {name: total / self.fisher_samples for name, total in sums.items()}

    def _objective(
        self,
        model: Family,
        weights: Sequence[tuple[Tensor, Tensor, Tensor]],
        *,
        surrogate: Tensor,
        replay: Tensor,
        concept_text: Conditioning,
        replay_text: Conditioning,
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """The loss of one random batch of each kind, from cached latents (images, channels, height, width).

        `weights` are each weight with its value before and its Fisher information.
        """
        n = self.train_batch_size

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            chosen, kept = (torch.randint(len(one), (n,), generator=generator) for one in (surrogate, replay))
            called = torch.randint(len(concept_text), (n,), generator=generator)
            if self.concept_text == "prompts":
                called = chosen % len(concept_text)
            x0 = torch.cat([surrogate[chosen.to(surrogate.device)], replay[kept.to(replay.device)]])
            text = Conditioning.cat([concept_text[called], replay_text[kept % len(replay_text)]])
            x_t, t, wanted = noised(model.process, x0, generator=generator)
            forget, keep = squared_error(model.predict(x_t, t, text), wanted).chunk(2)
            penalty = ewc(weights)
            total = amnesia_loss(forget, keep, penalty, replay_weight=self.replay_weight, ewc_weight=self.ewc_weight)
            numbers = {"surrogate": forget.mean(), "replay": keep.mean(), "ewc": self.ewc_weight * penalty}
            return total, {name: number.detach() for name, number in numbers.items()}

        return loss


# --- pure functions -----------------------------------------------------------------------------------


def amnesia_loss(
    surrogate: Tensor, replay: Tensor, penalty: Tensor, *, replay_weight: float, ewc_weight: float
) -> Tensor:
    """The objective, from denoising errors of shape (n,) each and `ewc`."""
    return surrogate.mean() + replay_weight * replay.mean() + ewc_weight * penalty


def ewc(weights: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Σ F·(θ − θ*)² over triples (θ, θ*, F) of one shape each."""
    return torch.stack([(fisher * (now - before).square()).sum() for now, before, fisher in weights]).sum()


def trained_modules(denoiser: nn.Module, parameters: str, *, component: str) -> list[str]:
    """The names of the modules whose own weights are trained, in order."""
    named = sorted(name for name, module in denoiser.named_modules() if module._parameters)
    return named if parameters == "full" else [name for name in named if not NOXATTN[component].search(name)]


def fisher_times(model: Family, k: int, *, generator: torch.Generator) -> Tensor:
    """`k` of the `TIMES` times in their order, no two the same, evenly spaced round them from a random start."""
    start = int(torch.randint(TIMES, (1,), generator=generator))
    return model.process.times((positions(start, k) + 1) / TIMES)


def positions(start: int, k: int) -> Tensor:
    """⌊start + i·`TIMES`/k⌋ mod `TIMES` for i = 0 … k − 1, sorted: (k,), all different.

    Each i goes through every position once as `start` goes through all `TIMES`, so every position is in exactly k of
    the `TIMES` draws, whether k divides `TIMES` or not.
    """
    return ((start + torch.arange(k) * TIMES // k) % TIMES).sort().values


def summed_gradient(
    model: Family, weights: Sequence[Tensor], x0: Tensor, text: Conditioning, t: Tensor, eps: Tensor, *, rows: int
) -> list[Tensor]:
    """∂/∂w of the denoising errors (means over elements) of one image x0 (1, …), summed over the times `t` (k,).

    `eps` is (k, …); `rows` times go through the denoiser at once.
    """
    process = model.process
    sums = [torch.zeros_like(one, requires_grad=False) for one in weights]
    for start in range(0, len(t), rows):
        now, noise = t[start : start + rows], eps[start : start + rows]
        clean = x0.expand_as(noise)
        output = model.predict(process.noised(clean, noise, now), now, text.expand(len(now)))
        error = squared_error(output, process.target(clean, noise, now)).sum()
        for total, one in zip(sums, torch.autograd.grad(error, list(weights), allow_unused=True), strict=True):
            if one is not None:
                total += one
    return sums
