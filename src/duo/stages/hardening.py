"""The erase stage: one erasure, or rounds of attacking it and erasing anew from more pairs.

    round 0   erase from the run's pairs, as without hardening, and attack that
    round r   what came back in round r − 1 are unsafe images; safe twins are edited from them as pairs are made; erase
              from the original model by all pairs so far, and attack again

Each round erases anew, and does not train on from the one before: what it becomes depends on its pairs alone, every
method that learns from pairs can do it, nothing drifts over rounds, and the delta is one. A round costs a whole
training for that.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duo import parallel, rundir
from duo.delta import Delta
from duo.fields import as_table
from duo.pairs import PairFiles, Pairs
from duo.rundir import Blocks, Stage, append_jsonl, progress
from duo.stages.attacking import attack
from duo.stages.erasing import erase_once, learned_from, pairs_of, told_of
from duo.stages.measuring import brought_back, measure
from duo.stages.metering import Meter
from duo.stages.pairing import PairRow, tell_rejected, try_twins
from duo.stages.rendering import read_image
from duo.stages.rounds import Round
from duo.stages.session import HARDENED, Session
from duo.stages.starts import starts_of

ROUNDS = "rounds.json"  # of the erase stage: what each round found
SCHEMA = 1  # of it


def erase(session: Session) -> Delta:
    """Erase the concept, and harden the erasure in as many rounds as the recipe has; write `delta.safetensors`.

    Rounds end before that where too little comes back to make pairs of, and say so.
    """
    if session.recipe.hardens is None:
        return erase_once(session)
    stage, made = session.dir.stage("erase"), {"": session.dir.stage("pairs")}
    pairs = None
    if not stage.finished:  # what is wrong is told before anything is written
        pairs = pairs_of(made)
        session.check_model(pairs=len(pairs), size=pairs.unsafe[0].size)
        _check_size(session, pairs)
    config = _config(session, learned_from(made) if pairs is None else pairs.digest())
    with session.at_work("erase"):
        if stage.begin(config):
            _all_rounds(session, stage)
    return Delta.load(session.dir.erasure()[0])


def _check_size(session: Session, pairs: Pairs) -> None:
    """Raise `UserError` where pairs that were brought are of another size than what comes back will be."""
    if session.recipe.pairs.brought:
        nothing = torch.zeros(1, *session.model.latent_shape, device=session.model.device)
        Pairs.joined({"the model": replace(pairs, unsafe=session.model.images(nothing)), "the recipe": pairs})


def _config(session: Session, pairs: str) -> dict[str, Any]:
    """What the result of all rounds depends on."""
    recipe = session.recipe
    return {
        **session.shared,
        "erase_seed": session.erase_seed,
        "method": as_table(recipe.method),
        "pairs": pairs,
        "hardening": as_table(recipe.hardening),
        "prompts": rundir.digest(starts_of(session)),
        "attack_images": recipe.attack_images,
        "block": recipe.block,
        "edit": _edit(session),
        "curator": session.curated_by,
        "preservation": recipe.score.preservation,
    }


def _edit(session: Session) -> dict[str, Any]:
    """How safe twins are edited."""
    names = ("strength", "guidance_scale", "max_edits", "block", "format")
    return {name: getattr(session.recipe.pairs, name) for name in names}


def _all_rounds(session: Session, stage: Stage) -> None:
    """From round 0 to the last, or to the one after which too little came back."""
    made = {"": session.dir.stage("pairs")}
    first = _count(made)
    rounds, records, stopped = [Round(session, 0)], [], None
    while True:
        one = rounds[-1]
        with _metered(one, "erase"):
            erase_once(one, pairs=made, record=_hardened(one))
        with _metered(one, "attack"):
            attack(one, models=["erased"])
        with _metered(one, "measure"):
            measured = measure(one, rounds[0])
        records.append(_record(one, made, measured))
        _tell(records[-1])
        if one.last:
            break
        after = Round(session, one.number + 1)
        with _metered(after, "pairs"):
            _make_pairs(one, after)
        stopped = _too_few(after, measured)
        if stopped is not None:
            rundir.note(stopped)
            break
        made = {**made, f"round-{after.number}": after.dir.stage("pairs")}
        rounds.append(Round(session, after.number, grown=_count(made) / first))
    if parallel.is_main():
        _finish(stage, rounds, records, stopped)


def _count(made: Mapping[str, Stage]) -> int:
    """How many pairs are learned from."""
    return sum(len(PairFiles.find(stage.folder).files) for stage in made.values())


def _record(one: Round, made: Mapping[str, Stage], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a finished round. No times: those are in `timings.jsonl`."""
    added = one.dir.stage("pairs").require("erase")["pairs"] if one.number else {}
    return {
        "round": one.number,
        "erasure": one.dir.erasure()[1],
        "pairs": {"learned_from": _count(made), "added": added},
        **{name: measured[name] for name in ("attacks", "preservation")},
    }


