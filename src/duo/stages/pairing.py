"""The pairs stage: unsafe images and their safe twins (DUO, Park et al. 2024, section 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from duo import parallel, rundir
from duo.errors import UserError
from duo.fields import as_table
from duo.pairs import SIDES, PairFiles, Pairs
from duo.plugins import Judge, Verdict
from duo.refusal import refuse_where_sexual
from duo.rundir import Blocks, Stage, progress
from duo.seeds import seed_for
from duo.stages.session import Session

CURATOR = "curator"  # of the concept, among those that decide
LATER = ("prompts", "judges")  # fields that older versions of duo did not have, told where they say something


def make_pairs(session: Session) -> Pairs:
    """Generate unsafe images and edit each into its safe twin, keeping what the curator accepts (DUO, section 3).

    A row is tried with new seeds up to `pairs.max_tries` times, and each of its unsafe images is edited up to
    `pairs.max_edits` times. A row that finds no pair is a `UserError` with the account of what was rejected; it may be
    gone on with by raising either. Each rejected image is a row of `rejected.jsonl`, with its seed. Pairs of the user's
    own (`pairs.source`) are copied in.
    """
    settings, stage = session.recipe.pairs, session.dir.stage("pairs")
    brought = None
    if not stage.finished:
        brought = _read_brought(session) if settings.brought else None
        session.check_model(
            pairs=settings.n if brought is None else len(brought),
            size=brought.unsafe[0].size if brought else None,
        )
    config = {
        **session.shared,
        "erase_seed": session.erase_seed,
        "pairs": {name: value for name, value in as_table(settings).items() if name not in LATER or value},
        "curator": session.curated_by,
    }
    if settings.brought:  # of a finished stage the copies count, and the originals may be gone
        config["brought"] = brought.digest() if brought else stage.require("pairs")["config"].get("brought")
    with session.at_work("pairs"):
        if stage.begin(config, may_rise=session.may_rise):
            if not session.recipe.validation:
                _note_same_networks(session)
            n = settings.n if brought is None else len(brought)
            parts = Blocks(stage.folder / rundir.BLOCKS, n=n, size=settings.block)
            parts.forget(lambda record: _given_up_sooner(record, settings.max_edits))
            with progress(n, "pairs") as bar:
                for rows in parts.pending():
                    done = _make_block(session, rows, parts) if brought is None else _bring(session, brought, rows)
                    parts.done(rows, done)
                    bar.update(rows.stop)
            parallel.barrier()
            if parallel.is_main():
                _join(stage, parts)
    return Pairs.read(stage.folder)


def _given_up_sooner(record: Mapping[str, Any], max_edits: int) -> bool:
    """Whether an unsafe image of a block was given up after fewer edits than `max_edits`, which was raised since."""
    return bool(record["account"].get("unsafe_given_up")) and record["max_edits"] < max_edits


def _same_network(judge: Judge, curator: Judge) -> bool:
    network = getattr(judge, "network", None)
    return judge == curator or (network is not None and network == getattr(curator, "network", None))


def _note_same_networks(session: Session) -> None:
    """Say where what selects the pairs also grades the result."""
    for name, curator in {CURATOR: session.curator, **session.pair_judges}.items():
        if _same_network(session.judge, curator):
            rundir.note(
                f"judge and {name} of concept {session.concept.name} look with the same network; what it overlooks in "
                "the pairs it overlooks in the scores too"
            )


def _join(stage: Stage, parts: Blocks) -> None:
    """What the blocks have to tell, as the stage's own files."""
    records = parts.records()
    rundir.write_jsonl(stage.folder / "pairs.jsonl", [row for record in records for row in record["rows"]])
    tell_rejected(stage.folder, records)
    account = sum((Counter(record["account"]) for record in records), Counter[str]())
    stage.finish(account=dict(account), digest=Pairs.read(stage.folder).digest())


