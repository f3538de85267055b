"""Templates of Markdown, and what keeps a record's text from being read as markup."""

from __future__ import annotations

import re
from typing import Any

from duo.report import templates
from duo.report.plain_text import visible
from duo.report.wording import attack_words, percent, percent_range


def fill(template: str, **values: Any) -> str:
    """The package's Markdown template of that name with its values; one that is missing raises."""
    environment = templates.environment(autoescape=False)
    environment.filters.update(percent=percent, plain=plain, code=code, fenced=fenced)
    environment.globals.update(percent_range=percent_range, attack_words=attack_words)
    return environment.get_template(template).render(**values)


def plain(text: str) -> str:
    """`text` for a sentence or a table cell: nothing is hidden in it, and Markdown and HTML act upon nothing.

    The colon of an address and the dot after `www` are marked as well, for many readers link a bare address.
    """
    text = " ".join(visible(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text, flags=re.IGNORECASE)


def code(text: str) -> str:
    """`text` for a code span of one line."""
    return visible(text).replace("`", "'")


def fenced(text: str) -> str:
    """`text` for a fenced block of code."""
    return visible(text, lines=True).replace("```", "'''")
