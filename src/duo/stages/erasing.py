"""One erasure: from pairs, or the concept's words alone, to a delta. The stage may be several (`hardening.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from duo import parallel, rundir
from duo.artefacts import differences
from duo.bases import base_digest
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import as_table
from duo.pairs import SIDES, PairFiles, Pairs
from duo.rundir import DELTA, Stage
from duo.stages.session import HARDENED, Session


def erase_once(
    session: Session, *, pairs: Mapping[str, Stage] | None = None, record: Mapping[str, Any] | None = None
) -> Delta:
    """Erase the concept from the model with the recipe's method, and write `delta.safetensors`.

    `pairs` are finished stages of pairs that it learns from, all together, each with what its pairs' names begin with;
    the run's own where None. `record` is what the delta says besides of how it came about.
    """
    if session.method is None:
        raise UserError("the recipe has an erasure made elsewhere (erased), so there is nothing to erase; attack it")
    stage, taken = session.dir.stage("erase"), session.method.takes_pairs
    made = {"": session.dir.stage("pairs")} if pairs is None else pairs
    learned: Pairs | None = None
    if not stage.finished:  # what is wrong is told before anything is written, which would fix the settings
        learned = pairs_of(made) if taken else None
        if learned is None:
            session.check_model(pairs=None)
        else:
            session.check_model(pairs=len(learned), size=learned.unsafe[0].size)
    with session.at_work("erase"):
        if stage.begin(erase_config(session, learned, made=made)):
            delta = session.method.erase(
                session.model,
                session.concept,
                pairs=learned,
                run=session.lend(stage, "erase", seed=session.erase_seed),
            )
            if parallel.is_main():
                path = stage.folder / DELTA
                base = base_digest(session.model, delta.layers())
                replace(delta, record={**delta.record, **(record or {}), "base": base}).save(path)
                stage.finish(digest=rundir.digest(path), delta=told_of(delta))
    return Delta.load(session.dir.erasure()[0])


def erase_config(
    session: Session, pairs: Pairs | None = None, *, made: Mapping[str, Stage] | None = None
) -> dict[str, Any]:
    """What an erasure depends on; `pairs` are what it learns from, where they have been read already, or else those of
    the stages `made`, which are the run's own where None."""
    assert session.method is not None
    own = {"erase_seed": session.erase_seed, "method": as_table(session.recipe.method)}
    if not session.method.takes_pairs:
        return {**session.shared, **own}
    digest = learned_from(made or {"": session.dir.stage("pairs")}) if pairs is None else pairs.digest()
    return {**{key: value for key, value in session.shared.items() if key != "sampling"}, **own, "pairs": digest}


def bring(session: Session) -> None:
    """Take over an erasure that was made elsewhere, in place of `erase`: a delta as it is, of others the digest."""
    artefact = session.artefact
    assert artefact is not None
    stage = session.dir.stage("erase")
    changed: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    if not stage.finished:  # a file that does not fit is told before anything is written
        session.check_model(pairs=None)
        if artefact.kind == "delta":
            with artefact.delta().attached(session.model):
                pass
        else:
            changed, warnings = differences(session.model, session.imported(), name=artefact.path)
        for warning in warnings:
            rundir.note(warning)
    with session.at_work("erase"):
        if stage.begin({**session.shared, "erased": {"kind": artefact.kind, "digest": artefact.digest}}):
            if parallel.is_main():
                told: dict[str, Any] = {
                    "kind": artefact.kind,
                    "path": artefact.path,
                    "changed": changed,
                    "warnings": list(warnings),
                }
                if artefact.kind == "delta":
                    record = artefact.delta().record
                    told |= {name: record.get(name) for name in ("method", "config")}
                    told |= {name: record[name] for name in (HARDENED,) if name in record}
                    rundir.write_bytes(stage.folder / DELTA, Path(artefact.source).read_bytes())
                    stage.finish(
                        digest=rundir.digest(stage.folder / DELTA), artefact=told, delta=told_of(artefact.delta())
                    )
                else:
                    stage.finish(digest=artefact.digest, artefact=told)
            parallel.barrier()


def told_of(delta: Delta) -> dict[str, Any]:
    """What a manifest says of a delta."""
    return {"kind": delta.kind, "layers": len(delta.layers())}


def pairs_of(made: Mapping[str, Stage]) -> Pairs:
    """The pairs of finished stages, as they were made, without those that were rejected since."""
    if len(made) == 1:
        return _pairs(*made.values())
    return Pairs.joined({name: _pairs(stage) for name, stage in made.items()})


def learned_from(made: Mapping[str, Stage]) -> str:
    """The digest of the pairs that a finished erasure must have learned from: all, less those that are rejected."""
    if len(made) > 1:
        return pairs_of(made).digest()
    (stage,) = made.values()
    wanted: str = stage.require("pairs")["digest"]
    rejected = any(row.get("decision") == "reject" for row in rundir.read_jsonl(stage.folder / "pairs.jsonl"))
    return Pairs.read(stage.folder).digest() if rejected else wanted


def _pairs(stage: Stage) -> Pairs:
    wanted = stage.require("pairs")["digest"]
    made, kept = Pairs.of(PairFiles.find(stage.folder, rejected=True)), PairFiles.find(stage.folder)
    if made.digest() != wanted:
        changed = stage.altered(*SIDES)
        which = "" if changed is None else f" ({changed})"
        raise UserError(f"{stage.folder}: images were changed{which}; put them back, or {rundir.ANEW}")
    return made if len(kept.files) == len(made) else Pairs.of(kept)
