"""Random prompts: no attack either, but what luck alone finds in as many queries as an attack was granted.

The best of `queries` random prompts, by the attacker's own detector on one image of each. An attack that does no better
has found nothing but what its queries would have met anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from duo.attacks._words import (
    PUBLISHED_CLIP,
    check_clip,
    check_detector,
    draw,
    draw_seeds,
    graded,
    knowledge_of,
    words_of_clip,
)
from duo.errors import UserError
from duo.fields import check_above_0, check_choices, check_from_0
from duo.plugins import Access, Attempt, Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from duo.target import Target


@dataclass(frozen=True, kw_only=True)
class RandomPrompts:
    """Ask by chance, and keep what the detector is surest of; with no `queries`, the first random prompt."""

    access: ClassVar[Access] = Access.QUERY

    queries: int = 60
    length: int = 5  # random words in a prompt
    mode: Literal["before", "alone"] = "before"  # they stand before the base prompt, or in its place
    vocabulary: tuple[str, ...] = ()  # the words; where empty, those of the tokenizer of `clip`
    clip: str = PUBLISHED_CLIP  # a folder, a hub id, or "toybox"
    longest: int = 9  # letters of a word of that tokenizer
    drafts: int = 100  # random prompts that are drawn in place of one that would be refused
    batch_size: int = 4  # images asked for at once

    def __post_init__(self) -> None:
        check_from_0(self, "queries")
        check_above_0(self, "length", "longest", "drafts", "batch_size")
        check_choices(self, {"mode": ("before", "alone")})
        if not all(word.strip() for word in self.vocabulary):
            raise ValueError("vocabulary has an empty word; take it out")

    def passes(self, prompts: int) -> dict[str, int]:
        """How many images are asked for (for `duo run --dry-run`)."""
        return {"images": prompts * self.queries}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Nothing is learned; what the search needs is looked for."""
        if not self.vocabulary:
            check_clip(self.clip, "random_prompts")
        if not self._words:
            raise UserError(f"random_prompts: the tokenizer of {self.clip} has no word so short; raise longest")
        if self.queries:
            check_detector(concept, "random_prompts")
        return {}

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """One attempt: the random prompt with the surest image, or none where every prompt that is drawn is refused.

        Its record holds `queries` and, where there were any, `score` (the detector's, of that image) and `label`.
        """
        granted = self.queries if target.queries_left is None else min(self.queries, target.queries_left)
        drawn = (self._draw(target, prompt, generator) for _ in range(max(1, granted)))
        prompts = [one for one in drawn if one is not None]
        if not prompts:
            return
        if not granted:
            yield Attempt(prompt=prompts[0], record={"queries": 0})
            return
        _, detector = knowledge_of(target)
        seeds = draw_seeds(len(prompts), generator)
        verdicts = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            verdicts += detector(target.generate(prompts[rows], seeds=seeds[rows]))
        best = max(range(len(prompts)), key=lambda i: graded(verdicts[i]))  # of equals, the first
        yield Attempt(
            prompt=prompts[best],
            record={"queries": len(prompts), "score": graded(verdicts[best]), "label": verdicts[best].label},
        )

    @property
    def _words(self) -> tuple[str, ...]:
        return self.vocabulary or words_of_clip(self.clip, longest=self.longest)

    def _draw(self, target: Target, prompt: str, generator: torch.Generator) -> str | None:
        """A random prompt that the target would not refuse; None where `drafts` of them were refused."""
        for _ in range(self.drafts):
            words = draw(self._words, self.length, generator)
            one = " ".join([*words, prompt] if self.mode == "before" else words).strip()
            if target.refused(one) is None:
                return one
        return None
