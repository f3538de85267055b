"""CLIP as judges and attackers need it (Radford et al. 2021): pictures and prompts as unit vectors of one space.

Reads any CLIP of transformers from a local folder or the hub, safetensors only; "toybox" is the embedded one. Pictures
are prepared by Pillow, as the folder's `preprocessor_config.json` says, whether or not torchvision is there: a verdict
must not depend on that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from duo import toybox
from duo.errors import UserError, first_line
from duo.sources import hub_file, is_hub_id, no_pickles

T = TypeVar("T")
EMBEDDED = "toybox"  # the name of the CLIP in the package, which knows the pictures of the embedded model alone
BATCH = 32
CONFIG = "config.json"
FEWEST_TOKENS = 256  # the bytes alone are so many


class Clip:
    """One CLIP with frozen float32 weights. `load_clip` makes it."""

    def __init__(self, model: Any, source: str) -> None:
        self._model, self._source = model, source

    @property
    def width(self) -> int:
        """Length of the vectors."""
        return int(self._model.config.projection_dim)

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by; 100 in the published ones."""
        return float(self._model.logit_scale.exp())

    @cached_property
    def digest(self) -> str:
        """sha256 over names and bytes of all weights and the way pictures are prepared."""
        total = hashlib.sha256(json.dumps(self._processor.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    @torch.no_grad()
    def images(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (n, width) of pictures, on the CPU."""
        parts = [self._model.vision_model(pixels).pooler_output for pixels in self._pixels(images)]
        return self._unit(parts, self._model.visual_projection)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, width) of prompts, on the CPU; each is cut to what the text tower can read."""
        parts = []
        for batch in _batches(prompts):
            found = self._tokenizer(list(batch), padding=True, truncation=True, return_tensors="pt")
            tokens = {name: found[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
            parts.append(self._model.text_model(**tokens).pooler_output)
        return self._unit(parts, self._model.text_projection)

    def _pixels(self, images: Sequence[Image]) -> Iterator[Tensor]:
        for batch in _batches(images):
            prepared = self._processor(images=[image.convert("RGB") for image in batch], return_tensors="pt")
            yield prepared["pixel_values"].to(self._model.device)

    def _unit(self, parts: Sequence[Tensor], projection: Any) -> Tensor:
        if not parts:
            return torch.zeros(0, self.width)
        return F.normalize(projection(torch.cat(list(parts))), dim=-1).cpu()

    @cached_property
    def _processor(self) -> Any:
        from transformers import CLIPImageProcessorPil

        return _read(CLIPImageProcessorPil, self._source)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _read_tokenizer(self._source)
        tokenizer.model_max_length = int(self._model.config.text_config.max_position_embeddings)
        return tokenizer


def find_clip(source: str, where: str, *, field: str = "model", whose: str = "judge") -> None:
    """Tell a CLIP that cannot be had before anything is done with it; of the hub only its `config.json` is asked for.

    `where` opens the message of the `UserError`: "judge q16". The message tells `field` of the judge, or whose it is.
    """
    folder = _folder(source)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise UserError(f"{where}: {source} is not a CLIP folder of transformers: it has no {CONFIG}")
        return
    if not is_hub_id(source):
        raise UserError(f"{where}: {field} is {source!r}, which is neither a folder nor a hub id, nor {EMBEDDED!r}")
    try:
        hub_file(source, CONFIG, kind="a CLIP", give=f"the {whose}'s {field} a local folder")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@lru_cache(maxsize=2)
def load_clip(source: str, device: str = "cpu") -> Clip:
    """Load a CLIP; judges that name the same one share it. A `UserError` tells what a folder lacks."""
    from transformers import CLIPModel

    path = _path(source)
    model, told = _read(CLIPModel, path, use_safetensors=True, output_loading_info=True)
    missing = sorted(told["missing_keys"])
    if missing or told["mismatched_keys"]:
        lacks = missing[0] if missing else str(next(iter(told["mismatched_keys"])))
        raise UserError(f"{source} is not a whole CLIP: it lacks {lacks}; give a CLIPModel, text and image towers both")
    clip = Clip(model.float().to(device).eval().requires_grad_(False), path)
    _ = clip._processor  # a folder that lacks it is told now, not at the first picture
    return clip


@lru_cache(maxsize=2)
def clip_vocabulary(source: str) -> tuple[str, ...]:
    """What a CLIP's tokenizer makes prompts of, by its ids; entries that end a word end with `</w>`. No weights are
    read."""
    tokenizer = _read_tokenizer(_path(source))
    entries: dict[str, int] = tokenizer.get_vocab()
    return tuple(sorted(entries.keys() - set(tokenizer.all_special_tokens), key=entries.__getitem__))


def _read_tokenizer(path: str) -> Any:
    from transformers import CLIPTokenizer

    tokenizer = _read(CLIPTokenizer, path)
    if len(tokenizer) < FEWEST_TOKENS:  # of a folder without its files, transformers makes an empty one
        raise UserError(f"{path} has no tokenizer; restore tokenizer.json, or vocab.json and merges.txt")
    return tokenizer


def _path(source: str) -> str:
    return str(_folder(source)) if _folder(source).is_dir() else source


def _folder(source: str) -> Path:
    """Where a CLIP lies if it is the embedded one or a folder."""
    return toybox.WEIGHTS / "clip" if source == EMBEDDED else Path(source).expanduser()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading bars of transformers, and put back what was set."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _read(cls: Any, source: str, **options: Any) -> Any:
    try:
        with _quiet(), no_pickles():
            return cls.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{source} cannot be read as a {cls.__name__}: {first_line(error)}") from error


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[first : first + BATCH] for first in range(0, len(items), BATCH))
