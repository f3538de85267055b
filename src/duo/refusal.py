"""Sexual concepts that mention minors are refused, before anything is rendered. No torch.

The word list is `refusal.toml`. It is a guard against mistakes and plain misuse of the software: whole English words,
ages below 18, and their common disguises. It is no moderation of what images show, and does not stop those who write
around it.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duo.errors import UserError

Words = tuple[str, ...]
Listed = Mapping[str, Collection[Words]]  # words and phrases by their first word

SHORTEST_INSIDE = 4  # letters of a word that is looked for inside longer ones
SHORTEST_SPELLED = 3  # letters of a word that is looked for in runs of single letters

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _listed(table: Mapping[str, Any]) -> Listed:
    found: dict[str, list[Words]] = {}
    for words in [(word,) for word in table["words"]] + [tuple(phrase.split()) for phrase in table["phrases"]]:
        found.setdefault(words[0], []).append(words)
    return found


_MINORS, _SEXUAL = _listed(_DATA["minors"]), _listed(_DATA["sexual"])
_INSIDE = re.compile(
    "|".join(
        sorted(
            (
                word
                for word in _DATA["minors"]["words"]
                if len(word) >= SHORTEST_INSIDE and word not in _DATA["minors"]["not_inside"]
            ),
            key=len,
            reverse=True,
        )
    )
)
_LOOKS_LIKE = str.maketrans({one: letter for letter, ones in _DATA["disguises"]["letters"].items() for one in ones})
_FIGURES: dict[str, str] = _DATA["disguises"]["figures"]
_READ_AS = [  # one table for each way to read the figures
    str.maketrans({figure: letters[min(way, len(letters) - 1)] for figure, letters in _FIGURES.items()})
    for way in range(max(map(len, _FIGURES.values())))
]
_IN_A_RUN = [  # at every place of a run of single letters the longest listed word, one pattern for each list
    re.compile(
        f"(?=({'|'.join(sorted((one for one in words if len(one) >= SHORTEST_SPELLED), key=len, reverse=True))}))"
    )
    for words in (_DATA["minors"]["words"], _DATA["sexual"]["words"])
]
_WORD = re.compile(r"[^\W\d_]+|\d+")
_ANY_FIGURE = f"[{re.escape(''.join(_FIGURES))}]"
_FIGURE = re.compile(_ANY_FIGURE)
_MARK = rf"[^\W_]|{_ANY_FIGURE}"  # a letter, a digit, or a sign that is read as a letter
_MARKED = re.compile(f"(?:{_MARK})+")
_SPELLED = re.compile(rf"(?<!\w)(?:{_MARK})(?:[\W_]{{1,3}}(?:{_MARK})(?!\w)){{{SHORTEST_SPELLED - 1},}}")


@dataclass(frozen=True)
class _Ages:
    """When a number is a minor's age."""

    adult: int
    years: frozenset[str]
    younger: frozenset[str]
    before: frozenset[str]
    between: frozenset[str]
    limits: frozenset[Words]
    tens: frozenset[str]
    numbers: dict[str, int]
    counted: frozenset[str]


_AGES = _Ages(
    adult=_DATA["ages"]["adult"],
    years=frozenset(_DATA["ages"]["years"]),
    younger=frozenset(_DATA["ages"]["younger"]),
    before=frozenset(_DATA["ages"]["before"]),
    between=frozenset(_DATA["ages"]["between"]),
    limits=frozenset(tuple(phrase.split()) for phrase in _DATA["ages"]["limits"]),
    tens=frozenset(_DATA["ages"]["tens"]),
    numbers={word: number for number, word in enumerate(_DATA["ages"]["numbers"])},
    counted=frozenset(_DATA["ages"]["counted"]),
)
_FIRST_LIMIT, _FIRST_TEEN = 10, 13  # the number words that are ages after a limit, and those that are alone
_YOUNG = "|".join(name for name, number in _AGES.numbers.items() if number < _AGES.adult)
_IN_ONE = re.compile(f"(?:{_YOUNG})(?:{'|'.join(_AGES.years)})")
_ORDINAL = ("st", "nd", "rd", "th")
_WITH_SEX = re.compile(rf"(?<![\w.])(1[0-7])([{''.join(_DATA['ages']['sexes'])}])(?!\w)")
_BETWEEN_COMMAS = re.compile(rf"[^\W\d_]\s*[,;]\s*(1[0-7]|\d|{_YOUNG})\s*(?=[,;]|\.(?!\d)|$)")


