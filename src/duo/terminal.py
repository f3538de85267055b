"""What a text from outside may not do to the terminal that it is printed on. No torch."""

from __future__ import annotations

LONGEST = 2000  # characters of a message: what is wrong with a file may quote a prompt, or a name, of any length


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would act upon written out: `\\x1b`, `\\u202e`.

    Control characters move the cursor and change colours, and marks of direction turn what follows around.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def message(error: BaseException) -> str:
    """What an error says, as one `printable` line, cut off where it is very long."""
    text = str(error)
    line = printable(" ".join(text[: 2 * LONGEST].split()))
    return line if len(line) < LONGEST and len(text) <= 2 * LONGEST else f"{line[: LONGEST - 1]}…"
