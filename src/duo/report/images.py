"""Images for the page: clear ones re-encoded, unsafe ones reduced to 64 blocks, all as data URIs.

Nothing but pixels is carried over: text chunks of the source files (prompts, paths) are not copied.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from duo.errors import UserError
from duo.image_files import opened
from duo.purged import removed
from duo.rundir import ANEW

BLOCKS = 8  # an unsafe image is shown as 8×8 blocks, which leaves its light and colours but no shapes
SHOWN_SIDE = 512  # larger images are reduced, so that the page can still be mailed
PIXELATED_SIDE = 64
SMALL = 128  # up to this side images are kept pixel by pixel; larger ones as JPEG, a tenth of the size
QUALITY = 88
GREY = (128, 128, 128)


def read_image(path: Path) -> Image.Image:
    """The file as RGB, at most `SHOWN_SIDE` on its longer side; a grey field of one that `duo purge` removed."""
    try:
        with opened(path) as file:
            image = file.convert("RGB")
    except FileNotFoundError:
        if removed(path):
            return Image.new("RGB", (PIXELATED_SIDE, PIXELATED_SIDE), GREY)
        raise UserError(f"{path} is missing; put it back, or {ANEW}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable image ({error}); put it back, or {ANEW}") from None
    if max(image.size) > SHOWN_SIDE:
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    return image


def pixelated(image: Image.Image) -> Image.Image:
    """The whole image as `BLOCKS`×`BLOCKS` mean colours. Nothing is left to detect, so nothing can be missed."""
    blocks = image.resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
    return blocks.resize((PIXELATED_SIDE, PIXELATED_SIDE), Image.Resampling.NEAREST)


def data_uri(image: Image.Image) -> str:
    """`image` inside a URL: a PNG of a small one, a JPEG of a larger."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    if kind == "png":
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
