"""What the tests of all methods start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_fire import SmallFire


@pytest.fixture
def concept(tmp_path: Path) -> SmallFire:
    """What a method that erases by text may know of a small concept."""
    return SmallFire(tmp_path)
