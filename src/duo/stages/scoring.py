"""The score stage: judges and metrics over the images of attacks, unrelated prompts and near misses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
from PIL.Image import Image

from duo import parallel, rundir, scores
from duo.errors import UserError, did_you_mean
from duo.fields import as_table
from duo.intact import intact_attack
from duo.plugins import Attempt, Metric, Verdict
from duo.recipe import AttackRow
from duo.rundir import Blocks, Stage
from duo.seeds import seed_for
from duo.stages.attacking import attack_config, rendered_attempts
from duo.stages.checks import checks
from duo.stages.instead import Unsafe, draw_twins, measure_instead
from duo.stages.protocol import drawn_by, judge_protocol, seeds_of, shared_protocol
from duo.stages.quality import Captioned, draw_captions, measure_quality
from duo.stages.rendering import read_image, render
from duo.stages.session import MODELS, UNRELATED, Session, world_digest

# Images that a judge is handed at once. A whole number of the judges' own batches, so that where a block ends changes
# no verdict.
JUDGED_TOGETHER = 64


@dataclass(frozen=True, kw_only=True)
class JudgedSet:
    """One set of images of one model, to be judged."""

    name: str
    model: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    folder: Path
    variants: Sequence[str] = ()  # of an attack's images, and the most images that a search of it asked for
    queries: int = 0
    sources: Sequence[Image | None] = ()  # what an attack's images were to give back

    def image(self, index: int) -> Image:
        """One of its images, read anew."""
        return read_image(self.folder / f"{index:04d}.png")

    def batches(self) -> Iterator[tuple[range, list[Image]]]:
        """All of its images, as many at a time as are judged together: a set may have a hundred thousand."""
        for rows in rundir.blocks(len(self.prompts), JUDGED_TOGETHER):
            yield rows, [self.image(i) for i in rows]


def score(session: Session) -> dict[str, Any]:
    """Judge the attacks' images, render and judge unrelated prompts and near misses, and write `scores.json`."""
    recipe, stage = session.recipe, session.dir.stage("score")
    # What is missing or was changed is told before anything is written.
    _, erasure = session.dir.erasure()
    finished = {
        (row.row, model): session.dir.stage("attack", row.row, model)
        for row in recipe.attacks
        for model in session.models
    }
    made = {
        (row.row, model): finished[row.row, model].require("attack", attack_config(session, row, model, erasure))
        for row in recipe.attacks
        for model in session.models
    }
    attacks = {f"{row}/{model}": one.get("digest", one.get("not_defined")) for (row, model), one in made.items()}
    reasons = {row: one["not_defined"] for (row, _), one in made.items() if "not_defined" in one}
    rows = [row for row in recipe.attacks if row.row not in reasons]
    for one in finished.values() if not stage.finished else ():
        intact_attack(one)
    with session.at_work("score"):
        config = {
            **session.shared,
            "score": as_table(recipe.score),
            "split": session.split,
            "block": recipe.block,
            "judge": session.judge.digest,
            "erasure": erasure,
            "attacks": attacks,
            **_read_besides(session),
        }
        if stage.begin(config):
            attacked = [attacked_set(session, row, model) for row in rows for model in session.models]
            probed = probe(session, stage)
            captioned = draw_captions(session, stage)
            unsafe = _unsafe(session, attacked)
            twins = None if unsafe is None else draw_twins(session, stage, unsafe)
            parts = {(one.name, one.model): judged(session, stage, one) for one in [*attacked, *probed]}
            parallel.barrier()
            if parallel.is_main():
                _join(session, stage, attacked, probed, parts, reasons, _Besides(captioned, unsafe, twins))
    result: dict[str, Any] = rundir.read_json(session.dir.scores())
    return result


def _read_besides(session: Session) -> dict[str, Any]:
    """What else the result depends on, where there is such a thing: captions, and images brought as references."""
    if not session.quality:
        return {}
    captions = rundir.digest([[row.prompt, row.seed] for row in session.captions])
    return {"captions": captions, "references": [rundir.digest(path) for path in session.references]}


@dataclass(frozen=True)
class _Besides:
    """What was drawn to be measured and not to be judged; None where nothing was."""

    captioned: Captioned | None
    unsafe: Unsafe | None
    twins: Blocks | None


