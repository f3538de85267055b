from __future__ import annotations

import pytest

from duo.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("\n no such file\nat all"), "no such file"),
        (AssertionError(), "AssertionError"),
        (ValueError("  "), "ValueError"),
        (
            ValueError("Validation error for field 'n':\n    TypeError: no int\nat all"),
            "Validation error for field 'n': TypeError: no int",
        ),
        (ValueError("it said:"), "it said:"),
    ],
)
def test_an_error_is_told_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
