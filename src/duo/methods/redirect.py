"""Redirection to safe twins (ours): at the unsafe image, predict what the frozen model predicts at its safe twin.

DUO's preference (`duo.methods.duo`) says what to be worse at, and leaves open what comes instead. Here the pair itself
says where to go. With one noise and one time for both images of a pair, x̂0 the clean image that a prediction implies,
θ the trained model and φ the frozen one,

    L = w_r·‖x̂0_θ(x_t⁻, c⁻) − x̂0_φ(x_t⁺, c⁺)‖² + w_k·‖x̂0_θ(x_t⁺, c⁺) − x̂0_φ(x_t⁺, c⁺)‖²
        + w_u·‖x̂0_θ(u_t, c) − x̂0_φ(u_t, c)‖²

So the frozen model teaches the identity everywhere (safe twins, and images u of harmless prompts that it draws itself)
but at unsafe images, where it teaches the step that it would take from the safe twin. At high noise, where twins cannot
be told apart, that is the identity too, and nothing drifts. Prompts are the pair's own (unsafe to the left of a safe
teacher) in a share `prompted` of the rows, and what guidance starts from in the others: the first closes the way by
words, the second those by images and learned words, which no list of prompts has. A share `crossed` of the prompted
rows has the prompt of the pair's other side, with the same teacher. For once the first steps of a sampler have left the
concept, the image is a safe one and the prompt still the unsafe one, which neither the first nor the second term has
seen; nor has it an unsafe image that somebody brings with a harmless prompt. And a share `named` of u's prompted rows
has a word of the concept beside the prompt, with the same teacher, as Concept Ablation has it: that closes the way by
words for what u shows, where pairs do it for their own subjects. `sampled` rows a step lie where the trained model's
own sampler passes when it is asked for the concept, by a pair's unsafe prompt; there the frozen model teaches by the
safe one.

What the study of objectives (docs/beyond.md) compares it with are fields of it: `towards = "twin"` has the safe twin
itself in the teacher's place; `preference` adds DUO's term with DPO-Positive's penalty, or its IPO or KTO form;
`prior_weight` adds DUO's hold on pure noise; `train = "weights"` trains the layers themselves.

With a `resilience_weight` the first term is also taken where somebody else's fine-tuning would lead in a few steps, on
unsafe images or on harmless ones, as chance has it (`duo.training.after_tuning`: ResAlign, Li et al. 2025, and
Meta-Unlearning, Gao et al. 2025, to first order). Only what is trained here is tuned then; others may tune all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from duo import parallel
from duo.conditioning import Conditioning, encoded
from duo.delta import Delta, made_by
from duo.drawn import draw, encode
from duo.errors import UserError
from duo.fields import check_above_0, check_choices, check_from_0
from duo.losses import Preference, duo_loss, ipo_loss, kto_loss, prior_loss, squared_error
from duo.pairs import SIDES, Pairs
from duo.plugins import Family, Precision, Run
from duo.precision import check_8bit, check_tunable, sharded, waiting
from duo.sampling import check_steps, grid, partly_sampled
from duo.training import Lora, Tuned, after_tuning, attach_lora, fixed_by, follow, steps_of, tune_weights

CHOICES = {
    "towards": ("teacher", "twin"),
    "weighting": ("min_snr", "clean", "output"),
    "preference": ("none", "dpo", "ipo", "kto"),
    "train": ("lora", "weights"),
    "lr_scheduler": ("constant", "constant_with_warmup", "linear", "cosine"),
}
FORMS: dict[str, Callable[..., Preference]] = {"dpo": duo_loss, "ipo": ipo_loss, "kto": kto_loss}


@dataclass(frozen=True, kw_only=True)
class Redirect:
    """Redirection in its plain form, with which the study began; the recipe toybox-fire has what it chose.
    No model but the embedded one has been tried.

    `weighting` is that of the squared errors over time: "clean" of the implied clean images, "output" of what the
    denoiser puts out, and "min_snr" of the smaller of both (Min-SNR with γ = 1; Hang et al. 2023), which neither blows
    up at high noise nor has almost all its weight at low noise. `train_batch_size` counts pairs a step, and as many
    unrelated images; `unrelated_images` are drawn for it, every other one of a prompt of `held_prompts` where there are
    any: those of what resembles the concept and must survive. `beta` and `positive_penalty` are of the `preference`.
    The other fields are as DUO's.
    """

    takes_pairs: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    strength: ClassVar[str] = "learning_rate"

    redirect_weight: float = 1.0
    keep_weight: float = 1.0
    unrelated_weight: float = 1.0
    unrelated_images: int = 64
    held_prompts: tuple[str, ...] = ()
    prompted: float = 0.5
    crossed: float = 0.0
    named: float = 0.0
    sampled: int = 0  # rows a step
    sampled_weight: float = 1.0
    sampling_steps: int = 10
    towards: Literal["teacher", "twin"] = "teacher"
    weighting: Literal["min_snr", "clean", "output"] = "min_snr"
    timestep_range: tuple[float, float] = (0.0, 1.0)
    preference: Literal["none", "dpo", "ipo", "kto"] = "none"
    preference_weight: float = 1.0
    beta: float = 20.0
    positive_penalty: float = 0.0
    prior_weight: float = 0.0
    resilience_weight: float = 0.0
    resilience_steps: int = 2
    resilience_rate: float = 2e-4
    train: Literal["lora", "weights"] = "lora"
    targets: tuple[str, ...] = ("self_attention", "feed_forward", "convolutions")
    rank: int = 16
    lora_alpha: float | None = None
    learning_rate: float = 5e-4
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    lr_warmup_steps: int = 5
    max_train_steps: int = 100
    train_batch_size: int = 16
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    checkpointing_steps: int = 20

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        counts = (
            "rank",
            "unrelated_images",
            "resilience_steps",
            "max_train_steps",
            "train_batch_size",
            "sampling_steps",
        )
        check_above_0(self, "beta", "learning_rate", "max_grad_norm", "resilience_rate", *counts, "checkpointing_steps")
        weights = ("redirect_weight", "keep_weight", "unrelated_weight", "preference_weight", "prior_weight")
        others = (
            "resilience_weight",
            "positive_penalty",
            "weight_decay",
            "lr_warmup_steps",
            "sampled",
            "sampled_weight",
        )
        check_from_0(self, *weights, *others)
        shares = {"prompted": "the rows", "crossed": "the prompted rows", "named": "the unrelated prompted rows"}
        for name, of in shares.items():
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share of {of}, 0 to 1")
        for name in ("crossed", "named"):
            if getattr(self, name) and not self.prompted:
                raise ValueError(f"{name} is a share of prompted rows, but prompted is 0; set {name} to 0 too")
        if self.sampled and not self.sampled_weight:
            raise ValueError("sampled_weight is 0, so sampled rows would teach nothing; give it, or set sampled to 0")
        if self.positive_penalty and self.preference != "dpo":
            raise ValueError(f"positive_penalty is for the preference 'dpo', not {self.preference!r}; set it to 0")
        if self.crossed and self.preference != "none":
            raise ValueError("crossed is for a teacher, and a preference compares errors at one prompt; give either")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}, expected a number above 0, or none for the rank")
        low, high = self.timestep_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"timestep_range is {self.timestep_range}, expected two fractions, 0 ≤ low < high ≤ 1")
        if not all(prompt.strip() for prompt in self.held_prompts):
            raise ValueError("held_prompts has an empty prompt; take it out")
        if self.named and not self.unrelated_weight:
            raise ValueError("named is of unrelated images, but unrelated_weight is 0; give it, or leave named out")
        if self.held_prompts and not self.drawn:
            raise ValueError(
                "held_prompts are of unrelated images, but unrelated_weight is 0; give it, or leave them out"
            )
        if len(self.held_prompts) > self.drawn // 2:
            raise ValueError(
                f"held_prompts has {len(self.held_prompts)} prompts, but only {self.drawn // 2} of the "
                f"{self.drawn} unrelated images are of them; raise unrelated_images to {2 * len(self.held_prompts)}"
            )
        if not self.targets:
            raise ValueError("targets is empty, expected at least one scope, such as 'self_attention'")
        if not self.redirect_weight and (self.preference == "none" or not self.preference_weight):
            raise ValueError(
                "redirect_weight is 0, and no preference has a weight, so nothing would be erased; give either"
            )
        if self.resilience_weight and not self.redirect_weight:
            raise ValueError("resilience_weight is for what redirect_weight asks for; give that too, or neither")

    @property
    def drawn(self) -> int:
        """How many unrelated images are drawn."""
        return self.unrelated_images if self.unrelated_weight or self.resilience_weight else 0

    def unrelated_prompts(self, harmless: Sequence[str]) -> list[str]:
        """The prompt of each unrelated image: the concept's `harmless` ones, and those that are held, in turn."""
        turns = (harmless, self.held_prompts) if self.held_prompts else (harmless,)
        each = ((turns[i % len(turns)], i // len(turns)) for i in range(self.drawn))
        return [prompts[i % len(prompts)] for prompts, i in each]

    def passes(self, pairs: int) -> dict[str, int]:
        """What training on so many pairs sends through the networks, in rows (for `duo run --dry-run`)."""
        rows = self.train_batch_size * self.max_train_steps
        beside = sum(bool(weight) for weight in (self.unrelated_weight, self.prior_weight))
        tuned = self.resilience_steps + 1 if self.resilience_weight else 0
        trained, frozen = (2 + beside + tuned) * rows, (1 + (self.preference != "none") + beside) * rows
        passed = self.sampled * self.max_train_steps
        trained += passed
        frozen += passed + (self.sampling_steps - 1) * passed  # half of the steps on average, with guidance
        return {
            "images": self.drawn,
            "vae": 2 * pairs + 2 * self.drawn,
            "denoiser": trained + frozen,
            "trained": trained,
            "steps": self.max_train_steps,
        }

    def check(self, model: Family, *, pairs: int | None, precision: Precision) -> None:
        """Raise `UserError` for what does not fit the model, the number of pairs (None: not known) or this machine."""
        if pairs is not None and self.train_batch_size > pairs:
            raise UserError(f"train_batch_size = {self.train_batch_size} but there are only {pairs} pairs")
        for batch in (self.train_batch_size, *([self.sampled] if self.sampled else [])):
            parallel.share(batch)
        if self.sampled:
            check_steps(model, self.sampling_steps)
        if self.prior_weight and precision.dtype != "float32":
            raise UserError(
                f"prior_weight is {self.prior_weight:g} and precision.dtype {precision.dtype!r}, where it would drown "
                "in rounding; set prior_weight to 0, or precision.dtype to float32"
            )
        if self.train == "weights":
            check_tunable(precision)
        if precision.optimizer_8bit:
            check_8bit()
        for scope in self.targets:
            if not model.layers(scope):
                raise UserError(f"targets: the denoiser of model {model.name!r} has no layers of scope {scope!r}")
        low, high = self.timestep_range
        model.process.sample_t(1, low=low, high=high, generator=torch.Generator())  # raises where no step lies there
        if not torch.isfinite(model.process.x0_scale(model.process.times(torch.tensor([high])))).all():
            raise UserError(
                f"timestep_range ends at {high:g}, where the noise of model {model.name!r} holds no signal (a zero "
                "terminal SNR) and a prediction of epsilon implies no clean image; lower its end"
            )

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Draw the unrelated images, and train on them and `pairs`."""
        assert pairs is not None
        self.check(model, pairs=len(pairs), precision=run.precision)
        scenes = _Scenes.of(self, model, concept, pairs=pairs, run=run)
        layers = sorted({name for scope in self.targets for name in model.layers(scope)})
        made = made_by("redirect", self, model=model, run=run)
        record = {**fixed_by(made["config"]), "pairs": pairs.digest(), "model": model.name, "seed": run.seed}
        with (
            waiting(model.encoders(), device=model.device, offload=run.precision.offload),
            sharded(model, shard=run.precision.shard),
            self._trained(model, layers, seed=run.seed) as trained,
        ):
            loss = self._objective(model, trained, scenes, guidance=run.sampling.guidance_scale)
            steps = steps_of(self, loss, trained.parameters, run=run, record=record, shared=True)
            follow(steps, run=run, total=self.max_train_steps, label="redirect")
            if isinstance(trained, Tuned):
                return Delta(kind="weights", component=model.component, tensors=trained.differences(), record=made)
            return Delta(
                kind="lora",
                component=model.component,
                tensors=trained.tensors(),
                record={**made, "lora": {"rank": trained.rank, "alpha": trained.alpha, "target_modules": layers}},
            )

    @contextmanager
    def _trained(self, model: Family, layers: list[str], *, seed: int) -> Iterator[Lora | Tuned]:
        if self.train == "weights":
            with tune_weights(model.denoiser, layers) as tuned:
                yield tuned
        else:
            alpha = float(self.rank if self.lora_alpha is None else self.lora_alpha)
            with attach_lora(model.denoiser, layers, rank=self.rank, alpha=alpha, seed=seed) as lora:
                yield lora

    def _objective(
        self, model: Family, trained: Lora | Tuned, scenes: _Scenes, *, guidance: float
    ) -> Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]:
        """This process's share of the loss of one random batch; all processes draw the same, and each its rows."""
        n, process = self.train_batch_size, model.process
        own = parallel.share(n)
        low, high = self.timestep_range

        def drawn(among: int, generator: torch.Generator, rows: slice = own) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Rows of one kind of image: which, noise, times, and whether they have their prompts."""
            chosen = torch.randperm(among, generator=generator)[torch.arange(n) % among]
            noise = torch.randn(n, *scenes.unsafe.shape[1:], generator=generator)
            t = process.sample_t(n, low=low, high=high, generator=generator)
            prompted = torch.rand(n, generator=generator) < self.prompted
            device = scenes.unsafe.device
            return tuple(one[rows].to(device) for one in (chosen, noise, t, prompted))  # type: ignore[return-value]

        def share(of: float, generator: torch.Generator) -> Tensor | None:
            """Which of this process's rows are among a share of all; None, and nothing drawn, for none."""
            return torch.rand(n, generator=generator)[own].to(scenes.unsafe.device) < of if of else None

        def tuning(kind: str, generator: torch.Generator) -> Tensor:
            """What fine-tuning on images of a kind minimises: on all rows, so that all processes are led alike."""
            latents = scenes.unsafe if kind == "unsafe" else scenes.unrelated
            chosen, noise, t, prompted = drawn(len(latents), generator, slice(None))
            x0 = latents[chosen]
            output = model.predict(process.noised(x0, noise, t), t, scenes.text(kind, chosen, prompted))
            return squared_error(output, process.target(x0, noise, t)).mean()

        def passed(generator: torch.Generator) -> tuple[Tensor, Tensor, Conditioning, Conditioning]:
            """Where the trained model's own sampler passes when it is asked for the concept: x_t, t, and both prompts.

            All rows are at one step of the sampler, which they are led to from noise of their own.
            """
            stop = int(torch.randint(self.sampling_steps, (), generator=generator))
            chosen = torch.randint(len(scenes.unsafe), (self.sampled,), generator=generator)
            eps = torch.randn(self.sampled, *scenes.unsafe.shape[1:], generator=generator)
            rows = parallel.share(self.sampled)
            chosen, eps = (one[rows].to(scenes.unsafe.device) for one in (chosen, eps))
            always = torch.ones_like(chosen, dtype=torch.bool)
            unsafe, safe = (scenes.text(side, chosen, always) for side in SIDES)
            x_t = partly_sampled(
                model,
                eps,
                unsafe,
                scenes.empty.expand(len(eps)),
                steps=self.sampling_steps,
                stop=stop,
                guidance_scale=guidance,
            )
            return x_t, grid(model, self.sampling_steps)[stop].expand(len(eps)), unsafe, safe

        def loss(generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
            chosen, noise, t, prompted = drawn(len(scenes.unsafe), generator)
            x0 = {"unsafe": scenes.unsafe[chosen], "safe": scenes.safe[chosen]}
            noised = {side: (process.noised(one, noise, t), t) for side, one in x0.items()}
            taught = {side: (*noised[side], scenes.text(side, chosen, prompted)) for side in SIDES}
            swapped = share(self.crossed, generator)
            rows = {
                side: (*noised[side], scenes.text(side, chosen, prompted, instead=twin, where=swapped))
                for side, twin in (SIDES, SIDES[::-1])
            }
            if self.unrelated_weight:
                other, other_noise, other_t, asked = drawn(len(scenes.unrelated), generator)
                x_t, said = process.noised(scenes.unrelated[other], other_noise, other_t), share(self.named, generator)
                taught["unrelated"] = x_t, other_t, scenes.text("unrelated", other, asked)
                rows["unrelated"] = (
                    x_t,
                    other_t,
                    scenes.text("unrelated", other, asked, instead="named", where=said),
                )
            if self.prior_weight:
                taught["prior"] = rows["prior"] = (*process.terminal(noise), scenes.empty.expand(len(t)))
            if self.sampled:
                x_t, at, unsafe_text, safe_text = passed(generator)
                rows["sampled"], taught["sampled"] = (x_t, at, unsafe_text), (x_t, at, safe_text)
            if self.preference == "none":
                del taught["unsafe"]
            with trained.disabled():
                teacher = _predicted(model, taught)
            of_clean = process.x0_scale(t)
            scale = self._scale(of_clean)
            twin = process.implied(rows["safe"][0], teacher["safe"], t)[0]
            wanted = x0["safe"] if self.towards == "twin" else twin

            def redirected(output: Tensor) -> Tensor:
                reached = process.implied(rows["unsafe"][0], output, t)[0]
                return squared_error(reached, wanted, scale=scale / of_clean).mean()

            terms: dict[str, tuple[float, Tensor]] = {}  # with their weights
            if self.resilience_weight:
                kind = ("unsafe", "unrelated")[int(torch.randint(2, (), generator=generator))]
                terms["resilience"] = (
                    self.resilience_weight,
                    after_tuning(
                        lambda: redirected(model.predict(*rows["unsafe"])),
                        lambda: tuning(kind, generator),
                        trained.parameters,
                        steps=self.resilience_steps,
                        rate=self.resilience_rate,
                    ),
                )
            student = _predicted(model, rows)
            if self.redirect_weight:
                terms["redirect"] = self.redirect_weight, redirected(student["unsafe"])
            if self.keep_weight:
                terms["kept"] = self.keep_weight, squared_error(student["safe"], teacher["safe"], scale=scale).mean()
            if self.unrelated_weight:
                scale = self._scale(process.x0_scale(rows["unrelated"][1]))
                error = squared_error(student["unrelated"], teacher["unrelated"], scale=scale)
                terms["unrelated"] = self.unrelated_weight, error.mean()
            if self.sampled:
                scale = self._scale(process.x0_scale(rows["sampled"][1]))
                error = squared_error(student["sampled"], teacher["sampled"], scale=scale)
                # Of several processes, whose terms are weighted by their share of the pairs below.
                terms["sampled"] = self.sampled_weight, error.sum() / self.sampled * (n / len(t))
            told = {}
            if self.preference != "none":
                targets = {side: process.target(one, noise, t) for side, one in x0.items()}
                errors = {
                    f"{who}_{side}": squared_error(output[side], target)
                    for who, output in (("policy", student), ("reference", teacher))
                    for side, target in targets.items()
                }
                preference = self._preference(errors)
                terms["preference"] = self.preference_weight, preference.loss
                told["accuracy"] = preference.accuracy
            if self.prior_weight:
                terms["prior"] = self.prior_weight, prior_loss(student["prior"], teacher["prior"])
            total = torch.stack([weight * value for weight, value in terms.values()]).sum()
            told |= {name: value.detach() for name, (_, value) in terms.items()}
            return total * (len(t) / n), {name: number * (len(t) / n) for name, number in told.items()}

        return loss

    def _scale(self, of_clean: Tensor) -> Tensor:
        """What errors of the output are multiplied by, (n,), from how large they are in the clean image."""
        if self.weighting == "clean":
            return of_clean
        return torch.ones_like(of_clean) if self.weighting == "output" else of_clean.clamp(max=1.0)

    def _preference(self, errors: Mapping[str, Tensor]) -> Preference:
        """Of errors (n,) by whose and which they are."""
        penalty = {"positive_penalty": self.positive_penalty} if self.preference == "dpo" else {}
        return FORMS[self.preference](**errors, beta=self.beta, **penalty)


def _predicted(model: Family, rows: Mapping[str, tuple[Tensor, Tensor, Conditioning]]) -> dict[str, Tensor]:
    """The denoiser's outputs for groups of rows (noised latents, times, texts), in one pass."""
    x_t, t, texts = zip(*rows.values(), strict=True)
    whole = model.predict(torch.cat(x_t), torch.cat(t), Conditioning.cat(texts))
    return dict(zip(rows, torch.split(whole, [len(one) for one in x_t]), strict=True))


def named(prompts: Sequence[str], words: Sequence[str]) -> list[str]:
    """Prompts with a word of the concept, every word in turn before them, and then behind them."""
    each = ((prompt, words[i % len(words)], i // len(words) % 2) for i, prompt in enumerate(prompts))
    return [f"{prompt} {word}" if behind else f"{word} {prompt}" for prompt, word, behind in each]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scenes:
    """What is trained on: latents (images, channels, height, width), and each image's prompt, encoded.

    Row 0 of `texts` is what guidance starts from; `places` has for each kind of image the row of each one's prompt.
    """

    unsafe: Tensor
    safe: Tensor
    unrelated: Tensor
    texts: Conditioning
    places: Mapping[str, Tensor]

    @property
    def empty(self) -> Conditioning:
        return self.texts[:1]

    def text(
        self, kind: str, chosen: Tensor, prompted: Tensor, *, instead: str = "", where: Tensor | None = None
    ) -> Conditioning:
        """Of images, (n,), their prompts where `prompted`, (n,), says so; `where` says, those of kind `instead`."""
        rows = self.places[kind][chosen]
        if where is not None:
            rows = torch.where(where, self.places[instead][chosen], rows)
        return self.texts[torch.where(prompted, rows, 0)]

    @classmethod
    def of(cls, method: Redirect, model: Family, concept: Any, *, pairs: Pairs, run: Run) -> _Scenes:
        """Encode the pairs, and draw and encode the unrelated images."""
        prompts = {side: ["" for _ in pairs.names] for side in SIDES}
        asking = next((name for name in ("prompted", "sampled") if getattr(method, name)), None)
        if asking:
            prompts = {side: [str(row.get(f"{side}_prompt") or "") for row in pairs.rows] for side in SIDES}
            if not pairs.rows or not all(all(own) for own in prompts.values()):
                raise UserError(
                    f"{asking} is {getattr(method, asking):g}, but not every pair says what it was drawn from "
                    f"(unsafe_prompt and safe_prompt in pairs.jsonl or the CSV); add them, or set {asking} to 0"
                )
        with torch.no_grad():
            unsafe, safe = (encode(model, side) for side in (pairs.unsafe, pairs.safe))
            unrelated = unsafe[:0]
            prompts["unrelated"] = method.unrelated_prompts(concept.harmless)
            if method.named:
                prompts["named"] = named(prompts["unrelated"], concept.words)
            if method.drawn:
                images = draw(model, prompts["unrelated"], n=method.drawn, run=run, name="unrelated")
                unrelated = encode(model, images)
            rows = {text: i + 1 for i, text in enumerate(dict.fromkeys(chain.from_iterable(prompts.values())))}
            texts = Conditioning.cat([model.unconditional(), encoded(model, list(rows))])
        places = {
            kind: torch.tensor([rows[text] for text in own], dtype=torch.long, device=unsafe.device)
            for kind, own in prompts.items()
        }
        return cls(unsafe=unsafe, safe=safe, unrelated=unrelated, texts=texts, places=places)
