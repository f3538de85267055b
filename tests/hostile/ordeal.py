"""How a hostile case is judged: what a parser may do with a file from outside, and what it may never do.

It may take the file, or raise a `UserError` that the command line tells in one line. It may not raise anything else,
take long, take much memory, write outside the folder that it was given, start a process, open a connection or unpickle.
"""

from __future__ import annotations

import faulthandler
import gc
import math
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib.font_manager  # noqa: F401
from hypothesis import HealthCheck, Phase, settings

import duo.training  # noqa: F401 (torch and matplotlib make folders of their own: before anything is watched)
from duo.cli import DISK_ERRORS, PATH_ERRORS
from duo.errors import UserError
from duo.terminal import LONGEST, message

# How many cases each property tries in the short form, and so the share that it has of the long form's.
SHARES = {
    "recipe": 60,
    "concept": 40,
    "budget": 25,
    "bench file": 25,
    "gate file": 25,
    "TOML bytes": 40,
    "run": 20,
    "gate": 30,
    "result and card": 20,
    "leaderboard": 40,
    "bench cells": 60,
    "erasure of a run": 30,
    "recipe of a run": 30,
    "curation": 20,
    "rows": 60,
    "stage": 60,
    "captions": 50,
    "prompt set": 70,
    "vector pairs": 40,
    "pairs CSV": 40,
    "pairs folder": 40,
    "images": 50,
    "svg": 40,
    "licence": 20,
    "tensors": 80,
    "delta": 50,
    "artefact": 50,
    "checkpoint": 30,
    "search": 30,
    "LoRA": 12,
    "weights": 10,
    "model folder": 6,
    "single file": 4,
    "pickles": 1,
    "resumed run": 4,
}
HEAVY = ("concept", "run", "LoRA", "weights", "model folder", "single file", "resumed run")  # a fourth in the long form
_WEIGHTS = {name: share / (4 if name in HEAVY else 1) for name, share in SHARES.items()}
ENVIRONMENT = "DUO_HOSTILE_CASES"
WANTED = int(os.environ.get(ENVIRONMENT, "0"))  # cases of the long form; 0: the short form
WALL, CPU = 60.0, 10.0  # seconds that one case may take: of the clock on a busy machine, and of a processor
MEMORY = 400 * 2**20  # bytes by which one case may raise what the process held at most

tried: Counter[str] = Counter()


def cases(name: str) -> Any:
    """Hypothesis's settings of the property `name`: the same cases each time in the short form, others in the long."""
    wanted = max(SHARES[name], math.ceil(WANTED * _WEIGHTS[name] / sum(_WEIGHTS.values())))
    return settings(
        max_examples=wanted,
        deadline=None,
        derandomize=not WANTED,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class TooSlowError(BaseException):
    """A case took longer than it may; no handler of errors takes it for one of its own."""


class Forbidden(BaseException):
    """A case did what no parser may."""


# --- what is watched -------------------------------------------------------------------------------

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = {  # event → which of its arguments are a path, and the descriptor of the folder that this starts from
    "os.mkdir": [(0, 2)],
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.rename": [(0, 2), (1, 3)],
    "os.link": [(1, 3)],
    "os.symlink": [(1, 2)],
    "os.truncate": [(0, None)],
}
NEVER = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
)
_allowed: list[Path] = []  # folders that the case at work may write to; none: nothing is watched


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES:
            _refuse_outside(event, path)
    elif event in CHANGES:
        for path, start in CHANGES[event]:
            _refuse_outside(event, arguments[path], -1 if start is None else arguments[start])
    elif event in NEVER:
        raise Forbidden(f"{event} {arguments!r:.200}")


def _refuse_outside(event: str, path: Any, start: int = -1) -> None:
    if isinstance(path, int):
        return
    folder = "" if start < 0 else str(Path(f"/proc/self/fd/{start}").readlink())
    name = os.path.realpath(os.path.join(folder, os.fsdecode(path)))  # noqa: PTH118 (of any kind of path)
    if name != os.devnull and "__pycache__" not in name and not any(Path(name).is_relative_to(one) for one in _allowed):
        raise Forbidden(f"{event} of {name}, outside {_allowed[0]}")


sys.addaudithook(_watch)


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `TooSlowError` past the time; where the process does not even answer to that, end it with a traceback."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"a case took more than {WALL:g} s, or {CPU:g} s of a processor")

    before = [(one, signal.signal(one, late)) for one in (signal.SIGALRM, signal.SIGPROF)]
    faulthandler.dump_traceback_later(3 * WALL, exit=True)
    signal.setitimer(signal.ITIMER_REAL, WALL)
    signal.setitimer(signal.ITIMER_PROF, CPU)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before:
            signal.signal(number, handler)


def endure(name: str, parse: Callable[[], object], *, writes: Path) -> UserError | None:
    """Put `parse` to one case of the property `name`: what it refused with, or None where it took the file.

    `writes` is the only folder that it may write to. Anything else than a `UserError` of one line fails the test.
    """
    tried[name] += 1
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _allowed.extend([writes.resolve(), Path(tempfile.gettempdir()).resolve() / "duo-hostile"])
    try:
        with _limited():
            parse()
        refusal = None
    except UserError as error:
        refusal = error
    except OSError as error:
        if error.errno not in DISK_ERRORS + PATH_ERRORS:  # of these the command line makes a line by itself
            raise
        refusal = UserError(str(error))
    finally:
        _allowed.clear()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    assert grown < MEMORY, f"one case took {grown / 2**20:.0f} MiB"
    if grown > MEMORY / 8:
        gc.collect()
    if refusal is not None:
        line = message(refusal)
        assert line and "\n" not in line and line.isprintable() and len(line) <= LONGEST
    return refusal


def accepted(name: str, parse: Callable[[], object], *, writes: Path) -> None:
    """The same of what is sound, which must be taken: else what is damaged may be refused for something else."""
    assert endure(name, parse, writes=writes) is None
