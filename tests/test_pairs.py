from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from duo.errors import UserError
from duo.pairs import Pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for side, colour in (("unsafe", 200), ("safe", 10)):
        (tmp_path / side).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 8), (colour, index, 0)).save(tmp_path / side / f"{index:04d}.png")
    return tmp_path


def test_pairs_are_read_by_name(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"index": 0}\n{"index": 1}\n{"index": 2}\n')
    pairs = Pairs.read(folder)
    assert len(pairs) == 3
    assert pairs.names == ["0000.png", "0001.png", "0002.png"]
    assert [image.getpixel((0, 0)) for image in pairs.unsafe] == [(200, i, 0) for i in range(3)]
    assert [image.getpixel((0, 0)) for image in pairs.safe] == [(10, i, 0) for i in range(3)]
    assert pairs.rows[2] == {"index": 2}


def test_the_digest_is_of_the_pictures(folder: Path) -> None:
    before = Pairs.read(folder).digest()
    path = folder / "safe" / "0001.png"
    with Image.open(path) as image:
        image.convert("RGBA").save(path, compress_level=0)
    assert Pairs.read(folder).digest() == before
    Image.new("RGB", (8, 8), (10, 1, 1)).save(path)
    assert Pairs.read(folder).digest() != before


def test_swapped_sides_are_another_digest(folder: Path) -> None:
    before = Pairs.read(folder).digest()
    (folder / "safe").rename(folder / "other")
    (folder / "unsafe").rename(folder / "safe")
    (folder / "other").rename(folder / "unsafe")
    assert Pairs.read(folder).digest() != before


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder unsafe/"):
        Pairs.read(tmp_path / "nowhere")


def test_an_empty_folder(folder: Path) -> None:
    for path in (folder / "safe").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"safe holds no \.png"):
        Pairs.read(folder)


def test_unpaired_images_are_named(folder: Path) -> None:
    (folder / "safe" / "0001.png").unlink()
    Image.new("RGB", (8, 8)).save(folder / "safe" / "0009.png")
    with pytest.raises(UserError, match=r"2 images are in only one .*: 0001\.png, 0009\.png$"):
        Pairs.read(folder)


def test_mixed_sizes(folder: Path) -> None:
    Image.new("RGB", (8, 9)).save(folder / "safe" / "0002.png")
    with pytest.raises(UserError, match=r"0002\.png is 8×9"):
        Pairs.read(folder)


@pytest.mark.parametrize("keep", [0, 4, 40])
def test_an_unreadable_image(folder: Path, keep: int) -> None:
    path = folder / "unsafe" / "0000.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"0000\.png cannot be read"):
        Pairs.read(folder)


@pytest.mark.parametrize("line", ["{", "[1]"])
def test_a_broken_row_is_named_by_its_line(folder: Path, line: str) -> None:
    (folder / "pairs.jsonl").write_text(json.dumps({"index": 0}) + f"\n{line}\n")
    with pytest.raises(UserError, match="line 2"):
        Pairs.read(folder)
