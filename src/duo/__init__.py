"""Remove an unsafe visual concept from a text-to-image diffusion model, and show the evidence.

    import duo
    session = duo.Session(duo.load_recipe("toybox-fire"), Path("runs/mine"))
    duo.make_pairs(session)
    duo.erase(session)
    duo.attack(session)
    duo.score(session)
    duo.write_report(Path("runs/mine"))

Names are imported when they are first used, so `import duo` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duo.concept import Concept, load_concept
    from duo.delta import Delta, compose
    from duo.errors import UserError
    from duo.exporting import export
    from duo.merging import merge
    from duo.models import load_family
    from duo.pairs import Pairs
    from duo.recipe import Recipe, load_recipe
    from duo.report import write_report
    from duo.stages import Session, attack, erase, make_pairs, run, score, search_strength
    from duo.strength import StrengthSearch

__all__ = [
    "Concept",
    "Delta",
    "Pairs",
    "Recipe",
    "Session",
    "StrengthSearch",
    "UserError",
    "attack",
    "compose",
    "erase",
    "export",
    "load_concept",
    "load_family",
    "load_recipe",
    "make_pairs",
    "merge",
    "run",
    "score",
    "search_strength",
    "write_report",
]

_HOMES = {
    "Concept": "concept",
    "Delta": "delta",
    "Pairs": "pairs",
    "Recipe": "recipe",
    "StrengthSearch": "strength",
    "UserError": "errors",
    "compose": "delta",
    "export": "exporting",
    "load_concept": "concept",
    "load_family": "models",
    "load_recipe": "recipe",
    "merge": "merging",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'duo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"duo.{_HOMES.get(name, 'stages')}"), name)
    globals()[name] = value  # over the submodule of the same name, which the import system puts there
    return value
