"""The account of files that `duo purge` removed: their digests stay where they lay, so that evidence stays bound to it.

In each folder that lost files there is a `purged.json`: `{"schema": 1, "files": {name: sha256}}`. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from duo.errors import UserError

PURGED = "purged.json"
SCHEMA = 1


def account(folder: Path) -> Mapping[str, str]:
    """The files that were removed from a folder: name → sha256. Empty where none were."""
    path = folder / PURGED
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it") from None
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        raise UserError(f"{path} is no account of this version of duo; restore it, or use the duo that wrote it")
    files = told.get("files")
    if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
        raise UserError(f"{path} has no table 'files' of digests; restore it")
    return files


def removed(path: Path) -> bool:
    """Whether `duo purge` removed a file, which is not there."""
    return path.name in account(path.parent) and not path.exists()
