"""Runs that are killed at random moments and gone on with: `python crashes.py FOLDER MODEL --kills 9 --seed 1`.

A run is straight once: whole, and never stopped. Then it is made again and again by attempts, each of which something
befalls at a random moment, until one comes through; what lies there then must be the straight run's, byte for byte.
What befalls it is one of

    kill    SIGKILL, after a time, before an operation on the run's files, or in the midst of a write, half of which
            is then on the disk
    stop    SIGTERM or Ctrl-C before an operation: it must say in one line how to go on, and return 143 or 130
    full    a disk that is full from an operation on, after half of a write: one line, code 2

Each attempt is a child of this process, which has loaded torch and the model already: so it takes no longer than its
work. `tests/test_crashes.py` runs a few of each, `make torture` a hundred.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

import staged
from duo import checkpoint, cli, plugins
from duo.models import load_family
from duo.recipe import load_recipe
from duo.stages import benching, run, session

TRAINED = (
    'method = {name = "duo", max_train_steps = 6, train_batch_size = 2, rank = 2, learning_rate = 1e-3, '
    "prior_weight = 10.0, checkpointing_steps = 2}"
)
LEARNING = """
[[attacks]]
row = "learns"
name = "concept_inversion"
prompts = "neutral"
images = 2
steps = 4
restarts = 2
checkpointing_steps = 2
batch_size = 1
"""
HARDENING = """
[hardening]
rounds = 1
unrelated = 2
[[hardening.attacks]]
row = "again"
name = "learned_word"
prompts = "plain"
images = 4
"""
BENCH = """
recipe = "recipe.toml"
budget = "rows.toml"
seeds = [3]
[methods.nudge]
recipe = "quick.toml"
strength = "method.size"
values = [0.5, 4.0]
"""
ROWS = f"attack_images = 3\n[score]\nunrelated = 2\nnear_miss = 1\n{staged.ROWS}"
SHORT = "short"  # what only the short form kills
LONGEST = 600  # seconds that an attempt may take before it counts as one that hangs
NEVER = 10**9  # operations
MOST = 400  # attempts at one run
TIMED = ("timings.jsonl", ".lock", "report.html", "README.md")  # files that hold times
PASSING = (*TIMED, "partial.json")  # what a stage that was killed as it ended may still have
TIMES = ("cost", "seconds", "denoiser")  # and what holds them in report.json


def write_recipes(folder: Path, model: str) -> None:
    """A hardened run of a method that trains and of attacks that search and learn, a bench, and a shorter run."""
    whole = staged.RECIPE.replace('"tiny"', json.dumps(model))
    trained = whole.replace('method = {name = "nudge"}', TRAINED)
    for name, text in {
        "fire.toml": staged.CONCEPT,
        "recipe.toml": trained.replace("[score]", f"{LEARNING}[score]") + HARDENING,
        "short.toml": trained,
        "quick.toml": whole,
        "rows.toml": ROWS,
        "bench.toml": BENCH.replace("recipe.toml", "quick.toml"),
    }.items():
        (folder / name).write_text(text)


def verbs(folder: Path, out: Path) -> dict[str, list[str]]:
    """What is killed, by name."""
    return {
        "run": ["run", str(folder / "recipe.toml"), "--out", str(out), "--resume"],
        "bench": ["bench", str(folder / "bench.toml"), "--out", str(out), "--results", str(out / "results")],
        SHORT: ["run", str(folder / "short.toml"), "--out", str(out), "--resume"],
    }


# --- what befalls an attempt ---------------------------------------------------------------------------


@dataclass
class Fate:
    """What befalls an attempt once it comes to operation `at` on files in `folder`, or after `seconds`."""

    folder: Path
    kind: str = "none"  # or "kill", "tear", "stop", "full"
    at: int = NEVER
    seconds: float | None = None
    signal: signal.Signals = signal.SIGKILL
    operations: int = field(default=0, init=False)
    spent: bool = field(default=False, init=False)

    def arm(self) -> None:
        """Watch this process, for good: it must be a child that does nothing else."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are born to ignore
        sys.addaudithook(self._look)
        write_bytes, write, save = Path.write_bytes, os.write, checkpoint.save_file

        def tearing(path: Path, data: bytes) -> int:
            if self._befalls(path):
                write_bytes(path, data[: len(data) // 2])
                self._torn()
            return write_bytes(path, data)

        def adding(descriptor: int, data: bytes) -> int:
            if self._befalls(Path(f"/proc/self/fd/{descriptor}").resolve()):
                written = write(descriptor, data[: len(data) // 2])
                if self.kind == "full":  # a disk tells so first
                    return written
                self._torn()
            return write(descriptor, data)

        def saving(tensors: Any, path: Path, metadata: Any) -> None:
            if self._befalls(path):
                if self.kind == "full":
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
                path.with_name(".tmpQdMCgF").write_bytes(b"half")  # as safetensors 0.8 begins
                self._torn()
            save(tensors, path, metadata)

        Path.write_bytes = tearing  # type: ignore[method-assign, assignment]
        os.write = adding  # type: ignore[assignment]
        checkpoint.save_file = saving

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An operation that changes files of the run is about to happen."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.link", "shutil.rmtree"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not self._counted(Path(path)):
            return
        self.operations += 1
        if event not in ("os.remove", "shutil.rmtree") and self._due("full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if self._due("kill", "stop"):
            os.kill(os.getpid(), self.signal)

    def _befalls(self, path: Path) -> bool:
        if not self._counted(path):
            return False
        self.operations += 1
        return self._due("tear", "full")

    def _due(self, *kinds: str) -> bool:
        """Whether it befalls now: once, but that a disk stays full."""
        due = self.kind in kinds and self.operations >= self.at and not self.spent
        self.spent = self.spent or (due and self.kind != "full")
        return due

    def _counted(self, path: Path) -> bool:
        return path.is_relative_to(self.folder)

    def _torn(self) -> NoReturn:
        if self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: its exit code (−9 where it was killed), what it told, and how far it came."""

    code: int
    told: str
    operations: int
    seconds: float


def attempt(arguments: list[str], fate: Fate, *, log: Path) -> Ended:
    """`duo ARGUMENTS` in a child of this process."""
    began = time.monotonic()
    counted, counting = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stdout = sys.stderr = log.open("w", buffering=1)
            fate.arm()
            code = cli.main(arguments)
        except BaseException:  # what the command line lets through is a fault, and told as such
            traceback.print_exc()
        finally:
            fate.kind = "none"
            os.write(counting, str(fate.operations).encode())
            os._exit(code)
    os.close(counting)
    killed_at = LONGEST if fate.seconds is None else fate.seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > killed_at:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    with os.fdopen(counted) as file:
        operations = int(file.read() or 0)
    took = time.monotonic() - began
    if fate.seconds is None and took > LONGEST:
        raise AssertionError(f"duo {' '.join(arguments)} hung for {LONGEST} seconds:\n{log.read_text()}")
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(), operations, took)


# --- what must be so after it ---------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those that hold times; of `report.json` what holds none."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in TIMED
    }
    if "report.json" in found:
        found["report.json"] = json.dumps(_timeless(json.loads(found["report.json"]))).encode()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(one) for name, one in value.items() if name not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """The files of all finished stages, each with what changes where it is written again."""
    stages = {path.parent for path in folder.rglob("manifest.json")}
    files = {path for stage in stages for path in stage.rglob("*") if path.is_file() and path.name not in PASSING}
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def fault(ended: Ended, fate: Fate) -> str | None:
    """What is wrong with how an attempt ended, that something befell; None where nothing is."""
    wanted = {"stop": {signal.SIGTERM: 143, signal.SIGINT: 130}.get(fate.signal), "full": 2}.get(fate.kind, -9)
    lines = [line for line in ended.told.splitlines() if re.match(r"duo: (?!\d+/)", line)]  # a method's name is duo too
    if ended.code != wanted:
        return f"code {ended.code}, not {wanted}"
    if wanted == -9:
        return None
    if len(lines) != 1 or "Traceback" in ended.told:
        return f"{len(lines)} lines"
    if fate.kind == "stop" and "stopped; nothing is lost: go on with `duo " not in lines[0]:
        return f"no word of going on: {lines[0]}"
    if fate.kind == "full" and "No space left on device" not in lines[0]:
        return f"no word of the disk: {lines[0]}"
    return None


@dataclass
class Campaign:
    """One verb, killed until so many have befallen it."""

    name: str
    arguments: list[str]
    out: Path
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def straight(self) -> None:
        """The run that nothing befalls."""
        ended = self._try(Fate(self.out))
        if ended.code != 0:
            raise AssertionError(f"duo {' '.join(self.arguments)} ended with {ended.code}:\n{ended.told}")
        self.operations, self.seconds = ended.operations, ended.seconds
        self.wanted = contents(self.out)

    def befall(self, kinds: list[str]) -> None:
        """Make runs until everything of `kinds` has befallen one of them."""
        left = list(kinds)
        while left:
            shutil.rmtree(self.out)
            kept: dict[Path, tuple[int, int]] = {}
            for _ in range(MOST):
                fate = self._fate(left[0]) if left else Fate(self.out)
                ended = self._try(fate)
                if ended.code == 0:
                    break
                if problem := fault(ended, fate):
                    self.problems.append(f"{fate}: {problem}\n{ended.told}")
                    return
                self.counts[_word(fate)] += 1
                left = left[1:]
                self._same(kept)
                kept |= finished(self.out)
            else:
                self.problems.append(f"{self.name} never ended")
                return
            self._same(kept)
            self.counts["runs"] += 1
            self.counts["finished"] += len(kept)
            self._compare()
            tell(f"{self.name} came through; {len(kinds) - len(left)} of {len(kinds)}")

    def _same(self, kept: Mapping[Path, tuple[int, int]]) -> None:
        now = finished(self.out)
        for path, what in kept.items():
            if now.get(path) != what:
                told = "made again" if path in now else "lost"
                self.problems.append(f"{path.relative_to(self.out)} of a finished stage was {told}")

    def _compare(self) -> None:
        found = contents(self.out)
        self.counts["compared"] += len(self.wanted)
        for name in sorted(found.keys() | self.wanted.keys()):
            if found.get(name) != self.wanted.get(name):
                where = "differs" if name in found and name in self.wanted else "is there" if name in found else "lacks"
                self.problems.append(f"{self.name}: {name} {where}")

    def _fate(self, kind: str) -> Fate:
        """A moment of an attempt: early enough that it takes several to come through."""
        if kind == "kill":
            kind = self.rng.choice(["kill", "tear", "time"])
        if kind == "time":
            return Fate(self.out, "kill", seconds=self.rng.uniform(0.0, self.seconds / 10))
        at = 1 + int(self.rng.random() * self.operations / 12)
        asked = signal.SIGKILL
        if kind == "stop":  # in turn, so that there is as much of the one as of the other
            asked = signal.SIGINT if self.counts["SIGINT"] < self.counts["SIGTERM"] else signal.SIGTERM
        return Fate(self.out, kind, at=at, signal=asked)

    def _try(self, fate: Fate) -> Ended:
        return attempt(self.arguments, fate, log=self.out.with_suffix(".log"))

    def __str__(self) -> str:
        told = ", ".join(f"{count} × {what}" for what, count in sorted(self.counts.items()) if "×" not in what)
        return f"{self.name} ({self.operations} operations, {self.seconds:.1f} s when straight): {told}"


def tell(text: str) -> None:
    print(f"crashes: {text}", flush=True)  # noqa: T201 (how whoever started it is told)


def _word(fate: Fate) -> str:
    return {"kill": "killed", "tear": "killed", "stop": fate.signal.name, "full": "disk full"}[fate.kind]


def warm(folder: Path, name: str) -> None:
    """Have this process import all that a run imports, by a run: its children need not, each anew."""
    recipe = load_recipe(folder / "short.toml")
    with (folder / "warm.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        run(session.Session(recipe, folder / "warm", model=load_family(name)))
    shutil.rmtree(folder / "warm")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--full", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only")
    parser.add_argument("--log", type=Path, help="a file for what was counted, as JSON")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    torch.set_num_threads(1)
    write_recipes(given.folder, given.model)
    model = load_family(given.model)
    load: Callable[[str, str], Any] = plugins.load
    plugins.load = lambda kind, name: staged.LEAVES.get((kind, name)) or load(kind, name)
    session.load_family = benching.load_family = lambda *_, **__: model  # type: ignore[attr-defined]
    warm(given.folder, given.model)
    tell(f"seed {given.seed}")
    every = verbs(given.folder, given.folder / "out")
    wanted = {name: one for name, one in every.items() if name == given.only or (not given.only and name != SHORT)}
    problems, total = [], Counter[str]()
    for number, (name, verb) in enumerate(wanted.items()):
        share = {"kill": given.kills, "stop": given.stops, "full": given.full}
        shares = {kind: n // len(wanted) + (number < n % len(wanted)) for kind, n in share.items()}
        rng = random.Random(f"{given.seed} {name}")
        campaign = Campaign(name, verb, given.folder / "out", rng)
        campaign.straight()
        kinds = [kind for kind, n in shares.items() for _ in range(n)]
        rng.shuffle(kinds)
        campaign.befall(kinds)
        shutil.rmtree(given.folder / "out")
        tell(str(campaign))
        for problem in campaign.problems:
            tell(problem)
        problems += campaign.problems
        total += campaign.counts
    tell(
        f"{total['killed']} kills survived, {total['SIGTERM'] + total['SIGINT']} stops and "
        f"{total['disk full']} full disks gone on from; {total['runs']} runs came through, {total['compared']} files "
        f"compared with those of runs that nothing befell, {total['finished']} files of finished stages looked after: "
        f"{len(problems)} lost, made again or different"
    )
    if given.log:
        names = {"killed": "kills", "SIGTERM": "SIGTERM", "SIGINT": "SIGINT", "disk full": "full_disks", "runs": "runs"}
        counts = {told: total[name] for name, told in names.items()}
        counts |= {"files_compared": total["compared"], "finished_files_watched": total["finished"]}
        record = {"seed": given.seed, **counts, "lost_or_different": len(problems), "problems": problems}
        given.log.write_text(json.dumps({**record, "seconds": round(time.monotonic() - began)}) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
