"""Images from outside: damaged, enormous, of odd kinds, or no images at all."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import CUTS, cut
from hypothesis import given
from hypothesis import strategies as st
from ordeal import cases, endure
from PIL import Image

from duo.app.pictures import Picture
from duo.attacks.inversion_probe import _read
from duo.image_files import opened
from duo.pairs import _image
from duo.report import images
from duo.rundir import read_image

READERS: dict[str, Callable[[Path], Any]] = {
    "pairs": _image,
    "run": lambda path: read_image(path, remedy="make it again"),
    "report": images.read_image,
    "probe": lambda path: _read(path, (8, 8)),
    "page": lambda path: Picture.thumbnail(path, hidden=False),
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *, chunks: bytes = b"", data: bytes = b"") -> bytes:
    """A PNG that says of itself whatever it is told to."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


COLOURS = Image.effect_noise((24, 16), 60).convert("RGB")
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E], EXIF[0x8825] = 6, "a" * 50, {1: "N", 2: (1.0, 2.0, 3.0)}
WHOLE = {
    "png": encoded(COLOURS, "PNG", exif=EXIF),
    "palette": encoded(COLOURS.quantize(7), "PNG", transparency=3),
    "jpeg": encoded(COLOURS, "JPEG", exif=EXIF),
    "progressive": encoded(COLOURS, "JPEG", progressive=True),
    "webp": encoded(COLOURS, "WEBP", exif=EXIF.tobytes()),
    "moving webp": encoded(COLOURS, "WEBP", save_all=True, append_images=[COLOURS.rotate(180)]),
    "moving png": encoded(COLOURS, "PNG", save_all=True, append_images=[COLOURS.rotate(180)]),
    "cmyk": encoded(COLOURS.convert("CMYK"), "JPEG"),
    "grey": encoded(COLOURS.convert("L"), "PNG"),
    "bits": encoded(COLOURS.convert("1"), "PNG"),
    "alpha": encoded(COLOURS.convert("RGBA"), "PNG"),
    "one pixel": encoded(COLOURS.resize((1, 1)), "PNG"),
    "deep rgb": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress((b"\0" + bytes(12)) * 2))
    + chunk(b"IEND", b""),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", WHOLE)
def test_every_kind_of_image_is_read(tmp_path: Path, kind: str, reader: str) -> None:
    if (kind, reader) == ("palette", "pairs"):
        return  # transparent parts are refused there (tests/test_pairs.py)
    path = tmp_path / "x.png"
    path.write_bytes(WHOLE[kind])
    read = READERS[reader]
    assert endure("images", lambda: read(path), writes=tmp_path) is None


@cases("images")
@given(st.sampled_from(sorted(WHOLE)), st.sampled_from(sorted(READERS)), CUTS)
def test_a_damaged_image_is_read_or_refused(tmp_path_factory: Any, kind: str, reader: str, cuts: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "x.png"
    path.write_bytes(cut(WHOLE[kind], cuts))
    endure("images", lambda: READERS[reader](path), writes=folder)


BOMBS = {
    "huge": png(100_000, 100_000),
    "large": png(12_000, 8_000, data=bytes(1000)),  # below what Pillow refuses by itself
    "wide": png(2**31 - 1, 1),
    "none": png(0, 0),
    "text": png(4, 4, chunks=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))), data=bytes(52)),
    "profile": png(4, 4, chunks=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000))), data=bytes(52)),
    "pixels": png(4, 4, data=bytes(200_000_000)),
    "webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xff\xff\xff\x0f" + bytes(8),
    "deep grey": encoded(Image.new("I;16", (3, 3)), "PNG"),
    "empty": b"",
    "text file": b"hello",
    "gif": encoded(COLOURS, "GIF"),
    "tiff": encoded(COLOURS, "TIFF"),
    "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_or_harmless(tmp_path: Path, kind: str, reader: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(BOMBS[kind])
    refusal = endure("images", lambda: READERS[reader](path), writes=tmp_path)
    assert refusal is not None or kind in ("text", "profile", "pixels")
    assert refusal is None or str(path) in str(refusal)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str, reader: str) -> None:
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    assert endure("images", lambda: READERS[reader](path), writes=tmp_path)


def test_a_postscript_file_starts_no_program(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(BOMBS["program"])
    with pytest.raises(ValueError, match="cannot identify image"), opened(path):
        pass
