"""Every family has what `duo.plugins.Family` asks for, as it asks for it."""

from __future__ import annotations

import inspect

import pytest

from duo import plugins
from duo.plugins import Family

ASKED = {name for name, member in vars(Family).items() if inspect.isroutine(member) and not name.startswith("_")}


def test_what_is_asked_for_is_known() -> None:
    assert {"text", "unconditional", "predict", "generate", "edit", "save", "kohya"} <= ASKED


@pytest.mark.parametrize("name", plugins.names("families"))
@pytest.mark.parametrize("member", sorted(ASKED))
def test_a_family_has_what_the_protocol_asks_for(name: str, member: str) -> None:
    own, asked = getattr(plugins.load("families", name), member), getattr(Family, member)
    assert own is not asked, "the protocol's own does nothing"
    assert own.__doc__
    assert list(inspect.signature(own).parameters) == list(inspect.signature(asked).parameters)


@pytest.mark.parametrize("name", plugins.names("families"))
def test_a_family_says_what_it_serves(name: str) -> None:
    family = plugins.load("families", name)
    assert family.pipelines and all(isinstance(one, str) for one in family.pipelines)  # type: ignore[attr-defined]
    assert family.component in ("unet", "transformer")  # type: ignore[attr-defined]
