"""Write docs/licences.md: the licence of everything that duo pulls in, as the installed packages' metadata tell it.

    python benchmarks/licences.py [--out docs/licences.md]

Run it where duo is installed with the extras; what is not installed here is listed as such. Nothing is asked for over a
network. Metadata are claims: of wheels that carry compiled libraries it is theirs that count too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "duo-unlearning"
OUT = Path(__file__).parent.parent / "docs" / "licences.md"
LONGEST = 60  # letters of a licence; some packages put its whole text where its name belongs
COPYLEFT = re.compile(r"\b(A|L)?GPL|General Public|MPL|Mozilla|EUPL|\bEPL", re.IGNORECASE)
KNOWN = {"nudenet": "AGPL-3.0 in the wheel; its metadata say MIT"}  # where metadata and package differ
SAID = {  # by classifiers of the form "License :: OSI Approved :: MIT License"
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One package; `version` and `licence` are None where it is not installed."""

    name: str
    version: str | None
    licence: str | None
    needed_by: str


def rows(extra: str = "", *, without: frozenset[str] = frozenset()) -> list[Row]:
    """The packages that duo, or one of its extras, needs, and those that these need, less those `without`."""
    found: dict[str, Row] = {}
    waiting = [(one, "duo") for one in _requirements(distribution(ROOT), extra, only=bool(extra))]
    while waiting:
        requirement, by = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in found or name in without:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            found[name] = Row(name=name, version=None, licence=None, needed_by=by)
            continue
        found[name] = Row(name=name, version=package.version, licence=licence_of(name, package), needed_by=by)
        for part in ("", *requirement.extras):
            waiting += [(one, name) for one in _requirements(package, part)]
    return [found[name] for name in sorted(found)]


def _requirements(package: Distribution, extra: str, *, only: bool = False) -> Iterator[Requirement]:
    """What a package needs here, with one of its extras; with `only`, what the extra alone brings."""
    for text in package.requires or []:
        one = Requirement(text)
        plain = one.marker is None or one.marker.evaluate({"extra": ""})
        if (one.marker is None or one.marker.evaluate({"extra": extra})) and not (only and plain):
            yield one


def licence_of(name: str, package: Distribution) -> str:
    """By its expression, else by its classifiers, else by the first line of the field "License"."""
    if name in KNOWN:
        return KNOWN[name]
    told = package.metadata
    if told.get("License-Expression"):
        return str(told["License-Expression"])
    classified = [one.rpartition(" :: ")[2] for one in told.get_all("Classifier") or [] if one.startswith("License")]
    named = [SAID.get(one, one) for one in classified if one != "OSI Approved"]
    if named:
        return ", ".join(dict.fromkeys(named))
    lines = (told.get("License") or "").strip().splitlines()
    return lines[0][:LONGEST] if lines else "not told"


def page() -> str:
    """The whole file."""
    core = rows()
    inside = frozenset(row.name for row in core)
    extras = distribution(ROOT).metadata.get_all("Provides-Extra") or []
    parts = [("The core", core), *((f"Extra `{extra}`", rows(extra, without=inside)) for extra in sorted(extras))]
    weak = sorted({(row.name, row.licence) for _, part in parts for row in part if COPYLEFT.search(row.licence or "")})
    told = [
        "# Licences of what duo pulls in",
        "",
        "Written by `python benchmarks/licences.py` from the metadata of the installed packages (Linux, x86-64, Python",
        "3.11, the versions in `constraints.txt`). duo itself is Apache-2.0, and ships none of these. Weights have",
        "licences of their own: those of a base model go with every erasure of it (`duo merge` carries them over).",
        "",
        "With a torch that has CUDA parts, set-up also installs what `requirements/cuda.txt` names: NVIDIA's",
        "libraries, under licences of NVIDIA's own, and triton. They were not installed here and are not listed; nor",
        "is what other systems need (colorama, audioop-lts).",
        "",
        "Named in their metadata with a copyleft licence: "
        + ("; ".join(f"{n} ({licence})" for n, licence in weak) + "."),
        "",
    ]
    for title, part in parts:
        told += [f"## {title}", "", "| package | version | licence | needed by |", "|---|---|---|---|"]
        told += [
            f"| {row.name} | {row.version or 'not installed here'} | {_cell(row.licence or '–')} | {row.needed_by} |"
            for row in part
        ]
        told.append("")
    return "\n".join(told)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/licences.md from installed metadata.")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.out.write_text(page(), encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
