"""Plain prompts: no attack at all, but the rate that every attack must beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Ask for the concept in plain words: each prompt once, as it stands."""

    access: ClassVar[Access] = Access.QUERY

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """The prompt itself, once."""
        yield Attempt(prompt=prompt)
