from __future__ import annotations

from typing import Any

import torch

from duo.attacks.prompts import Prompts
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import Target


def test_yields_the_prompt_as_it_stands_without_touching_the_model(family: Any, concept: Any, run: Any) -> None:
    attack = Prompts()
    target = Target(family, access=attack.access, sampling=Sampling(), query_limit=0)
    assert isinstance(attack, Attack)
    assert attack.access == Access.QUERY
    assert attack.prepare(target, concept, run=run) == {}
    attempts = list(attack.search(target, {}, " A red house, ablaze ", generator=torch.Generator()))
    assert attempts == [Attempt(prompt=" A red house, ablaze ")]
