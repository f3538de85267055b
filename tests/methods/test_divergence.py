"""Every method that trains: what is not finite stops it, what was good is kept, and from there it comes to the same
bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from duo.checkpoint import read_tensors
from duo.errors import DivergedError
from duo.methods.ca import Ca
from duo.methods.duo import Duo
from duo.methods.esd import Esd
from duo.methods.fmn import Fmn
from duo.methods.redirect import Redirect
from duo.methods.sa import Sa
from duo.methods.spm import Spm
from duo.pairs import Pairs
from duo.plugins import names
from recording import RecordingRun

SHARED: dict[str, Any] = {"max_train_steps": 5, "checkpointing_steps": 1, "learning_rate": 1e-3}
METHODS = {
    "ca": Ca(parameters="cross_attention", prompts="prompts", images=2, train_batch_size=1, **SHARED),
    "duo": Duo(rank=2, prior_weight=1.0, train_batch_size=1, **SHARED),
    "esd": Esd(variant="x", sampling_steps=3, train_batch_size=1, **SHARED),
    "fmn": Fmn(images=2, inversion_steps=1, train_batch_size=1, **SHARED),
    "redirect": Redirect(prompted=0.0, unrelated_images=1, rank=2, train_batch_size=1, **SHARED),
    "sa": Sa(surrogate_images=2, replay_images=2, fisher_samples=1, fisher_timesteps=2, train_batch_size=1, **SHARED),
    "spm": Spm(concepts=("burning",), grid_steps=2, anchors=1, targets=("cross_attention",), **SHARED),
}
CLOSED_FORM = {"uce"}


@pytest.fixture
def pairs() -> Pairs:
    safe = [Image.new("RGB", (64, 64), (40 * i, 90, 200 - 40 * i)) for i in range(2)]
    unsafe = [image.copy() for image in safe]
    for image in unsafe:
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 120, 0))
    return Pairs(names=["0", "1"], unsafe=unsafe, safe=safe)


class Spoiling(RecordingRun):
    """After step 3 the denoiser's attention is not a number, for as long as the run lasts."""

    spoilt = False

    def log(self, **numbers: Any) -> None:
        super().log(**numbers)
        self.spoilt = numbers.get("step", 0) >= 3


@contextmanager
def spoiled_by(run: Spoiling, model: Any) -> Iterator[None]:
    def spoil(_module: Any, _arguments: Any, output: Any) -> Any:
        return output * float("nan") if run.spoilt else output

    queries = [module for name, module in model.layers("cross_attention").items() if name.endswith("to_q")]
    hooks = [module.register_forward_hook(spoil) for module in queries]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_no_method_that_trains_is_left_out() -> None:
    assert METHODS.keys() | CLOSED_FORM == set(names("methods"))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_stops_a_training_and_what_was_good_is_kept(
    tiny_sd: Any, concept: Any, pairs: Pairs, tmp_path: Path, name: str
) -> None:
    method = METHODS[name]
    learned = pairs if method.takes_pairs else None

    def erased(run: RecordingRun) -> bytes:
        path = run.folder / "delta.safetensors"
        method.erase(tiny_sd, concept, pairs=learned, run=run).save(path)
        return path.read_bytes()

    whole = erased(RecordingRun(tmp_path / "whole"))
    run = Spoiling(tmp_path / "run")
    with spoiled_by(run, tiny_sd), pytest.raises(DivergedError) as caught:
        erased(run)
    told = str(caught.value)
    last = tmp_path / "run" / "checkpoints" / "checkpoint-0000002.safetensors"
    assert told.startswith("step 4: loss nan")
    assert f"lower learning_rate (now 0.001) in a new --out; the last good checkpoint is {last}" in told
    assert all(tensor.isfinite().all() for tensor in read_tensors(last)[0].values())
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert not (tmp_path / "run" / "delta.safetensors").exists()

    resumed = RecordingRun(tmp_path / "run")  # what spoiled it was not in what is kept
    assert erased(resumed) == whole
    assert [row["step"] for row in resumed.rows] == [4, 5]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "checkpoints").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()} == kept
