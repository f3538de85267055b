"""`Pairs`: unsafe images and their safe twins, read and checked. The run's own, or any that a user brings:

    pairs/  unsafe/0000.png  safe/0000.png  …  pairs.jsonl (optional: how each pair came about)
    two folders of any name, `unsafe` and `safe`
    pairs.csv, with the columns unsafe and safe: paths from the CSV's folder; other columns are kept as its rows

In folders, two images are a pair if their names are the same but for the ending (.png, .webp, .jpg, .jpeg). A row of
`pairs.jsonl` may say what a person made of its pair, as `duo app` writes it: `"decision": "keep"` or `"reject"`, beside
`"unsafe"`, the path that says which pair that is. Rejected pairs are left out wherever pairs are read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from PIL import Image, ImageOps

from duo.errors import UserError
from duo.foreign import json_value, read_whole
from duo.image_files import opened
from duo.purged import PURGED
from duo.refusal import is_sexual, minor_mentioned, texts_of

SIDES = ("unsafe", "safe")
DECISIONS = ("keep", "reject")
ENDINGS = (".png", ".webp", ".jpg", ".jpeg")
OPAQUE = (255, 255)  # least and largest alpha
LONGEST_SHOWN = 200  # letters of a file's name in a message


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """n pairs in the order of their names: RGB images of one size, and the rows that came with them, if any."""

    names: Sequence[str]
    unsafe: Sequence[Image.Image]
    safe: Sequence[Image.Image]
    rows: Sequence[dict[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def read(cls, source: Path) -> Pairs:
        """Read a pairs folder or a CSV; a `UserError` tells the first problem, and how many more there are."""
        return cls.of(PairFiles.find(source))

    @classmethod
    def of(cls, files: PairFiles) -> Pairs:
        """Read the images of `files`, or raise a `UserError` as `read` does."""
        pairs, problems = _load(files)
        if problems:
            more = f" (and {len(problems) - 1} more: `duo pairs check` lists them)" if len(problems) > 1 else ""
            raise UserError(problems[0] + more)
        return pairs

    @classmethod
    def joined(cls, parts: Mapping[str, Pairs]) -> Pairs:
        """Several as one, in their order: a pair's name has that of its part before it, where that has one.

        Raises `UserError` where their images are not of one size.
        """
        sizes = {part: pairs.unsafe[0].size for part, pairs in parts.items()}
        first, *others = sizes.items()
        for part, size in others:
            if size != first[1]:
                raise UserError(
                    f"the pairs of {part} are {_shown(size)}, and those before them {_shown(first[1])}; bring pairs of "
                    "the size that the model draws"
                )
        return cls(
            names=[f"{part}/{name}" if part else name for part, pairs in parts.items() for name in pairs.names],
            unsafe=[image for pairs in parts.values() for image in pairs.unsafe],
            safe=[image for pairs in parts.values() for image in pairs.safe],
            rows=[row for pairs in parts.values() for row in pairs.rows],
        )

    def digest(self) -> str:
        """SHA-256 over names, sizes and pixels: the same for the same pictures, however they are compressed."""
        total = hashlib.sha256()
        for name, *pair in zip(self.names, self.unsafe, self.safe, strict=True):
            total.update(json.dumps([name, *(image.size for image in pair)]).encode())
            for image in pair:
                total.update(image.tobytes())
        return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """Where pairs lie, before any image is opened: name → (unsafe, safe), and what is wrong so far, one line each."""

    where: str
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()
    problems: Sequence[str] = ()

    @classmethod
    def find(cls, source: Path, *, rejected: bool = False) -> Self:
        """The pairs of a folder with `unsafe/` and `safe/`, or of a CSV of paths; the `rejected` ones only if asked."""
        if source.suffix.lower() == ".csv":
            return cls._of_csv(source)
        missing = [side for side in SIDES if not (source / side).is_dir()]
        if missing:
            told = " and ".join(f"{side}/" for side in missing)
            what = "is a file, and no .csv" if source.is_file() else "does not exist"
            what = "is not a folder of pairs" if source.is_dir() else what
            return cls(where=str(source), problems=[f"{source} {what}: it has no folder {told}"])
        found = cls.of_folders(source / "unsafe", source / "safe")
        rows, broken = _rows(source / "pairs.jsonl")
        problems = [*found.problems, *broken]
        files = found.files
        left_out = set() if rejected else {name_of(row) for row in rows if row.get("decision") == "reject"}
        if left_out:
            files = {name: pair for name, pair in files.items() if name not in left_out}
            rows = [row for row in rows if row.get("decision") != "reject"]
            if found.files and not files:
                problems.append(f"{source}: all {len(found.files)} pairs are rejected; keep some by `duo app`")
        return cls(where=str(source), files=files, rows=rows, problems=problems)

    @classmethod
    def of_folders(cls, unsafe: Path, safe: Path) -> Self:
        """The pairs of any two folders."""
        problems: list[str] = []
        named: list[dict[str, Path]] = []
        for folder in (unsafe, safe):
            files: dict[str, Path] = {}
            if not folder.is_dir():
                problems.append(f"{folder} is not a folder")
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix.lower() not in ENDINGS or path.name.startswith("."):
                    if path.suffix.lower() in Image.registered_extensions():
                        problems.append(f"{path} is of a kind that is not read here; convert it to PNG")
                    continue
                stem = unicodedata.normalize("NFC", path.stem)  # file systems write accents in either of two ways
                if stem in files:
                    problems.append(f"{path} has the name of {files[stem].name}; keep one of them")
                files.setdefault(stem, path)
            if folder.is_dir() and not files:
                purged = "; `duo purge` removed them" if (folder / PURGED).is_file() else ""
                problems.append(f"{folder} holds no {', '.join(ENDINGS)} images{purged}")
            named.append(files)
        alone = sorted(named[0].keys() ^ named[1].keys())
        if alone and all(named):
            problems += [
                f"{named[0].get(name) or named[1][name]} is in only one of {unsafe.name}/ and {safe.name}/"
                for name in alone
            ]
        both = sorted(named[0].keys() & named[1].keys())
        if not both and all(named):
            problems.append(f"no image of {unsafe} has the name of one of {safe}")
        return cls(
            where=f"{unsafe} and {safe}",
            files={name: (named[0][name], named[1][name]) for name in both},
            problems=problems,
        )

    @classmethod
    def _of_csv(cls, path: Path) -> Self:
        try:
            with io.StringIO(read_whole(path).decode("utf-8-sig"), newline="") as file:
                columns = [column.strip() for column in next(csv.reader(file), [])]
                rows = list(csv.DictReader(file, fieldnames=columns))
        except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8
            return cls(where=str(path), problems=[f"{path} cannot be read as a CSV: {error}"])
        twice = [f"the column {name!r}" for name, count in Counter(columns).items() if name and count > 1]
        if twice:
            return cls(where=str(path), problems=[f"{path} has {', '.join(twice)} more than once; keep one"])
        missing = [side for side in SIDES if side not in columns]
        if missing:
            has = _short(", ".join(columns)) or "none"
            return cls(
                where=str(path), problems=[f"{path} has no column {' and no column '.join(missing)} (it has {has})"]
            )
        problems, files = [], {}
        for number, row in enumerate(rows):
            line = f"{path}, row {number + 1}"  # the heading not counted
            if None in row or None in row.values():
                problems.append(f"{line}: it has not as many cells as there are columns")
            empty = [side for side in SIDES if not (row[side] or "").strip()]
            problems += [f"{line}: {side} is empty" for side in empty]
            if empty:
                continue
            pair = (path.parent / row["unsafe"].strip(), path.parent / row["safe"].strip())
            absent = [one for one in pair if not _is_file(one)]
            problems += [f"{line}: there is no file {_short(str(one))}" for one in absent]
            if not absent:
                files[f"{number:04d}"] = pair
        if not rows:
            problems.append(f"{path} has no rows")
        repeated = [pair for pair, count in Counter(files.values()).items() if count > 1]
        problems += [f"{path}: {unsafe} and {safe} are a pair more than once" for unsafe, safe in repeated]
        return cls(where=str(path), files=files, rows=[_kept(row) for row in rows], problems=problems)

    def check(self) -> list[str]:
        """Open every image and list every problem, one line each; an empty list where the pairs can be used.

        Names and texts that are sexual may not speak of minors either; a sexual concept refuses them in any case.
        """
        texts = self.texts()
        refused = [
            f"{where} mentions a minor ({found!r}), and these pairs are sexual: they will be refused"
            for where, text in (texts if is_sexual(text for _, text in texts) else ())
            if (found := minor_mentioned(text))
        ]
        return [*_load(self)[1], *refused]

    def texts(self) -> list[tuple[str, str]]:
        """File names and whatever the rows say, each with the place where it stands."""
        names = [(str(path), path.stem) for pair in self.files.values() for path in pair]
        return [*names, *texts_of(list(self.rows), f"{self.where}: rows")]


def _load(found: PairFiles) -> tuple[Pairs, list[str]]:
    """The pairs that could be read whole, and every problem."""
    problems = list(found.problems)
    read: dict[str, list[Image.Image]] = {}
    for name, paths in found.files.items():
        images = []
        for path in paths:
            try:
                images.append(_image(path))
            except UserError as error:
                problems.append(str(error))
        if len(images) == len(SIDES):
            read[name] = images
    sizes = Counter(image.size for images in read.values() for image in images)
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        for name, images in read.items():
            problems += [
                f"{path} is {_shown(image.size)}, most are {_shown(usual)}; give all one size"
                for path, image in zip(found.files[name], images, strict=True)
                if image.size != usual
            ]
    for name, (unsafe, safe) in read.items():
        if unsafe.size == safe.size and unsafe.tobytes() == safe.tobytes():
            problems.append(f"{' and '.join(map(str, found.files[name]))} are the same picture")
    pairs = Pairs(
        names=list(read),
        unsafe=[images[0] for images in read.values()],
        safe=[images[1] for images in read.values()],
        rows=found.rows,
    )
    return pairs, problems


def _image(path: Path) -> Image.Image:
    """An RGB image as it is shown: a camera's note that it lies on its side is followed.

    What RGB cannot hold is refused: Pillow would cut grey values off at 255, and show what transparency hides.
    """
    try:
        with opened(path) as image:
            if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != OPAQUE:
                raise UserError(f"{path} has transparent parts, which no model sees; put it on a background")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image; make or fetch it again") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the file system
        return False


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}…"


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _kept(row: dict[Any, Any]) -> dict[str, Any]:
    """A CSV row without what it has beyond the columns."""
    return {name: value for name, value in row.items() if isinstance(name, str)}


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a `pairs.jsonl`, if there is one, and its broken lines."""
    rows: list[dict[str, Any]] = []
    problems = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json_value(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            problems.append(f"{path}, line {number}: not a JSON object")
            continue
        rows.append(row)
        if "decision" in row and row["decision"] not in DECISIONS:
            told = _short(json.dumps(row["decision"]))
            problems.append(f'{path}, line {number}: decision is {told}, expected "keep" or "reject"')
        elif "decision" in row and name_of(row) is None:
            problems.append(f'{path}, line {number}: a decision, but no "unsafe" to say on which pair; name its image')
    return rows, problems


def name_of(row: Mapping[str, Any]) -> str | None:
    """The name of the pair that a row of `pairs.jsonl` is of, by its unsafe image; None where it does not say."""
    path = row.get("unsafe")
    return unicodedata.normalize("NFC", PurePosixPath(path).stem) if isinstance(path, str) and path else None


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from read_whole(path).decode("utf-8", errors="replace").splitlines()
