"""Fine-tuning a denoiser: what is trained, for the length of a context, and a loop that yields its steps.

Trained is a LoRA (Hu et al. 2022), `attach_lora`, or the denoiser's own weights, `tune_weights`; both are lent as
`parameters`, with a way back to the frozen reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import get_scheduler

from duo import parallel
from duo.checkpoint import load_training_state, read_tensors, save_training_state
from duo.errors import DivergedError, UserError
from duo.fields import at_default
from duo.plugins import Run
from duo.precision import adamw

ADAPTER = "default"
CHECKPOINTS_KEPT = 2


class Lora:
    """A LoRA that `attach_lora` has put into a denoiser. Parameters are float32 whatever the denoiser is."""

    def __init__(self, layers: Mapping[str, Any], *, rank: int, alpha: float) -> None:
        self.rank, self.alpha = rank, alpha
        self._layers = dict(layers)
        # A module of its own, so that a checkpoint holds the adapter and not the frozen denoiser.
        self.parameters = nn.ParameterList(
            part[ADAPTER].weight for layer in self._layers.values() for part in (layer.lora_A, layer.lora_B)
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the denoiser is the frozen reference, and nothing is recorded for gradients."""
        try:
            for layer in self._layers.values():
                layer.enable_adapters(False)
            with torch.no_grad():
                yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def tensors(self) -> dict[str, Tensor]:
        """Copies as `Delta` wants them, on the CPU: the scale alpha/rank multiplied into B."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            down, up = (part[ADAPTER].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
            found[f"{name}.lora_A.weight"] = down.clone()
            found[f"{name}.lora_B.weight"] = up * (self.alpha / self.rank)
        return found


@contextmanager
def attach_lora(
    denoiser: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    init: Literal["gaussian", "kaiming"] = "gaussian",
) -> Iterator[Lora]:
    """Put a peft LoRA on the modules named `targets`, and take it off again at the end.

    A is drawn by a generator of `seed` alone and B is zero, so that the model starts as the reference. `init` is A's:
    N(0, 1/rank²) ("gaussian" in peft), or uniform within ±1/√fan_in ("kaiming", torch's own of a layer).
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    devices = {parameter.device for parameter in denoiser.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices):  # peft draws from the global generators; what it draws is replaced below
        inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}
    try:
        if set(layers) != set(targets):
            raise ValueError(f"peft adapted other layers than asked for: {sorted(set(layers) ^ set(targets))}")
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():  # peft gives them the dtype of the layer, in which small steps would be lost
            layer.lora_A.float()
            layer.lora_B.float()
        for name in sorted(layers):
            down = layers[name].lora_A[ADAPTER].weight.data
            if init == "gaussian":
                drawn = torch.randn(down.shape, generator=generator) / rank
            else:
                drawn = (2 * torch.rand(down.shape, generator=generator) - 1) / math.sqrt(down[0].numel())
            down.copy_(drawn)
        yield Lora(layers, rank=rank, alpha=alpha)
    finally:
        for name, layer in layers.items():
            denoiser.set_submodule(name, layer.get_base_layer())
        del denoiser.peft_config


class Tuned:
    """Weights of a denoiser that `tune_weights` has made trainable, and what they were before."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._named = dict(parameters)
        self._frozen = {name: parameter.data for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        self.parameters = nn.ParameterList(parameters.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the denoiser is the frozen reference, and nothing is recorded for gradients.

        Leave it before `backward`, which reads the weights.
        """
        trained = {name: parameter.data for name, parameter in self._named.items()}
        self._put(self._frozen)
        try:
            with torch.no_grad():
                yield
        finally:
            self._put(trained)

    def differences(self) -> dict[str, Tensor]:
        """The change of each parameter, as a `Delta` of kind "weights" wants it, on the CPU."""
        return {f"{name}.diff": (p.data - self._frozen[name]).cpu() for name, p in self._named.items()}

    def restore(self) -> None:
        """Put back the very tensors from before, frozen."""
        self._put(self._frozen)
        for parameter in self._named.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.data = tensors[name]


@contextmanager
def tune_weights(denoiser: nn.Module, targets: Sequence[str]) -> Iterator[Tuned]:
    """Train the weights and biases of the modules named `targets` themselves; put back what was there at the end."""
    if not targets:
        raise ValueError("no modules to train")
    modules = dict(denoiser.named_modules())
    found = {f"{name}.{part}": one for name in targets for part, one in modules[name].named_parameters(recurse=False)}
    half = next((name for name, one in found.items() if one.dtype != torch.float32), None)
    if half is not None:
        raise UserError(
            f"{half} is {str(found[half].dtype).removeprefix('torch.')}, in which small steps are lost; set "
            "precision.weights to float32, and precision.dtype to compute in half precision"
        )
    tuned = Tuned(found)
    try:
        yield tuned
    finally:
        tuned.restore()