def tell_rejected(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write what the blocks of pairs rejected, image by image."""
    rundir.write_jsonl(folder / "rejected.jsonl", [row for record in records for row in record["rejected"]])


@dataclass
class PairRow:
    """One pair in the making. `origin` says where an unsafe image is from that was not drawn for the pair."""

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
    origin: Mapping[str, Any] = field(default_factory=dict)

    def record(self, ending: str) -> dict[str, Any]:
        return {
            "index": self.index,
            "unsafe": f"unsafe/{self.index:04d}.{ending}",
            "safe": f"safe/{self.index:04d}.{ending}",
            "unsafe_prompt": self.unsafe_prompt,
            "safe_prompt": self.safe_prompt,
            "unsafe_seed": self.unsafe_seed,
            "safe_seed": self.safe_seed,
            "tries_unsafe": self.tries_unsafe,
            "tries_safe": self.tries_safe,
            **self.origin,
        }

    def write(self, folder: Path, ending: str) -> None:
        """Write both images."""
        for side, image in (("unsafe", self.unsafe), ("safe", self.safe)):
            assert image is not None
            rundir.write_image(folder / side / f"{self.index:04d}.{ending}", image)


def _make_block(session: Session, indices: range, parts: Blocks) -> dict[str, Any]:
    """One block of pairs with its images written: the rows of `pairs.jsonl` and the account."""
    settings, prompts, folder = session.recipe.pairs, session.pair_prompts, session.dir.stage("pairs").folder
    rows = [PairRow(i, *prompts[i % len(prompts)]) for i in indices]
    account: Counter[str] = Counter()
    rejected: list[dict[str, Any]] = []
    while pending := [row for row in rows if row.safe is None]:
        wanting = [row for row in pending if row.unsafe is None]
        if any(row.tries_unsafe == settings.max_tries for row in wanting):
            tell_rejected(folder, [*parts.records(), {"rejected": rejected}])
            raise UserError(_unsatisfied(session, folder, account))
        if wanting:
            _try_unsafe(session, wanting, account, rejected)
        editing = [row for row in pending if row.unsafe is not None]
        if editing:
            try_twins(session, editing, account, rejected, seed=session.erase_seed)
    for row in rows:
        row.write(folder, settings.format)
    return {
        "rows": [row.record(settings.format) for row in rows],
        "account": dict(account),
        "rejected": rejected,
        "max_edits": settings.max_edits,
    }


def _try_unsafe(
    session: Session, rows: Sequence[PairRow], account: Counter[str], rejected: list[dict[str, Any]]
) -> None:
    for row in rows:
        row.unsafe_seed = seed_for(session.erase_seed, "pairs", "unsafe", row.index, row.tries_unsafe)
        row.tries_unsafe, row.edits = row.tries_unsafe + 1, 0
    images = session.model.generate(
        [row.unsafe_prompt for row in rows],
        seeds=[row.unsafe_seed for row in rows],
        sampling=session.recipe.sampling,
    )
    for row, image, (verdict, judge) in zip(rows, images, _curated(session, images, wanted="present"), strict=True):
        account["unsafe_generated"] += 1
        row.unsafe = image if verdict.label == "present" else None
        if row.unsafe is not None:
            account["unsafe_kept"] += 1
        else:
            account[f"unsafe_rejected_{verdict.label}"] += 1
            rejected.append(_rejection(row, "unsafe", row.unsafe_prompt, row.unsafe_seed, verdict, judge))


def try_twins(
    session: Session, rows: Sequence[PairRow], account: Counter[str], rejected: list[dict[str, Any]], *, seed: int
) -> None:
    """Edit each unsafe image once, with noise that comes of `seed`, and keep as its twin what all judges find clean.

    An unsafe image of which `pairs.max_edits` edits were rejected is given up.
    """
    settings = session.recipe.pairs
    assert settings.strength is not None and settings.guidance_scale is not None  # the session resolved them
    for row in rows:
        row.safe_seed = seed_for(seed, "pairs", "safe", row.index, row.tries_safe)
        row.tries_safe, row.edits = row.tries_safe + 1, row.edits + 1
    images = session.model.edit(
        [row.unsafe for row in rows if row.unsafe is not None],
        [row.safe_prompt for row in rows],
        strength=settings.strength,
        seeds=[row.safe_seed for row in rows],
        sampling=replace(session.recipe.sampling, guidance_scale=settings.guidance_scale),
        negative_prompts=[row.unsafe_prompt for row in rows],
    )
    for row, image, (verdict, judge) in zip(rows, images, _curated(session, images, wanted="absent"), strict=True):
        account["safe_edited"] += 1
        if verdict.label == "absent":
            account["safe_kept"] += 1
            row.safe = image
            continue
        account[f"safe_rejected_{verdict.label}"] += 1
        rejected.append(_rejection(row, "safe", row.safe_prompt, row.safe_seed, verdict, judge))
        if row.edits == settings.max_edits:
            account["unsafe_given_up"] += 1
            row.unsafe = None


def _curated(session: Session, images: Sequence[Image], *, wanted: str) -> Iterator[tuple[Verdict, str]]:
    """Of each image the verdict of the first judge that does not say what is `wanted`, else the curator's, and whose.

    All judges look at all images, so that an image's verdict does not depend on those beside it.
    """
    told = [(CURATOR, session.curator(images)), *((name, one(images)) for name, one in session.pair_judges.items())]
    for i in range(len(images)):
        each = [(verdicts[i], name) for name, verdicts in told]
        yield next((one for one in each if one[0].label != wanted), each[0])


def _rejection(row: PairRow, side: str, prompt: str, seed: int, verdict: Verdict, judge: str) -> dict[str, Any]:
    """What a judge did not take, and why: its label and scores. `unsafe_seed` made what a rejected twin edits."""
    return {
        "index": row.index,
        "side": side,
        "prompt": prompt,
        "seed": seed,
        **({"unsafe_seed": row.unsafe_seed} if side == "safe" else {}),
        "label": verdict.label,
        "scores": dict(verdict.scores),
        **({"judge": judge} if judge != CURATOR else {}),
    }


def _unsatisfied(session: Session, folder: Path, account: Mapping[str, int]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in account.items())
    return (
        f"{folder}: the curator of concept {session.concept.name!r} was not satisfied within pairs.max_tries = "
        f"{session.recipe.pairs.max_tries} ({told}; rejected.jsonl has each image); raise pairs.max_tries or "
        "pairs.max_edits and go on, or mend the pair prompts or the judge in a new --out"
    )


# --- pairs of the user's own ------------------------------------------------------------------------


def _read_brought(session: Session) -> Pairs:
    """The user's pairs, whole and checked; where they or the concept are sexual, their names and texts may not speak of
    minors."""
    settings = session.recipe.pairs
    if settings.source is not None:
        found = PairFiles.find(Path(settings.source).expanduser())
    else:
        found = PairFiles.of_folders(*(Path(str(one)).expanduser() for one in (settings.unsafe, settings.safe)))
    refuse_where_sexual(found.texts(), adults_only=session.concept.adults_only)
    return Pairs.of(found)


def _bring(session: Session, brought: Pairs, indices: range) -> dict[str, Any]:
    """Copy one block of the user's pairs into the run. The curator's verdicts are counted; nothing is rejected."""
    folder, ending = session.dir.stage("pairs").folder, session.recipe.pairs.format
    told = brought.rows if len(brought.rows) == len(brought) else [{}] * len(brought)
    account: Counter[str] = Counter()
    rows = []
    for side, images in (("unsafe", brought.unsafe), ("safe", brought.safe)):
        chosen = [images[i] for i in indices]
        account[f"{side}_brought"] += len(chosen)
        account.update(f"{side}_judged_{verdict.label}" for verdict in session.curator(chosen))
        for i, image in zip(indices, chosen, strict=True):
            rundir.write_image(folder / side / f"{i:04d}.{ending}", image)
    for i in indices:
        row = {"index": i, **{side: f"{side}/{i:04d}.{ending}" for side in SIDES}, "name": brought.names[i]}
        prompts = {f"{side}_prompt": str(told[i].get(f"{side}_prompt") or "") for side in SIDES}
        rows.append({**row, **prompts})
    return {"rows": rows, "account": dict(account), "rejected": []}
