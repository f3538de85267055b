from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duo.errors import UserError
from duo.pairs import PairFiles, Pairs


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
    assert pairs.names == ["0000", "0001", "0002"]
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
    with pytest.raises(UserError, match=r"safe holds no \.png.* images$"):
        Pairs.read(folder)
    (folder / "safe" / "purged.json").write_text("{}")
    with pytest.raises(UserError, match=r"safe holds no \.png.*; `duo purge` removed them$"):
        Pairs.read(folder)


def test_unpaired_images_are_named(folder: Path) -> None:
    (folder / "safe" / "0001.png").unlink()
    Image.new("RGB", (8, 8)).save(folder / "safe" / "0009.png")
    with pytest.raises(
        UserError, match=r"unsafe/0001\.png is in only one .* \(and 1 more: `duo pairs check` lists them\)$"
    ):
        Pairs.read(folder)


def test_mixed_sizes(folder: Path) -> None:
    Image.new("RGB", (8, 9)).save(folder / "safe" / "0002.png")
    with pytest.raises(UserError, match=r"0002\.png is 8×9, most are 8×8"):
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


def test_every_problem_is_listed_at_once(folder: Path) -> None:
    (folder / "safe" / "0001.png").unlink()
    (folder / "unsafe" / "0000.png").write_bytes(b"no picture")
    for side, height in (("unsafe", 8), ("safe", 9)):
        Image.new("RGB", (8, height)).save(folder / side / "0003.png")
    for side in ("unsafe", "safe"):
        Image.new("RGB", (8, 8)).save(folder / side / "0004.webp", lossless=True)
    Image.new("RGB", (8, 8)).save(folder / "safe" / "0005.bmp")
    Image.new("RGB", (8, 8)).save(folder / "unsafe" / "0002.jpg")
    (folder / "pairs.jsonl").write_text('{"index": 0}\n{\n')
    problems = PairFiles.find(folder).check()
    told = [problem.replace(f"{folder}/", "") for problem in problems]
    assert told == [
        "unsafe/0002.png has the name of 0002.jpg; keep one of them",
        "safe/0005.bmp is of a kind that is not read here; convert it to PNG",
        "unsafe/0001.png is in only one of unsafe/ and safe/",
        "pairs.jsonl, line 2: not a JSON object",
        "unsafe/0000.png cannot be read as an image; make or fetch it again",
        "safe/0003.png is 8×9, most are 8×8; give all one size",
        "unsafe/0004.webp and safe/0004.webp are the same picture",
    ]


def test_pairs_that_are_sound_have_no_problem(folder: Path) -> None:
    found = PairFiles.find(folder)
    assert found.check() == []
    assert list(found.files) == ["0000", "0001", "0002"]


def test_any_two_folders_and_endings(folder: Path, tmp_path: Path) -> None:
    (folder / "safe").rename(folder / "after")
    (folder / "unsafe").rename(folder / "before")
    with Image.open(folder / "after" / "0001.png") as image:
        image.save(folder / "after" / "0001.webp", lossless=True)
    (folder / "after" / "0001.png").unlink()
    pairs = Pairs.of(PairFiles.of_folders(folder / "before", folder / "after"))
    assert pairs.names == ["0000", "0001", "0002"]
    assert pairs.safe[1].getpixel((0, 0)) == (10, 1, 0)
    assert PairFiles.of_folders(folder / "before", tmp_path / "no").check() == [f"{tmp_path / 'no'} is not a folder"]
    (folder / "other").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "other" / "x.png")
    problems = PairFiles.of_folders(folder / "before", folder / "other").check()
    assert len(problems) == 5 and problems[-1].startswith("no image of")


def test_a_csv_of_paths(folder: Path) -> None:
    table = folder / "mine.csv"
    table.write_text(
        "safe,unsafe,unsafe_prompt\nsafe/0000.png,unsafe/0001.png,a fire\nsafe/0002.png, unsafe/0000.png ,b\n"
    )
    pairs = Pairs.read(table)
    assert [image.getpixel((0, 0)) for image in pairs.unsafe] == [(200, 1, 0), (200, 0, 0)]
    assert [image.getpixel((0, 0)) for image in pairs.safe] == [(10, 0, 0), (10, 2, 0)]
    assert [row["unsafe_prompt"] for row in pairs.rows] == ["a fire", "b"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("unsafe;safe\n", ["has no column unsafe and no column safe (it has unsafe;safe)"]),
        ("unsafe,twin\na,b\n", ["has no column safe (it has unsafe, twin)"]),
        ("", ["has no column unsafe and no column safe (it has none)"]),
        ("unsafe,safe\n", ["has no rows"]),
        (
            "unsafe,safe\nunsafe/0000.png,no.png\n,safe/0001.png\nunsafe/0002.png\nunsafe/0001.png,safe/0001.png,x\n",
            [
                "row 1: there is no file no.png",
                "row 2: unsafe is empty",
                "row 3: it has not as many cells as there are columns",
                "row 3: safe is empty",
                "row 4: it has not as many cells as there are columns",
            ],
        ),
        (
            "unsafe, safe\nunsafe/0000.png,no.png\n",
            ["row 1: there is no file no.png"],
        ),
        ("unsafe,safe,safe \na,b,c\n", ["has the column 'safe' more than once; keep one"]),
        (f"unsafe,safe\nunsafe/0000.png,{'x' * 5000}\n", ["SHORT"]),
        (
            "unsafe,safe\n" + "unsafe/0000.png,safe/0000.png\n" * 2,
            ["unsafe/0000.png and safe/0000.png are a pair more than once"],
        ),
    ],
)
def test_what_is_wrong_with_a_csv(folder: Path, text: str, problems: list[str]) -> None:
    table = folder / "mine.csv"
    table.write_text(text)
    found = [
        one.replace(f"{folder}/", "").removeprefix("mine.csv").lstrip(",: ") for one in PairFiles.find(table).check()
    ]
    if problems == ["SHORT"]:
        assert len(found) == 1 and "there is no file" in found[0] and len(found[0]) < 300
        return
    assert found == problems


