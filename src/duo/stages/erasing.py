"""The erase stage: from pairs, or the concept's words alone, to a delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from duo import parallel, rundir
from duo.artefacts import differences
from duo.bases import base_digest
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import as_table
from duo.pairs import PairFiles, Pairs
from duo.rundir import DELTA, Stage
from duo.stages.session import Session


def erase(session: Session) -> Delta:
    """Erase the concept from the model with the recipe's method, and write `delta.safetensors`."""
    if session.method is None:
        raise UserError("the recipe has an erasure made elsewhere (erased), so there is nothing to erase; attack it")
    stage, made = session.dir.stage("erase"), session.dir.stage("pairs")
    taken = session.method.takes_pairs
    pairs: Pairs | None = None
    if not stage.finished:  # what is wrong is told before anything is written, which would fix the settings
        pairs = _pairs(made) if taken else None
        if pairs is None:
            session.check_model(pairs=None)
        else:
            session.check_model(pairs=len(pairs), size=pairs.unsafe[0].size)
    with session.at_work("erase"):
        config = {
            **{key: value for key, value in session.shared.items() if not (taken and key == "sampling")},
            "erase_seed": session.erase_seed,
            "method": as_table(session.recipe.method),
            **({"pairs": _learned_from(made) if pairs is None else pairs.digest()} if taken else {}),
        }
        if stage.begin(config):
            delta = session.method.erase(
                session.model,
                session.concept,
                pairs=pairs,
                run=session.lend(stage, "erase", seed=session.erase_seed),
            )
            if parallel.is_main():
                path = stage.folder / DELTA
                base = base_digest(session.model, delta.layers())
                replace(delta, record={**delta.record, "base": base}).save(path)
                stage.finish(digest=rundir.digest(path), delta=_told(delta))
    return Delta.load(session.dir.erasure()[0])


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
                    told |= {name: artefact.delta().record.get(name) for name in ("method", "config")}
                    rundir.write_bytes(stage.folder / DELTA, Path(artefact.source).read_bytes())
                    stage.finish(
                        digest=rundir.digest(stage.folder / DELTA), artefact=told, delta=_told(artefact.delta())
                    )
                else:
                    stage.finish(digest=artefact.digest, artefact=told)
            parallel.barrier()


def _told(delta: Delta) -> dict[str, Any]:
    """What a manifest says of a delta."""
    return {"kind": delta.kind, "layers": len(delta.layers())}


def _pairs(stage: Stage) -> Pairs:
    """The run's pairs, as they were made, without those that were rejected since."""
    wanted = stage.require("pairs")["digest"]
    made, kept = Pairs.of(PairFiles.find(stage.folder, rejected=True)), PairFiles.find(stage.folder)
    if made.digest() != wanted:
        raise UserError(f"{stage.folder}: images were changed; put them back, or {rundir.ANEW}")
    return made if len(kept.files) == len(made) else Pairs.of(kept)


def _learned_from(stage: Stage) -> str:
    """The digest of the pairs that a finished erasure must have learned from: all, less those that are rejected."""
    wanted: str = stage.require("pairs")["digest"]
    rejected = any(row.get("decision") == "reject" for row in rundir.read_jsonl(stage.folder / "pairs.jsonl"))
    return Pairs.read(stage.folder).digest() if rejected else wanted
