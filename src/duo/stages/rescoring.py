"""An attack's images drawn again by other weights than it was run on, and judged: what a merged model is worth."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from duo.intact import intact_attack
from duo.plugins import Family
from duo.recipe import NOT_MEASURED, Recipe
from duo.rundir import RunDir
from duo.stages.attacking import rendered_attempts
from duo.stages.rendering import read_images, render
from duo.stages.session import Session


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """Images of `n` in which the concept's judge sees the concept, in the run (`before`) and drawn by other weights."""

    concept: str
    row: str
    n: int
    before: int
    after: int


def rescore(run: Path, recipe: Recipe, model: Family) -> Rescored | None:
    """Draw the images of the first attack row of a run, on the erased model, again with `model`, and judge both.

    The prompts, learned words and seeds are the run's. None where the row was not run to its end; a `UserError` where
    another version of duo ran it.
    """
    row = recipe.attacks[0].row if recipe.attacks else ""
    stage = RunDir(run).stage("attack", row, "erased")
    if not stage.finished:
        return None
    session = Session(_judged_alone(recipe), run, device=model.device, model=model)
    attempts, seeds = rendered_attempts(stage.folder)
    intact_attack(stage)
    with tempfile.TemporaryDirectory() as folder:
        render(session, Path(folder), attempts, seeds, label=f"{row}: images drawn again", model="original")
        drawn = read_images(Path(folder), len(seeds))
    before, after = (
        sum(verdict.label == "present" for verdict in session.judge(images))
        for images in (read_images(stage.folder / "images", len(seeds)), drawn)
    )
    return Rescored(concept=session.concept.name, row=row, n=len(seeds), before=before, after=after)


def _judged_alone(recipe: Recipe) -> Recipe:
    """The recipe without the metrics that no image is drawn again for: their networks need not be on this machine."""
    return replace(recipe, score=replace(recipe.score.without_besides(), preservation=NOT_MEASURED))
