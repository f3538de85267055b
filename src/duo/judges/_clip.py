"""What the judges that look through a CLIP share: which network it is, what a digest is of, and how a verdict falls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from duo.clip import Clip, find_clip, load_clip
from duo.plugins import Verdict


class ClipJudge:
    """For dataclasses with these fields: `model` as `load_clip` reads it, `threshold` of a probability, `device`."""

    model: str
    threshold: float
    device: str

    @property
    def network(self) -> str:
        """What looks: a curator with the same one is no independent witness."""
        return f"CLIP {self.model}"

    @property
    def _clip(self) -> Clip:
        return load_clip(self.model, self.device)

    def _check_threshold(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}, expected a probability between 0 and 1")

    def _find_clip(self, name: str) -> None:
        """Raise `UserError` where there is no such CLIP for the judge called `name`."""
        find_clip(self.model, f"judge {name}")

    def _digest_of(self, *decides: object) -> str:
        """sha256 over CLIP's weights, what else `decides` (JSON values), and the threshold."""
        return hashlib.sha256(json.dumps([self._clip.digest, *decides, self.threshold]).encode()).hexdigest()

    def _verdict(self, present: float, *, cosines: Mapping[str, float]) -> Verdict:
        return Verdict(
            label="present" if present >= self.threshold else "absent",
            scores={"present": present, "absent": 1 - present},
            record={"cosines": dict(cosines)},
        )
