"""The command line. Nothing here imports torch before a verb needs it, so that help and mistakes answer at once."""

from __future__ import annotations

import errno
import io
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from duo import parallel
from duo.errors import UserError
from duo.flags import parser_for
from duo.terminal import message, printable

MISUSE, INTERRUPTED, UNHEARD, TERMINATED = 2, 130, 141, 143
SHARED_VERBS = ("run", "pairs", "erase", "attack", "score")  # the work of which several processes share
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)
PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
MEMORY_ERRORS = ("out of memory", "can't allocate memory")  # as torch tells them on CUDA and on the CPU


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can mend, 130 where it was interrupted (Ctrl-C),
    141 where nobody reads what it prints any more (`duo … | head`), 143 where it was terminated (SIGTERM).

    `duo check` returns 1 where a bound does not hold.

    Of several processes (`duo.parallel`) the main one alone writes to standard output, and one tells what went wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] not in ([verb] for verb in SHARED_VERBS) or "--dry-run" in arguments:
        if not parallel.is_main():
            return 0
        parallel.go_alone()
    if parallel.is_main():
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no UTF-8, and a prompt no Unicode
            sys.stdout.reconfigure(errors="backslashreplace")
        return _main(arguments)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return _main(arguments)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends what is at work as Ctrl-C does."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the context SIGTERM raises; who has a handler of their own, or is no main thread, keeps it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def _main(arguments: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a torchvision that nothing here needs
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with _terminable():
            try:
                given = parser_for(arguments).parse_args(arguments)
                code = given.verb(given) or 0
            except SystemExit:  # as --help ends
                _flush()
                raise
            _flush()  # here, where a pipe that nobody reads, or a full disk, is still told
            return code
    except UserError as error:
        _tell(f"duo: {message(error)}")
        return MISUSE
    except BrokenPipeError:
        if not _unheard():
            raise  # it was another pipe, such as that of a process of ours
        return UNHEARD
    except OSError as error:
        if error.errno not in DISK_ERRORS + PATH_ERRORS:
            raise
        where = printable(os.fsdecode(error.filename or "the disk"))
        _tell(f"duo: {where}: {error.strerror}; nothing is lost: {_again(arguments)}")
        return MISUSE
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in MEMORY_ERRORS):
            raise
        _tell(
            "duo: out of memory; lower block, pairs.block, method.train_batch_size or an attack's batch_size, or set "
            "precision.dtype, precision.gradient_checkpointing, precision.offload or (for several processes) "
            "precision.shard, each in a new --out, as a run keeps its settings; or free some: nothing is lost: "
            f"{_again(arguments)}"
        )
        return MISUSE
    except KeyboardInterrupt as stopped:
        _tell(f"\nduo: stopped; nothing is lost: {_again(arguments)}")
        return TERMINATED if isinstance(stopped, _TerminatedError) else INTERRUPTED
    finally:
        _drop_unprinted()


def _tell(text: str) -> None:
    """Print what went wrong, unless another process has, and so stop the others."""
    if parallel.stop():
        print(text, file=sys.stderr)


def _flush() -> None:
    if sys.stdout is not None:  # as it is where the command was started with its output closed
        sys.stdout.flush()


def _drop_unprinted() -> None:
    """Leave nothing that the interpreter would try to print as it ends, which would change the exit code."""
    try:
        _flush()
    except OSError:
        _to_nowhere(sys.stdout)


def _unheard() -> bool:
    """Whether nobody reads what is printed; then stop the other processes, and print no more."""
    watch = select.poll()
    try:
        watch.register(sys.stdout.fileno(), 0)  # that the other end is gone is told unasked
    except (AttributeError, OSError, ValueError):  # there is no output, or it is no file
        return False
    if not watch.poll(0):
        return False
    parallel.stop()
    _to_nowhere(sys.stdout)
    _to_nowhere(sys.stderr)
    return True


def _to_nowhere(stream: TextIO | None) -> None:
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def _again(arguments: Sequence[str]) -> str:
    resumes = arguments[:1] == ["run"] and not {"--resume", "--dry-run"} & {*arguments}
    return f"go on with `duo {shlex.join([*arguments, *(['--resume'] if resumes else [])])}`"


if __name__ == "__main__":
    sys.exit(main())