def minor_mentioned(text: str) -> str | None:
    """The first word, phrase or age of a minor in `text`, as it was understood, or None."""
    plain = _folded(text)
    words = _words(plain)
    for start in range(len(words)):
        if found := _at(words, start, _MINORS) or _minor_age(words, start):
            return found
    for pattern in (_WITH_SEX, _BETWEEN_COMMAS):
        if match := pattern.search(plain):
            return " ".join(match.groups())
    return next((found for words in _disguised(plain) if (found := _first(words, _MINORS))), None)


def minor_inside(text: str, *, vetted: Collection[str] = ()) -> str | None:
    """A listed word of at least four letters inside a longer word of `text` that is not `vetted`, or None.

    For prompts that attacks find: tokens glued together make "girlnaked", which text encoders read as they read "girl
    naked". People's own texts are not held to it, for "girl" is in "girlfriend"; `words_of` gives their words.
    """
    plain = _folded(text)
    for words in (_words(plain), *_disguised(plain)):
        for word in words:
            if word not in vetted and (found := _INSIDE.search(word)):
                return found[0]
    return None


def words_of(texts: Iterable[str]) -> frozenset[str]:
    """The words of texts, as `minor_inside` compares them."""
    return frozenset(word for text in texts for word in _words(_folded(text)))


def is_sexual(texts: Iterable[str]) -> bool:
    """Whether any text has a word or phrase of the list of sexual ones, plain or disguised."""
    folded = (_folded(text) for text in texts)
    return any(_first(words, _SEXUAL) for plain in folded for words in (_words(plain), *_disguised(plain)))


def refuse_minors(texts: Iterable[tuple[str, str]]) -> None:
    """Raise `ValueError` for the first of a sexual concept's texts, (where it is, text), that mentions a minor."""
    for where, text in texts:
        found = minor_mentioned(text)
        if found:
            raise ValueError(
                f"{where} mentions a minor ({found!r}), and this is a sexual concept: refused, it is for adults only"
            )


def refuse_where_sexual(texts: Sequence[tuple[str, str]], *, adults_only: bool = False) -> None:
    """Raise `UserError` for the first of the texts that mentions a minor, where any of them is sexual or the concept
    is (`adults_only`)."""
    if adults_only or is_sexual(text for _, text in texts):
        try:
            refuse_minors(texts)
        except ValueError as error:
            raise UserError(str(error)) from None


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


# --- how a text is read -----------------------------------------------------------------------------


def _folded(text: str) -> str:
    """Lower case without accents and invisible characters; look-alikes of other alphabets as Latin letters."""
    if text.isascii():  # attacks ask for hundreds of thousands of texts
        return text.lower()
    plain = "".join(
        letter for letter in unicodedata.normalize("NFKD", text) if unicodedata.category(letter) not in ("Mn", "Cf")
    )
    return plain.casefold().translate(_LOOKS_LIKE)


def _words(plain: str) -> Words:
    """Words and numbers; letters and digits are parted."""
    return tuple(_WORD.findall(plain))


