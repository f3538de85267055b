"""The names of `import duo`."""

from __future__ import annotations

import pytest

import duo


@pytest.mark.parametrize("name", duo.__all__)
def test_every_public_name_is_there_and_described(name: str) -> None:
    value = getattr(duo, name)
    assert callable(value)
    assert value.__doc__


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'eraser'"):
        _ = duo.eraser
