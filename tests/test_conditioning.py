"""Encoded prompts as rows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duo.conditioning import TEXTS_AT_ONCE, Conditioning, encoded


@pytest.mark.parametrize("n", [1, TEXTS_AT_ONCE, 2 * TEXTS_AT_ONCE + 3])
def test_many_prompts_are_encoded_in_their_order_and_some_at_a_time(n: int) -> None:
    asked: list[int] = []

    def text(prompts: Sequence[str]) -> Conditioning:
        asked.append(len(prompts))
        rows = torch.tensor([float(prompt) for prompt in prompts])
        return Conditioning(embeds=rows[:, None, None], pooled=-rows[:, None])

    model: Any = SimpleNamespace(text=text)
    found = encoded(model, [str(i) for i in range(n)])
    assert found.pooled is not None
    assert found.embeds.flatten().tolist() == (-found.pooled).flatten().tolist() == list(range(n))
    assert max(asked) <= TEXTS_AT_ONCE
    assert sum(asked) == n