def _disguised(plain: str) -> Iterator[Words]:
    """Other readings of a text: figures in words as letters ("g1rl"), runs of single letters as words ("g-i-r-l")."""
    if _FIGURE.search(plain):
        marked = _MARKED.findall(plain)
        mixed = [_mixed(word) for word in marked]
        for table in _READ_AS if any(mixed) else ():
            yield tuple(word.translate(table) if one else word for word, one in zip(marked, mixed, strict=True))
    for run in _SPELLED.findall(plain):
        single = "".join(_MARKED.findall(run))
        if 2 * sum(letter.isalpha() for letter in single) < len(single):
            continue
        for spelled in dict.fromkeys(single.translate(table) for table in _READ_AS):
            yield tuple(found[1] for pattern in _IN_A_RUN for found in pattern.finditer(spelled))


def _mixed(word: str) -> bool:
    """Whether a word has figures, and at least as many letters."""
    figures = sum(letter in _FIGURES for letter in word)
    return 0 < figures <= sum(letter.isalpha() for letter in word)


def _first(words: Words, listed: Listed) -> str | None:
    for start, word in enumerate(words):
        if word in listed and (found := _at(words, start, listed)):
            return found
    return None


def _at(words: Words, start: int, listed: Listed) -> str | None:
    """The listed word or phrase that begins at `start`."""
    for one in listed.get(words[start], ()):
        if words[start : start + len(one)] == one:
            return " ".join(one)
    return None


# --- ages -------------------------------------------------------------------------------------------


def _minor_age(words: Words, start: int) -> str | None:
    """The age of a minor whose number is at `start`, with the words that make it one."""
    number = _number(words, start)
    if number is None:
        return _age_in_one(words[start])
    after = words[start + 1 : start + 3]
    if after[1:] == ("old",) and after[0] in _AGES.younger:
        return " ".join(words[start : start + 3])
    if number < _AGES.adult:
        if (first := _aged_from(words, start)) is not None:
            return " ".join(words[first : start + 1])
        ordinal = words[start].isdecimal() and after[:1] and after[0] in _ORDINAL
        unit = after[1:] if ordinal else after[:1]
        if unit and unit[0] in _AGES.years:
            return " ".join(words[start : start + 2 + bool(ordinal)])
    if _counts(after) and after[0] not in _AGES.years:
        return None
    spelled_out = not words[start].isdecimal()
    if number <= _AGES.adult and not (spelled_out and number < _FIRST_LIMIT):
        for length in (1, 2):
            if words[max(0, start - length) : start] in _AGES.limits:
                return " ".join(words[start - length : start + 1])
    return words[start] if spelled_out and _FIRST_TEEN <= number < _AGES.adult else None


def _aged_from(words: Words, start: int) -> int | None:
    """Where "aged" or "at the age of about" begins, if the number at `start` stands after such words."""
    for first in range(start - 1, max(-1, start - 5), -1):
        if words[first] in _AGES.before:
            return first
        if words[first] not in _AGES.between:
            return None
    return None


def _age_in_one(word: str) -> str | None:
    """ "sixteenyearold": a number and its unit in one word."""
    return word if _IN_ONE.fullmatch(word) else None


def _counts(after: Sequence[str]) -> bool:
    """Whether a number counts what stands after it, perhaps behind one other word: a plural, or a unit."""
    return any(
        word in _AGES.counted or (len(word) > 2 and word.endswith("s") and not word.endswith("ss")) for word in after
    )


def _number(words: Words, at: int) -> int | None:
    """The number that stands alone at `at`: the "one" of "twenty-one" does not."""
    if words[at].isdecimal():
        return int(words[at]) if len(words[at]) < 6 else None
    return None if at and words[at - 1] in _AGES.tens else _AGES.numbers.get(words[at])


def refused(prompt: str, *, adults_only: bool, vetted: Collection[str]) -> str | None:
    """The word, phrase or age for which a prompt is not rendered, or None.

    With `adults_only`, for a sexual concept, that is any mention of a minor, also inside a longer word unless that is
    `vetted` (`words_of`); of other concepts one in a prompt that is sexual itself.
    """
    if adults_only:
        return minor_mentioned(prompt) or minor_inside(prompt, vetted=vetted)
    return minor_mentioned(prompt) if is_sexual([prompt]) else None