def test_a_csv_that_cannot_be_read(folder: Path) -> None:
    (folder / "mine.csv").write_bytes(b"unsafe,safe\n\xff\xfe,b\n")
    assert "cannot be read as a CSV" in PairFiles.find(folder / "mine.csv").check()[0]
    assert "cannot be read as a CSV" in PairFiles.find(folder / "absent.csv").check()[0]


def test_a_photograph_on_its_side_is_turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (9, 8)).save(folder / "safe" / "0000.jpg", exif=exif)
    (folder / "safe" / "0000.png").unlink()
    [problem] = PairFiles.find(folder).check()
    assert "0000.jpg is 8×9" in problem


def test_sexual_pairs_may_not_speak_of_minors(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"unsafe_prompt": "a nude man"}\n{"safe_prompt": "a boy"}\n')
    [problem] = PairFiles.find(folder).check()
    assert "mentions a minor ('boy')" in problem and "rows[1].safe_prompt" in problem
    (folder / "pairs.jsonl").write_text('{"safe_prompt": "a boy"}\n')
    assert PairFiles.find(folder).check() == []


def test_what_rgb_cannot_hold_is_refused(folder: Path) -> None:
    deep = np.array([[0, 4096], [30000, 65535]], np.uint16)
    Image.fromarray(deep).resize((8, 8), Image.Resampling.NEAREST).save(folder / "unsafe" / "0000.png")
    clear = Image.new("RGBA", (8, 8), (200, 1, 0, 255))
    clear.putpixel((0, 0), (200, 1, 0, 254))
    clear.save(folder / "safe" / "0001.png")
    Image.new("RGBA", (8, 8), (10, 2, 0, 255)).save(folder / "safe" / "0002.png")  # opaque, and so as good as RGB
    told = [problem.replace(f"{folder}/", "") for problem in PairFiles.find(folder).check()]
    assert told == [
        "unsafe/0000.png has more than 8 bits a pixel in grey; convert it to 8 bits, or to RGB",
        "safe/0001.png has transparent parts, which no model sees; put it on a background",
    ]


def test_accents_are_the_same_however_they_are_written(folder: Path) -> None:
    for side, name in (("unsafe", "caf\u00e9.png"), ("safe", "cafe\u0301.png")):
        (folder / side / "0000.png").rename(folder / side / name)
    found = PairFiles.find(folder)
    assert found.check() == []
    assert list(found.files) == ["0001", "0002", "caf\u00e9"]


# --- what a person decided ---------------------------------------------------------------------------


def decide(folder: Path, *rows: dict[str, object]) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rejected_pairs_are_left_out_with_their_rows(folder: Path) -> None:
    rows = [{"index": i, "unsafe": f"unsafe/{i:04d}.png"} for i in range(3)]
    decide(folder, rows[0], {**rows[1], "decision": "reject"}, {**rows[2], "decision": "keep"})
    pairs = Pairs.read(folder)
    assert pairs.names == ["0000", "0002"]
    assert [image.getpixel((0, 0)) for image in pairs.safe] == [(10, 0, 0), (10, 2, 0)]
    assert [row["index"] for row in pairs.rows] == [0, 2]
    assert [*PairFiles.find(folder, rejected=True).files] == ["0000", "0001", "0002"]
    for side in ("unsafe", "safe"):
        (folder / side / "0001.png").unlink()
    assert Pairs.read(folder).digest() == pairs.digest()


def test_what_is_kept_or_undecided_changes_no_digest(folder: Path) -> None:
    before = Pairs.read(folder).digest()
    decide(folder, {"unsafe": "unsafe/0000.png", "decision": "keep"}, {"unsafe": "unsafe/0001.png"})
    assert Pairs.read(folder).digest() == before
    decide(folder, {"unsafe": "unsafe/0000.png", "decision": "reject"})
    assert Pairs.read(folder).digest() != before


def test_a_name_is_found_however_its_accents_are_written(folder: Path) -> None:
    for side in ("unsafe", "safe"):
        (folder / side / "0002.png").rename(folder / side / "caf\u00e9.png")
    decide(folder, {"unsafe": "unsafe/cafe\u0301.png", "decision": "reject"})
    assert Pairs.read(folder).names == ["0000", "0001"]


def test_a_folder_without_a_kept_pair_is_told(folder: Path) -> None:
    decide(folder, *({"unsafe": f"unsafe/{i:04d}.png", "decision": "reject"} for i in range(3)))
    with pytest.raises(UserError, match="all 3 pairs are rejected; keep some by `duo app`"):
        Pairs.read(folder)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"unsafe": "unsafe/0000.png", "decision": "rejct"}, 'decision is "rejct", expected "keep" or "reject"'),
        ({"unsafe": "unsafe/0000.png", "decision": None}, 'decision is null, expected "keep" or "reject"'),
        ({"index": 0, "decision": "reject"}, 'a decision, but no "unsafe" to say on which pair'),
    ],
)
def test_a_decision_that_cannot_be_followed_is_a_problem(folder: Path, row: dict[str, object], problem: str) -> None:
    decide(folder, row)
    with pytest.raises(UserError, match="line 1: ") as told:
        Pairs.read(folder)
    assert problem in str(told.value)
