"""Erasures as `duo merge` and `duo export` take them: run folders and delta files, of one base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duo.delta import Delta, compose
from duo.errors import UserError
from duo.fields import build
from duo.recipe import Recipe
from duo.report.json_fields import read_object
from duo.report.records import Scores
from duo.report.wording import no_fall
from duo.rundir import RunDir, digest, read_table


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """One erasure and the model that it is of, as the user called it. `recipe` is that of a run, None of a file."""

    path: Path
    delta: Delta
    digest: str  # of the delta's file
    model: str
    recipe: Recipe | None = None

    @classmethod
    def read(cls, path: Path) -> Erasure:
        """A run folder whose erasure is finished, or a `delta.safetensors`."""
        if path.is_file():
            delta = Delta.load(path)
            model = delta.record.get("model")
            if not isinstance(model, str):
                raise UserError(f"{path} does not say which model it is of; give the folder of its run")
            return cls(path=path, delta=delta, digest=digest(path), model=model)
        if not path.is_dir():
            raise UserError(f"{path} is neither a run folder nor a delta file; give the --out of a `duo run`")
        RunDir(path).require()
        file, wanted = RunDir(path).erasure()
        recipe = build(Recipe, read_table(path / "run.json", "recipe")["recipe"], f"{path / 'run.json'}: recipe")
        return cls(path=path, delta=Delta.load(file), digest=wanted, model=recipe.model, recipe=recipe)


def doubt(path: Path) -> str | None:
    """Why a run's own scores do not show that its concept went; None where they do, or where there are none."""
    run = RunDir(path)
    return no_fall(Scores.read(read_object(run.scores()))) if run.stage("score").finished else None


@dataclass(frozen=True, kw_only=True)
class Composition:
    """One erasure or several on one model, with their weights, and the delta that they come to."""

    erasures: tuple[Erasure, ...]
    weights: tuple[float, ...]
    delta: Delta

    @classmethod
    def read(cls, paths: Sequence[Path], weights: Sequence[float] | None = None) -> Composition:
        """The erasures at `paths`; `weights` are 1 each where None. `UserError` where they do not go together."""
        found = tuple(Erasure.read(path) for path in paths)
        first, *others = dict.fromkeys(one.model for one in found)
        if others:
            raise UserError(f"the erasures are of different models, {first!r} and {others[0]!r}; merge one by one")
        _refuse_twice(found)
        chosen = (1.0,) * len(found) if weights is None else tuple(weights)
        whole = chosen == (1.0,)
        delta = found[0].delta if whole else compose([one.delta for one in found], chosen)
        return cls(erasures=found, weights=chosen, delta=delta)

    @property
    def model(self) -> str:
        """The base model."""
        return self.erasures[0].model

    @property
    def model_config(self) -> str | None:
        """Whose settings a base model has that is a single checkpoint: as the runs have it."""
        return next((one.recipe.model_config for one in self.erasures if one.recipe is not None), None)

    @property
    def alone(self) -> bool:
        """Whether this is one erasure as it was made."""
        return self.weights == (1.0,)


def _refuse_twice(found: Sequence[Erasure]) -> None:
    paths: dict[str, Path] = {}
    for one in found:
        if one.digest in paths:
            raise UserError(
                f"{paths[one.digest]} and {one.path} are the same erasure, and would count twice; name it once, with "
                "--weights where it shall weigh more"
            )
        paths[one.digest] = one.path
