"""Sets of many images: whatever looks at them holds a batch at a time, and so do the files of records."""

from __future__ import annotations

import json
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from duo import rundir
from duo.plugins import Verdict
from duo.rundir import Blocks
from duo.stages import instead, scoring
from duo.stages.instead import Unsafe
from duo.stages.scoring import JUDGED_TOGETHER, JudgedSet, verdicts_of
from staged import Closeness, Named

N = 5 * JUDGED_TOGETHER + 3
ROW_BYTES, ROWS = 10_000, 2000


class Alive:
    """Images that are read and not let go of yet, and the most that there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def read(self, path: Path) -> Image.Image:
        image = Image.new("RGB", (2, 2), (int(path.stem) % 256, 0, 0))
        weakref.finalize(image, self._gone)
        self.now += 1
        self.most = max(self.most, self.now)
        return image

    def _gone(self) -> None:
        self.now -= 1


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    made = Alive()
    for module in (scoring, instead):
        monkeypatch.setattr(module, "read_image", made.read)
    return made


def _set(model: str, name: str = "unrelated") -> JudgedSet:
    folder = Path("images", model)
    return JudgedSet(name=name, model=model, prompts=[f"p{i}" for i in range(N)], seeds=range(N), folder=folder)


def _judge(images: Any) -> list[Verdict]:
    return [Verdict(label="present" if image.getpixel((0, 0))[0] % 2 else "absent") for image in images]


def _session(**near: Any) -> Any:
    near_miss = SimpleNamespace(judge=None, attribute="subject", **near)
    return SimpleNamespace(
        judge=_judge,
        preservation=Closeness,
        adherence=Named,
        near_misses={"car": near_miss, "judged": SimpleNamespace(judge=object())},
        near_miss_judges={"judged": _judge},
        concept=SimpleNamespace(name="fire"),
        recipe=SimpleNamespace(seed=0),
    )


ONE = JUDGED_TOGETHER + 1  # images of a batch, and the next batch's first
LOOKS: dict[str, tuple[Callable[[], Any], int]] = {
    "labels": (lambda: scoring.labels_of(_session(), _set("erased")), 2 * ONE),
    "attributes": (lambda: scoring.adherence_of(_session(), _set("erased"))["subject"], 2 * ONE),
    "survival by an attribute": (lambda: scoring.survival_of(_session(), _set("erased", "car")), 2 * ONE),
    "survival by a judge": (lambda: scoring.survival_of(_session(), _set("erased", "judged")), 2 * ONE),
    "preservation": (lambda: scoring.compared(Closeness(), _set("original"), _set("erased")).compute(), 4 * ONE),
}


@pytest.mark.parametrize("look", LOOKS)
def test_of_a_large_set_no_more_than_two_batches_are_held(look: str, alive: Alive) -> None:
    work, most = LOOKS[look]
    assert len(work()) == N, "every image is looked at"
    assert 0 < alive.most <= most < N


def test_what_comes_instead_is_compared_batch_by_batch(alive: Alive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instead, "shared_protocol", lambda *_, **__: {})
    monkeypatch.setattr(instead, "seeds_of", lambda _: {})
    paths = [Path(f"{i:04d}.png") for i in range(N)]
    unsafe = Unsafe(
        row="prompts",
        prompts=[f"p{i}" for i in range(N)],
        seeds=range(N),
        images=dict.fromkeys(("original", "erased"), paths),
    )
    asked = {i: f"p{i}" for i in range(N)}
    told, _ = instead._compared(_session(), unsafe, Closeness, asked, dict(enumerate(paths)))
    assert told["original"]["mean"] == 1 and told["n"] == N
    assert 0 < alive.most <= 4 * ONE < 2 * N


def test_verdicts_are_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Blocks(tmp_path, n=6, size=2)
    for rows in parts.pending():
        parts.done(rows, {"verdicts": [{"label": "absent"} for _ in rows]})
    read: list[Path] = []
    load = rundir.read_json
    monkeypatch.setattr(rundir, "read_json", lambda path, **more: [read.append(path), load(path, **more)][1])
    found = verdicts_of(parts)
    next(found)
    assert len(read) == 1
    assert len(list(found)) == 5 and len(read) == 3


def _peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_rows_are_written_and_read_without_holding_them_all(tmp_path: Path) -> None:
    path, text = tmp_path / "a.jsonl", "x" * ROW_BYTES
    rows = ({"i": i, "text": text} for i in range(ROWS))
    assert _peak(lambda: rundir.write_jsonl(path, rows)) < ROW_BYTES * ROWS / 4
    assert path.stat().st_size > ROW_BYTES * ROWS
    assert _peak(lambda: sum(row["i"] for row in rundir.rows_of(path))) < ROW_BYTES * ROWS / 4
    assert [row["i"] for row in rundir.rows_of(path)] == list(range(ROWS))
    assert json.loads(path.read_text().splitlines()[-1]) == {"i": ROWS - 1, "text": text}


def test_a_digest_of_texts_is_that_of_their_list() -> None:
    for texts in ([], ["a"], ["a", 'b"\u2028', "c"]):
        assert rundir.digest_of_texts(texts) == rundir.digest(texts)
