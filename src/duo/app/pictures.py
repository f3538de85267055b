"""Images for the page, as data URIs: nothing lies in a folder that a server could be asked for."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from duo.report.images import data_uri, pixelated, read_image

THUMBNAIL = 256  # pixels of the longer side in the grid
FEW_PIXELS = 256  # images up to this are enlarged without smoothing


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as it stands on the page; of a `hidden` one no more than its blocks are sent."""

    uri: str
    hidden: bool
    sharp: bool  # whether it is enlarged pixel by pixel

    @classmethod
    def of(cls, image: Image.Image, *, hidden: bool) -> Picture:
        if hidden:
            return cls(uri=data_uri(pixelated(image)), hidden=True, sharp=True)
        return cls(uri=data_uri(image), hidden=False, sharp=max(image.size) < FEW_PIXELS)

    @classmethod
    def thumbnail(cls, path: Path, *, hidden: bool) -> Picture:
        """Of a file, which is read again only when it was written anew."""
        return _thumbnail(path, path.stat().st_mtime_ns if path.exists() else 0, hidden)


@lru_cache(maxsize=4096)
def _thumbnail(path: Path, written: int, hidden: bool) -> Picture:
    image = read_image(path)
    if hidden or max(image.size) <= THUMBNAIL:
        return Picture.of(image, hidden=hidden)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri=f"data:image/webp;base64,{encoded}", hidden=False, sharp=False)
