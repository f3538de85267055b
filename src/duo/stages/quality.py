"""Images of captions by both models, and what is measured on them: FID, KID and CLIP score, or toybox's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from duo import parallel, rundir, scores
from duo.plugins import Attempt, Metric, SetMetric
from duo.rundir import Stage
from duo.seeds import seed_for
from duo.stages.protocol import seeds_of, shared_protocol
from duo.stages.rendering import READ_TOGETHER, read_image, render
from duo.stages.session import CAPTIONS, MODELS, Session

OTHER_NOISE = "reference"  # folder of the original model's images that are the references
REFERENCES = "references"


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Image i of each model is of caption i, at the same noise. `references` are as many, or none where no metric
    needs them."""

    folder: Path
    prompts: Sequence[str]
    seeds: Sequence[int]
    references: Sequence[Path]

    def paths(self, model: str) -> list[Path]:
        """The images of one model."""
        return [self.folder / model / f"{i:04d}.png" for i in range(len(self.prompts))]


def draw_captions(session: Session, stage: Stage) -> Captioned | None:
    """Render the captions on both models, and with other noise on the original one where that gives the references."""
    if not session.quality:
        return None
    n, rows, folder = session.captions_n, session.captions, stage.folder / "images" / CAPTIONS
    chosen = [rows[i % len(rows)] for i in range(n)]
    prompts = [row.prompt for row in chosen]
    seeds = [
        row.seed if row.seed is not None and i < len(rows) else _seed(session, CAPTIONS, i)
        for i, row in enumerate(chosen)
    ]
    draws = {(model, model): seeds for model in MODELS}
    if session.draws_references:
        draws["original", OTHER_NOISE] = [_seed(session, f"{CAPTIONS} {OTHER_NOISE}", i) for i in range(n)]
    for (model, name), own in draws.items():
        with session.as_model(model):
            attempts = [Attempt(prompt=prompt) for prompt in prompts]
            render(session, folder / name, attempts, own, label=f"{CAPTIONS}, {name}: images", model=model)
    parallel.barrier()
    captioned = Captioned(folder=folder, prompts=prompts, seeds=seeds, references=session.references)
    if ("original", OTHER_NOISE) not in draws:
        return captioned
    return Captioned(folder=folder, prompts=prompts, seeds=seeds, references=captioned.paths(OTHER_NOISE))


def _seed(session: Session, purpose: str, index: int) -> int:
    return seed_for(session.recipe.seed, session.split, "score", purpose, index)


def measure_quality(session: Session, drawn: Captioned) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section `captions` of `scores.json`, and the protocol of each of its metrics by name."""
    looked = _Looked(drawn=drawn, known={})
    lines, protocols = [], {}
    for make in session.quality.values():
        metric = make()
        seed = session.recipe.seed
        told = (
            _of_sets(metric, looked, seed=seed) if hasattr(metric, "features") else _of_images(make, drawn, seed=seed)
        )
        lines.append({"metric": metric.name, "higher_is_better": metric.higher_is_better, **told})
        protocols[metric.name] = _protocol(session, metric, drawn)
    section = {"n": len(drawn.prompts), "prompts": len(set(drawn.prompts)), "metrics": lines}
    return section, protocols


def _of_images(make: Callable[[], Metric], drawn: Captioned, *, seed: int) -> dict[str, Any]:
    """A metric that has a value for each image and its prompt, with the difference by pairs."""
    values = {}
    for model in MODELS:
        metric = make()
        for rows in rundir.blocks(len(drawn.prompts), READ_TOGETHER):
            images = _read([drawn.paths(model)[i] for i in rows])
            metric.update(images=images, references=None, prompts=[drawn.prompts[i] for i in rows])
        values[model] = metric.compute()
    return scores.both(values["original"], values["erased"], prompts=drawn.prompts, seed=seed)


def _of_sets(metric: SetMetric, looked: _Looked, *, seed: int) -> dict[str, Any]:
    """A distance of sets, at equal n and with the same references for both models."""
    features = {name: looked.features(metric, name) for name in (*MODELS, REFERENCES)}

    def distance(model: str, rows: Sequence[int]) -> float:
        return metric.compute(features[model][list(rows)], features[REFERENCES][list(rows)])

    return scores.of_sets(distance, len(features[REFERENCES]), seed=seed)


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """Features of the images, made once for all metrics of one network."""

    drawn: Captioned
    known: dict[tuple[str, str], NDArray[np.float64]]

    def features(self, metric: SetMetric, name: str) -> NDArray[np.float64]:
        """(n, width) of one model's images, or of the references."""
        key = metric.digest, name
        if key not in self.known:
            paths = self.drawn.references if name == REFERENCES else self.drawn.paths(name)
            parts = [
                metric.features(_read([paths[i] for i in rows])) for rows in rundir.blocks(len(paths), READ_TOGETHER)
            ]
            self.known[key] = np.concatenate(parts)
        return self.known[key]


def _read(paths: Sequence[Path]) -> list[Image]:
    return [read_image(path) for path in paths]


def _protocol(session: Session, metric: Any, drawn: Captioned) -> dict[str, Any]:
    told = shared_protocol(session, metric, drawn.paths("original")[0], n=len(drawn.prompts))
    settings = session.recipe.score
    told |= {"prompts": {"set": settings.captions, "of": len(session.captions)}, "seeds": seeds_of(session)}
    if hasattr(metric, "features"):
        told |= {
            "references": {
                "from": "reference_images" if session.references else "the original model, same captions, other noise",
                "n": len(drawn.references),
                "digest": rundir.digest([rundir.digest(path) for path in drawn.references]),
            },
            "interval": {
                "by": "subsampling without replacement (Politis and Romano 1994)",
                "size": scores.subsample_size(len(drawn.prompts)),
                "draws": scores.DRAWS,
            },
        }
    return told