def _tell(record: Mapping[str, Any]) -> None:
    rows = [row for row in record["attacks"] if "rate" in row]
    told = ", ".join(f"{row['row']} {row['detected']} of {row['n']}" for row in rows)
    rundir.note(f"hardening, round {record['round']}: on validation prompts {told or 'nothing could be counted'}")


def _finish(stage: Stage, rounds: Sequence[Round], records: Sequence[Mapping[str, Any]], stopped: str | None) -> None:
    """The last round's erasure is the run's."""
    last = rounds[-1]
    path, digest = last.dir.erasure()
    log = path.with_name("log.jsonl")
    for file in (log, path) if log.exists() else (path,):
        rundir.write_bytes(stage.folder / file.name, file.read_bytes())
    used = _hardened(last).get(HARDENED, {"attacks": []})["attacks"]
    told = {"asked": last.settings.rounds, "attacks": used, "stopped": stopped, "rounds": list(records)}
    rundir.write_json(stage.folder / ROUNDS, {"schema": SCHEMA, **told})
    stage.finish(digest=digest, delta=told_of(Delta.load(path)), rounds=rundir.digest(stage.folder / ROUNDS))


def _hardened(one: Round) -> dict[str, Any]:
    """What a round's delta says of the attacks that it learned from; of round 0 nothing, which learned from none."""
    if not one.number:
        return {}
    return {HARDENED: {"rounds": one.number, "attacks": list(dict.fromkeys(row.name for row in one.settings.attacks))}}


@contextmanager
def _metered(one: Round, part: str) -> Iterator[None]:
    """Add a row to the erase stage's `timings.jsonl`, also where the part is interrupted: then there are several."""
    meter, clock = Meter(), time.monotonic()
    try:
        with meter.on(one.model.denoiser):
            yield
    finally:
        # Rows of all processes add up; the time that they take together is the main one's.
        seconds = round(time.monotonic() - clock, 3) if parallel.is_main() else 0.0
        row = {"round": one.number, "part": part, "seconds": seconds, "denoiser": meter.rows}
        append_jsonl(one.whole.dir.stage("erase").folder / "timings.jsonl", row)


# --- from what came back to pairs ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _CameBack:
    """An image in which an attack brought the concept back, its pair's prompts, and where it is from."""

    index: int
    path: Path
    unsafe_prompt: str
    safe_prompt: str
    seed: int
    origin: Mapping[str, Any]

    def row(self) -> PairRow:
        """The pair in the making, whose unsafe image is there."""
        made = PairRow(self.index, self.unsafe_prompt, self.safe_prompt, unsafe=read_image(self.path))
        made.unsafe_seed, made.tries_unsafe, made.origin = self.seed, 1, self.origin
        return made


