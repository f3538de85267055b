"""Unloading: drop the adapter that an erasure is, as anyone who downloaded the model can (diffusers' `unload_lora`).

It needs no search and has no paper. An erasure that is published as a LoRA, or acts by hooks beside the weights, fails
it by definition: what is left is the original model. One that was merged has nothing to drop, and is rendered as it is.

`published = "adapter"` asks for that. `published = "merged"` tests the claim instead of believing it: the denoiser of
the model under attack is looked through for what can be taken off, and where something is found, it is.

How it is rendered: an attempt with `unloaded` by the model from before the erasure where the erasure is an adapter (a
delta of kind "lora" or "gated"), and otherwise by the model under attack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from duo.fields import check_choices
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    from duo.target import Target

CHOICES = {"published": ("adapter", "merged")}


@dataclass(frozen=True, kw_only=True)
class Unload:
    """Take off whatever of the erasure is not in the weights. `published` is the form in which others get it."""

    access: ClassVar[Access] = Access.WEIGHTS
    queries: ClassVar[int] = 0

    published: Literal["adapter", "merged"] = "adapter"

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """How many modules of the denoiser hold what can be dropped, by kind (`droppable`), a scalar each."""
        found = droppable(target.denoiser)
        run.log(**found)
        return {kind: torch.tensor(count) for kind, count in found.items()}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """The prompt as it stands, once. Its record has what `prepare` found."""
        found = {kind: int(count) for kind, count in state.items()}
        yield Attempt(
            prompt=prompt,
            variant=self.published,
            unloaded=self.published == "adapter" or any(found.values()),
            record=found,
        )


def droppable(denoiser: nn.Module) -> dict[str, int]:
    """The numbers of modules with low-rank adapters beside their weights, with hooks, and with parametrized weights.

    Hooks that change no output are counted too: they cannot be told apart without running the model.
    """
    modules = list(denoiser.modules())
    return {
        "adapters": sum(_adapted(module) for module in modules),
        "hooks": sum(bool(module._forward_hooks or module._forward_pre_hooks) for module in modules),
        "parametrizations": sum(parametrize.is_parametrized(module) for module in modules),
    }


def _adapted(module: nn.Module) -> bool:
    """Whether it is a layer of peft, or has a low-rank part as other software calls it."""
    return isinstance(module, BaseTunerLayer) or any(name.startswith("lora") for name, _ in module.named_children())
