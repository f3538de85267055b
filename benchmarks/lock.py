"""Write requirements/*.txt: the versions of constraints.txt with the SHA-256 of every file that the index has for them.

    python benchmarks/lock.py            (`make lock`, which installs uv for it)

constraints.txt says which versions; this adds the hashes, for every system and every Python from 3.11 on, and refuses
where something would be installed that constraints.txt does not name. `core.txt` is what duo needs, `test.txt` what the
extras of `make test` add, `cuda.txt` what torch's build with CUDA, the usual one on Linux, brings along. The Makefile
tries `torch-cpu.txt` first: pip prefers files whose hashes the index tells, so it needs a list of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
EXTRAS = ("test", "nudenet", "app", "ray")
CUDA = ("nvidia-", "cuda-", "triton")
TORCH_CPU = (  # not on the package index: for CPython 3.11 on Linux x86-64, as it lay where the lock was made
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
)
HEAD = """\
# {what}
# Written by `make lock` from constraints.txt; `make demo` and `make test` install by these hashes. Not to be edited.
"""
WHAT = {
    "core": "What duo needs, setuptools to build it included.",
    "test": "What the extras of `make test` need beyond core.txt.",
    "torch-cpu": "The build of torch without CUDA, where the machine's pip knows one.",
    "cuda": "What torch's build with CUDA (Linux) needs beyond core.txt; the Makefile looks whether it is that one.",
}


def resolve(*extras: str) -> dict[str, str]:
    """Package → its entry, as uv resolves pyproject.toml for all systems under constraints.txt."""
    environment = dict(os.environ)
    if "PIP_CERT" in environment:
        environment.setdefault("SSL_CERT_FILE", environment["PIP_CERT"])
    command = [
        *("uv", "pip", "compile", "pyproject.toml", "--constraint", "constraints.txt", "--quiet", "--universal"),
        *("--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate"),
        *(f"--extra={extra}" for extra in extras),
    ]
    told = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=True).stdout
    entries: dict[str, str] = {}
    for line in told.splitlines(keepends=True):
        if not line.startswith(" "):
            name = canonicalize_name(Requirement(line.strip(" \\\n")).name)
            if name in entries:
                raise SystemExit(f"constraints.txt leaves two versions of {name}")
            entries[name] = ""
        entries[name] += line
    # Pyodide is no system that torch is made for.
    return {name: text for name, text in entries.items() if "sys_platform == 'emscripten'" not in text}


def main() -> int:
    """Resolve twice and write the three files, or say what constraints.txt lacks."""
    core, everything = resolve(), resolve(*EXTRAS)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    if missing := everything.keys() - pinned:
        names = ", ".join(everything[name].split()[0] for name in sorted(missing))
        print(f"constraints.txt does not name {names}", file=sys.stderr)
        return 1
    if unused := pinned - everything.keys():
        print(f"constraints.txt names what nothing needs: {', '.join(sorted(unused))}", file=sys.stderr)
        return 1
    parts: dict[str, list[str]] = {part: [] for part in WHAT}
    for name, entry in everything.items():
        parts["cuda" if name.startswith(CUDA) else "core" if name in core else "test"].append(entry)
    (version,) = (line for line in lines if line.startswith("torch=="))
    parts["torch-cpu"] = [f"{version}+cpu" + "".join(f" \\\n    --hash=sha256:{one}" for one in TORCH_CPU) + "\n"]
    FOLDER.mkdir(exist_ok=True)
    for part, entries in parts.items():
        (FOLDER / f"{part}.txt").write_text(HEAD.format(what=WHAT[part]) + "".join(entries))
        print(f"requirements/{part}.txt: {len(entries)} packages, {''.join(entries).count('--hash=')} hashes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
