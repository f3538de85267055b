"""A synthetic run with the digests that the stages of today record, so that it can be proved to be of its erasure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import synthetic

from duo.intact import images_digest
from duo.rundir import SCORED, digest

CONCEPT = {"name": "toybox-fire", "digest": "c" * 64}


def write_run(
    folder: Path,
    *,
    attacks: Mapping[str, tuple[int, int, int]] = synthetic.ATTACKS,
    delta: bytes = b"what changed",
    method: str = "duo",
) -> Path:
    """As `synthetic.write_run`, with one image a set."""
    synthetic.write_run(folder, images=1, attacks=attacks)
    edit(folder / "score" / "scores.json", {"method": method})
    file = folder / "erase" / "delta.safetensors"
    file.write_bytes(delta)
    config = {"model": "toybox", "concept": CONCEPT, "method": {"name": method}, "pairs": "0" * 64}
    made = {"schema": 1, "config": config, "digest": digest(file), "delta": {"kind": "lora", "layers": 1}}
    synthetic.write_json(folder / "erase" / "manifest.json", made)
    run = json.loads((folder / "run.json").read_text())
    run["versions"] |= {"duo-unlearning": "0.1.0"}
    run["recipe"] |= {"budget": "toybox-quick", "method": {"name": method, "beta": 20.0, "folder": str(folder)}}
    synthetic.write_json(folder / "run.json", run)
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Record anew what manifests say of the files as they are, as stages do that were just run."""
    erasure = digest(folder / "erase" / "delta.safetensors")
    attacks = {}
    for place in sorted(folder.glob("attack/*/*")):
        n = len((place / "attempts.jsonl").read_text().splitlines())
        manifest = {
            "schema": 1,
            "config": {"erasure": erasure if place.name == "erased" else None},
            "digest": images_digest(place / "images", n),
            "attempts": digest(place / "attempts.jsonl"),
        }
        synthetic.write_json(place / "manifest.json", manifest)
        attacks[f"{place.parent.name}/{place.name}"] = manifest["digest"]
    score = folder / "score"
    config = {"model": "toybox", "concept": CONCEPT, "split": "test", "judge": "j" * 64}
    config |= {"erasure": erasure, "attacks": attacks}
    manifest = {"schema": 1, "config": config, "digests": {name: digest(score / name) for name in SCORED}}
    synthetic.write_json(score / "manifest.json", manifest)


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Replace fields of a JSON file."""
    synthetic.write_json(path, json.loads(path.read_text()) | dict(changes))


def rescore(folder: Path, **changes: Any) -> None:
    """Scores with other fields, as if they had been scored so."""
    edit(folder / "score" / "scores.json", changes)
    seal(folder)
