"""Seeds: one for each purpose of a run, none of which follows from another."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, below 2**53 so that it survives JSON; purposes that differ have unrelated seeds."""
    words = [part if isinstance(part, int) else int.from_bytes(_sha256(part)[:8], "big") for part in purpose]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(11))


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
