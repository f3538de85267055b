"""`duo app` as a process of its own, with the quick leaves of `staged`; it writes down whom it talks to.

Run as a program it is that process: `python app_process.py NOTES RUN …`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
PATIENCE = 90  # seconds until the page must be up, on a busy machine


@dataclass
class App:
    """The page's process: its URL, what it printed after that, whom it connected to, and how it ended."""

    url: str
    told: list[str]
    errors: Path
    notes: Path
    code: int | None = None
    process: Any = field(default=None, repr=False)

    def connections(self) -> set[str]:
        """Every host that the process connected to or looked up."""
        return set(self.notes.read_text().split()) if self.notes.exists() else set()


@contextmanager
def app_at_work(*arguments: Path | str, temporary: Path) -> Iterator[App]:
    """The page over `arguments` of `duo app`, ended as a service manager ends it."""
    notes, errors = temporary / "connections.txt", temporary / "app-stderr.txt"
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, __file__, str(notes), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
        ) as process,
    ):
        try:
            lines = 1 + ("--token" in arguments)
            printed = _lines(process, lines)
            assert len(printed) == lines, errors.read_text()
            app = App(url=printed[0], told=printed[1:], errors=errors, notes=notes, process=process)
            yield app
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    app.code = code


def _lines(process: Any, wanted: int) -> list[str]:
    """The first lines that it prints, read past Python's buffer, which `select` knows nothing of."""
    printed, end = b"", time.monotonic() + PATIENCE
    while printed.count(b"\n") < wanted and time.monotonic() < end and process.poll() is None:
        if select.select([process.stdout], [], [], 0.2)[0]:
            printed += os.read(process.stdout.fileno(), 4096)
    return printed.decode().splitlines()


def main(notes: str, *arguments: str) -> int:
    """The process itself."""

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = given[0]
        elif event == "socket.connect" and isinstance(given[1], tuple):
            host = given[1][0]
        else:
            return
        with Path(notes).open("a") as file:
            file.write(f"{host.decode() if isinstance(host, bytes) else host}\n")

    sys.addaudithook(note)
    sys.path.insert(0, str(TESTS))
    from duo import cli, plugins

    load = plugins.load

    def load_staged(kind: str, name: str) -> Any:
        import staged  # which imports torch

        return staged.LEAVES.get((kind, name)) or load(kind, name)

    plugins.load = load_staged
    return cli.main(["app", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
