"""Sexual concepts that mention minors are refused, before anything is rendered. No torch.

The word list is `refusal.toml`. It is a guard against mistakes and plain misuse of the software: whole English words,
and ages below 18. It is no moderation of what images show, and does not stop those who write around it.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Words = tuple[str, ...]

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_MINORS: frozenset[Words] = frozenset((word,) for word in _DATA["minors"]["words"]) | frozenset(
    tuple(phrase.split()) for phrase in _DATA["minors"]["phrases"]
)
_SEXUAL = frozenset(_DATA["sexual"]["words"])
_LONGEST = max(len(words) for words in _MINORS)


@dataclass(frozen=True)
class _Ages:
    """When a number is a minor's age."""

    adult: int
    years: frozenset[str]
    younger: frozenset[str]
    before: frozenset[str]
    tens: frozenset[str]
    numbers: dict[str, int]


_AGES = _Ages(
    adult=_DATA["ages"]["adult"],
    years=frozenset(_DATA["ages"]["years"]),
    younger=frozenset(_DATA["ages"]["younger"]),
    before=frozenset(_DATA["ages"]["before"]),
    tens=frozenset(_DATA["ages"]["tens"]),
    numbers={word: number for number, word in enumerate(_DATA["ages"]["numbers"])},
)


def minor_mentioned(text: str) -> str | None:
    """The first word, phrase or age of a minor in `text`, as it was understood, or None."""
    words = _words(text)
    for start in range(len(words)):
        for length in range(1, _LONGEST + 1):
            if words[start : start + length] in _MINORS:
                return " ".join(words[start : start + length])
        if age := _minor_age(words, start):
            return age
    return None


def is_sexual(texts: Iterable[str]) -> bool:
    """Whether any text has a word of the list of sexual words."""
    return any(word in _SEXUAL for text in texts for word in _words(text))


def refuse_minors(texts: Iterable[tuple[str, str]]) -> None:
    """Raise `ValueError` for the first of a sexual concept's texts, (where it is, text), that mentions a minor."""
    for where, text in texts:
        found = minor_mentioned(text)
        if found:
            raise ValueError(
                f"{where} mentions a minor ({found!r}), and this is a sexual concept: refused, it is for adults only"
            )


def texts_of(value: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a table as TOML or JSON holds it, with the place where it is: `prompts.plain[3]`."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_of(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from texts_of(item, f"{where}[{index}]")


def _words(text: str) -> Words:
    """Lower-case words and numbers, without accents and invisible characters; letters and digits are parted."""
    plain = "".join(
        letter for letter in unicodedata.normalize("NFKD", text) if unicodedata.category(letter) not in ("Mn", "Cf")
    )
    return tuple(re.findall(r"[^\W\d_]+|\d+", plain.casefold()))


def _minor_age(words: Sequence[str], start: int) -> str | None:
    number = _number(words, start)
    if number is None:
        return None
    after = words[start + 1 : start + 3]
    if tuple(after[1:]) == ("old",) and after[0] in _AGES.younger:
        return " ".join(words[start : start + 3])
    aged = start > 0 and words[start - 1] in _AGES.before
    if number < _AGES.adult and (aged or (after and after[0] in _AGES.years)):
        return " ".join(words[start - 1 if aged else start : start + 1 if aged else start + 2])
    return None


def _number(words: Sequence[str], at: int) -> int | None:
    """The number that stands alone at `at`: the "one" of "twenty-one" does not."""
    if words[at].isdecimal():
        return int(words[at]) if len(words[at]) < 6 else None
    return None if at and words[at - 1] in _AGES.tens else _AGES.numbers.get(words[at])
