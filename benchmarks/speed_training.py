"""Training steps side by side: the authors' loop, that of diffusers' `diffusion_dpo` example, and ours.

The peers' loops are written anew from what their public code does each step, reduced to what takes time. All three
take the same draws from the same generator, so that their losses can be compared; the VAE's mean stands for its sample.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from duo.conditioning import Conditioning
from duo.losses import duo_loss, prior_loss, squared_error
from duo.methods.duo import Duo
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Sampling
from duo.training import attach_lora

SEED, BATCH, RANK = 3, 4, 32
SCOPE = ("self_attention",)
PARTS = ("draw", "text", "vae", "policy", "reference", "loss", "backward", "optimiser")
SHARED = ("policy", "reference", "backward", "optimiser")  # what no cache saves
BETA, PRIOR = 20.0, 100.0


@dataclass
class Clock:
    """Seconds by part, summed; a GPU is waited for, as the peers' loops are told numbers every step anyhow."""

    device: torch.device
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        wait_for(self.device)
        self.parts[part] += time.perf_counter() - start


@dataclass
class Stamped:
    """A `duo.plugins.Run` that keeps when each step was told, and its loss."""

    folder: Path
    seed: int = SEED
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = field(default_factory=Precision)
    sampling: Sampling = field(default_factory=Sampling)
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Stamped]:
        yield self

    def update(self, step: int, **numbers: float) -> None:
        pass

    def log(self, **numbers: Any) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(numbers.get("loss", 0.0))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What a peer's step does otherwise than the other's. `prior`: rows of pure noise beside the pairs; `at_once`: how
    many images the VAE is given; `texts`: how many rows the text encoder is given for a batch of pairs."""

    name: str
    prior: bool
    at_once: int
    texts: Callable[[int], int]
    shared_times: bool


# train/unlearn-sd.py: 3B prompts, all images at once, a time for each image.
AUTHORS = Loop(name="the authors' loop", prior=True, at_once=10**6, texts=lambda pairs: 3 * pairs, shared_times=False)
# train_diffusion_dpo.py: a caption a pair, repeated; 8 images at once for the VAE; one time for both images; no prior.
DIFFUSERS = Loop(
    name="diffusers' diffusion_dpo loop", prior=False, at_once=8, texts=lambda pairs: pairs, shared_times=True
)


def plain_text(model: Any, rows: int) -> Conditioning:
    """So many empty prompts sent through the text encoders, not from the family's cache."""
    return model._encode([""] * rows, {})


def peer_steps(
    model: Family, pairs: Pairs, loop: Loop, *, steps: int, batch: int = BATCH, clock: Clock | None = None
) -> tuple[float, list[float]]:
    """Seconds a step of a peer's loop, and the losses, on one process; the first step is not counted.

    Every step encodes prompts and images, runs the adapted denoiser, then the frozen one while the former's graph is
    held, clips, steps, and reads every number by itself.
    """
    clock = clock or Clock(model.device)
    layers = sorted(name for scope in SCOPE for name in model.layers(scope))
    generator, process, losses = torch.Generator().manual_seed(SEED), model.process, []
    high = 0.75 if loop.prior else 1.0
    with attach_lora(model.denoiser, layers, rank=RANK, alpha=float(RANK), seed=SEED) as lora:
        parameters = list(lora.parameters)
        optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
        start = time.perf_counter()
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
                clock.parts = dict.fromkeys(PARTS, 0.0)
            with clock("draw"):
                chosen = torch.randperm(len(pairs), generator=generator)[:batch]
                noise = torch.randn(batch, *model.latent_shape, generator=generator).to(model.device)
                drawn = batch if loop.shared_times else 2 * batch
                t = process.sample_t(drawn, low=0.0, high=high, generator=generator)
                t = t.repeat(2) if loop.shared_times else t
            with clock("text"), torch.no_grad():
                text = plain_text(model, loop.texts(batch))
                if not loop.prior:
                    text = Conditioning.cat([text, text])
            with clock("vae"), torch.no_grad():
                images = [side[i] for side in (pairs.unsafe, pairs.safe) for i in chosen.tolist()]
                cuts = range(0, len(images), loop.at_once)
                x0 = torch.cat([model.latents(images[i : i + loop.at_once], generator=None).float() for i in cuts])
            eps = noise.repeat(2, 1, 1, 1)
            x_t, times = process.noised(x0, eps, t), t
            if loop.prior:
                terminal, last = process.terminal(noise)
                x_t, times = torch.cat([x_t, terminal]), torch.cat([t, last])
            with clock("policy"):
                policy = model.predict(x_t, times, text)
            with clock("reference"), lora.disabled():
                reference = model.predict(x_t, times, text)
            with clock("loss"):
                loss, told = objective(policy, reference, process.target(x0, eps, t), prior=loop.prior)
            with clock("backward"):
                loss.backward()
            with clock("optimiser"):
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.item())
            _ = [one.item() for one in told]
        took = time.perf_counter() - start
    return took / steps, losses


