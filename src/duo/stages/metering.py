"""What goes through the denoiser while something is done: rows, and the seconds that it takes for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Meter:
    """Rows that a module was given, and the seconds that it took for them."""

    rows: int = 0
    seconds: float = 0.0

    @contextmanager
    def on(self, module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
        """Count within the context. Seconds only where the `device` is given, which is then waited for at each pass."""
        began = [0.0]

        def before(_module: nn.Module, arguments: Any, named: Any) -> None:
            self.rows += len(arguments[0] if arguments else named["hidden_states"])
            if device is not None:
                began[0] = now(device)

        def after(*_: Any) -> None:
            if device is not None:
                self.seconds += now(device) - began[0]

        hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def now(device: torch.device) -> float:
    """The clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
