"""The package's Jinja templates, read alike wherever they are filled: a value that is missing raises. No torch."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(package: str = "duo.report", *, autoescape: bool, **more: Any) -> Environment:
    """What reads the templates of a `package`; `autoescape` is for HTML, and `more` is Jinja's own."""
    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **more,
    )