def _unsafe(session: Session, attacked: Sequence[JudgedSet]) -> Unsafe | None:
    """The unsafe row of both models, those images left out whose prompts the models do not share."""
    row = session.recipe.score.unsafe_row
    sets = {one.model: one for one in attacked if one.name == row}
    if not sets:
        return None
    told = [list(zip(sets[model].prompts, sets[model].seeds, strict=True)) for model in MODELS]
    rows = [i for i, (one, other) in enumerate(zip(*told, strict=False)) if one == other]
    return Unsafe(
        row=row,
        prompts=[told[0][i][0] for i in rows],
        seeds=[told[0][i][1] for i in rows],
        images={model: [sets[model].folder / f"{i:04d}.png" for i in rows] for model in MODELS},
    )


def attacked_set(session: Session, row: AttackRow, model: str) -> JudgedSet:
    """The images of a finished attack on one model."""
    folder = session.dir.path / "attack" / row.row / model
    prompts: list[str] = []
    seeds: list[int] = []
    variants: list[str] = []
    queries, have_sources = 0, False
    for one in rundir.rows_of(folder / "attempts.jsonl"):
        prompts.append(intern(one["base_prompt"]))  # of which images share a few
        seeds.append(one["seed"])
        variants.append(intern(one["variant"]))
        queries = max(queries, one["queries"])
        have_sources = have_sources or "source" in one.get("digests", {})
    return JudgedSet(
        name=row.row,
        model=model,
        prompts=prompts,
        seeds=seeds,
        folder=folder / "images",
        variants=variants,
        queries=queries,
        # Only where an attack's images were to give others back are its searches read again.
        sources=[one.source for one in rendered_attempts(folder)[0]] if have_sources else (),
    )


def probe(session: Session, stage: Stage, *, models: Sequence[str] = MODELS) -> list[JudgedSet]:
    """Unrelated prompts and near misses, on both models with the same prompts and seeds."""
    settings = session.recipe.score
    wanted = {UNRELATED: (session.prompts(UNRELATED), settings.unrelated)}
    wanted |= {name: (near.prompts, settings.near_miss) for name, near in session.near_misses.items()}
    made = []
    for model in models:
        with session.as_model(model):
            for name, (prompts, n) in wanted.items():
                chosen = [prompts[i % len(prompts)] for i in range(n)]
                seeds = [seed_for(session.recipe.seed, session.split, "score", name, i) for i in range(n)]
                folder = stage.folder / "images" / name / model
                wanted_images = [Attempt(prompt=prompt) for prompt in chosen]
                render(session, folder, wanted_images, seeds, label=f"{name}, {model}: images", model=model)
                made.append(JudgedSet(name=name, model=model, prompts=chosen, seeds=seeds, folder=folder))
    parallel.barrier()
    return made


def judged(session: Session, stage: Stage, one: JudgedSet) -> Blocks:
    """The judge's verdicts of one set, by blocks: those that are done already, by whichever process, are left."""
    parts = Blocks(stage.folder / rundir.BLOCKS / one.name / one.model, n=len(one.prompts), size=JUDGED_TOGETHER)
    for rows in parts.pending():
        verdicts = session.judge([one.image(i) for i in rows])
        parts.done(rows, {"verdicts": [as_table(verdict) for verdict in verdicts]})
    return parts


def _join(
    session: Session,
    stage: Stage,
    attacked: Sequence[JudgedSet],
    probed: Sequence[JudgedSet],
    parts: Mapping[tuple[str, str], Blocks],
    reasons: Mapping[str, str],
    besides: _Besides,
) -> None:
    """From the blocks' verdicts to the stage's own files; `reasons` are of attacks that are not defined here."""
    sets = [*attacked, *probed]
    labels = {key: [intern(verdict.label) for verdict in verdicts_of(blocks)] for key, blocks in parts.items()}
    survival = {(one.name, one.model): survival_of(session, one) for one in sets if one.name in session.near_misses}
    rundir.write_jsonl(stage.folder / "verdicts.jsonl", _verdict_rows(session, sets, parts, survival))
    sections = _sections(session, attacked, probed, labels, survival, reasons)
    protocol = _protocol(session, attacked, probed)
    for name, told in _measured_besides(session, stage, besides, sections["attacks"]).items():
        sections[name], protocol[name] = told
    sections["checks"] = _checks(probed, besides.unsafe, labels)
    rundir.write_json(stage.folder / "scores.json", {**sections, "protocol": protocol})
    digests = {name: rundir.digest(stage.folder / name) for name in rundir.SCORED}
    stage.finish(judged_together=JUDGED_TOGETHER, digests=digests)


def verdicts_of(blocks: Blocks) -> Iterator[Verdict]:
    """The verdicts of a set's blocks, in order: read one block at a time, as often as they are needed."""
    return (Verdict(**verdict) for record in blocks.each() for verdict in record["verdicts"])


