"""Whether what a finished attack wrote is still there as it was. No torch, so that a gate answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from duo import rundir
from duo.purged import account
from duo.rundir import Stage


def intact_attack(stage: Stage) -> None:
    """Raise `UserError` unless the finished attack in `stage` has the attempts and images that it recorded."""
    manifest = stage.require("attack")
    if "not_defined" in manifest:
        return
    attempts = stage.intact("attempts.jsonl", manifest.get("attempts"))  # older versions of duo recorded no digest
    intact_images(stage, stage.folder / "images", sum(1 for _ in rundir.rows_of(attempts)), manifest["digest"])


def intact_images(stage: Stage, folder: Path, n: int, wanted: str | None) -> None:
    """Raise `UserError` unless the `n` images in `folder`, of a finished stage, are there and have the digest `wanted`.

    `wanted` is None where no digest was recorded, as by older versions of duo.
    """
    gone = account(folder)
    for path in (folder / f"{i:04d}.png" for i in range(n)):
        if path.name not in gone and not path.is_file():
            raise stage.broken(path, "is missing")
    if wanted is not None and images_digest(folder, n) != wanted:
        first = folder.relative_to(stage.folder).parts[:1] or tuple(f"{i:04d}.png" for i in range(n))
        raise stage.broken(folder, f"holds other images than its stage wrote{_named(stage.altered(*first))}")


def _named(name: str | None) -> str:
    return "" if name is None else f" ({Path(name).name})"


def images_digest(folder: Path, n: int) -> str:
    """One digest of the images 0000.png … of a folder; of those that were purged, by their account."""
    gone = account(folder)
    paths = (folder / f"{i:04d}.png" for i in range(n))
    return rundir.digest_of_texts(gone[path.name] if _gone(path, gone) else rundir.digest(path) for path in paths)


def _gone(path: Path, gone: Mapping[str, str]) -> bool:
    return path.name in gone and not path.exists()
