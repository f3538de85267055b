"""Inversion probe (as TINA 2026 and Rusanovsky et al. 2025): does starting noise exist that gives the image back?

An image of the concept is run backwards through the deterministic sampler, under the model under attack and with the
empty prompt (DDIM inversion, Song et al. 2021, section 4.3; for rectified flow Euler's method backwards). Sampling from
the noise that this ends at, again with the empty prompt, gives the image back, if the model still can. No text is used.

Where we depart from the published probes, and why:

- They read an image that comes back as knowledge of the concept. But the sampler's path can be run backwards from any
  image, and any good denoiser gives back most of them. So the same is done with images that the model never saw: the
  variant "control". Only what "concept" gives back and "control" does not says something of the concept.
- What should come back is the image as the model's own VAE renders it (`Attempt.source`). Where the VAE cannot hold an
  image, as a small one cannot hold a pattern, the denoiser is not to blame.
- Each step is solved `rounds` times, on the grid of times that the images will be sampled on. A single round, as is
  usual, needs many more steps to be as near. The published ones optimise the noise or each step by gradients instead.
- Guidance starts from the empty prompt too, so whatever its scale it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image, ImageOps
from torch import Tensor

from duo.attacks._images import image_of, stacked
from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.fields import check_above_0, check_above_0_or_none
from duo.image_files import opened
from duo.plugins import Access, Attempt, Run
from duo.sampling import inverted

if TYPE_CHECKING:
    from duo.target import Target

CELLS = 8  # checks along the side of a pattern
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class InversionProbe:
    """Sample from noise that images of the concept, and others, were inverted to."""

    access: ClassVar[Access] = Access.GRADIENT
    learns_from_images: ClassVar[bool] = True

    k: int = 16  # how many images of the concept are inverted, and as many others
    steps: int | None = None  # of the inversion; none: as many as images are sampled in
    rounds: int = 3  # how often each step is solved; 1 is plain DDIM inversion
    # What stands beside them: "pattern", checks in random colours, or a folder of images that the model never saw.
    control: str = "pattern"
    batch_size: int = 4

    def __post_init__(self) -> None:
        check_above_0(self, "k", "rounds", "batch_size")
        check_above_0_or_none(self, "steps")

    def passes(self, prompts: int) -> dict[str, int]:
        """Rows through the denoiser (for `duo run --dry-run`), at 50 steps where `steps` is none."""
        return {"denoiser": 2 * self.k * (self.steps or 50) * self.rounds}

    def prepare(self, target: Target, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Invert images: for both variants `<variant>.latents` (n, channels, height, width), unit normal noise if all
        went well, and `<variant>.sources` (n, height, width, 3), uint8. A batch that is done is kept in the folder."""
        if not concept.attack_images:
            raise UserError(f"concept {concept.name}: no attack_images, and inversion_probe inverts them")
        images = list(concept.attack_images[: self.k])
        variants = {"concept": images, "control": self._controls(len(images), images[0].size)}
        state: dict[str, Tensor] = {}
        total = sum(map(len, variants.values()))
        with run.progress(total, f"inverting {concept.name}") as bar:
            done = 0
            for variant, own in variants.items():
                parts = []
                for start in range(0, len(own), self.batch_size):
                    path = run.folder / f"inverted-{variant}-{start:04d}.safetensors"
                    if not path.exists():
                        batch = own[start : start + self.batch_size]
                        write_tensors(
                            path, self._invert(target, batch, steps=self.steps or run.sampling.num_inference_steps), {}
                        )
                    parts.append(read_tensors(path)[0])
                    done += len(parts[-1]["latents"])
                    bar.update(done)
                state |= {f"{variant}.{name}": torch.cat([part[name] for part in parts]) for name in parts[0]}
                run.log(variant=variant, noise=float(state[f"{variant}.latents"].std()))
        return state

    def search(
        self, target: Target, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """Two attempts, "concept" and "control", each of an image that `generator` draws. The prompt is not used.

        The record holds the image's number and how far its noise is from unit variance (`noise`, 1 where it is not).
        """
        for variant in ("concept", "control"):
            latents = state[f"{variant}.latents"]
            row = int(torch.randint(len(latents), (1,), generator=generator))
            yield Attempt(
                prompt="",
                negative_prompt="",  # not what guidance starts from otherwise, which need not be the empty prompt
                variant=variant,
                latents=latents[row],
                source=image_of(state[f"{variant}.sources"][row]),
                record={"image": row, "noise": float(latents[row].std())},
            )

    def _invert(self, target: Target, images: Sequence[Image.Image], *, steps: int) -> dict[str, Tensor]:
        """Noise, float32 on the CPU, and what the VAE makes of the images."""
        with torch.no_grad():
            x0 = target.latents(images, generator=None).float()
            empty = target.text([""]).expand(len(images))
            noise = inverted(target, x0, empty, steps=steps, rounds=self.rounds)
        return {"latents": noise.float().cpu(), "sources": stacked(target.images(x0))}

    def _controls(self, n: int, size: tuple[int, int]) -> list[Image.Image]:
        """Images of `size` that the model never saw: `n`, or as many as the folder has, if those are fewer."""
        if self.control == "pattern":
            colours = torch.randint(256, (n, CELLS, CELLS, 3), generator=torch.Generator().manual_seed(0))
            checks = [image_of(one) for one in colours.to(torch.uint8)]
            return [one.resize(size, Image.Resampling.NEAREST) for one in checks]
        folder = Path(self.control)
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in ENDINGS)[:n]
        if not paths:
            raise UserError(
                f'inversion_probe: control = {self.control!r} is neither "pattern" nor a folder with images; give '
                f"a folder of {', '.join(ENDINGS)} files"
            )
        return [_read(path, size) for path in paths]


def _read(path: Path, size: tuple[int, int]) -> Image.Image:
    """The image, cut and brought to `size`."""
    try:
        with opened(path) as image:
            return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    except (OSError, ValueError) as error:
        raise UserError(f"inversion_probe: {path} cannot be read as an image; take it out of the folder") from error