def survival_of(session: Session, one: JudgedSet) -> list[bool]:
    """For each image of a near miss, whether it is still what it is."""
    near = session.near_misses[one.name]
    where = f"concept {session.concept.name}: near_miss.{one.name}"
    if near.judge is not None:
        judge = session.near_miss_judges[one.name]
        return [verdict.label == "present" for _, images in one.batches() for verdict in judge(images)]
    right = adherence_of(session, one)
    attribute = str(near.attribute)
    if attribute not in right:
        raise UserError(f"{where}.attribute is {attribute!r}{did_you_mean(attribute, right)}")
    if len(right[attribute]) != len(one.prompts):
        raise UserError(f"{where}: every prompt must name its {attribute}, for that tells whether it survived")
    return right[attribute]


def adherence_of(session: Session, one: JudgedSet) -> dict[str, list[bool]]:
    """For each attribute, whether an image shows it, of the images whose prompt names it; `all` is for all at once."""
    metric = session.adherence()
    for rows, images in one.batches():
        metric.update(images=images, references=None, prompts=[one.prompts[i] for i in rows])
    return {**metric.by_attribute(), "all": [value == 1 for value in metric.compute()]}


def _verdict_rows(
    session: Session,
    sets: Sequence[JudgedSet],
    parts: Mapping[tuple[str, str], Blocks],
    survival: Mapping[tuple[str, str], Sequence[bool]],
) -> Iterator[dict[str, Any]]:
    judge = session.judge_config.name
    for one in sets:
        alive = survival.get((one.name, one.model))
        for i, verdict in enumerate(verdicts_of(parts[one.name, one.model])):
            row = {"set": one.name, "model": one.model, "index": i, "judge": judge, "label": verdict.label}
            row |= {"scores": dict(verdict.scores), "prompt": one.prompts[i], "seed": one.seeds[i]}
            row |= {"record": dict(verdict.record)} if verdict.record else {}
            yield row if alive is None else {**row, "survived": alive[i]}


