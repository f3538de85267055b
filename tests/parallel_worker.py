"""What each process of tests/test_parallel.py does: `python parallel_worker.py FOLDER MODEL`.

A whole run of quick leaves by the command line, then 20 steps of DUO, then pairs that fail in one process alone. All
in one start, because that takes longer than what is tested.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from duo import parallel, plugins
from duo.errors import UserError
from test_stages import CONCEPT, LEAVES, RECIPE, ByPrompt

TRAINED = {"max_train_steps": 20, "train_batch_size": 4, "rank": 4, "learning_rate": 1e-3, "prior_weight": 10.0}


@dataclass(frozen=True, kw_only=True)
class Failing(ByPrompt):
    """Fails in the second process; in the first it never finds the concept, which would take all tries to tell."""

    def __call__(self, images: Any) -> Any:
        if parallel.rank() == 1:
            raise UserError("this judge broke")
        return super().__call__(images)


def leaves() -> dict[tuple[str, str], type]:
    return {**LEAVES, ("judges", "failing"): Failing}


def write_recipes(folder: Path, model: str) -> None:
    (folder / "fire.toml").write_text(CONCEPT)
    (folder / "recipe.toml").write_text(RECIPE.replace('"tiny"', json.dumps(model)))
    broken = CONCEPT.replace('curator = {name = "by_prompt"}', 'curator = {name = "failing"}')
    (folder / "broken-fire.toml").write_text(broken)
    (folder / "broken.toml").write_text(
        'extends = "recipe.toml"\nconcept = "broken-fire.toml"\npairs = {n = 40, block = 1}\n'
    )


def train(model: Any, folder: Path) -> None:
    """20 steps of DUO on four pairs, logged to `folder/log.jsonl`; the LoRA goes to `folder/delta.safetensors`."""
    from duo.methods.duo import Duo
    from duo.pairs import Pairs
    from duo.rundir import StageRun

    safe = [Image.new("RGB", (64, 64), (40 * i, 90, 200 - 40 * i)) for i in range(6)]
    unsafe = [image.copy() for image in safe]
    for image in unsafe:
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 120, 0))
    pairs = Pairs(names=[str(i) for i in range(6)], unsafe=unsafe, safe=safe)
    run = StageRun(folder=folder, seed=5, device=model.device)
    delta = Duo(**TRAINED).erase(model, None, pairs=pairs, run=run)  # type: ignore[arg-type]
    if parallel.is_main():
        delta.save(folder / "delta.safetensors")


def main(folder: Path, model: str) -> None:
    from duo import cli
    from duo.models import load_family

    load = plugins.load
    plugins.load = lambda kind, name: leaves().get((kind, name)) or load(kind, name)
    codes = [cli.main(["run", str(folder / "recipe.toml"), "--out", str(folder / "run")])]
    train(load_family(model), folder / "trained")
    parallel.barrier()
    codes.append(cli.main(["pairs", str(folder / "broken.toml"), "--out", str(folder / "broken")]))
    print(json.dumps(codes))  # noqa: T201 (how the test is told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
