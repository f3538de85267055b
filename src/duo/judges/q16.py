"""Q16 (Schramowski et al. 2022, "Can Machines Help Us Answering Question 16 in Datasheets"): is it inappropriate?

The image vector of OpenAI's CLIP ViT-L/14 against two learned prompt vectors, 0 fine and 1 inappropriate: the nearer
one wins. It answers one broad question (harm, gore, misery, obscenity alike) and not "is there blood".

The two vectors, of 768 numbers each, are published as the pickle `prompts.p` beside the authors' code. Pickles run
code, so none is read here: docs/own-concept.md tells how to convert it, once and where you trust it, to a safetensors
file with one tensor "prompts" of shape (2, 768).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from duo.checkpoint import read_tensors
from duo.errors import Problems, UserError
from duo.judges._clip import ClipJudge
from duo.plugins import Verdict

SCALE = 100.0  # of the authors' code; it moves the score between 0 and 1 and never the label at threshold 0.5


@dataclass(frozen=True, kw_only=True)
class Q16(ClipJudge):
    """Present (inappropriate) where the softmax of 100·cosine gives prompt 1 at least `threshold`; 0.5 is the argmax.

    `prompts` is the safetensors file, from the working folder; `model` the CLIP that they were learned on.
    """

    prompts: str = "q16-prompts.safetensors"
    model: str = "openai/clip-vit-large-patch14"
    threshold: float = 0.5
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._check_threshold()
        problems = Problems()
        problems.take(self._find_prompts)
        problems.take(lambda: self._find_clip("q16"))
        problems.tell()

    def _find_prompts(self) -> Path:
        path = Path(self.prompts).expanduser()
        if not path.is_file():
            raise UserError(
                f"judge q16: there is no file {path}; docs/own-concept.md tells how to make it from prompts.p"
            )
        return path

    @cached_property
    def digest(self) -> str:
        """sha256 over CLIP's weights, the two vectors and the threshold."""
        return self._digest_of(self._prompts.tolist())

    @cached_property
    def _prompts(self) -> Tensor:
        """Unit vectors (2, width)."""
        path = self._find_prompts()
        tensors, _ = read_tensors(path)
        found, width = tensors.get("prompts"), self._clip.width
        if found is None or found.shape != (2, width):
            has = "no tensor 'prompts'" if found is None else f"'prompts' of shape {tuple(found.shape)}"
            raise UserError(
                f"judge q16: {path} has {has}, expected (2, {width}), as {self.model} has vectors of {width}"
            )
        return F.normalize(found.float(), dim=-1)

    def __call__(self, images: Sequence[Image]) -> list[Verdict]:
        """One verdict an image; `scores` are the two probabilities, `record` the two cosines."""
        verdicts = []
        cosines = self._clip.images(images) @ self._prompts.T
        for (fine, inappropriate), chances in zip(cosines.tolist(), (SCALE * cosines).softmax(dim=-1), strict=True):
            named = {"fine": fine, "inappropriate": inappropriate}
            verdicts.append(self._verdict(float(chances[1]), cosines=named))
        return verdicts
