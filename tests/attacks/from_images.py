"""What the tests of attacks that start from images share: a concept of images, and models of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tiny_flow
from duo.concept import AttackConcept
from duo.plugins import Verdict

KINDS = ("sd", "sdxl", "sd3", "flux")


def bright(images: Sequence[Image.Image]) -> list[Verdict]:
    """A detector: the concept is a white spot, of 4×4 pixels or more."""
    white = [int((np.asarray(image).min(axis=2) > 250).sum()) for image in images]
    return [Verdict(label="present" if count >= 16 else "absent", scores={"white": count}) for count in white]


bright.digest = "white"  # type: ignore[attr-defined]


def spotted(seed: int, where: tuple[int, int], *, side: int = 32) -> Image.Image:
    """Dark noise with the concept at `where`."""
    image = tiny_flow.picture(seed, width=side, height=side).point(lambda level: level // 2)
    image.paste((255, 255, 255), (*where, where[0] + 4, where[1] + 4))
    return image


def concept_of(images: Sequence[Image.Image], prompts: Sequence[str] = ()) -> AttackConcept:
    prompts = tuple(prompts) or tuple(f"a white spot {row}" for row in range(len(images)))
    return AttackConcept(
        name="spots",
        words=("spot",),
        anchor="plain",
        vector_pairs=(),
        attack_images=list(images),
        attack_captions=tuple("a picture" for _ in images),
        attack_prompts=prompts,
        detector=bright,  # type: ignore[arg-type]
    )


def tiny_model(kind: str, vocabulary: Path, make_tiny_pipeline: Callable[[], Any]) -> Any:
    """A random model of each kind that diffusers can inpaint with."""
    import tiny_unet
    from duo.families.flux import Flux
    from duo.families.sd import Sd
    from duo.families.sd3 import Sd3
    from duo.families.sdxl import Sdxl

    if kind == "sd":
        return Sd(make_tiny_pipeline(), name="tiny")
    if kind == "sdxl":
        return Sdxl(tiny_unet.sdxl_pipeline(vocabulary), name="tiny")
    if kind == "sd3":
        return Sd3(tiny_flow.sd3_pipeline(vocabulary, channels=16), name="tiny")
    return Flux(tiny_flow.flux_pipeline(vocabulary), name="tiny")
