"""What the score stage counts to doubt itself by: a judge that fires everywhere, an erasure that changed nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duo.statistics import wilson


def checks(
    labels: Mapping[str, Sequence[str]], images: Mapping[str, Sequence[Path]], *, models: Sequence[str]
) -> dict[str, Any]:
    """The section `checks` of `scores.json`.

    Args:
        labels: model → the judge's labels of its images of unrelated prompts, which nobody asked the concept of.
        images: "original" and "erased" → files of images at the same prompts and seeds, in one order.
        models: those of which `labels` are counted.
    """
    pairs = zip(images["original"], images["erased"], strict=True)
    return {
        "false_positives": {model: _rate(labels[model]) for model in models if labels[model]},
        "compared": len(images["original"]),
        "identical": sum(one.read_bytes() == other.read_bytes() for one, other in pairs),
    }


def _rate(labels: Sequence[str]) -> dict[str, Any]:
    n, detected = len(labels), labels.count("present")
    return {"n": n, "detected": detected, "rate": detected / n, **wilson(detected, n)._asdict()}
