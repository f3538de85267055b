"""One prompt and one seed, drawn by the original and by the erased model, and judged. No torch until that is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

from PIL.Image import Image

from duo.errors import UserError
from duo.plugins import Family, Verdict
from duo.report.records import MODELS

if TYPE_CHECKING:
    from duo.delta import Delta
    from duo.stages import Session

STRONGEST = 1.5  # of the strength slider: beyond 1 an erasure is stronger than it was trained to be
LARGEST_SEED = 2**53 - 1  # what JSON and browsers hold exactly
KEPT = 16  # drawings that are remembered


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be drawn. `strength` scales the erasure's change: 0 is the original model, 1 the erased one."""

    prompt: str
    seed: int
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"the seed is {self.seed}, expected a whole number from 0 to {LARGEST_SEED}")
        if not 0 <= self.strength <= STRONGEST:
            raise UserError(f"the strength is {self.strength:g}, expected from 0 to {STRONGEST:g}")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One model's image and what the judge made of it. It is hidden unless the judge saw nothing of the concept."""

    model: str
    image: Image
    verdict: Verdict

    @property
    def hidden(self) -> bool:
        return self.verdict.label != "absent"


class Comparison:
    """A finished erasure beside the model that it is of. One drawing at a time: the two share their weights."""

    def __init__(self, session: Session) -> None:
        session.dir.stage("erase").require("erase")
        self._session = session
        self._drawn: dict[tuple[str, Asked], Drawn] = {}
        self._drawing = Lock()

    @cached_property
    def _delta(self) -> Delta | None:
        """What the erasure changed; None of one that was made elsewhere and is a model of its own."""
        from duo.delta import Delta

        artefact = self._session.artefact
        if artefact is not None and artefact.kind != "delta":
            return None
        return Delta.load(self._session.dir.erasure()[0])

    @property
    def has_strength(self) -> bool:
        """Whether the erasure is a change that can be scaled."""
        return self._delta is not None

    def draw(self, asked: Asked) -> tuple[Drawn, Drawn]:
        """The original model's image and the erased one's, from the same noise.

        Raises `UserError` for a prompt that is refused, which is not rendered, and for a judge that cannot look.
        """
        if found := self._session.refused(asked.prompt):
            raise UserError(f"The prompt mentions a minor ({found}), so it is refused: nothing was drawn")
        if not self.has_strength and asked.strength != 1:
            raise UserError("This erasure was made elsewhere, as a model of its own: it has no strength to change")
        with self._drawing:
            original, erased = (self._one(model, asked) for model in MODELS)
        return original, erased

    def _one(self, model: str, asked: Asked) -> Drawn:
        # The original's image has nothing to do with the strength, and is not drawn again when that is moved.
        key = (model, Asked(prompt=asked.prompt, seed=asked.seed) if model == "original" else asked)
        if key not in self._drawn:
            _ = self._session.judge.digest  # one whose weights are missing is told before anything is drawn
            with self._at(model, asked.strength) as family:
                (image,) = family.generate([asked.prompt], seeds=[asked.seed], sampling=self._session.recipe.sampling)
            (verdict,) = self._session.judge([image])
            self._drawn[key] = Drawn(model=model, image=image, verdict=verdict)
            for oldest in list(self._drawn)[:-KEPT]:
                del self._drawn[oldest]
        return self._drawn[key]

    @contextmanager
    def _at(self, model: str, strength: float) -> Iterator[Family]:
        if model == "original":
            yield self._session.model
        elif self._delta is None:
            yield self._session.imported()
        else:
            with self._delta.attached(self._session.model, strength):
                yield self._session.model