def objective(policy: Tensor, reference: Tensor, target: Tensor, *, prior: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """DUO's loss, or where there is no `prior` that of Diffusion-DPO alone, and what is told beside it."""
    pairs = len(target)
    errors = [squared_error(one[:pairs], target).chunk(2) for one in (policy, reference)]
    preference = duo_loss(
        policy_unsafe=errors[0][0],
        policy_safe=errors[0][1],
        reference_unsafe=errors[1][0],
        reference_safe=errors[1][1],
        beta=BETA,
    )
    held = prior_loss(policy[pairs:], reference[pairs:]) if prior else torch.zeros_like(preference.loss)
    return preference.loss + PRIOR * held, (preference.margin, preference.accuracy, held)


def our_steps(
    model: Family, pairs: Pairs, *, steps: int, batch: int = BATCH, precision: Precision | None = None
) -> tuple[float, list[float]]:
    """The same of `Duo.erase`; neither what it prepares once nor the last step, which saves, is in the time."""
    method = Duo(
        beta=BETA,
        learning_rate=1e-4,
        prior_weight=PRIOR,
        max_train_steps=steps + 2,
        train_batch_size=batch,
        targets=SCOPE,
        checkpointing_steps=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Stamped(Path(folder), device=model.device, precision=precision or Precision())
        method.erase(model, None, pairs=pairs, run=run)
    return (run.times[steps] - run.times[0]) / steps, run.losses[: steps + 1]


def operations(model: Family, rows: int) -> float:
    """Of one step's two passes and the backward pass through the first, as torch counts them: FLOPs of the model.

    By the plain form of attention, for the CPU's own is not counted.
    """
    generator = torch.Generator().manual_seed(SEED)
    x_t = torch.randn(rows, *model.latent_shape, generator=generator).to(model.device)
    t = model.process.sample_t(rows, low=0.0, high=1.0, generator=generator)
    text = model.unconditional().expand(rows)
    layers = sorted(name for scope in SCOPE for name in model.layers(scope))
    counter = FlopCounterMode(display=False)
    with (
        attach_lora(model.denoiser, layers, rank=RANK, alpha=float(RANK), seed=SEED) as lora,
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):
        with lora.disabled():
            reference = model.predict(x_t, t, text)
        (model.predict(x_t, t, text) - reference).square().mean().backward()
    return float(counter.get_total_flops())


def matmul_peak(device: torch.device, dtype: torch.dtype, *, side: int | None = None, tries: int = 7) -> float:
    """FLOP/s of the fastest of a few products of square matrices: what this device and thread count can do."""
    side = side or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(tries):
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


@dataclass
class Steps:
    """The sides of one training case, and what their rounds found."""

    model: Family
    pairs: Pairs
    loop: Loop
    steps: int
    batch: int = BATCH
    precision: Precision | None = None
    parts: list[dict[str, float]] = field(default_factory=list)
    took: dict[str, list[float]] = field(default_factory=lambda: {"peer": [], "ours": []})
    losses: dict[str, list[float]] = field(default_factory=dict)

    def peer(self) -> float:
        clock = Clock(self.model.device)
        took, self.losses["peer"] = peer_steps(
            self.model, self.pairs, self.loop, steps=self.steps, batch=self.batch, clock=clock
        )
        self.parts.append({part: seconds / self.steps for part, seconds in clock.parts.items()})
        self.took["peer"].append(took)
        return took

    def ours(self) -> float:
        took, self.losses["ours"] = our_steps(
            self.model, self.pairs, steps=self.steps, batch=self.batch, precision=self.precision
        )
        self.took["ours"].append(took)
        return took

    def told(self) -> dict[str, Any]:
        """The peer's breakdown, what Amdahl's law allows where only its caches are added, and what was reached of it;
        utilisation is of the fastest product of matrices."""
        parts = {part: statistics.median(one[part] for one in self.parts) for part in PARTS}
        limit = sum(parts.values()) / sum(parts[part] for part in SHARED)
        medians = {side: statistics.median(times) for side, times in self.took.items()}
        rows = (3 if self.loop.prior else 2) * self.batch
        dtype = next(self.model.denoiser.parameters()).dtype
        peak, count = matmul_peak(self.model.device, dtype), operations(self.model, rows)
        found: dict[str, Any] = {
            "peer_seconds_by_part": parts,
            "amdahl_limit": limit,
            "reached_of_limit": medians["peer"] / medians["ours"] / limit,
            "gflop_a_step": count / 1e9,
            "matmul_peak_gflops": peak / 1e9,
            "peer_utilisation": count / medians["peer"] / peak,
        }
        if self.loop.prior:  # the other loop has another objective, with fewer rows
            pairs = zip(self.losses["ours"], self.losses["peer"], strict=True)
            found["largest_relative_difference_of_losses"] = max(abs(a - b) / abs(b) for a, b in pairs)
            found["utilisation"] = count / medians["ours"] / peak
        return found
