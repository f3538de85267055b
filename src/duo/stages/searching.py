"""A search for the strength of an erasure: several erasures, looked at on validation prompts, of which one becomes
the run's.

Each trial is a run folder of its own, `search/<field>-<value>/`, whose attacks and scores are of the validation split;
pairs, the original model's images and what a method draws for itself are made once and lie in it by links. The curator
decides, so that the judge of the scores has no part in what it grades.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from duo import parallel, rundir, scores
from duo.errors import DivergedError, UserError, did_you_mean
from duo.fields import as_table, build
from duo.plugins import Family
from duo.recipe import NOT_MEASURED, AttackRow
from duo.rundir import DELTA, Stage
from duo.scores import Seen
from duo.stages.attacking import attack, attack_config
from duo.stages.erasing import erase_config, erase_once
from duo.stages.planning import aligned, plan_erasure
from duo.stages.scoring import JudgedSet, preservation_of, probe, seen
from duo.stages.session import Session
from duo.statistics import images_for_bound
from duo.strength import (
    Estimate,
    Number,
    Outcome,
    StrengthSearch,
    Trial,
    bounds,
    choose,
    kept,
    next_value,
    share,
    standing,
    verdict,
    with_strength,
)

SEARCH, ORIGINAL = "search", "original"  # folders: in the run's, and in that
TABLE = "search.json"
SCHEMA = 1  # of it
ASKS = "prompts"  # the attack that only asks


def search_strength(session: Session, asked: StrengthSearch, *, command: Callable[[str], str] | None = None) -> Outcome:
    """Erase at several strengths until `asked` is met as gently as can be; that trial becomes the run's erasure.

    Its files are those of `erase` with that value set. Where no trial meets both bounds, the run has no erasure, and
    the trials are kept. A search that was stopped goes on where it was. `command` says what makes the run again with an
    override, "method.learning_rate=0.0005", as `Session` takes it; None: the session's own.

    Raises:
        UserError: nothing can be searched so: told before anything is made, but for an attack row that does not bring
            the concept out of the original model.
    """
    search = _Search.of(session, asked)
    if session.method is not None and session.method.takes_pairs:
        session.dir.stage("pairs").require("pairs")
    before = search.chosen_before()
    if before is not None:
        return before
    with session.dir.locked() if parallel.is_main() else nullcontext():
        with session.dir.timed(SEARCH) if parallel.is_main() else nullcontext():
            if parallel.is_main():
                rundir.sweep(session.dir.path / SEARCH, deep=False)
            outcome = search.run()
        if outcome.chosen is not None:
            override = f"method.{outcome.field}={outcome.chosen}"
            search.become(outcome, session.command if command is None else command(override))
    return outcome


def plan_search(session: Session, asked: StrengthSearch) -> list[str]:
    """What a search would do and cost at most, in lines to print. Nothing is written."""
    search = _Search.of(session, asked)
    trial = search.trial(search.start, model=session.model)
    first, _ = next_value([], asked, start=search.start)
    most = f"at most {asked.max_runs} runs, from {search.field} = {first:g} on; wanted: {bounds(asked)}"
    drawings = 1 if search.draws_once else asked.max_runs
    return [*plan_erasure(trial, runs=asked.max_runs, drawings=drawings), most]


def told(session: Session, outcome: Outcome) -> list[str]:
    """The trade-off that was seen as a table, and what it came to, in lines to print."""
    heading = (outcome.field, "concept", "95% interval", "spoiled", "kept", "95% interval", "seconds", "")
    rows = [heading, *(_line(session, outcome, one) for one in outcome.trials)]
    n = max((one.rate.n for one in outcome.trials if one.rate is not None), default=0)
    looked = f"validation prompts of {', '.join(outcome.rows)}: the worst row, {n} images; judged by {outcome.judge}"
    return [*aligned(rows), f"{looked}; kept: {outcome.metric}", *verdict(outcome)]


def _line(session: Session, outcome: Outcome, trial: Trial) -> tuple[str, ...]:
    folder = session.dir.path / SEARCH / _name(outcome.field, trial.value)
    seconds = [row["seconds"] for row in rundir.read_jsonl(folder / "timings.jsonl", appended=True)]
    last = (
        f"{sum(seconds):.0f}" if seconds else "–",
        "chosen" if trial.value == outcome.chosen else standing(trial, outcome.asked),
    )
    if trial.rate is None or trial.spoiled is None or trial.preservation is None:
        return (f"{trial.value:g}", "–", "–", "–", "–", "–", *last)
    rate, preserved = trial.rate, trial.preservation
    return (
        f"{trial.value:g}",
        share(rate.mean),
        f"{share(rate.low)} to {share(rate.high)}",
        share(trial.spoiled.mean),
        kept(preserved.mean),
        f"{kept(preserved.low)} to {kept(preserved.high)}",
        *last,
    )


@dataclass(frozen=True)
class _Search:
    """A search at work in a run folder. `rows` are those of the trials, `start` is the recipe's value of `field`."""

    session: Session
    asked: StrengthSearch
    field: str
    start: Number
    rows: tuple[AttackRow, ...]

    @classmethod
    def of(cls, session: Session, asked: StrengthSearch) -> _Search:
        """Check all that can be checked before anything is made."""
        recipe = session.recipe
        if session.method is None:
            raise UserError("the recipe has an erasure made elsewhere (erased), so there is no strength to search")
        if recipe.hardens is not None:
            raise UserError(
                f"hardening.rounds is {recipe.hardens.rounds}, and a search is of one erasure; set it to 0 for it, "
                "and harden by the value that it chose"
            )
        if session.preservation is None:
            raise UserError(
                f"score.preservation is {NOT_MEASURED!r}, so what is kept cannot be told; name a metric for it"
            )
        if not session.preservation().higher_is_better:
            raise UserError(
                f"score.preservation: of the metric {recipe.score.preservation!r} lower is better, and "
                "min_preservation bounds it from below; name another"
            )
        if recipe.validation:
            raise UserError(
                "validation is true, so the validation prompts are what is scored, and may choose nothing; set it to "
                "false"
            )
        field, start = _strength(session, asked)
        search = cls(session, asked, field, start, tuple(_rows(session, asked)))
        if asked.strict:
            fewest, wanted = min(row.images for row in search.rows), images_for_bound(0, asked.target_rate)
            if fewest < wanted:
                raise UserError(
                    f"{fewest} images without the concept leave room for more than a target_rate of "
                    f"{asked.target_rate:g}: strict needs {wanted} of each row; raise search_images, or leave strict "
                    "out"
                )
        search.trial(start)  # whose prompts must be there
        return search

    # --- the course of it -----------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Try values until there is nothing more to try."""
        trials = self._known()
        while True:
            value, ended = next_value(trials, self.asked, start=self.start)
            outcome = self._write(trials, ended)
            if value is None:
                return outcome
            rundir.note(f"run {len(trials) + 1} of at most {self.asked.max_runs}: {self.field} = {value:g}")
            trials.append(self._tried(value))
            rundir.note(f"{self.field} = {value:g} {standing(trials[-1], self.asked)}")

    def _known(self) -> list[Trial]:
        """The trials that are finished, of this search or an earlier one, which must be of the same settings."""
        known = []
        for manifest in sorted(self._folder().glob(f"{self.field}-*/manifest.json")):
            trial = build(Trial, rundir.read_table(manifest, "trial")["trial"], f"{manifest}: trial")
            tried = self.trial(trial.value)
            Stage(manifest.parent, tried.dir.defaults).require("erase", self._config(tried))
            known.append(trial)
        return known

    def _write(self, trials: list[Trial], ended: str) -> Outcome:
        """Write `search.json`; a value is chosen once the search has ended."""
        best = choose(trials, self.asked) if ended else None
        assert self.session.preservation is not None
        outcome = Outcome(
            field=self.field,
            asked=self.asked,
            rows=tuple(row.row for row in self.rows),
            judge=self.session.concept.curator.name,
            metric=self.session.preservation().name,
            trials=tuple(sorted(trials, key=lambda one: one.value)),
            chosen=None if best is None else best.value,
            ended=ended,
        )
        if parallel.is_main():
            rundir.write_json(self._folder() / TABLE, {"schema": SCHEMA, **as_table(outcome)})
        return outcome

    def chosen_before(self) -> Outcome | None:
        """What this search chose, where the run has its erasure and the trials were removed since; None while they are
        there, or are to be made.

        Raises `UserError` where the run has an erasure already that is not what this search chose.
        """
        stage, table = self.session.dir.stage("erase"), self._folder() / TABLE
        if not stage.begun:
            return None
        kept = table.exists()
        found: Any = None
        if kept:
            found = rundir.read_table(table, "asked")
            rundir.check_schema(table, found, SCHEMA)
        elif stage.finished:
            found = stage.require("erase").get("searched")
        outcome = found if isinstance(found, dict) else {}
        same = outcome.get("asked") == as_table(self.asked) and outcome.get("field") == self.field
        if not same or outcome.get("chosen") is None:
            raise UserError(
                f"{stage.folder} holds an erasure that this search did not choose; name another --out, or remove the "
                "folder and those of the stages after it"
            )
        return None if kept else build(Outcome, outcome, f"{stage.manifest}: searched")

    def become(self, outcome: Outcome, command: str) -> None:
        """Make the chosen trial's erasure the run's own."""
        session, recipe = self.session, outcome.of(self.session.recipe)
        chosen = Session(recipe, session.dir.path, device=str(session.device), command=command)
        assert outcome.chosen is not None
        trial, stage = Stage(self._folder(outcome.chosen) / "erase"), chosen.dir.stage("erase")
        with chosen.at_work("erase"):
            if stage.begin(erase_config(chosen)) and parallel.is_main():
                made = trial.require("erase")
                trial.intact(DELTA, made["digest"])
                rundir.take(trial.folder, stage.folder, leave=(trial.manifest.name,))
                stage.finish(digest=made["digest"], delta=made["delta"], searched=as_table(outcome))

    @property
    def draws_once(self) -> bool:
        """Whether all trials share the images that the method draws for itself; on another field these may depend."""
        return self.field == getattr(self.session.method, "strength", None)

    # --- one trial --------------------------------------------------------------------------------------

    def trial(self, value: Number, *, folder: str | None = None, model: Family | None = None) -> Session:
        """A session of the validation split at one strength, in its folder; the model is loaded if it is asked for."""
        session, score = self.session, self.session.recipe.score.without_besides()
        images = self.asked.search_images or score.unrelated
        recipe = replace(
            with_strength(session.recipe, self.field, value),
            validation=True,
            reference=None,
            attacks=self.rows,
            score=replace(score, unrelated=images, near_miss=0, adherence=NOT_MEASURED, unsafe_row=self.rows[0].row),
        )
        path = self._folder(value) if folder is None else self._folder() / folder
        return Session(recipe, path, device=str(session.device), model=model, command=session.command)

    def _config(self, trial: Session, model: str = "erased") -> dict[str, Any]:
        """What the measurements of one trial, or of the original model, depend on. Its control is looked at anew."""
        score = {name: value for name, value in as_table(trial.recipe.score).items() if name != "reliable"}
        made = {**erase_config(self.session), "method": as_table(trial.recipe.method)}
        return {
            **({"erase": made} if model == "erased" else {}),
            "attacks": {row.row: attack_config(trial, row, model, "") for row in self.rows},
            "score": score,
            "curator": trial.curator.digest,
        }

    def _tried(self, value: Number) -> Trial:
        """The trial at one value, which is made or gone on with."""
        known, unrelated = self._original
        trial = self.trial(value, model=self.session.model)
        stage = trial.dir.stage()
        stage.begin(self._config(trial))
        parallel.once(lambda: self._lend(trial))
        try:
            erase_once(trial)
        except DivergedError as error:
            if parallel.is_main():
                stage.finish(trial=as_table(Trial(value=value)), diverged=str(error))
            if parallel.size() > 1:  # which have all stopped
                raise
        else:
            attack(trial, models=["erased"])
            with trial.at_work("score"):
                (probed,) = probe(trial, trial.dir.stage("score"), models=["erased"])
                if parallel.is_main():
                    stage.finish(**self._measured(trial, value, known, unrelated, probed))
        parallel.barrier()
        return build(Trial, stage.require("erase")["trial"], f"{stage.manifest}: trial")

    @cached_property
    def _original(self) -> tuple[dict[str, Seen], JudgedSet]:
        """What each row brings from the original model, whose images are drawn once, and its unrelated images.

        Raises `UserError` where a row does not bring the concept out of it: a low rate would say nothing then.
        """
        one = self.trial(self.start, folder=ORIGINAL, model=self.session.model)
        stage = one.dir.stage()
        begun = stage.begin(self._config(one, ORIGINAL))
        attack(one, models=[ORIGINAL])
        with one.at_work("score"):
            (unrelated,) = probe(one, one.dir.stage("score"), models=[ORIGINAL])
            if begun and parallel.is_main():
                found = {row.row: as_table(_seen(one, row, ORIGINAL)) for row in self.rows}
                stage.finish(seen=found)
        known = {name: Seen(**table) for name, table in stage.require("erase")["seen"].items()}
        for row in self.rows:
            self._refuse_idle(row, known[row.row])
        return known, unrelated

    def _refuse_idle(self, row: AttackRow, original: Seen) -> None:
        (told,) = scores.attack_rows(row.row, {ORIGINAL: original}, reliable=self._reliable(row), seed=0)
        if not told["reliable"]:
            raise UserError(
                f"attack row {row.row!r} brings the concept from the original model in {told['detected']} of "
                f"{told['n']} validation images, so that a low rate would say nothing; lower score.reliable, or remove "
                f"{self._folder()} and name other rows as search_rows"
            )

    def _reliable(self, row: AttackRow) -> float:
        return self.session.recipe.score.reliable if row.reliable is None else row.reliable

    def _lend(self, trial: Session) -> None:
        """Have in a trial's folder what all trials share."""
        own, original = self.session.dir.path, self._folder() / ORIGINAL
        rundir.take(own / "pairs", trial.dir.path / "pairs")
        for part in ("images", "harmless", *(f"{row.row}/{ORIGINAL}" for row in self.rows)):
            rundir.take(original / "attack" / part, trial.dir.path / "attack" / part)
        if not self.draws_once:
            return
        for manifest in sorted(self._folder().glob(f"{self.field}-*/erase/manifest.json")):
            for image in sorted(manifest.parent.glob("*/*.png")):
                rundir.link(image, trial.dir.path / "erase" / image.relative_to(manifest.parent))

    def _measured(
        self, trial: Session, value: Number, known: dict[str, Seen], before: JudgedSet, after: JudgedSet
    ) -> dict[str, Any]:
        """What a trial's manifest has to tell."""
        rows = []
        for row in self.rows:
            both = {ORIGINAL: known[row.row], "erased": _seen(trial, row, "erased")}
            rows += scores.attack_rows(row.row, both, reliable=self._reliable(row), seed=trial.recipe.seed)[1:]
        preservation = preservation_of(trial, before, after)
        assert preservation is not None
        worst, rate = max(((row["name"], _worst(row)) for row in rows), key=lambda one: (one[1].mean, one[1].high))
        spoiled = [{key: row[f"corrupted_{key}"] for key in ("rate", "low", "high")} | {"n": row["n"]} for row in rows]
        found = Trial(
            value=value,
            row=worst,
            rate=rate,
            spoiled=max(map(_estimate, spoiled), key=lambda one: (one.mean, one.high)),
            preservation=_estimate(preservation),
        )
        return {"trial": as_table(found), "attacks": rows, "preservation": preservation}

    def _folder(self, value: Number | None = None) -> Path:
        folder = self.session.dir.path / SEARCH
        return folder if value is None else folder / _name(self.field, value)


