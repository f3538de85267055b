"""What the denoiser is conditioned on, as one record that can be cut and joined by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from duo.plugins import Family

TEXTS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encoded prompts. `embeds` is (n, length, width); `pooled` is (n, width) where the family has one, else None.

    `prompts` are their texts where somebody has to know them (`duo.gating`), else None.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        prompts = self.prompts
        if prompts is not None:
            chosen = rows.cpu() if isinstance(rows, Tensor) else rows
            prompts = tuple(prompts[i] for i in torch.arange(len(prompts))[chosen].tolist())
        pooled = None if self.pooled is None else self.pooled[rows]
        return Conditioning(embeds=self.embeds[rows], pooled=pooled, prompts=prompts)

    def expand(self, n: int) -> Conditioning:
        """One row repeated `n` times, without copying."""
        if len(self) != 1:
            raise ValueError(f"only one row can be expanded, not {len(self)}")
        pooled = None if self.pooled is None else self.pooled.expand(n, -1)
        prompts = None if self.prompts is None else self.prompts * n
        return Conditioning(embeds=self.embeds.expand(n, -1, -1), pooled=pooled, prompts=prompts)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join rows; either all parts have a pooled embedding or none."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled and len(pooled) != len(parts):
            raise ValueError("cannot join conditionings with and without a pooled embedding")
        prompts = [part.prompts for part in parts if part.prompts is not None]
        return Conditioning(
            embeds=torch.cat([part.embeds for part in parts]),
            pooled=torch.cat(pooled) if pooled else None,
            prompts=tuple(one for own in prompts for one in own) if len(prompts) == len(parts) else None,
        )


def encoded(model: Family, prompts: Sequence[str]) -> Conditioning:
    """Any number of prompts by `model.text`, so many at once that what the encoders hold meanwhile stays bounded."""
    begins = range(0, len(prompts), TEXTS_AT_ONCE)
    return Conditioning.cat([model.text(prompts[begin : begin + TEXTS_AT_ONCE]) for begin in begins])
