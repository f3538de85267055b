"""`Pairs`: a folder of unsafe images and their safe twins, read and checked.

    pairs/  unsafe/0000.png  safe/0000.png  …  pairs.jsonl (optional: how each pair came about)

Two images are a pair if they have the same file name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from duo.errors import UserError

SIDES = ("unsafe", "safe")
NAMED_AT_MOST = 5


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """n pairs in the order of their names: RGB images of one size, and the rows of `pairs.jsonl`, if there are any."""

    names: Sequence[str]
    unsafe: Sequence[Image.Image]
    safe: Sequence[Image.Image]
    rows: Sequence[dict[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def read(cls, folder: Path) -> Pairs:
        """Read a pairs folder; a `UserError` names what is missing, unpaired, unreadable or of another size."""
        files = {side: _files(folder, side) for side in SIDES}
        unpaired = sorted(files["unsafe"].keys() ^ files["safe"].keys())
        if unpaired:
            named = ", ".join(unpaired[:NAMED_AT_MOST]) + (" …" if len(unpaired) > NAMED_AT_MOST else "")
            raise UserError(f"{folder}: {len(unpaired)} images are in only one of unsafe/ and safe/: {named}")
        names = sorted(files["unsafe"])
        images = {side: [_image(files[side][name]) for name in names] for side in SIDES}
        size = images["unsafe"][0].size
        for side in SIDES:
            for name, image in zip(names, images[side], strict=True):
                if image.size != size:
                    found, first = (f"{width}×{height}" for width, height in (image.size, size))
                    raise UserError(f"{files[side][name]} is {found}, the first image {first}; give all one size")
        return cls(names=names, unsafe=images["unsafe"], safe=images["safe"], rows=_rows(folder / "pairs.jsonl"))

    def digest(self) -> str:
        """SHA-256 over names, sizes and pixels: the same for the same pictures, however they are compressed."""
        total = hashlib.sha256()
        for name, *pair in zip(self.names, self.unsafe, self.safe, strict=True):
            total.update(json.dumps([name, *(image.size for image in pair)]).encode())
            for image in pair:
                total.update(image.tobytes())
        return total.hexdigest()


def _files(folder: Path, side: str) -> dict[str, Path]:
    if not (folder / side).is_dir():
        raise UserError(f"{folder} is not a folder of pairs: it has no folder {side}/")
    files = {path.name: path for path in (folder / side).glob("*.png")}
    if not files:
        raise UserError(f"{folder / side} holds no .png images")
    return files


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow raises SyntaxError on a broken PNG
        raise UserError(f"{path} cannot be read as an image; make or fetch it again") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows
