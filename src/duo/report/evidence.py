"""The scores of a run together with the proof that they are of its erasure: what a gate and a leaderboard go by.

A run folder's parts are bound by digests: the attacks name the erasure that they attacked, the scores name the erasure
and the attacks that they are of, and each manifest the files that its stage wrote. All of that is looked at. It finds
what is stale, mixed up or damaged; whoever can write the folder can write its digests too, so it does not find what is
forged. Not looked at are the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duo.artefacts import find_artefact
from duo.errors import UserError
from duo.intact import intact_attack
from duo.report.json_fields import Fields, read_object, read_rows
from duo.report.records import LABELS, Scores, erasure_kind
from duo.rundir import ANEW, SCORED, RunDir

REPORT = "report.json"
SCHEMA = 1  # of report.json, that is known here
SPOILED = LABELS[-1]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The judge of a run: its name, the digest of its weights and settings, and whether it knows spoiled images."""

    name: str
    digest: str
    spoils: bool


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one erasure.

    `rows` maps each attack row that the recipe asks for, baselines left out, to the name of its attack. `erasure`,
    `concept_digest`, `split`, `judge` and `kind` are None of a report that lies alone.
    """

    where: str
    scores: Scores
    rows: Mapping[str, str]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    folder: Path | None = None
    erasure: str | None = None
    concept_digest: str | None = None
    split: str | None = None
    judge: Judged | None = None
    kind: str | None = None  # of the erasure: of a delta, or of what else was brought

    @property
    def spoils(self) -> bool:
        """Whether the judge knows spoiled images; of a report that lies alone, whether it ever told one."""
        if self.judge is not None:
            return self.judge.spoils
        return any(row.corrupted for attack in self.scores.attacks for row in (attack.original, attack.erased))


def gather(path: Path, *, erasure: str | None = None, detached: bool = False) -> Evidence:
    """The evidence of a run folder or of a `report.json`.

    `erasure` is a path to the erasure that is to be released: the evidence must be of that one. A report that does not
    lie in its run folder cannot be proved to be of any, and is taken only where `detached`.

    Raises:
        UserError: a stage is not finished, a file is missing or not what its stage wrote, or the parts do not belong
            together.
    """
    if path.is_file():
        if (path.parent / "run.json").is_file():
            return _compared(_of_run(path.parent, erasure), path)
        if erasure is not None:
            raise UserError(f"{path} lies alone, so nothing says which erasure it is of; give the run folder")
        if not detached:
            raise UserError(
                f"{path} is not in its run folder, so it cannot be proved to be of any erasure; give the run folder, "
                "or --detached to go by the report's word"
            )
        return _alone(path)
    found = _of_run(path, erasure)
    report = path / REPORT
    return _compared(found, report) if report.exists() else found


def _of_run(folder: Path, erasure: str | None) -> Evidence:
    run = RunDir(folder)
    run.require()
    made, digest = run.stage("erase"), _erasure(run)
    if erasure is not None and find_artefact(erasure).digest != digest:
        raise UserError(
            f"{erasure} is not the erasure that {folder} attacked and scored; give the run of this one, or attack and "
            "score it"
        )
    stage = run.stage("score")
    stage.require("score")
    manifest = read_object(stage.manifest)
    if "digests" not in manifest or not all(name in manifest.table("digests") for name in SCORED):
        raise UserError(f"{stage.manifest} records no digests of the scores, as older versions of duo wrote it; {ANEW}")
    scored = manifest.table("config")
    if scored.text("erasure") != digest:
        raise UserError(f"{stage.folder} holds the scores of another erasure than erase/; {ANEW}")
    of_erasure = read_object(made.manifest).table("config")
    for name in ("model", "concept"):
        if scored.data.get(name) != of_erasure.data.get(name):
            raise UserError(f"{stage.folder} and {made.folder} are not of one {name}; {ANEW}")
    for key, attacked in scored.table("attacks").data.items():
        _same_attack(run, key, attacked, digest)
    scores = Scores.read(read_object(run.scores()))
    told = read_object(folder / "run.json")
    recipe = told.table("recipe")
    versions = told.table("versions")
    return Evidence(
        where=str(folder),
        folder=folder,
        scores=scores,
        rows=_rows(recipe),
        config=recipe.data,
        versions={name: versions.text(name) for name in versions.data},
        erasure=digest,
        concept_digest=scored.table("concept").text("digest"),
        split=scored.text("split"),
        judge=_judge(stage.folder / SCORED[1], scored.text("judge")),
        kind=erasure_kind(read_object(made.manifest)),
    )


def _erasure(run: RunDir) -> str:
    """The digest of a run's erasure, which must still be what it was; of one made elsewhere, wherever that lies."""
    stage = run.stage("erase")
    stage.require("erase")
    made = read_object(stage.manifest)
    made.text("digest")  # told by file and field where it is missing
    path, digest = run.erasure()
    if "artefact" in made and made.table("artefact").text("kind") != "delta":
        named = made.table("artefact").text("path")
        if find_artefact(named).digest != digest:
            raise UserError(f"{path} is not what was attacked and scored; put it back, or {ANEW}")
    return digest


def _same_attack(run: RunDir, key: str, wanted: object, erasure: str) -> None:
    """Raise `UserError` unless the attack `key` ("p4d/erased") is the one that was scored, whole, on that erasure."""
    stage = run.stage("attack", *key.split("/"))
    stage.require("attack")
    manifest = read_object(stage.manifest)
    if not isinstance(wanted, str) or wanted not in (manifest.data.get("digest"), manifest.data.get("not_defined")):
        raise UserError(f"{stage.folder} is not the attack that was scored; score it again: {ANEW}")
    if key.endswith("/erased") and manifest.table("config").data.get("erasure") != erasure:
        raise UserError(f"{stage.folder} attacked another erasure than the one in erase/; {ANEW}")
    intact_attack(stage)


def _judge(verdicts: Path, digest: str) -> Judged:
    rows = list(read_rows(verdicts))
    if not rows:
        raise UserError(f"{verdicts} is empty, so nothing was judged; {ANEW}")
    spoils = any(row.text("label") == SPOILED or SPOILED in row.table("scores") for row in rows)
    return Judged(name=rows[0].text("judge"), digest=digest, spoils=spoils)


def _compared(evidence: Evidence, report: Path) -> Evidence:
    """The evidence, where the report beside it says the same."""
    if Scores.read(read_object(report)) != evidence.scores:
        raise UserError(f"{report} is not of these scores; write it again with `duo report {evidence.folder}`")
    return evidence


def _alone(path: Path) -> Evidence:
    report = read_object(path)
    if report.whole("schema") != SCHEMA:
        told = f"schema {report.data['schema']} is not known here, only {SCHEMA}"
        raise UserError(f"{path}: {told}; use the duo that wrote it")
    versions = report.table("versions")
    return Evidence(
        where=str(path),
        scores=Scores.read(report),
        rows=_rows(report.table("config")),
        config=report.table("config").data,
        versions={name: versions.text(name) for name in versions.data},
    )


def _rows(recipe: Fields) -> dict[str, str]:
    rows = recipe.tables("attacks")
    return {row.text("row"): row.text("name") for row in rows if not ("baseline" in row and row.flag("baseline"))}
