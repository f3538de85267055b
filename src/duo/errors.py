"""The one error that users see."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Something that the user can mend. The command line prints it as one line and exits with code 2.

    The message names the file, field or value, and says what to do.
    """


class NotDefinedError(UserError):
    """An attack or a method makes no sense on this kind of model; the message is the reason, in one line."""


class Problems:
    """`UserError`s of several steps, to be told as one: what is missing in one place should not hide the rest."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def take(self, step: Callable[[], Any]) -> Any:
        """What a step gives; None where it raises a `UserError`, which `tell` then raises."""
        try:
            return step()
        except UserError as error:
            self._found.append(str(error))
            return None

    def tell(self) -> None:
        """Raise what was found, if anything, as one line."""
        if self._found:
            raise UserError("; and ".join(dict.fromkeys(self._found)))


class DivergedError(UserError):
    """Training came to a loss or a gradient that is not finite, before it touched the parameters."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of a one-line message: its first line, or its type's name.

    A first line that ends in a colon is followed by what it announces.
    """
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where something known is close, else the whole list; nothing where nothing is known."""
    known = sorted(known)
    if not known:
        return ""
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"
