"""What a record's text may not do to the terminal that it is printed on."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would act upon written out: `\\x1b`, `\\u202e`.

    Control characters move the cursor and change colours, and marks of direction turn what follows around.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
