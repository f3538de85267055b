"""A prompt without its concept: "a burning red house" → "a red house", by rules read off its pairs. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

from duo.concept import Concept

_TOKEN = re.compile(r"[^\W_][\w'’-]*|[^\w\s]")  # words with their hyphens and apostrophes, and marks
_ARTICLES = ("a", "an")
_VOWELS = "aeiou"
_NO_SPACE_BEFORE = ",.;:!?)'’"
_NO_SPACE_AFTER = "("


class SafePart:
    """What a prompt says besides the concept.

    Where one of the concept's pairs (fresh images' and vectors' captions first, then the training prompts) differs in
    one stretch of words, that stretch is a phrase of the concept and the other's stretch, often nothing, what stands
    in its place. The concept's words that no pair tells of are replaced by the anchor.
    """

    def __init__(self, concept: Concept) -> None:
        pairs = (
            *concept.attack_pairs,
            *concept.vector_pairs,
            *zip(concept.pairs.unsafe, concept.pairs.safe, strict=True),
        )
        self._rules: Mapping[tuple[str, ...], tuple[str, ...]] = dict(_rules(concept, pairs))
        self._longest = max(map(len, self._rules))

    def __call__(self, prompt: str) -> str | None:
        """The prompt without the concept, or None where it names it by no phrase that is known."""
        tokens, kept, changed, place = _TOKEN.findall(prompt), [], False, 0
        while place < len(tokens):
            rule = self._rule(tokens, place)
            if rule is None:
                kept.append(tokens[place])
                place += 1
                continue
            phrase, instead = rule
            kept += instead
            place, changed = place + len(phrase), True
        return _text(kept) or None if changed else None

    def _rule(self, tokens: list[str], place: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The longest phrase of the concept that stands at `place`, and what stands in its place."""
        for length in range(self._longest, 0, -1):
            phrase = tuple(token.lower() for token in tokens[place : place + length])
            if len(phrase) == length and phrase in self._rules:
                return phrase, self._rules[phrase]
        return None


def _rules(concept: Concept, pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Phrase → what stands in its place; the first that tells of a phrase counts."""
    seen: set[tuple[str, ...]] = set()
    for unsafe, safe in pairs:
        found = _difference(unsafe, safe)
        if found is not None and found[0] not in seen:
            seen.add(found[0])
            yield found
    for word in concept.words:
        phrase = tuple(token.lower() for token in _TOKEN.findall(word))
        if phrase and phrase not in seen:
            seen.add(phrase)
            yield phrase, tuple(_TOKEN.findall(concept.anchor))


def _difference(unsafe: str, safe: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The one stretch in which a pair's prompts differ, articles' forms apart; None where there are more."""
    ours, theirs = (_TOKEN.findall(text) for text in (unsafe, safe))
    plain = [["a" if token.lower() in _ARTICLES else token.lower() for token in tokens] for tokens in (ours, theirs)]
    matcher = SequenceMatcher(None, plain[0], plain[1], autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    if len(changes) != 1:
        return None
    _, first, last, start, stop = changes[0]
    phrase = tuple(plain[0][first:last])
    # A stretch of nothing is no phrase, and an article or a mark alone says nothing of the concept.
    if not any(len(token) > 1 and token[0].isalpha() for token in phrase):
        return None
    return phrase, tuple(theirs[start:stop])


def _text(tokens: list[str]) -> str:
    """Tokens as a text: marks close to their words, none at an end, and the articles' forms as what follows asks."""
    while tokens and not tokens[0][0].isalnum():
        tokens = tokens[1:]
    while tokens and tokens[-1] in ",;:":
        tokens = tokens[:-1]
    text = ""
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else ""
        if token in _ARTICLES and following[:1].isalpha():
            token = "an" if following[0].lower() in _VOWELS else "a"
        space = "" if not text or token[0] in _NO_SPACE_BEFORE or text[-1] in _NO_SPACE_AFTER else " "
        text += space + token
    return text
