"""Where attacks of hardening start from: prompts of the run's pairs, none of which is scored or counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duo.errors import UserError
from duo.recipe import HARDENED_PROMPTS
from duo.safe_part import SafePart

if TYPE_CHECKING:
    from duo.stages.session import Session


def starts_of(session: Session) -> dict[str, dict[str, str]]:
    """What attacks of hardening start from, by set, each with the prompt of a pair's unsafe image that it comes of.

    Raises `UserError` where every prompt is one that is scored or counted.
    """
    safe_part, taken = SafePart(session.concept), _taken(session)
    found: dict[str, dict[str, str]] = {name: {} for name in HARDENED_PROMPTS}
    for unsafe, safe in session.pair_prompts:
        if unsafe not in taken:
            for name, start in zip(HARDENED_PROMPTS, (unsafe, safe_part(unsafe) or safe), strict=True):
                if start not in taken:
                    found[name].setdefault(start, unsafe)
    for name, starts in found.items():
        if not starts:
            raise UserError(
                f"hardening: every prompt of the pairs ({name}) is also a prompt that is scored or counted; give "
                "pairs.prompts of their own"
            )
    return found


def _taken(session: Session) -> set[str]:
    """Every prompt that is scored, or counted in rounds."""
    splits = [session.concept.sets(validation=validation) for validation in (False, True)]
    found = [prompts for split in splits for prompts in split.prompts.values()]
    found += [near.prompts for split in splits for near in split.near_miss.values()]
    found += [session.prompts(row.prompts) for row in session.recipe.attacks]
    return {prompt for prompts in found for prompt in prompts}