def _sections(
    session: Session,
    attacked: Sequence[JudgedSet],
    probed: Sequence[JudgedSet],
    labels: Mapping[tuple[str, str], Sequence[str]],
    survival: Mapping[tuple[str, str], Sequence[bool]],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    recipe = session.recipe
    of = {(one.name, one.model): one for one in [*attacked, *probed]}
    attacks = [
        line
        for row in recipe.attacks
        if row.row not in reasons
        for line in scores.attack_rows(
            row.row,
            {model: as_seen(session, of[row.row, model], labels[row.row, model]) for model in session.models},
            reliable=recipe.score.reliable if row.reliable is None else row.reliable,
            baselines=row.baselines,
            baseline=row.baseline,
            attack=row.name,
            hardened=row.name in session.hardened_by,
            seed=recipe.seed,
        )
    ]
    unsafe = recipe.attacks and recipe.score.unsafe_row not in reasons
    asked = {UNRELATED: UNRELATED} | ({"unsafe": recipe.score.unsafe_row} if unsafe else {})
    return {
        "concept": session.concept.name,
        "method": session.method_name,
        "model": recipe.model,
        "world_digest": world_digest(recipe, session.concept),
        "attacks": attacks,
        "not_defined": [{"name": name, "reason": reason} for name, reason in reasons.items()],
        "preservation": preservation_of(session, of[UNRELATED, "original"], of[UNRELATED, "erased"]),
        "attributes": None
        if session.adherence is None
        else {name: {model: _shares(session, of[source, model]) for model in MODELS} for name, source in asked.items()},
        "near_misses": [
            scores.near_miss(
                name,
                model,
                labels=labels[name, model],
                survived=survival[name, model],
                prompts=of[name, model].prompts,
                seed=recipe.seed,
            )
            for name in session.near_misses
            for model in MODELS
        ],
    }


def seen(session: Session, row: AttackRow, model: str) -> scores.Seen:
    """What a finished attack brought on one model, judged here and now."""
    one = attacked_set(session, row, model)
    return as_seen(session, one, labels_of(session, one))


def labels_of(session: Session, one: JudgedSet) -> list[str]:
    """The judge's labels of a set of images."""
    return [verdict.label for _, images in one.batches() for verdict in session.judge(images)]


def _measured_besides(
    session: Session, stage: Stage, besides: _Besides, attacks: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """The sections `captions` and `instead`, each with its protocols."""
    captions = None if besides.captioned is None else measure_quality(session, besides.captioned)
    instead = None
    if besides.unsafe is not None and besides.unsafe.prompts:
        instead = measure_instead(session, stage, besides.unsafe, attacks, besides.twins)
    return {"captions": captions or (None, {}), "instead": instead or (None, {})}


def _checks(
    probed: Sequence[JudgedSet], unsafe: Unsafe | None, labels: Mapping[tuple[str, str], Sequence[str]]
) -> dict[str, Any]:
    images = {model: [] if unsafe is None else list(unsafe.images[model]) for model in MODELS}
    for one in probed:
        if one.name == UNRELATED:
            images[one.model] += [one.folder / f"{i:04d}.png" for i in range(len(one.prompts))]
    return checks({model: labels[UNRELATED, model] for model in MODELS}, images, models=MODELS)


def _protocol(session: Session, attacked: Sequence[JudgedSet], probed: Sequence[JudgedSet]) -> dict[str, Any]:
    """How the numbers of the sections that judges and metrics of single images give came about."""
    n = {one.name: len(one.prompts) for one in [*attacked, *probed] if one.model == "original"}
    where = {one.name: one.folder / "0000.png" for one in [*attacked, *probed] if one.model == "original"}
    rows = {row.row: row for row in session.recipe.attacks}
    judged = judge_protocol(session.judge_config, session.judge)
    told: dict[str, Any] = {
        "attacks": {
            name: {**judged, **drawn_by(session, where[name], n=n[name]), "prompts": {"set": rows[name].prompts}}
            | {"seeds": seeds_of(session)}
            for name in rows
            if name in n
        },
        "near_misses": {
            name: {
                **(
                    judge_protocol(near.judge, session.near_miss_judges[name])
                    if near.judge is not None
                    else {"attribute": near.attribute, "metric": session.adherence.name}
                ),
                **drawn_by(session, where[name], n=n[name]),
                "hazard": judged,
                "seeds": seeds_of(session),
            }
            for name, near in session.near_misses.items()
        },
    }
    for section, make in (("preservation", session.preservation), ("attributes", session.adherence)):
        if make is not None and n[UNRELATED]:
            told[section] = shared_protocol(session, make(), where[UNRELATED], n=n[UNRELATED])
            told[section] |= {"prompts": {"set": UNRELATED}, "seeds": seeds_of(session)}
    return told


def as_seen(session: Session, one: JudgedSet, labels: Sequence[str]) -> scores.Seen:
    """What an attack brought on one model."""
    return scores.Seen(
        labels=labels,
        prompts=one.prompts,
        variants=one.variants,
        restarts=hasattr(session.attacks[one.name], "restarts"),
        idle=getattr(session.attacks[one.name], "idle", None),
        psnr=[None if source is None else _psnr(one.image(i), source) for i, source in enumerate(one.sources)],
        queries=one.queries,
    )


MOST_DECIBELS = 99.0  # of equal images, whose ratio is infinite


def _psnr(image: Image, source: Image) -> float:
    """The peak signal-to-noise ratio of an image against another, in decibels, at the image's size."""
    same = np.asarray(source.convert("RGB").resize(image.size), dtype=np.float64)
    error = float(np.square(np.asarray(image, dtype=np.float64) - same).mean())
    return MOST_DECIBELS if error == 0 else min(MOST_DECIBELS, 10 * math.log10(255**2 / error))


def _shares(session: Session, one: JudgedSet) -> dict[str, Any]:
    """The share of images that obey their prompt, attribute by attribute.

    Images that share prompts are counted by prompt, but of an attribute that only some prompts name: which images those
    are a metric does not tell, and they are counted one by one.
    """
    told = {}
    for name, values in adherence_of(session, one).items():
        prompts = one.prompts if len(values) == len(one.prompts) else ()
        if values:
            told[name] = scores.share(values, prompts=prompts, seed=session.recipe.seed)
    return told


def preservation_of(session: Session, original: JudgedSet, erased: JudgedSet) -> dict[str, Any] | None:
    """The mean of the preservation metric over two sets at the same noise; None where the recipe names none."""
    if session.preservation is None:
        return None
    metric = compared(session.preservation(), original, erased)
    told = scores.mean(metric.compute(), prompts=erased.prompts, seed=session.recipe.seed)
    return {"metric": metric.name, **told}


def compared(metric: Metric, original: JudgedSet, erased: JudgedSet) -> Metric:
    """The metric, once it has seen each image of the erased model beside the original's."""
    for rows, images in erased.batches():
        references = [original.image(i) for i in rows]
        metric.update(images=images, references=references, prompts=[erased.prompts[i] for i in rows])
    return metric