@dataclass(frozen=True, kw_only=True)
class Step:
    """Optimisation step `step` of `total`, from 1. `grad_norm` is before clipping; `numbers` are what the loss told."""

    step: int
    total: int
    loss: float
    grad_norm: float
    learning_rate: float
    numbers: Mapping[str, float] = field(default_factory=dict)


def fit(
    loss: Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]],
    parameters: nn.ParameterList,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
    seed: int,
    folder: Path,
    checkpointing_steps: int,
    record: Mapping[str, Any],
    lr_scheduler: str = "constant",
    lr_warmup_steps: int = 0,
    lr_num_cycles: int = 1,
    optimizer_8bit: bool = False,
    shared: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[Step]:
    """Minimise `loss` with AdamW (β 0.9 and 0.999) at a rate by one of transformers' schedules; yield each step taken.

    `loss` draws all its randomness from the CPU generator that it is given, and returns the scalar and further scalars
    to tell. Of several processes each draws the same and returns its share, so that the sum over them is the loss (and
    what is told) of the whole batch; gradients are summed before the step. A loss that is not `shared` is computed
    whole by each of them, and counts for its part. `lr_num_cycles` is for "cosine_with_restarts" alone.

    Every `checkpointing_steps`, and at the end, the state goes to `folder`, once the step was taken up by the caller,
    who may log it: no log lacks a step that a checkpoint has. The last two are kept and a run starts from the newest.
    `record` (JSON values) is kept with it: a run with another one is refused, a field that a checkpoint lacks being
    taken from `defaults`. A loss or gradient that is not finite stops the run before it touches the parameters, and
    parameters that are not finite before they are kept.
    """
    optimizer = adamw(parameters, learning_rate=learning_rate, weight_decay=weight_decay, eight_bit=optimizer_8bit)
    generator = torch.Generator().manual_seed(seed)
    start = _resume(folder, parameters, optimizer, generator, record, defaults or {})
    if start > steps:
        raise UserError(f"{folder} holds a checkpoint of step {start}, which is beyond step {steps}; name a new --out")
    # Only the factor is taken from there: as a function of the step it needs no state of its own in a checkpoint.
    schedule = get_scheduler(
        lr_scheduler,
        optimizer,
        num_warmup_steps=lr_warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs={"num_cycles": lr_num_cycles} if lr_scheduler == "cosine_with_restarts" else None,
    )
    (factor,) = schedule.lr_lambdas
    for step in range(start + 1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate = learning_rate * factor(step - 1)
        optimizer.zero_grad(set_to_none=True)
        value, told = loss(generator)
        if not shared:
            value, told = value / parallel.size(), {name: one / parallel.size() for name, one in told.items()}
        torch.autograd.backward(value)
        value, told = _whole(value.detach(), told, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        # All numbers come over in one transfer, the only wait for the device in a step.
        scalars = [value, norm, *told.values()]
        loss_value, grad_norm, *rest = torch.stack([scalar.float() for scalar in scalars]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            raise _diverged(folder, step, f"loss {loss_value}, gradient norm {grad_norm}", learning_rate)
        optimizer.step()
        keep = step % checkpointing_steps == 0 or step == steps
        if keep and not all(bool(parameter.isfinite().all()) for parameter in parameters):
            raise _diverged(folder, step + 1, "the parameters are not finite", learning_rate)
        yield Step(
            step=step,
            total=steps,
            loss=loss_value,
            grad_norm=grad_norm,
            learning_rate=rate,
            numbers=dict(zip(told, rest, strict=True)),
        )
        if keep and parallel.is_main():
            _save(folder, step, parameters, optimizer, generator, record)


def _diverged(folder: Path, step: int, found: str, learning_rate: float) -> DivergedError:
    """What to tell of a training that ended as step `step` began: it is from the parameters of the step before that
    a loss comes out not finite, so that the checkpoint of that one is not good."""
    kept = [path for path in _checkpoints(folder) if path < _checkpoint(folder, step - 1)]
    return DivergedError(
        f"step {step}: {found}; lower learning_rate (now {learning_rate:g}) in a new --out"
        f"{f'; the last good checkpoint is {kept[-1]}' if kept else ''}"
    )


def after_tuning(
    loss: Callable[[], Tensor],
    tuning: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter] | nn.ParameterList,
    *,
    steps: int,
    rate: float,
) -> Tensor:
    """What `loss` is once somebody has fine-tuned on `tuning`: a scalar whose gradient is that of `loss` there.

    The meta-learned resilience of ResAlign (Li et al. 2025) and Meta-Unlearning (Gao et al. 2025) to first order: how
    the tuned parameters depend on the ones before is left out, where ResAlign solves for it with Hessian-vector
    products. Of `steps` descents each moves every tensor by `rate` (root mean square), about what Adam does at that
    rate. Call it before the forward pass whose backward follows, for the parameters are changed and put back.
    """
    listed = list(parameters)
    before = [one.detach().clone() for one in listed]
    try:
        for _ in range(steps):
            slopes = torch.autograd.grad(tuning(), listed)
            for one, slope in zip(listed, slopes, strict=True):
                one.data -= rate * slope / slope.square().mean().sqrt().clamp(min=1e-12)
        value = loss()
        slopes = torch.autograd.grad(value, listed)
    finally:
        for one, was in zip(listed, before, strict=True):
            one.data.copy_(was)
    linear = torch.stack([(slope * one).sum() for one, slope in zip(listed, slopes, strict=True)]).sum()
    return value.detach() + linear - linear.detach()


def fixed_by(config: Mapping[str, Any], *free: str) -> dict[str, Any]:
    """What of a method's configuration a run must keep to go on from its checkpoint: not the fields `free`.

    Nor how often checkpoints are made; nor the number of steps at a constant rate, where a longer run begins as a
    shorter one does, so that either may go on from the other's.
    """
    constant = str(config.get("lr_scheduler", "constant")).startswith("constant")
    dropped = {"checkpointing_steps", *free, *(["max_train_steps"] if constant else [])}
    return {name: value for name, value in config.items() if name not in dropped}


def steps_of(
    settings: Any,
    loss: Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]],
    parameters: nn.ParameterList,
    *,
    run: Run,
    record: Mapping[str, Any],
    seed: int | None = None,
    folder: str = "checkpoints",
    shared: bool = False,
) -> Iterator[Step]:
    """`fit` with what a method's `settings` say under the names that diffusers' training scripts have.

    Those are `max_train_steps`, `learning_rate`, `weight_decay`, `max_grad_norm` (None: no clipping),
    `checkpointing_steps` and, where there are such fields, `lr_scheduler`, `lr_warmup_steps` and `lr_num_cycles`. The
    seed is the run's unless another is given, and checkpoints lie in the run's `folder`.
    """
    return fit(
        loss,
        parameters,
        steps=settings.max_train_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler=getattr(settings, "lr_scheduler", "constant"),
        lr_warmup_steps=getattr(settings, "lr_warmup_steps", 0),
        lr_num_cycles=getattr(settings, "lr_num_cycles", 1),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm or math.inf,
        optimizer_8bit=run.precision.optimizer_8bit,
        seed=run.seed if seed is None else seed,
        folder=run.folder / folder,
        checkpointing_steps=settings.checkpointing_steps,
        record=record,
        defaults=at_default(settings) if is_dataclass(settings) else None,
        shared=shared,
    )


