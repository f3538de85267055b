"""What comes instead of the concept: on unsafe prompts, how near the images are to what else was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from duo import parallel, rundir, scores
from duo.rundir import Blocks, Stage, progress
from duo.safe_part import SafePart
from duo.seeds import seed_for
from duo.stages.protocol import seeds_of, shared_protocol
from duo.stages.rendering import READ_TOGETHER, read_image
from duo.stages.session import MODELS, TWINS, Session


@dataclass(frozen=True, kw_only=True)
class Unsafe:
    """The images of the unsafe row by both models, of those prompts and seeds that both have."""

    row: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    images: Mapping[str, Sequence[Path]]

    def read(self, model: str, rows: Sequence[int]) -> list[Image]:
        """Some of the images of one model."""
        return [read_image(self.images[model][i]) for i in rows]


def draw_twins(session: Session, stage: Stage, unsafe: Unsafe) -> Blocks | None:
    """The safe twins of the original model's images of unsafe prompts, as pairs are made: its image is edited towards
    what else its prompt says, by the strength and guidance of the concept's pairs, until the curator sees nothing.

    Prompts that name the concept by no known phrase have none, and neither has an image of which every edit
    (`pairs.max_edits`) still shows the concept.
    """
    n = min(session.twins, len(unsafe.prompts))
    if n == 0:
        return None
    safe_part = SafePart(session.concept)
    wanted = [safe_part(prompt) for prompt in unsafe.prompts[:n]]
    parts = Blocks(stage.folder / rundir.BLOCKS / TWINS, n=n, size=session.recipe.block)
    with session.as_model("original"), progress(n, "safe twins") as bar:
        for rows in parts.pending():
            parts.done(rows, {"twins": _edit(session, stage, unsafe, wanted, rows)})
            bar.update(rows.stop)
    parallel.barrier()
    return parts


def _edit(
    session: Session, stage: Stage, unsafe: Unsafe, wanted: Sequence[str | None], rows: range
) -> list[dict[str, Any]]:
    """The twins of one block, written; a row for each that was found."""
    settings, found = session.recipe.pairs, []
    assert settings.strength is not None and settings.guidance_scale is not None  # the session resolved them
    left = {i: prompt for i in rows if (prompt := wanted[i]) is not None}
    for attempt in range(settings.max_edits):
        if not left:
            break
        seeds = {i: seed_for(session.recipe.seed, session.split, "score", TWINS, i, attempt) for i in left}
        images = session.model.edit(
            unsafe.read("original", list(left)),
            list(left.values()),
            strength=settings.strength,
            seeds=list(seeds.values()),
            sampling=replace(session.recipe.sampling, guidance_scale=settings.guidance_scale),
            negative_prompts=[unsafe.prompts[i] for i in left],
        )
        for i, image, verdict in zip(list(left), images, session.curator(images), strict=True):
            if verdict.label == "absent":
                rundir.write_image(_twin(stage, i), image)
                found.append(
                    {"index": i, "prompt": left.pop(i), "negative_prompt": unsafe.prompts[i], "seed": seeds[i]}
                )
    return sorted(found, key=lambda row: int(row["index"]))


def _twin(stage: Stage, index: int) -> Path:
    return stage.folder / "images" / TWINS / f"{index:04d}.png"


def measure_instead(
    session: Session, stage: Stage, unsafe: Unsafe, attacks: Sequence[Mapping[str, Any]], twins: Blocks | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section `instead` of `scores.json` and its protocols; `attacks` are the rows that were scored already."""
    section: dict[str, Any] = {"row": unsafe.row, "agreement": None, "twins": None}
    section["corrupted"] = {
        row["model"]: {"rate": row["corrupted_rate"], "low": row["corrupted_low"], "high": row["corrupted_high"]}
        for row in attacks
        if row["name"] == unsafe.row and row["model"] in MODELS
    }
    protocols: dict[str, Any] = {}
    if session.agreement is not None:
        safe_part = SafePart(session.concept)
        asked = {i: text for i, prompt in enumerate(unsafe.prompts) if (text := safe_part(prompt)) is not None}
        section["agreement"], protocols["agreement"] = _compared(session, unsafe, session.agreement, asked, {})
        protocols["agreement"] |= {"prompts": {"set": unsafe.row, "as": "without the concept (duo.safe_part)"}}
    if twins is not None:
        made = [row for record in twins.records() for row in record["twins"]]
        rundir.write_jsonl(stage.folder / "twins.jsonl", made)
        asked = {row["index"]: row["prompt"] for row in made}
        references = {i: _twin(stage, i) for i in asked}
        assert session.preservation is not None  # or there were no twins
        section["twins"], protocols["twins"] = _compared(session, unsafe, session.preservation, asked, references)
        section["twins"]["wanted"] = min(session.twins, len(unsafe.prompts))
        pairs = session.recipe.pairs
        protocols["twins"] |= {
            "prompts": {"set": unsafe.row, "as": "edited towards the prompt without the concept (duo.safe_part)"},
            "edit": {"strength": pairs.strength, "guidance_scale": pairs.guidance_scale, "max_edits": pairs.max_edits},
            "curator": {"judge": session.concept.curator.name, "digest": session.curator.digest},
        }
    return section, protocols


def _compared(
    session: Session, unsafe: Unsafe, make: Any, asked: Mapping[int, str], references: Mapping[int, Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a metric gives for some of the images of both models, beside `asked` prompts and, if any, `references`."""
    rows, values = list(asked), {}
    for model in MODELS:
        metric = make()
        if rows:  # metrics refuse to compare nothing
            for part in (rows[cut.start : cut.stop] for cut in rundir.blocks(len(rows), READ_TOGETHER)):
                beside = [read_image(references[i]) for i in part] if references else None
                metric.update(images=unsafe.read(model, part), references=beside, prompts=[asked[i] for i in part])
            values[model] = metric.compute()
    told: dict[str, Any] = {"metric": metric.name, "n": len(rows)}
    prompts = [unsafe.prompts[i] for i in rows]
    if rows:
        told |= scores.both(values["original"], values["erased"], prompts=prompts, seed=session.recipe.seed)
    else:
        told |= {"original": None, "erased": None, "difference": None}
    protocol = shared_protocol(session, metric, unsafe.images["original"][0], n=len(rows))
    return told, {**protocol, "seeds": seeds_of(session)}
