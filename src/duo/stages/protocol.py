"""How each number of `scores.json` came about: its section `protocol`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from duo.fields import LeafConfig, as_table
from duo.plugins import Judge
from duo.stages.rendering import read_image
from duo.stages.session import Session


def shared_protocol(session: Session, metric: Any, image: Path, *, n: int) -> dict[str, Any]:
    """What looks at the images (nothing where the metric does not say), how many there are and how they were drawn."""
    told = dict(metric.protocol()) if hasattr(metric, "protocol") else {}
    return {**told, **drawn_by(session, image, n=n)}


def drawn_by(session: Session, image: Path, *, n: int) -> dict[str, Any]:
    """How many images there are, as large as `image`, and the sampler that drew them."""
    sampling = session.recipe.sampling
    return {
        "images": {"n": n, "size": list(read_image(image).size)},
        "sampler": {
            "name": session.model.sampler(sampling),
            "steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
        },
    }


def seeds_of(session: Session) -> dict[str, Any]:
    """Where the images' noise comes from: the same for both models."""
    return {"run": session.recipe.seed, "split": session.split, "noise": "the same on both models"}


def judge_protocol(config: LeafConfig, judge: Judge) -> dict[str, Any]:
    """What a judge's label hangs on. `threshold` is None where the likeliest label wins, `label_set` where the judge
    knows no classes."""
    settings: Mapping[str, Any] = as_table(judge) if is_dataclass(judge) else config.settings
    counted = getattr(judge, "counted", None)
    return {
        "judge": config.name,
        "digest": judge.digest,
        "threshold": getattr(judge, "threshold", None),
        "label_set": None if counted is None else list(counted),
        "settings": dict(settings),
    }
