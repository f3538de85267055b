"""What the page shows of the places that it was given, as HTML. Every text is escaped: prompts are other people's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import TYPE_CHECKING, Any

from duo.app.comparison import Asked, Comparison
from duo.app.curation import Curation, Filters, Verdicts, counted, score_names, shown_part
from duo.app.pictures import Picture
from duo.app.places import Place
from duo.app.reporting import Summary, framed
from duo.errors import UserError
from duo.pairs import SIDES
from duo.recipe import recipe_of_run
from duo.report import templates
from duo.report.wording import concept_word

if TYPE_CHECKING:
    from duo.stages import Session

PER_PAGE = 64
OFFERED = 6  # prompts of each of the concept's sets
WORDS = {"undecided": "undecided", "keep": "kept", "reject": "rejected"}  # of the states of pairs


@dataclass
class Opened:
    """A place and what was made of it so far."""

    place: Place
    curation: Curation | None = None
    comparison: Comparison | None = None
    verdicts: Mapping[str, Verdicts] | None = None
    problem: str | None = None  # why there are no verdicts
    session: Session | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The pairs as HTML, with what their filters can be set to."""

    html: str
    scores: Sequence[tuple[str, str]] = ()
    pages: int = 1


@dataclass
class Views:
    """The page's parts. Places are named by their number. One run's model is in memory at a time."""

    places: Sequence[Place]
    device: str = "cpu"
    _opened: dict[int, Opened] = field(default_factory=dict)
    _opening: RLock = field(default_factory=RLock)

    def __post_init__(self) -> None:
        environment = templates.environment("duo.app", autoescape=True)
        environment.globals["words"] = WORDS
        self._parts: Any = environment.get_template("parts.html").module

    # --- pairs --------------------------------------------------------------------------------------

    def grid(
        self,
        number: int,
        filters: Filters,
        *,
        originals: bool = False,
        page: int = 0,
        tell: Callable[[float], None] = lambda share: None,
    ) -> Grid:
        """The pairs of a place that the filters take. The unsafe sides' own pixels are sent only with `originals`.

        Pairs are judged when they are first looked at; `tell` is told the share that is done.
        """
        try:
            curation = self._curation(number)
            pairs = curation.pairs()
            verdicts, problem = self._verdicts(number, tell)
            if filters.score and (filters.side, filters.score) not in score_names(verdicts):
                filters = replace(filters, score=None)  # chosen for another run
            matching = [pair for pair in pairs if filters.takes(pair, verdicts.get(pair.name, {}))]
            shown, pages = shown_part(matching, page, PER_PAGE)
            pictures = {
                pair.name: {
                    side: Picture.thumbnail(
                        getattr(pair, side), hidden=not originals and _hidden(side, verdicts.get(pair.name, {}))
                    )
                    for side in SIDES
                }
                for pair in shown
            }
        except UserError as error:
            return Grid(html=self.note(str(error)))
        html = self._parts.grid(
            place=number,
            concept=self._concept(number) if verdicts else "",
            pairs=shown,
            matching=len(matching),
            counts=counted(pair.decision for pair in pairs),
            pictures=pictures,
            verdicts=verdicts,
            locked=curation.locked(),
            problem=problem,
        )
        return Grid(html=str(html), scores=score_names(verdicts), pages=pages)

    def score_range(self, number: int, side: str, score: str) -> tuple[float, float]:
        """The least and the largest value that a score has among the pairs of a place, to two digits outwards."""
        verdicts = self._at(number).verdicts or {}
        values = [one[side].scores[score] for one in verdicts.values() if score in one[side].scores] or [0.0]
        return math.floor(min(values) * 100) / 100, math.ceil(max(values) * 100) / 100

    def decide(self, number: int, name: str, decision: str | None) -> dict[str, Any]:
        """As `Curation.decide`, as JSON for the page: `counts`, or the `problem`."""
        try:
            return {"counts": self._curation(number).decide(name, decision)}
        except UserError as error:
            return {"problem": str(error)}

    def _curation(self, number: int) -> Curation:
        opened = self._at(number)
        if opened.curation is None:
            opened.curation = Curation(opened.place)
        return opened.curation

    def _verdicts(self, number: int, tell: Callable[[float], None]) -> tuple[Mapping[str, Verdicts], str | None]:
        """The curator's verdicts, and why there are none: a folder that is no run's names no curator."""
        opened = self._at(number)
        if opened.place.run is None or opened.problem is not None:
            return {}, opened.problem
        with self._opening:
            if opened.verdicts is None:
                try:
                    opened.verdicts = self._curation(number).judged(self._session(number).curator, tell)
                except UserError as error:  # weights that are not here: the pairs can be looked at all the same
                    opened.problem = str(error)
        return opened.verdicts or {}, opened.problem

    # --- original and erased ------------------------------------------------------------------------

    def comparison(self, number: int, asked: Asked, *, originals: bool = False) -> str:
        """Both models' images for a prompt and a seed, pixelated where the judge does not call them free of the
        concept, unless `originals` are asked for; or why there are none."""
        try:
            drawn = self._comparison(number).draw(asked)
        except UserError as error:
            return self.note(str(error), role="alert")
        sides = [(one, Picture.of(one.image, hidden=one.hidden and not originals)) for one in drawn]
        return str(self._parts.comparison(self._concept(number), asked, sides))

    def comparable(self, number: int) -> tuple[bool, str]:
        """Whether the place has an erasure whose strength can be moved, and what stands where the images will."""
        try:
            return self._comparison(number).has_strength, ""
        except UserError as error:
            return False, self.note(str(error))

    def offered(self, number: int) -> list[str]:
        """Some prompts of the place's concept, of each of its sets."""
        try:
            sets = self._session(number).concept.prompts
        except UserError:
            return []
        return list(dict.fromkeys(prompt for prompts in sets.values() for prompt in prompts[:OFFERED]))

    def _comparison(self, number: int) -> Comparison:
        opened = self._at(number)
        with self._opening:
            if opened.comparison is None:
                opened.comparison = Comparison(self._session(number))
                for other in self._opened.values():  # their models make room
                    if other is not opened:
                        other.comparison = other.session = None
        return opened.comparison

    # --- reports ------------------------------------------------------------------------------------

    def summaries(self) -> str:
        """What came of each place, as a table."""
        return str(self._parts.summaries([Summary.of(place) for place in self.places]))

    def report(self, number: int) -> str:
        """One run's report, or why there is none."""
        summary = Summary.of(self._at(number).place)
        try:
            return str(self._parts.report(summary, "" if summary.missing else framed(summary.place)))
        except UserError as error:
            return self.note(str(error), role="alert")

    # --- what they share ----------------------------------------------------------------------------

    def note(self, text: str, *, role: str = "note") -> str:
        return str(self._parts.note(text, role))

    def _at(self, number: int) -> Opened:
        if not 0 <= number < len(self.places):
            raise UserError(f"the page has no run number {number}; load it again")
        with self._opening:
            return self._opened.setdefault(number, Opened(place=self.places[number]))

    def _concept(self, number: int) -> str:
        return concept_word(self._session(number).concept.name)

    def _session(self, number: int) -> Session:
        opened = self._at(number)
        with self._opening:
            if opened.session is None:
                if opened.place.run is None:
                    raise UserError(f"{opened.place.name} holds pairs alone, and no run that has a model")
                from duo.stages import Session

                folder = opened.place.run.path
                recipe = replace(recipe_of_run(folder), attacks=())  # none is run here; they may be of an older duo
                opened.session = Session(recipe, folder, device=self.device)
        return opened.session


def _hidden(side: str, verdicts: Verdicts) -> bool:
    """Whether a side of a pair is pixelated: the unsafe one always, a safe one that the curator does not call so."""
    return side == "unsafe" or (side in verdicts and verdicts[side].label != "absent")
