"""The pairs stage: unsafe images and their safe twins (DUO, Park et al. 2024, section 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from duo import rundir
from duo.errors import UserError
from duo.fields import as_table
from duo.pairs import Pairs
from duo.rundir import Blocks, progress
from duo.stages.session import Session, seed_for


def make_pairs(session: Session) -> Pairs:
    """Generate unsafe images and edit each into its safe twin, keeping what the curator accepts (DUO, section 3).

    A row is tried with new seeds up to `pairs.max_tries` times, and each of its unsafe images is edited up to
    `pairs.max_edits` times. A row that finds no pair is a `UserError` with the account of what was rejected.
    """
    settings, stage = session.recipe.pairs, session.dir.stage("pairs")
    if not stage.finished:
        _ = session.model  # a model that cannot be loaded is told before anything is written
    config = {
        **session.shared,
        "erase_seed": session.erase_seed,
        "pairs": as_table(settings),
        "curator": session.curator.digest,
    }
    with session.at_work("pairs"):
        if stage.begin(config):
            parts = Blocks(stage.folder / "blocks", n=settings.n, size=settings.block)
            with progress(settings.n, "pairs") as bar:
                for rows in parts.pending():
                    parts.done(rows, _make_block(session, rows, stage.folder))
                    bar.update(rows.stop)
            records = parts.records()
            rundir.write_jsonl(stage.folder / "pairs.jsonl", [row for record in records for row in record["rows"]])
            account = sum((Counter(record["account"]) for record in records), Counter[str]())
            stage.finish(account=dict(account), digest=Pairs.read(stage.folder).digest())
            parts.clear()
    return Pairs.read(stage.folder)


@dataclass
class _Row:
    """One pair in the making."""

    index: int
    unsafe_prompt: str
    safe_prompt: str
    unsafe: Image | None = None
    safe: Image | None = None
    unsafe_seed: int = 0
    safe_seed: int = 0
    tries_unsafe: int = 0
    tries_safe: int = 0
    edits: int = 0  # of the present unsafe image

    def record(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "unsafe": f"unsafe/{self.index:04d}.png",
            "safe": f"safe/{self.index:04d}.png",
            "unsafe_prompt": self.unsafe_prompt,
            "safe_prompt": self.safe_prompt,
            "unsafe_seed": self.unsafe_seed,
            "safe_seed": self.safe_seed,
            "tries_unsafe": self.tries_unsafe,
            "tries_safe": self.tries_safe,
        }


def _make_block(session: Session, indices: range, folder: Path) -> dict[str, Any]:
    """One block of pairs with its images written: the rows of `pairs.jsonl` and the account."""
    settings, prompts = session.recipe.pairs, session.concept.pairs
    rows = [_Row(i, prompts.unsafe[i % len(prompts.unsafe)], prompts.safe[i % len(prompts.safe)]) for i in indices]
    account: Counter[str] = Counter()
    while pending := [row for row in rows if row.safe is None]:
        wanting = [row for row in pending if row.unsafe is None]
        if any(row.tries_unsafe == settings.max_tries for row in wanting):
            raise UserError(_unsatisfied(session, folder, account))
        if wanting:
            _try_unsafe(session, wanting, account)
        editing = [row for row in pending if row.unsafe is not None]
        if editing:
            _try_safe(session, editing, account)
    for row in rows:
        for side, image in (("unsafe", row.unsafe), ("safe", row.safe)):
            assert image is not None
            rundir.write_image(folder / side / f"{row.index:04d}.png", image)
    return {"rows": [row.record() for row in rows], "account": dict(account)}


def _try_unsafe(session: Session, rows: Sequence[_Row], account: Counter[str]) -> None:
    for row in rows:
        row.unsafe_seed = seed_for(session.erase_seed, "pairs", "unsafe", row.index, row.tries_unsafe)
        row.tries_unsafe, row.edits = row.tries_unsafe + 1, 0
    images = session.model.generate(
        [row.unsafe_prompt for row in rows],
        seeds=[row.unsafe_seed for row in rows],
        sampling=session.recipe.sampling,
    )
    for row, image, verdict in zip(rows, images, session.curator(images), strict=True):
        account["unsafe_generated"] += 1
        account["unsafe_kept" if verdict.label == "present" else f"unsafe_rejected_{verdict.label}"] += 1
        row.unsafe = image if verdict.label == "present" else None


def _try_safe(session: Session, rows: Sequence[_Row], account: Counter[str]) -> None:
    settings = session.recipe.pairs
    for row in rows:
        row.safe_seed = seed_for(session.erase_seed, "pairs", "safe", row.index, row.tries_safe)
        row.tries_safe, row.edits = row.tries_safe + 1, row.edits + 1
    images = session.model.edit(
        [row.unsafe for row in rows if row.unsafe is not None],
        [row.safe_prompt for row in rows],
        strength=settings.strength,
        seeds=[row.safe_seed for row in rows],
        sampling=replace(session.recipe.sampling, guidance_scale=settings.guidance_scale),
        negative_prompts=[row.unsafe_prompt for row in rows],
    )
    for row, image, verdict in zip(rows, images, session.curator(images), strict=True):
        account["safe_edited"] += 1
        if verdict.label == "absent":
            account["safe_kept"] += 1
            row.safe = image
            continue
        account[f"safe_rejected_{verdict.label}"] += 1
        if row.edits == settings.max_edits:
            account["unsafe_given_up"] += 1
            row.unsafe = None


def _unsatisfied(session: Session, folder: Path, account: Mapping[str, int]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in account.items())
    return (
        f"{folder}: the curator of concept {session.concept.name!r} was not satisfied within pairs.max_tries = "
        f"{session.recipe.pairs.max_tries} ({told}); mend the pair prompts or the judge, or raise pairs.max_tries, "
        "in a new --out"
    )
