"""The licence that a model comes with, as far as it lies beside the model on this machine. No torch, no network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from duo.models import local_folder

# The fields of a model card's metadata on the hub that tell its licence, as plain scalars on a line of their own.
FIELD = re.compile(r"^(license|license_name|license_link): *(['\"]?)([^\[{'\"#\n][^'\"\n]*?)\2 *$", re.MULTILINE)
FRONT_MATTER = re.compile(r"\A\s*---\n(.*?)\n---\s", re.DOTALL)
TEXTS = ("license", "licence", "copying", "notice", "use_policy")  # how the names of licence texts begin


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What a model's folder says of its licence: its card's metadata, and the texts that lie beside it."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[Path, ...] = ()

    @classmethod
    def of(cls, model: str) -> Licence:
        """That of `model`, as the user calls it; empty where it says nothing here, as a single checkpoint does."""
        folder = local_folder(model)
        if folder is None:
            return cls()
        texts = [path for path in folder.iterdir() if path.is_file() and path.name.lower().startswith(TEXTS)]
        return cls(metadata=_metadata(folder / "README.md"), texts=tuple(sorted(texts)))


def _metadata(card: Path) -> dict[str, str]:
    """The fields of a card that tell the licence; none where there is no card, or no metadata in front of it."""
    if not card.is_file():
        return {}
    front = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    return {name: value for name, _, value in FIELD.findall(front[1])} if front else {}
