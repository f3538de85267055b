"""A recipe as TOML text, so that a reported configuration can be saved and run again (Python itself only reads)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from duo.report.plain_text import toml_escaped


def toml_text(table: Mapping[str, Any], prefix: str = "") -> str:
    """`table` as TOML. None is left out, as TOML has no word for it; lists hold plain values, or tables only."""
    lines, tables = [], []
    for key, value in table.items():
        name = key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)
        if isinstance(value, Mapping):
            tables.append(f"\n[{prefix}{name}]\n{toml_text(value, f'{prefix}{name}.')}")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            tables += [f"\n[[{prefix}{name}]]\n{toml_text(item, f'{prefix}{name}.')}" for item in value]
        elif value is not None:
            lines.append(f"{name} = {_value(value)}\n")
    return "".join(lines + tables)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "inf" and "nan", as TOML writes them
    return toml_escaped(json.dumps(value, ensure_ascii=False))  # JSON's texts, numbers and truth values are TOML's
