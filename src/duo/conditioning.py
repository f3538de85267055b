"""What the denoiser is conditioned on, as one record that can be cut and joined by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encoded prompts. `embeds` is (n, length, width); `pooled` is (n, width) where the family has one, else None."""

    embeds: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning(embeds=self.embeds[rows], pooled=None if self.pooled is None else self.pooled[rows])

    def expand(self, n: int) -> Conditioning:
        """One row repeated `n` times, without copying."""
        if len(self) != 1:
            raise ValueError(f"only one row can be expanded, not {len(self)}")
        pooled = None if self.pooled is None else self.pooled.expand(n, -1)
        return Conditioning(embeds=self.embeds.expand(n, -1, -1), pooled=pooled)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join rows; either all parts have a pooled embedding or none."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled and len(pooled) != len(parts):
            raise ValueError("cannot join conditionings with and without a pooled embedding")
        return Conditioning(
            embeds=torch.cat([part.embeds for part in parts]), pooled=torch.cat(pooled) if pooled else None
        )
