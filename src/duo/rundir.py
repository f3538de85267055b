"""The run folder: atomic files, stages that are finished or not, the lock, progress and timings. No torch.

A stage's folder holds `partial.json` from its first moment and `manifest.json` from its last: it is finished if and
only if the manifest is there. Both hold the stage's configuration, and going on with another one is refused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo import parallel
from duo.errors import UserError
from duo.foreign import json_value, open_plain, read_text, read_whole, refuse_strays
from duo.plugins import Precision, Sampling
from duo.purged import removed
from duo.terminal import printable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

OTHER_OUT = ", or start anew with another --out"
SCHEMA = 1  # of run.json and of the manifests, which speak for the other records of their folders too
SCORED = ("scores.json", "verdicts.jsonl")  # what the report reads of the score stage
# Running a finished stage again writes nothing: this is how its files are made anew.
_ANEW = "remove {} and the folders of the stages after it, and go on with `duo run … --resume`"
ANEW = _ANEW.format("the folder of its stage")


# --- files --------------------------------------------------------------------------------------


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write a file to, which is renamed to `path` at the end: so it is there whole or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _naming(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary neighbour that is then renamed."""
    with _renamed(path) as temporary:
        temporary.write_bytes(data)


def private(folder: Path) -> None:
    """Make a folder that its owner alone may look into, for images that nobody else shall see; one that is there stays
    as it is."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def _naming(path: Path, error: OSError) -> OSError:
    """The same error with the file that was to be written: a full disk is told without one, or with a temporary's."""
    return OSError(error.errno, error.strerror, str(path))


def sweep(folder: Path, *, deep: bool = True) -> None:
    """Remove what a kill in the midst of a write left in a folder, and in those below it where `deep`.

    That is `write_bytes`'s, and what safetensors writes before it renames.
    """
    for pattern in LEFTOVERS:
        for leftover in folder.rglob(pattern) if deep else folder.glob(pattern):
            if leftover.is_file():
                leftover.unlink()


def make_room(path: Path) -> None:
    """Make the folder that the new `path` is to lie in; a `UserError` where it cannot be made or written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another --out") from error


LEFTOVERS = (".*.tmp", ".tmp*")  # what a kill leaves half written: ours, and those of safetensors
PIECE = 2**20  # bytes that are written at once of what is made bit by bit
_ESCAPED = "backslashreplace"  # of names that are no UTF-8: Python's escapes of lone surrogates are JSON's


def write_json(path: Path, value: object) -> None:
    """Write `value` indented, keys in their order, ending in a newline; NaN and infinity are refused."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(errors=_ESCAPED))


def read_json(path: Path, *, todo: str = "restore it, or start anew with another --out", finite: bool = True) -> Any:
    """The value in a JSON file of a run, or a `UserError` that names the file and, of a broken one, what is `todo`.

    Not `finite`: as for `duo.foreign.json_value`. A `run.json` or manifest must be of a schema that is known here.
    """
    try:
        value = json_value(read_text(path), table=partial(Table, path), finite=finite)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {todo}") from error
    if path.name in (RUN, MANIFEST, PARTIAL) and isinstance(value, Table):
        check_schema(path, value)
    return value


def check_schema(path: Path, record: Mapping[str, Any], known: int = SCHEMA, *, otherwise: str = OTHER_OUT) -> None:
    """Raise `UserError` where a record says that it is of another schema than the one that is `known` here."""
    told = record.get("schema", known)
    if told != known or isinstance(told, bool):
        raise UserError(
            f"{path}: schema {_short(told)} is not known here, only {known}; use the duo that wrote it{otherwise}"
        )


class Table(dict[str, Any]):
    """An object of a run's JSON; a field that it lacks is told with the file's name."""

    def __init__(self, path: Path, table: Mapping[str, Any]) -> None:
        super().__init__(table)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path} has no field {key!r}; restore it, or start anew with another --out")


