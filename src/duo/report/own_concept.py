"""A concept of the user's own in a report: without its file the recipe that is shown cannot be run again. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from duo.concept import FILE, load_concept
from duo.errors import UserError
from duo.fields import as_table, read_toml
from duo.report.json_fields import read_object
from duo.report.toml_text import toml_text
from duo.rundir import digest

PATHS = ("concept", "model", "model_config", "reference", "erased")  # of a recipe


@dataclass(frozen=True, kw_only=True)
class OwnConcept:
    """A concept file's name, its text where it still is as the run had it, and the digest of what the run had.

    The text of one that names a file of captions has these in it, so that it needs no other file.
    """

    file: str
    text: str | None
    digest: str

    @classmethod
    def of(cls, run: Path, recipe: Mapping[str, Any]) -> Self | None:
        """That of a run with `recipe`; None where the concept is one of the package's."""
        path = Path(str(recipe.get("concept", "")))
        if path.suffix != ".toml":
            return None
        had = read_object(run / "erase" / "manifest.json").table("config").table("concept").text("digest")
        try:
            table = as_table(load_concept(path))
            whole = toml_text(table) if FILE in read_toml(path) else path.read_text(encoding="utf-8")
        except UserError:  # moved, or changed to what is no concept
            return cls(file=path.name, text=None, digest=had)
        return cls(file=path.name, text=whole if digest(table) == had else None, digest=had)


def portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as it is to be saved beside the files that it names, which it then calls by their names alone: a page
    that is passed on must not tell this machine's folders."""
    paths = {name: recipe.get(name) for name in PATHS}
    named = {
        name: Path(value).name
        for name, value in paths.items()
        if isinstance(value, str) and (Path(value).is_absolute() or (name == "concept" and value.endswith(".toml")))
    }
    return {**recipe, **named}