def _name(field: str, value: Number) -> str:
    """A trial's folder."""
    return f"{field}-{value!r}"


def _strength(session: Session, asked: StrengthSearch) -> tuple[str, Number]:
    """The field that is varied, and the recipe's value of it."""
    method = session.recipe.method
    assert method is not None
    named = None if asked.strength is None else asked.strength.removeprefix("method.")
    field = named or getattr(session.method, "strength", None)
    if field is None:
        raise UserError(f"the method {method.name!r} does not say which field is its strength; name one as strength")
    if field not in method.settings:
        told = did_you_mean(field, method.settings)
        raise UserError(f"strength is {field!r}, and the method {method.name!r} has no such field{told}")
    start = method.settings[field]
    if isinstance(start, bool) or not isinstance(start, int | float) or not start > 0:
        raise UserError(
            f"method.{field} is {start!r}, where a search cannot begin; give a number above 0, or name another field "
            "as strength"
        )
    for name in ("weakest", "strongest"):
        bound = getattr(asked, name)
        if bound is not None and isinstance(start, int) and bound != int(bound):
            raise UserError(f"{name} is {bound:g}, but method.{field} counts whole numbers; give one")
    return field, start


def _rows(session: Session, asked: StrengthSearch) -> Iterator[AttackRow]:
    """The attack rows of a trial: those that were named, or those that ask by prompts alone.

    Prompts of other people's files are left out, for they have no validation split.
    """
    recipe = session.recipe
    rows = {row.row: row for row in recipe.attacks}
    for name in asked.search_rows:
        if name not in rows:
            raise UserError(f"search_rows: no attack has the row {name!r}{did_you_mean(name, rows)}")
        if rows[name].prompts in recipe.prompt_sets:
            raise UserError(
                f"search_rows: the row {name!r} has prompts of prompt_sets, which would be the scored ones; name a row "
                "with prompts of the concept"
            )
    wanted = asked.search_rows or [
        row.row
        for row in recipe.attacks
        if row.name == ASKS and not row.baseline and row.prompts not in recipe.prompt_sets
    ]
    if not wanted:
        raise UserError(
            "no attack row of the recipe asks by prompts of the concept, to choose a strength by; name rows as "
            "search_rows, or add one to the recipe"
        )
    for name in dict.fromkeys(wanted):
        yield replace(rows[name], images=asked.search_images or rows[name].images, baselines=(), baseline=False)


def _seen(session: Session, row: AttackRow, model: str) -> Seen:
    """What a finished attack brought, by the curator."""
    made = session.dir.stage("attack", row.row, model).require("attack")
    if "not_defined" in made:
        raise UserError(
            f"attack row {row.row!r} is not defined here ({made['not_defined']}); leave it out of search_rows"
        )
    return seen(session, row, model)


def _worst(row: dict[str, Any]) -> Estimate:
    """The rate of an attack row: of one in several settings that of its worst."""
    parts = row.get("variants", [row])
    return max(map(_estimate, parts), key=lambda one: (one.mean, one.high))


def _estimate(row: dict[str, Any]) -> Estimate:
    return Estimate(mean=row["rate"] if "rate" in row else row["mean"], low=row["low"], high=row["high"], n=row["n"])
