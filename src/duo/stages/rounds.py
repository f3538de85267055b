"""One round of hardening: a run folder of its own, in `erase/round-<number>`, and the prompts that its attacks see.

Nothing that is scored has a part in it. What is learned from starts at prompts of the run's pairs, those left out that
stand in a set of the concept or of a scored row; so do the images that its attacks learn from, which in scored rows are
of the concept's `attack_pairs`. What is counted starts at validation prompts. The noise of both is the round's own, and
the curator, which chose the pairs, is the only judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from duo import rundir
from duo.fields import LeafConfig
from duo.recipe import NOT_MEASURED, AttackRow, HardeningSettings, Recipe
from duo.seeds import seed_for
from duo.stages.session import STEPS, Session
from duo.stages.starts import starts_of

BESIDE = " beside the pairs"  # ends the name of a set: the concept's validation prompts, and as many of the pairs'


class Round(Session):
    """Round `number` of a run: 0 is the plain erasure, and the last one makes no more pairs.

    `grown` is how many pairs it has for each of round 0; with `hardening.grow_steps` it trains as many times as long.
    """

    def __init__(self, whole: Session, number: int, *, grown: float = 1.0) -> None:
        self.whole, self.number = whole, number
        super().__init__(
            _recipe(whole, number, grown if _settings(whole).grow_steps else 1.0),
            whole.dir.path / "erase" / f"round-{number}",
            device=whole.device,
            model=whole.model,
            command=whole.command,
        )
        self.curator = self.judge = whole.curator

    @property
    def settings(self) -> HardeningSettings:
        """The run's, for a round has no rounds."""
        return _settings(self.whole)

    @property
    def last(self) -> bool:
        """Whether no round comes after this one."""
        return self.number == self.settings.rounds

    @cached_property
    def starts(self) -> Mapping[str, Mapping[str, str]]:
        """What `starts_of` finds, each set in an order of the round's own."""
        found = starts_of(self.whole)

        def place(start: str) -> int:
            return seed_for(self.recipe.seed, "prompts", start)

        return {name: {start: found[name][start] for start in sorted(found[name], key=place)} for name in found}

    @property
    def attack_pairs(self) -> list[tuple[str, str]]:
        """Prompts of the pairs, and the same without the concept."""
        return [(unsafe, start) for start, unsafe in self.starts["neutral"].items()]

    def prompts(self, name: str) -> tuple[str, ...]:
        """As of any run; of a set beside the pairs in turn one of the pairs' and one validation prompt."""
        if not name.endswith(BESIDE):
            return super().prompts(name)
        name = name.removesuffix(BESIDE)
        both = list(zip(self.starts[name], super().prompts(name), strict=False))  # as many as the shorter one has
        return tuple(prompt for ours, theirs in both for prompt in ((theirs,) if self.last else (ours, theirs)))

    def prompts_digest(self, name: str) -> str | None:
        """Of a set beside the pairs too: it depends on more than the concept."""
        return rundir.digest(self.prompts(name)) if name.endswith(BESIDE) else super().prompts_digest(name)

    def learned(self, base_prompt: str) -> bool:
        """Whether what an attack brought from this prompt may be learned from."""
        return any(base_prompt in starts for starts in self.starts.values())


def _settings(whole: Session) -> HardeningSettings:
    settings = whole.recipe.hardens
    if settings is None:
        raise ValueError("the recipe has no rounds of hardening")
    return settings


def _recipe(whole: Session, number: int, longer: float) -> Recipe:
    """The run's recipe with the round's attacks in place of those that are scored, and a seed of its own for them; its
    method trains so many times as long."""
    settings, score = _settings(whole), whole.recipe.score
    rows = (*(_beside(row, last=number == settings.rounds) for row in settings.attacks), *settings.held_out)
    return replace(
        whole.recipe,
        method=_longer(whole, longer),
        seed=seed_for(whole.erase_seed, "hardening", number),
        erase_seed=whole.erase_seed,
        validation=True,
        reference=None,
        budget=None,
        hardening=None,
        attacks=rows,
        score=replace(score.without_besides(), near_miss=0, adherence=NOT_MEASURED, unsafe_row=rows[0].row),
    )


def _longer(whole: Session, times: float) -> LeafConfig | None:
    method = whole.recipe.method
    if method is None or times == 1:
        return method
    steps = round(times * getattr(whole.method, STEPS))
    return replace(method, settings={**method.settings, STEPS: steps})


def _beside(row: AttackRow, *, last: bool) -> AttackRow:
    """A row that is learned from, on prompts of both kinds; in the last round on validation prompts alone."""
    row = replace(row, prompts=f"{row.prompts}{BESIDE}")
    if not last:
        return row
    return replace(row, images=row.images // 2, searches=None if row.searches is None else row.searches // 2)