def _make_pairs(one: Round, after: Round) -> None:
    """Edit safe twins of what came back in one round, for the next to learn from.

    An image of which no edit (`pairs.max_edits`) satisfies the curator makes no pair.
    """
    stage = after.dir.stage("pairs")
    found = list(_came_back(one, after))
    config = {**after.shared, "of": [row.path.name for row in found], "erasure": one.dir.erasure()[1]}
    config |= {"edit": _edit(after), "curator": after.curated_by}
    if stage.finished:  # the round may be described by now as one that trains longer, by how many pairs these are
        stage.begin(config)
        return
    with after.at_work("pairs"):
        if not stage.begin(config):
            return
        parts = Blocks(stage.folder / rundir.BLOCKS, n=len(found), size=after.recipe.pairs.block)
        with after.as_model("original"), progress(len(found), f"hardening, round {after.number}: safe twins") as bar:
            for rows in parts.pending():
                parts.done(rows, _twins(after, [found[i].row() for i in rows], stage.folder))
                bar.update(rows.stop)
        parallel.barrier()
        if parallel.is_main():
            _join(after, stage, parts)


def _came_back(one: Round, after: Round) -> Iterator[_CameBack]:
    """What the attacks that are learned from brought back on prompts of the pairs, in the order of the attacks.

    An image that was drawn from another is named by that one's prompt, for it shows that scene; any other by the prompt
    that its attack started from.
    """
    safe = dict(one.pair_prompts)
    starts = {start: unsafe for starts in one.starts.values() for start, unsafe in starts.items()}
    images = {row["index"]: row["prompt"] for row in rundir.read_jsonl(one.dir.path / "attack/images/images.jsonl")}
    for index, (row, attempt) in enumerate(brought_back(one)):
        shown = attempt["record"].get("image") if {"init", "latents"} & attempt.get("digests", {}).keys() else None
        unsafe = starts[attempt["base_prompt"]] if shown is None else images[shown]
        yield _CameBack(
            index=index,
            path=one.dir.path / "attack" / row / "erased" / attempt["image"],
            unsafe_prompt=unsafe,
            safe_prompt=safe[unsafe],
            seed=attempt["seed"],
            origin={
                "round": after.number,
                "attack": row,
                "attempt": attempt["index"],
                "label": attempt["label"],
                "attack_prompt": attempt["prompt"],
            },
        )


def _twins(after: Round, rows: Sequence[PairRow], folder: Path) -> dict[str, Any]:
    """The pairs of one block, written: of those images that have a twin."""
    account, rejected = Counter(came_back=len(rows)), list[dict[str, Any]]()
    while left := [row for row in rows if row.unsafe is not None and row.safe is None]:
        try_twins(after, left, account, rejected, seed=after.recipe.seed)
    ending = after.recipe.pairs.format
    made = [row for row in rows if row.safe is not None]
    for row in made:
        row.write(folder, ending)
    return {"rows": [row.record(ending) for row in made], "account": dict(account), "rejected": rejected}


def _join(after: Round, stage: Stage, parts: Blocks) -> None:
    """What the blocks have to tell, as the stage's own files."""
    records = parts.records()
    rows = [row for record in records for row in record["rows"]]
    rundir.write_jsonl(stage.folder / "pairs.jsonl", rows)
    tell_rejected(stage.folder, records)
    account = sum((Counter(record["account"]) for record in records), Counter[str]())
    made = Counter(row["attack"] for row in rows)
    stage.finish(
        account=dict(account),
        pairs={row.row: made[row.row] for row in after.settings.attacks},
        digest=Pairs.read(stage.folder).digest() if rows else None,
    )


def _too_few(after: Round, measured: Mapping[str, Any]) -> str | None:
    """Why there is no such round, where what came back in the one before does not make enough pairs."""
    made = after.dir.stage("pairs").require("erase")
    pairs, came, least = sum(made["pairs"].values()), made["account"].get("came_back", 0), after.settings.least_pairs
    if pairs >= least:
        return None
    tried = sum(row["tried"] for row in measured["attacks"] if row.get("learned"))
    told = f"hardening ends after round {after.number - 1}: "
    if not came:
        return f"{told}nothing came back in {tried} images"
    return f"{told}{came} of {tried} images came back and {pairs} of them have a safe twin; least_pairs is {least}"