def follow(steps: Iterator[Step], *, run: Run, total: int, label: str) -> None:
    """Take all the steps; show each on a bar of `run`, and log it."""
    with run.progress(total, label) as bar:
        for step in steps:
            bar.update(step.step, loss=step.loss, **step.numbers)
            run.log(
                step=step.step,
                loss=step.loss,
                grad_norm=step.grad_norm,
                learning_rate=step.learning_rate,
                **step.numbers,
            )


def _whole(
    value: Tensor, told: Mapping[str, Tensor], parameters: nn.ParameterList
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Loss, numbers and gradients of the whole batch, from the shares of all processes."""
    if parallel.size() == 1:
        return value, told
    scalars = [value, *(one.detach() for one in told.values())]
    parallel.add_up([*(p.grad for p in parameters if p.grad is not None), *scalars])
    return scalars[0], dict(zip(told, scalars[1:], strict=True))


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}.safetensors"


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first: the names hold the step with leading zeros."""
    return sorted(folder.glob("checkpoint-*.safetensors"))


def _forget_old(folder: Path) -> None:
    for old in _checkpoints(folder)[:-CHECKPOINTS_KEPT]:
        old.unlink()


def _save(
    folder: Path,
    step: int,
    parameters: nn.ParameterList,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    record: Mapping[str, Any],
) -> None:
    save_training_state(
        _checkpoint(folder, step),
        step=step,
        modules={"adapter": parameters},
        optimizer=optimizer,
        generator=generator,
        record={"run": record},
    )
    _forget_old(folder)


def _resume(
    folder: Path,
    parameters: nn.ParameterList,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    record: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> int:
    """Load the newest checkpoint, if there is one, and return its step."""
    found = _checkpoints(folder)
    if not found:
        return 0
    newest, todo = found[-1], "delete it to go on from the one before, or from the start"
    kept = read_tensors(newest, todo=todo)[1].get("run")
    before = kept if isinstance(kept, dict) else {}
    if before:  # a checkpoint from before there were such fields lacks them
        before = {name: value for name, value in defaults.items() if name in record} | before
    if changed := sorted(key for key in {*before, *record} if before.get(key) != record.get(key)):
        raise UserError(f"{newest} was made with another {', '.join(changed)}; name a new --out or undo the change")
    try:
        step, _ = load_training_state(newest, modules={"adapter": parameters}, optimizer=optimizer, generator=generator)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{newest} cannot be resumed from ({error}); {todo}") from error
    if parallel.is_main():
        _forget_old(folder)  # a kill may have come between the newest and that
    return step
