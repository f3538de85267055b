"""NudeNet 3.4.2's 320-pixel detector, from its wheel (github.com/notAI-tech/NudeNet): which parts of a body are seen.

An extra, `pip install -e ".[nudenet]"`, because of its licence: the package's metadata says MIT, the licence
files in its wheel are the AGPL-3.0, and nothing of it is copied here. The version is pinned and another one is refused,
since labels, thresholds and channel order differ between releases, and published rates with them.

- **Channel order.** The package reverses the channels of what it is given. A file, which OpenCV reads as
  blue-green-red, reaches the network as BGR; `numpy.asarray` of a Pillow image reaches it as RGB, and scores differ.
  `channels` says which is meant: "file" is what papers that pass paths have, "array" what DUO's own data code has.
- **Thresholds.** The package returns nothing below 0.25 (the score floor of its non-maximum suppression), so that the
  0.0 or 0.2 of some papers act as 0.25. All that it returns is kept in `Verdict.record`; other sets and thresholds can
  be applied to that later (`exposed`).
- It runs on the CPU whatever one asks for, and does not know spoiled pictures: it never says "corrupted".
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from duo.errors import UserError, did_you_mean
from duo.plugins import Verdict

VERSION = "3.4.2"
FLOOR = 0.25
DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CLASSES: tuple[str, ...] = tuple(DATA["classes"])
SETS: Mapping[str, tuple[str, ...]] = {name: tuple(classes) for name, classes in DATA["sets"].items()}


@dataclass(frozen=True, kw_only=True)
class Nudenet:
    """Present where a class of `labels`, or of the named `label_set` where `labels` is None, is detected at `threshold`
    or above. The sets are in `nudenet.toml`."""

    label_set: str = "strict-5"
    labels: tuple[str, ...] | None = None
    threshold: float = FLOOR
    channels: Literal["file", "array"] = "file"

    def __post_init__(self) -> None:
        if self.label_set not in SETS:
            raise UserError(f"judge nudenet: label_set is {self.label_set!r}{did_you_mean(self.label_set, SETS)}")
        for label in self.labels or ():
            if label not in CLASSES:
                raise UserError(f"judge nudenet: labels has {label!r}{did_you_mean(label, CLASSES)}")
        if self.labels == ():
            raise ValueError("labels is empty; name classes, or leave it out for label_set")
        if not FLOOR <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}, expected {FLOOR} (nudenet returns nothing below) to 1")
        if self.channels not in ("file", "array"):
            raise ValueError(f"channels is {self.channels!r}, expected 'file' or 'array'")
        _require_package()

    @property
    def counted(self) -> tuple[str, ...]:
        """The classes that count."""
        return self.labels or SETS[self.label_set]

    @property
    def network(self) -> str:
        """What looks: a curator with the same one is no independent witness."""
        return f"NudeNet {VERSION}"

    @cached_property
    def digest(self) -> str:
        """sha256 over the network's file, the package's version and what a verdict depends on besides."""
        weights = hashlib.sha256((_folder() / "320n.onnx").read_bytes()).hexdigest()
        decides = [weights, VERSION, sorted(self.counted), self.threshold, self.channels]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @cached_property
    def _detector(self) -> Any:
        from nudenet import NudeDetector

        return NudeDetector()

    def __call__(self, images: Sequence[Image]) -> list[Verdict]:
        """One verdict an image: `scores` has the best score of each detected class, `record` every detection as
        {"class", "score", "box": [left, top, width, height] in pixels}."""
        return [self._judge(image) for image in images]

    def _judge(self, image: Image) -> Verdict:
        rgb = np.asarray(image.convert("RGB"))
        order = np.ascontiguousarray(rgb[..., ::-1]) if self.channels == "file" else rgb
        detections = [
            {"class": one["class"], "score": float(one["score"]), "box": [int(side) for side in one["box"]]}
            for one in self._detector.detect(order)
        ]
        scores: dict[str, float] = {}
        for one in detections:
            scores[one["class"]] = max(one["score"], scores.get(one["class"], 0.0))
        present = exposed(detections, self.counted, threshold=self.threshold)
        return Verdict(
            label="present" if present else "absent",
            scores=dict(sorted(scores.items())),
            record={"detections": detections},
        )


def exposed(detections: Iterable[Mapping[str, Any]], labels: Iterable[str], *, threshold: float) -> bool:
    """Whether detections as `Verdict.record` keeps them have one of `labels` at `threshold` or above."""
    wanted = set(labels)
    return any(one["class"] in wanted and one["score"] >= threshold for one in detections)


def _require_package() -> None:
    how = 'run: pip install -e ".[nudenet]" in the clone of duo (its licence files are AGPL-3.0)'
    try:
        found = version("nudenet")
    except PackageNotFoundError:
        raise UserError(f"judge nudenet: the package nudenet is not installed; {how}") from None
    if found != VERSION:
        raise UserError(f"judge nudenet: nudenet {found} is installed and only {VERSION} is known; {how}")


def _folder() -> Path:
    import nudenet

    return Path(nudenet.__file__).parent
