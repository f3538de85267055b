"""Run the suite on the lowest or the newest versions that pyproject.toml allows, and write down what came of it.

    python benchmarks/versions.py lowest|newest [--work runs/versions] [--docs docs/results/versions]

Makes a virtual environment of its own under `--work`, installs there by pip as it is set up on this machine, and runs
`pytest` in this working tree. torch is held at the version of constraints.txt in both. `lowest` takes each requirement
that pyproject.toml states, extras included, at the lowest release that its bound allows; what those bring along is the
newest that fits. Writes `DOCS/lowest.json` or `DOCS/newest.json`, with the versions, and exits 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "nudenet", "app", "ray")  # as `make test` installs; `metrics` needs a torchvision for this torch
HELD = ("torch",)
ITSELF = "duo-unlearning"


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, the extras of the suite included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for extra in EXTRAS for one in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in [*project["dependencies"], *extras]]


def held() -> list[str]:
    """The lines of constraints.txt that hold in both environments."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.split("==")[0] in HELD]


def lowest(requirement: Requirement, released: list[str]) -> str:
    """The lowest of the releases that a requirement allows."""
    allowed = [one for one in map(Version, released) if not one.is_prerelease and one in requirement.specifier]
    if not allowed:
        raise SystemExit(f"no release of {requirement.name} meets {requirement}")
    return str(min(allowed))


def released(python: Path, name: str) -> list[str]:
    """The releases of a package for this Python, as pip tells them."""
    told = subprocess.run([python, "-m", "pip", "index", "versions", name], text=True, capture_output=True, check=True)
    (line,) = (line for line in told.stdout.splitlines() if line.startswith("Available versions:"))
    return line.removeprefix("Available versions:").replace(" ", "").split(",")


def install(kind: str, work: Path) -> Path:
    """A virtual environment of the wanted versions; returns its Python."""
    folder = work / kind
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = held()
    if kind == "lowest":
        free = [one for one in requirements() if one.name not in HELD]
        wanted += [f"{one.name}=={lowest(one, released(python, one.name))}" for one in free]
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in wanted))
    pip = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, "-c", constraints, "-e", f"{ROOT}[{','.join(EXTRAS)}]"], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Every package that is installed there."""
    told = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], text=True, capture_output=True, check=True
    ).stdout
    found = {canonicalize_name(one["name"]): one["version"] for one in json.loads(told)}
    return {name: found[name] for name in sorted(found) if name != ITSELF}


def outcome(report: Path) -> dict[str, Any]:
    """Counts, and the names of what failed, of a JUnit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    told: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        name = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"
        for kind, names in told.items():
            if case.find(kind) is not None:
                names.append(name)
    failed = {"failed": told["failure"], "errors": told["error"]}
    missed = len({one for names in told.values() for one in names})
    return {"passed": len(cases) - missed, "skipped": len(told["skipped"]), **failed}


def main() -> int:
    """Install, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("lowest", "newest"))
    parser.add_argument("--work", type=Path, default=Path("runs/versions"), help="where the environments lie")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/results/versions", help="where the log is written")
    parser.add_argument("--processes", default="2", help="of pytest")
    parser.add_argument("--install-only", action="store_true", help="make the environment, and stop there")
    parser.add_argument("--installed", action="store_true", help="the environment is there: only run")
    parser.add_argument("tests", nargs="*", help="these alone, without writing a log")
    asked = parser.parse_args()
    work = asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    python = work / asked.kind / "bin" / "python" if asked.installed else install(asked.kind, work)
    if asked.install_only:
        return 0
    report = work / f"{asked.kind}.xml"
    report.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["-m", "pytest", "-q", "-n", asked.processes, "--dist", "loadfile"]
    start = time.monotonic()
    status = subprocess.run(
        [python, *command, f"--junitxml={report}", *asked.tests], cwd=ROOT, env=environment
    ).returncode
    if asked.tests:
        return status
    if not report.exists():
        print(f"pytest wrote no report: it ended with {status}", file=sys.stderr)
        return 1
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True)
    log = {
        "schema": 1,
        "kind": asked.kind,
        "held": held(),
        "command": "python " + " ".join(command),
        "exit_status": status,
        **outcome(report),
        "minutes": round((time.monotonic() - start) / 60),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "asked": [re.sub(r"\s", "", str(one)) for one in requirements()],
        "versions": versions(python),
    }
    asked.docs.mkdir(parents=True, exist_ok=True)
    path = asked.docs / f"{asked.kind}.json"
    path.write_text(json.dumps(log, indent=1) + "\n")
    print(f"{log['passed']} passed, {len(log['failed']) + len(log['errors'])} failed, {log['skipped']} skipped: {path}")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
