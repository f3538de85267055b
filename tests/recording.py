"""A `duo.plugins.Run` for tests of methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from duo.plugins import Precision, Sampling


@dataclass
class RecordingRun:
    """A `Run` that keeps what it is told and can be stopped after a step: as the next is told."""

    folder: Path
    seed: int = 5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = field(default_factory=Precision)
    sampling: Sampling = field(default_factory=lambda: Sampling(num_inference_steps=2))
    stop_after: int | None = None
    expected: frozenset[str] = frozenset()  # what each step must tell
    rows: list[dict[str, Any]] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[RecordingRun]:
        yield self

    def update(self, step: int, **numbers: float) -> None:
        assert self.expected <= numbers.keys()
        self.shown.append(step)

    def log(self, **numbers: Any) -> None:
        if self.stop_after is not None and numbers.get("step") == self.stop_after + 1:
            raise KeyboardInterrupt
        self.rows.append(numbers)