def read_table(path: Path, key: str) -> dict[str, Any]:
    """As `read_json`, of an object that must have `key`."""
    value = read_json(path)
    if not isinstance(value, Table) or not isinstance(value.get(key), dict):
        raise UserError(f"{path} has no table {key!r}; restore it, or start anew with another --out")
    return value


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all; the rows are taken one by one, for they may be many."""
    write_parts(path, (_line(row).encode() for row in rows))


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """As `write_bytes`, of what is made bit by bit and would not be held at once."""
    with _renamed(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for part in _gathered(parts):
                if os.write(descriptor, part) < len(part):  # which is how a disk says first that it is full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def _gathered(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that are worth a write."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= PIECE:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, whole or not at all; what a kill left of a line is cut off first.

    Several processes may add to one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a line that another process has half written is none of a kill's
        before = _end_of_lines(descriptor)
        line = _line(row).encode()
        if os.write(descriptor, line) < len(line):  # which is how a disk says first that it is full
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _naming(path, error) from error
    finally:
        os.close(descriptor)


def _end_of_lines(descriptor: int) -> int:
    """The length of a file whose last line is whole: what follows its last newline is cut off."""
    length = os.fstat(descriptor).st_size
    if length and os.pread(descriptor, 1, length - 1) != b"\n":
        length = os.pread(descriptor, length, 0).rfind(b"\n") + 1
        os.ftruncate(descriptor, length)
    return length


def read_jsonl(path: Path, *, appended: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file.

    Of a file that is `appended` to, a last line that was cut off by a kill is left out; one that is written at once is
    broken if it does not end in a newline.
    """
    if not path.exists():
        return []
    try:
        whole, _, cut_off = read_whole(path).rpartition(b"\n")
        if cut_off and not appended:
            raise ValueError("its last line is cut off")
        rows = [json_value(line, table=partial(Table, path)) for line in whole.splitlines()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is no object")
        return rows
    except ValueError as error:
        raise UserError(f"{path} is not valid JSONL ({error}); restore it, or start anew with another --out") from error


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """As `read_jsonl`, of a file that was written at once, a row at a time: for those that may have 10⁵."""
    if not path.exists():
        return
    try:
        with open_plain(path) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    raise ValueError("its last line is cut off")
                row = json_value(line, table=partial(Table, path))
                if not isinstance(row, dict):
                    raise ValueError("a row is no object")
                yield row
    except ValueError as error:
        raise UserError(f"{path} is not valid JSONL ({error}); restore it, or start anew with another --out") from error


def write_image(path: Path, image: Image) -> None:
    """Write a PNG, or a lossless WebP where the name ends in `.webp`: RGB pixels come back as they were."""
    private(path.parent)
    buffer = io.BytesIO()
    if path.suffix == ".webp":
        image.save(buffer, format="WEBP", lossless=True)
    else:
        image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def read_image(path: Path, *, remedy: str) -> Image:
    """The RGB picture in a file of a run, or a `UserError` that names the file and the `remedy`."""
    from duo.image_files import opened

    try:
        with opened(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        if removed(path):
            raise UserError(f"{path} was removed by `duo purge`; make it anew, in another --out") from None
        raise UserError(f"{path} cannot be read as an image; {remedy}") from error


def digest(value: object) -> str:
    """sha256 of a file's bytes (for a `Path`) or of a value's canonical JSON."""
    if isinstance(value, Path):
        with value.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_texts(texts: Iterable[str]) -> str:
    """`digest` of the list of these texts, of which no more than one is held."""
    whole, before = hashlib.sha256(b"["), b""
    for text in texts:
        whole.update(before + json.dumps(text).encode())
        before = b","
    whole.update(b"]")
    return whole.hexdigest()


def _line(row: Mapping[str, Any]) -> str:
    # ASCII only: attacks find prompts with U+2028 and the like, which some readers take for the end of a line.
    return json.dumps(row, allow_nan=False) + "\n"


DELTA = "delta.safetensors"  # in the folder of the erase stage
RUN = "run.json"  # in every run folder
MANIFEST, PARTIAL = "manifest.json", "partial.json"  # in every stage's
BLOCKS = "blocks"  # in the folder of a stage that is cut into such, until it is finished


# --- stages -------------------------------------------------------------------------------------


# Of leaves, by name, the settings that are at their defaults: a record from before there were such may lack them.
Defaults = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One stage's folder within a run."""

    folder: Path
    defaults: Defaults = field(default_factory=dict)

    @property
    def manifest(self) -> Path:
        """Written last: a stage is finished if and only if it is there."""
        return self.folder / MANIFEST

    @property
    def partial(self) -> Path:
        """Written first, and removed at the end."""
        return self.folder / PARTIAL

    @property
    def finished(self) -> bool:
        """Whether the manifest is there."""
        return self.manifest.exists()

    @property
    def begun(self) -> bool:
        """Whether anything of the stage is there, finished or not."""
        return self.finished or self.partial.exists()

    def begin(self, config: Mapping[str, Any], *, may_rise: Sequence[str] = ()) -> bool:
        """Begin the stage or go on with it, and say whether anything is left to do.

        Raises `UserError` where it was begun, or finished, with another configuration; only the numbers that `may_rise`
        names ("pairs.max_tries") may be larger than they were. Every process must call it.
        """
        return parallel.once(lambda: self._begin(config, may_rise))

    def _begin(self, config: Mapping[str, Any], may_rise: Sequence[str]) -> bool:
        if self.begun:
            self._same(config, may_rise)
        if self.finished:
            self._tidy()  # a kill may have come between the manifest and that
            return False
        new = {"schema": SCHEMA, "config": json.loads(json.dumps(config))}
        if not self.begun or read_json(self.partial) != new:
            write_json(self.partial, new)
        sweep(self.folder)
        return True

    def finish(self, **record: Any) -> None:
        """Write the manifest: the configuration that the stage was begun with, what it has to tell, and the digests of
        its files.

        The records of its blocks, which were gathered into its own files, go with `partial.json`.
        """
        _tidy_log(self.folder / "log.jsonl")
        files = {str(path.relative_to(self.folder)): digest(path) for path in self._made()}
        write_json(self.manifest, {**read_json(self.partial), **record, **({"files": files} if files else {})})
        self._tidy()

    def _made(self) -> Iterator[Path]:
        """The files that the stage leaves, in order: not those that are added to, nor what serves to go on, nor those
        of run folders in it, whose stages have manifests of their own."""
        if (self.folder / RUN).exists():
            return
        for path in sorted(self.folder.rglob("*")):
            parts = path.relative_to(self.folder).parts
            passing = parts[0] in (BLOCKS, "checkpoints") or path.name in (*GROWING, self.partial.name)
            inner = (self.folder.joinpath(*parts[:i], RUN) for i in range(1, len(parts)))
            if path.is_file() and not passing and not path.name.startswith(".") and not any(map(Path.exists, inner)):
                yield path

    def altered(self, *folders: str) -> str | None:
        """The first file in `folders` of this finished stage that is not what it wrote, if any.

        Files that are no longer there are passed over. Of a stage that an older version of duo made nothing is known.
        """
        for name, wanted in self._files().items():
            path = self.folder / name
            if Path(name).parts[0] in folders and path.is_file() and digest(path) != wanted:
                return name
        return None

    def sealed(self, name: str) -> str | None:
        """The digest that the manifest has of a file of this finished stage."""
        return self._files().get(name)

    def _files(self) -> dict[str, str]:
        files = read_json(self.manifest).get("files", {})
        return files if isinstance(files, dict) else {}

    def _tidy(self) -> None:
        shutil.rmtree(self.folder / BLOCKS, ignore_errors=True)
        self.partial.unlink(missing_ok=True)

    def require(self, verb: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The manifest of a stage that must be finished, or a `UserError` that says which verb finishes it.

        Where `config` is given, it must be the one that the stage was made with.
        """
        if not self.finished:
            raise UserError(f"{self.folder} is not finished; run `duo {verb}` first")
        if config is not None:
            self._same(config)
        return read_table(self.manifest, "config")

    def intact(self, name: str, wanted: str | None = None) -> Path:
        """The path of a file of this finished stage, which must be there and have the digest `wanted`.

        `wanted` is None where no digest was recorded, as by older versions of duo. Raises `UserError`: running a
        finished stage again does not make its files anew, so that says what does.
        """
        path = self.folder / name
        if not path.is_file():
            raise self.broken(path, "is missing")
        if wanted is not None and digest(path) != wanted:
            raise self.broken(path, "is not what its stage wrote")
        return path

    def broken(self, path: Path, fault: str) -> UserError:
        """What to tell where what a finished stage wrote is no longer so: `fault` of `path`."""
        return UserError(f"{path} {fault}; put it back, or {_ANEW.format(self.folder)}")

    def _same(self, config: Mapping[str, Any], may_rise: Sequence[str] = ()) -> None:
        found = read_table(self.manifest if self.finished else self.partial, "config")["config"]
        new = json.loads(json.dumps(config))
        difference = _difference(_raised(_filled(found, new, self.defaults), new, may_rise), new)
        if difference:
            raise UserError(
                f"{self.folder} was made with {difference}; give that again, name another --out, or remove the folder "
                "and those of the stages after it"
            )


GROWING = ("timings.jsonl", "log.jsonl")  # files of a stage that are added to, and stay where they are


def take(source: Path, to: Path, *, leave: Sequence[str] = GROWING) -> None:
    """Have the files of a finished part of a run in another run's folder too, those apart that are named in `leave`.

    A part that is not there is made where it is due. Files are never changed in place, only replaced, so that links
    are safe.
    """
    if (to / "manifest.json").exists() or not source.is_dir():
        return
    if source.name != "images" and not (source / "manifest.json").exists():
        return
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    for path in sorted(files, key=lambda one: one.name == "manifest.json"):  # which says that all is there: last
        if path.name not in leave:
            link(path, to / path.relative_to(source))


def link(path: Path, target: Path) -> None:
    """Have a file in another place too, unless one is there: by a hard link, or a copy where the disk has none."""
    if target.exists():
        return
    private(target.parent)
    try:
        os.link(path, target)
    except OSError:
        write_bytes(target, path.read_bytes())


class Blocks:
    """The rows 0 … n−1 cut into fixed blocks, with one record file for each that is done.

    A block is computed whole or not at all, so a resumed run, or one of several processes, yields the same bytes as one
    that was never stopped.
    """

    def __init__(self, folder: Path, *, n: int, size: int) -> None:
        self.folder = folder
        self.ranges = blocks(n, size)

    def pending(self) -> Iterator[range]:
        """The blocks that have no record yet and fall to this process, in order."""
        return (rows for rows in parallel.mine(self.ranges) if not self._path(rows).exists())

    def done(self, rows: range, record: Mapping[str, Any]) -> None:
        """Keep what one block has to tell; its images must have been written before."""
        write_json(self._path(rows), record)

    def forget(self, which: Callable[[dict[str, Any]], bool]) -> None:
        """Make those blocks pending again of whose records `which` is true. Every process must call it."""
        parallel.once(lambda: self._forget(which))

    def _forget(self, which: Callable[[dict[str, Any]], bool]) -> None:
        for path in map(self._path, self.ranges):
            if path.exists() and which(read_json(path)):
                path.unlink()

    def records(self) -> list[dict[str, Any]]:
        """The records of all blocks that are done, in order."""
        return list(self.each())

    def each(self) -> Iterator[dict[str, Any]]:
        """The same, one at a time."""
        return (read_json(path) for path in map(self._path, self.ranges) if path.exists())

    def _path(self, rows: range) -> Path:
        return self.folder / f"{rows.start:04d}.json"


def blocks(n: int, size: int) -> list[range]:
    """0 … n−1 in runs of `size`; the last may be shorter."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first field that differs, in words, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else f"{where} = {_short(old)}, not {_short(new)}"


def _filled(old: Any, new: Any, defaults: Defaults) -> Any:
    """`old` with what its tables of leaves lack, in tables of the same name in `new`, at whatever depth."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_filled(before, now, defaults) for before, now in zip(old, new, strict=True)]
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old
    leaf = new.get("name")
    known = defaults.get(leaf, {}) if isinstance(leaf, str) and old.get("name") == leaf else {}
    filled = {name: _filled(value, new.get(name), defaults) for name, value in old.items()}
    later = {name: value for name, value in new.items() if name not in old and name in known}
    return filled | {name: value for name, value in later.items() if json.loads(json.dumps(known[name])) == value}


def _raised(old: Any, new: Any, fields: Sequence[str]) -> Any:
    """`old` with those `fields` ("table.name") taken from `new` that are larger numbers there."""
    for field_name in fields:
        table, _, name = field_name.partition(".")
        before, now = (one[table].get(name) if isinstance(one.get(table), dict) else None for one in (old, new))
        if isinstance(before, int) and isinstance(now, int) and now > before:
            old = {**old, table: {**old[table], name: now}}
    return old


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _tidy_log(path: Path) -> None:
    """Of a row that was written again after a resume, keep the last: the log of a run that was never stopped.

    Which step a row is of its whole numbers and words say: {"restart", "step"}, of an attack that starts again.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in read_jsonl(path, appended=True):
        rows[_line({name: value for name, value in row.items() if "step" not in row or type(value) is not float})] = row
    if rows:
        write_jsonl(path, rows.values())


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDir:
    """One run's folder."""

    path: Path
    defaults: Defaults = field(default_factory=dict)

    def require(self) -> None:
        """Raise a `UserError` where this is not the folder of a run."""
        if not (self.path / RUN).is_file():
            lacks = "it has no run.json" if self.path.is_dir() else "there is no such folder"
            raise UserError(f"{self.path} is not a run folder: {lacks}; give the --out of a `duo run`")
        refuse_strays(self.path)

    def stage(self, *parts: str) -> Stage:
        """The stage at `pairs`, `erase`, `attack/<row>/<model>` or `score`."""
        return Stage(self.path.joinpath(*parts), self.defaults)

    def erasure(self) -> tuple[Path, str]:
        """The file of the finished erasure and the digest that its stage recorded, which the file must still have.

        Of an erasure that was made elsewhere and is no delta, it is the path where that lay; whoever loads it looks at
        the digest.
        """
        stage = self.stage("erase")
        made = stage.require("erase")
        wanted: str = made["digest"]
        elsewhere = made.get("artefact", {"kind": "delta"})
        if not isinstance(elsewhere, dict) or not isinstance(elsewhere.get("path", ""), str):
            raise stage.broken(stage.manifest, "has an artefact without a path")
        if elsewhere["kind"] != "delta":
            return Path(elsewhere["path"]), wanted
        return stage.intact(DELTA, wanted), wanted

    def scores(self) -> Path:
        """The `scores.json` of the finished score stage; it, the verdicts and the images that were drawn to be scored
        must be those that the stage wrote."""
        stage = self.stage("score")
        wanted = stage.require("score").get("digests", {})  # older versions of duo recorded none
        if not isinstance(wanted, dict):
            raise stage.broken(stage.manifest, "has digests that are no table")
        scores, _ = (stage.intact(name, wanted.get(name)) for name in SCORED)
        if changed := stage.altered("images"):
            raise stage.broken(stage.folder / changed, "is not what its stage wrote")
        return scores

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder for this process; a `UserError` names the process that holds it already.

        Whoever holds it may ask again, and loses it where it was got first.
        """
        if self.path.resolve() in _held():
            yield
            return
        try:
            private(self.path)
            refuse_strays(self.path)
            handle = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; name another --out") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UserError(f"{self.path} is in use by {holder}; wait for it, or stop it") from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}, started {_now()}\n")
            handle.flush()
            sweep(self.path, deep=False)
            _held().add(self.path.resolve())
            try:
                yield
            finally:
                _held().discard(self.path.resolve())

    def describe(
        self, record: Mapping[str, Any], *, fixed: Mapping[str, Sequence[str]], may_rise: Sequence[str] = ()
    ) -> None:
        """Write `run.json`. Versions and world must be those of a run that was begun, and so must what stages used.

        `fixed` names, for each stage, the fields of `record["recipe"]` that may not change once it is begun; numbers in
        them that `may_rise` names ("pairs.max_tries") may be larger than they were.
        """
        path = self.path / RUN
        new = json.loads(json.dumps({"schema": SCHEMA, **record}))
        found = read_table(path, "recipe") if path.exists() else new
        old = {**found, "recipe": _filled(found["recipe"], new["recipe"], self.defaults)}
        kept = [field for stage, names in fixed.items() if self.stage(stage).begun for field in names]
        for where, before, now, keys in (
            ("", old, new, ("versions", "world_digest")),
            ("recipe.", _raised(old["recipe"], new["recipe"], may_rise), new["recipe"], kept),
        ):
            for key in keys:
                difference = _difference(before.get(key), now.get(key), f"{where}{key}")
                if difference:
                    raise UserError(
                        f"{path} has {difference}; go back to that, name another --out, or remove the folders of the "
                        "stages that used it"
                    )
        if not path.exists() or found != new:
            write_json(path, new)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add a row to `timings.jsonl`, also where the stage is interrupted: a resumed stage has several."""
        started, clock = _now(), time.monotonic()
        try:
            yield
        finally:
            row = {
                "stage": stage,
                "seconds": round(time.monotonic() - clock, 3),
                "started": started,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
            }
            append_jsonl(self.path / "timings.jsonl", row)


_THREAD = threading.local()


def _held() -> set[Path]:
    """The run folders that this thread holds."""
    held: set[Path] = _THREAD.__dict__.setdefault("held", set())
    return held


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- what a stage lends to a leaf -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """A `duo.plugins.Run`: the folder that a leaf may keep checkpoints in, its seed and device, progress and a log.

    Of several processes only the main one logs and shows progress.
    """

    folder: Path
    seed: int
    device: torch.device
    precision: Precision = field(default_factory=Precision)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def progress(self, total: int, label: str) -> AbstractContextManager[Progress]:
        """A bar on a terminal; elsewhere about ten plain lines on stderr."""
        return progress(total, label)

    def log(self, **numbers: float | int | str) -> None:
        """Add one row to `log.jsonl`."""
        if parallel.is_main():
            append_jsonl(self.folder / "log.jsonl", numbers)


def note(text: str) -> None:
    """Tell something that is no error, once for all processes."""
    if parallel.is_main():
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)  # noqa: T201


@dataclass
class Progress:
    """Plain progress: a line whenever a tenth more is done."""

    total: int
    label: str
    shown: int = field(default=-1, init=False)

    def update(self, step: int, **numbers: float) -> None:
        """Say that `step` of the total are done, with what there is to tell."""
        tenth = 10 * step // max(1, self.total)
        if tenth > self.shown and parallel.is_main():
            self.shown = tenth
            print(f"{self.label}: {step}/{self.total}{_told(numbers)}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere about ten plain lines on stderr."""
    if not sys.stderr.isatty() or not parallel.is_main():
        yield Progress(total, label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as rich:
        yield _Bar(total, label, rich)


class _Bar(Progress):
    """The same on a terminal."""

    def __init__(self, total: int, label: str, rich: Any) -> None:
        super().__init__(total, label)
        self._rich, self._task = rich, rich.add_task(label, total=total, told="")

    def update(self, step: int, **numbers: float) -> None:
        self._rich.update(self._task, completed=step, told=_told(numbers))


def _told(numbers: Mapping[str, float]) -> str:
    return "".join(f"  {name} {value:.4g}" for name, value in numbers.items())
