"""Templates of Markdown, and what keeps a record's text from being read as markup."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from duo.report.wording import attack_words, percent, percent_range


def fill(template: str, **values: Any) -> str:
    """The package's Markdown template of that name with its values; one that is missing raises."""
    environment = Environment(
        loader=PackageLoader("duo.report", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, plain=plain)
    environment.globals.update(percent_range=percent_range, attack_words=attack_words)
    return environment.get_template(template).render(**values)


def plain(text: str) -> str:
    """`text` with nothing that Markdown or HTML would act upon, for use within a sentence or a table cell."""
    text = " ".join(text.split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return text
