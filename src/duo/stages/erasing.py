"""The erase stage: from pairs to a delta."""

from __future__ import annotations

from dataclasses import replace

from duo import parallel, rundir
from duo.bases import base_digest
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import as_table
from duo.pairs import Pairs
from duo.stages.session import Session


def erase(session: Session) -> Delta:
    """Erase the concept from the model with the recipe's method, and write `delta.safetensors`."""
    stage, before = session.dir.stage("erase"), session.dir.stage("pairs")
    pairs = before.require("pairs")  # told before anything is written
    with session.at_work("erase"):
        config = {
            **{key: value for key, value in session.shared.items() if key != "sampling"},
            "erase_seed": session.erase_seed,
            "method": as_table(session.recipe.method),
            "pairs": pairs["digest"],
        }
        if not stage.finished:  # what is wrong is told before the stage is begun, which fixes the method's settings
            made = Pairs.read(before.folder)
            if made.digest() != pairs["digest"]:
                raise UserError(f"{before.folder}: images were changed; put them back, or {rundir.ANEW}")
            session.check_model(pairs=len(made), size=made.unsafe[0].size)
        if stage.begin(config):
            delta = session.method.erase(
                session.model,
                session.concept,
                pairs=made,
                run=session.lend(stage, "erase", seed=session.erase_seed),
            )
            if parallel.is_main():
                path = stage.folder / "delta.safetensors"
                base = base_digest(session.model, delta.layers())
                replace(delta, record={**delta.record, "base": base}).save(path)
                stage.finish(digest=rundir.digest(path))
    return Delta.load(session.dir.erasure()[0])
