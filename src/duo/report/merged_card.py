"""The model card of a folder that `duo merge` wrote: what was merged, at what weights, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from duo.licence import Licence
from duo.models import hub_id
from duo.models import title as called
from duo.report.front_matter import detected, front_matter, results
from duo.report.json_fields import read_object
from duo.report.markdown import fill
from duo.report.own_concept import OwnConcept, portable
from duo.report.records import Scores
from duo.report.toml_text import toml_text
from duo.report.warnings import cautions
from duo.report.wording import concept_word, fell, listed, model_title
from duo.rundir import RunDir
from duo.statistics import wilson

UNKNOWN = "a concept that its file does not name"


class Rates(Protocol):
    """How often a concept was seen in `n` images of an attack row: in the run, and on the merged weights."""

    @property
    def concept(self) -> str: ...
    @property
    def row(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def before(self) -> int: ...
    @property
    def after(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """One erasure that was merged: its weight and its delta's record, and its run's folder where there is one."""

    weight: float
    record: Mapping[str, Any]
    concept: str | None = None
    run: Path | None = None

    @property
    def word(self) -> str:
        return UNKNOWN if self.concept is None else concept_word(self.concept)

    @property
    def scores(self) -> Scores | None:
        if self.run is None or not RunDir(self.run).stage("score").finished:
            return None
        return Scores.read(read_object(RunDir(self.run).scores()))

    @property
    def recipe(self) -> str | None:
        """The run's configuration, as TOML."""
        return None if self.run is None else toml_text(portable(self._recipe(self.run)))

    @property
    def own_concept(self) -> OwnConcept | None:
        """The concept's file, where the run's concept is none of the package's."""
        return None if self.run is None else OwnConcept.of(self.run, self._recipe(self.run))

    def gone(self, rescored: Sequence[Rates]) -> bool:
        """Whether it was measured that the concept went: by the rule of `wording.fell`, and on the merged weights
        where those were measured."""
        scores = self.scores
        if scores is None:
            return False
        rates = next((one for one in rescored if one.concept == self.concept), None)
        if rates is None:
            return fell(scores)
        attack = next((attack for attack in scores.attacks if attack.name == rates.row), None)
        if attack is None or not attack.reliable:
            return False
        return wilson(rates.after, rates.n).high < attack.original.low

    @staticmethod
    def _recipe(run: Path) -> Mapping[str, Any]:
        return read_object(run / "run.json").table("recipe").data

    @property
    def account(self) -> Mapping[str, Any]:
        """What was made for the run's pairs, and what was rejected."""
        path = None if self.run is None else self.run / "pairs" / "manifest.json"
        return {} if path is None or not path.exists() else read_object(path).table("account").data


def render(*, model: str, parts: Sequence[Part], dtype: str, difference: int, rescored: Sequence[Rates]) -> str:
    """The text of the card. `difference` is of 255, `rescored` what was measured on the merged weights themselves.

    The run's own results are given as the model's only where they are: of one erasure at weight 1, in float32.
    """
    alone = len(parts) == 1 and parts[0].weight == 1
    scores = parts[0].scores if alone else None
    found = results(scores) if scores is not None and dtype == "fp32" else []
    scored = [(part.concept, part.scores) for part in parts]
    reliable = {(of, one.name) for of, found_in in scored if found_in for one in found_in.attacks if one.reliable}
    found += [
        detected(one.row, one.concept, n=one.n, rate=one.after / one.n)
        for one in rescored
        if (one.concept, one.row) in reliable
    ]
    words = listed(list(dict.fromkeys(part.word for part in parts)))
    tried = list(dict.fromkeys(part.word for part in parts if not part.gone(rescored)))
    gone = [word for word in dict.fromkeys(part.word for part in parts) if word not in tried]
    title = model_title(called(model), gone=gone, tried=tried)
    methods = sorted({str(part.record["method"]) for part in parts if "method" in part.record})
    licence = Licence.of(model)
    return fill(
        "merged_card.md",
        metadata=front_matter(model=model, relation="finetune", name=title, tags=[*methods, "merged"], results=found),
        title=title,
        gone=listed(gone) if gone else None,
        tried=listed(tried) if tried else None,
        called=called(model),
        base=hub_id(model),
        words=words,
        parts=parts,
        alone=alone,
        dtype=dtype,
        difference=difference,
        rescored=rescored,
        scores=scores,
        # Of the adapters that the run's attacks dropped nothing is left here.
        cautions=[one for one in cautions(scores, erasure="model") if one.kind != "unloads"] if scores else [],
        licence=licence.metadata.get("license"),
        texts=[path.name for path in licence.texts],
    )
