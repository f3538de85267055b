"""Image files of other people, opened so that they can do no harm: of known kinds and of a size that memory holds."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from duo.errors import UserError, first_line

KINDS = ("PNG", "JPEG", "WEBP")  # of others Pillow starts programs (EPS), or needs plugins that few use
MOST_PIXELS = 50_000_000  # 150 MB as RGB; a camera's image is smaller
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # Pillow's, of one channel; 16 bits of RGB it scales down
# What Pillow's decoders raise for damaged files, besides its own errors: nobody has listed it.
FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file, to be decoded within the context: the first, of one that moves.

    Raises `FileNotFoundError`, and `ValueError` for what cannot be decoded; `UserError` for an image that is no use:
    one that is too large, or of more than 8 bits in grey, which Pillow would cut off at 255.
    """
    try:
        if not path.is_file() and path.exists():
            raise ValueError("it is no plain file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at here
            image = Image.open(path, formats=KINDS)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{path} is {image.width}×{image.height}, more than {MOST_PIXELS // 10**6} million pixels; make it "
                    "smaller"
                )
            if image.mode in DEEP_MODES:
                raise UserError(f"{path} has more than 8 bits a pixel in grey; convert it to 8 bits, or to RGB")
            yield image
    except FileNotFoundError:
        raise
    except FAILURES as error:
        raise ValueError(first_line(error)) from error
