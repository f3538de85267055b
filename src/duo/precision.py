"""Memory and rounding of a denoiser: autocast with a way out, networks that wait elsewhere, shares, 8-bit moments.

The prior term of DUO is λ·‖f_θ(x_T) − f_φ(x_T)‖² with λ up to 5e6: the difference of two outputs of size about 1 that
were rounded has a mean square of about eps²/24 even where they are the same function, so λ times that is a floor which
no training lowers: 0.2 in float16, 13 in bfloat16, beside a preference term that starts at log 2. Hence `unrounded`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from duo import parallel
from duo.errors import UserError
from duo.plugins import Family, Precision

LARGEST_FLOOR = 0.05  # of the prior term, beside log 2 ≈ 0.69


class _Autocast:
    """A module's `forward` under autocast; its output, a tensor or a tuple that begins with one, is float32."""

    def __init__(self, forward: Callable[..., Any], *, device: str, dtype: torch.dtype) -> None:
        self.plain, self._device, self._dtype = forward, device, dtype
        self.enabled = True

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(self._device, dtype=self._dtype) if self.enabled else nullcontext():
            output = self.plain(*arguments, **named)
        if isinstance(output, tuple):
            return (output[0].float(), *output[1:])
        return output.float() if isinstance(output, Tensor) else output


def prepare_denoiser(model: Family, precision: Precision) -> None:
    """Make the model's denoiser compute as `precision` says. Nothing is changed where it says nothing."""
    denoiser: Any = model.denoiser
    if precision.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    forward = denoiser.forward
    if isinstance(forward, _Autocast):  # of an earlier session with the same model
        forward = denoiser.forward = forward.plain
    if precision.dtype != "float32" and precision.weights == "float32":
        denoiser.forward = _Autocast(forward, device=model.device.type, dtype=getattr(torch, precision.dtype))
    if precision.torch_compile:
        denoiser.compile()


def rounds(denoiser: nn.Module) -> bool:
    """Whether the denoiser computes under autocast, so that the prior term needs a pass of its own."""
    return isinstance(denoiser.forward, _Autocast)


@contextmanager
def unrounded(denoiser: nn.Module) -> Iterator[None]:
    """Within the context a denoiser under autocast computes in its weights' own dtype."""
    cast: Any = denoiser.forward
    if not isinstance(cast, _Autocast):
        yield
        return
    cast.enabled = False
    try:
        yield
    finally:
        cast.enabled = True


def check_prior(prior_weight: float, precision: Precision, *, scale: float = 1.0) -> None:
    """Raise `UserError` where the rounding of frozen weights in half precision would drown the preference term.

    `scale` is what the prior's differences are multiplied by before they are squared, as in `duo.losses.prior_loss`.
    """
    eps = torch.finfo(getattr(torch, precision.weights)).eps
    floor = prior_weight * scale**2 * eps**2 / 24
    if floor > LARGEST_FLOOR:
        acts = "" if scale == 1 else f", which precondition_outputs makes {prior_weight * scale**2:.2g}"
        raise UserError(
            f"precision.weights is {precision.weights!r}, whose rounding alone makes the prior term about {floor:.2g} "
            f"at prior_weight {prior_weight:g}{acts}; keep weights float32 and set precision.dtype, or lower "
            "prior_weight"
        )


@contextmanager
def waiting(modules: Iterable[nn.Module], *, device: torch.device, offload: bool) -> Iterator[None]:
    """Within the context `modules` lie on the CPU, where `offload` says so; afterwards on `device` again."""
    moved = list(modules) if offload else []
    try:
        for module in moved:
            module.to("cpu")
        if moved and device.type == "cuda":
            torch.cuda.empty_cache()
        yield
    finally:
        for module in moved:
            module.to(device)


@contextmanager
def sharded(model: Family, *, shard: bool) -> Iterator[None]:
    """Within the context each of several processes holds a part of the frozen denoiser, where `shard` says so.

    That is FSDP (Zhao et al. 2023): the weights of a block are gathered for its passes alone, so every process has to
    send as many batches through the denoiser as the others. An adapter that is put on within the context is whole
    everywhere. FSDP cannot be taken off, so it is put on a copy of the modules, which is `model.denoiser` for as long.

    At the end the denoiser has its weights back, the same bytes. After an error, which stops all processes, it stays
    empty: there is nobody to gather them from.
    """
    if not shard or parallel.size() == 1:
        yield
        return
    whole = model.denoiser
    with parallel.exchanging():
        model.denoiser = shares = _shares(whole, model.device)
        try:
            yield
        finally:
            model.denoiser = whole
        for parameter, share in zip(whole.parameters(), shares.parameters(), strict=True):
            held: Any = share
            parameter.data = held.full_tensor()
            held.to_local().untyped_storage().resize_(0)  # lest shares and whole weights lie there together


def _shares(denoiser: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the modules that holds this process's part of their weights on `device`; `denoiser` is left empty."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks: Any = getattr(denoiser, "_no_split_modules", None)  # the classes that diffusers says are gathered as one
    if not blocks:
        raise UserError(f"precision.shard: a {type(denoiser).__name__} does not tell its blocks; set it to false")
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    copied = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    mesh = init_device_mesh(device.type, (parallel.size(),))
    parts = {name: part for name, part in copied.named_modules() if not name or type(part).__name__ in blocks}
    for name in reversed(parts):  # from the innermost to the whole, which takes what is left
        fully_shard(parts[name], mesh=mesh, reshard_after_forward=True)
        for parameter in denoiser.get_submodule(name).parameters():
            parameter.data = parameter.new_empty(0)
    return copied


def adamw(parameters: nn.ParameterList, *, learning_rate: float, weight_decay: float, eight_bit: bool) -> Any:
    """AdamW with β 0.9 and 0.999: torch's, or that of bitsandbytes with moments of 8 bits (Dettmers et al. 2022)."""
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    check_8bit()
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)


def check_tunable(precision: Precision) -> None:
    """Raise `UserError` where a method that trains the denoiser's own weights cannot do so."""
    if precision.weights != "float32":
        raise UserError(
            f"precision.weights is {precision.weights!r}, in which small steps are lost; set it to float32, for this "
            "method trains the weights themselves, and precision.dtype to compute in half precision"
        )
    if precision.optimizer_8bit:
        check_8bit()


def check_8bit() -> None:
    """Raise `UserError` where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "precision.optimizer_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or set it "
            "to false"
        )
