"""The README's Python example, run as it stands but for its sizes and its folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
SMALL = (
    "method.max_train_steps=2",
    "method.train_batch_size=2",
    "method.unrelated_images=2",
    "method.held_prompts=[]",
    "pairs.n=2",
    "attack_images=2",
    "score.unrelated=2",
    "score.near_miss=1",
    *(
        f"attacks.{row}.images=2"
        for row in ("prompts", "prompts_held_out_words", "prompts_held_out_subjects", "ring_a_bell")
    ),
    "attacks.ring_a_bell.generations=1",
    *(f"attacks.concept_inversion_{n}.{field}=2" for n in (1, 4) for field in ("images", "steps")),
)


def test_the_example_runs_and_leaves_a_report(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    shrunk, sizes = re.subn(r"overrides=\[.*?\]", f"overrides={list(SMALL)!r}", block)
    moved = shrunk.replace("runs/mine", str(tmp_path / "mine"))
    assert sizes == 1
    assert moved.count(str(tmp_path)) == 2
    names: dict[str, Any] = {}
    exec(compile(moved, str(README), "exec"), names)
    assert names["page"] == tmp_path / "mine" / "report.html"
    assert names["page"].exists()
    assert names["scores"]["concept"] == "toybox-fire"
    assert names["delta"].kind == "lora"
    assert names["image"].size == (64, 64)
