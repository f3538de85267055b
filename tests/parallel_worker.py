"""What each process of tests/test_parallel.py does: `python parallel_worker.py FOLDER MODEL`.

A whole run of quick leaves by the command line, hardened in a round, then 20 steps of DUO, again with the frozen
denoiser sharded, then pairs that fail in one process alone. All in one start, because that takes longer than what is
tested.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from duo import parallel, plugins
from duo.errors import UserError
from duo.plugins import Precision
from staged import CONCEPT, LEAVES, RECIPE, ByPrompt

HARDENING = """
[hardening]
rounds = 1
unrelated = 3
[[hardening.attacks]]
row = "again"
name = "learned_word"
prompts = "plain"
images = 8
"""
TRAINED = {"max_train_steps": 20, "train_batch_size": 4, "rank": 4, "learning_rate": 1e-3, "prior_weight": 10.0}


@dataclass(frozen=True, kw_only=True)
class Failing(ByPrompt):
    """Fails in the second process; in the first it never finds the concept, which would take all tries to tell."""

    def __call__(self, images: Any) -> Any:
        if parallel.rank() == 1:
            raise UserError("this judge broke")
        return super().__call__(images)


def leaves() -> dict[tuple[str, str], type]:
    return {**LEAVES, ("judges", "failing"): Failing}


def write_recipes(folder: Path, model: str) -> None:
    (folder / "fire.toml").write_text(CONCEPT)
    (folder / "recipe.toml").write_text(RECIPE.replace('"tiny"', json.dumps(model)) + HARDENING)
    broken = CONCEPT.replace('curator = {name = "by_prompt"}', 'curator = {name = "failing"}')
    (folder / "broken-fire.toml").write_text(broken)
    (folder / "broken.toml").write_text(
        'extends = "recipe.toml"\nconcept = "broken-fire.toml"\npairs = {n = 40, block = 1}\n'
    )


def train(
    model: Any, folder: Path, precision: Precision | None = None, held: dict[str, int] | None = None, **changes: Any
) -> None:
    """20 steps of DUO on four pairs, logged to `folder/log.jsonl`; the LoRA goes to `folder/delta.safetensors`.

    `held` is told what is held as the first forward pass ends, and after the second step.
    """
    from duo.methods.duo import Duo
    from duo.pairs import Pairs
    from duo.precision import prepare_denoiser
    from duo.rundir import StageRun

    class Watched(StageRun):
        def log(self, **numbers: Any) -> None:
            super().log(**numbers)
            if held is not None and numbers["step"] == 2:
                held["between"] = bytes_held()

    def look(*_: Any) -> None:
        if held is not None:
            held["passing"] = held.get("passing") or bytes_held()

    precision = precision or Precision()
    prepare_denoiser(model, precision)
    safe = [Image.new("RGB", (64, 64), (40 * i, 90, 200 - 40 * i)) for i in range(6)]
    unsafe = [image.copy() for image in safe]
    for image in unsafe:
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 120, 0))
    pairs = Pairs(names=[str(i) for i in range(6)], unsafe=unsafe, safe=safe)
    run = Watched(folder=folder, seed=5, device=model.device, precision=precision)
    hook = model.denoiser.conv_out.register_forward_pre_hook(look)  # where it is sharded, its copy has the hook too
    delta = Duo(**{**TRAINED, **changes}).erase(model, None, pairs=pairs, run=run)  # type: ignore[arg-type]
    hook.remove()
    if parallel.is_main():
        delta.save(folder / "delta.safetensors")


def train_sharded(model: Any, folder: Path) -> None:
    """`train`, and again sharded; what was held goes to `folder/held-RANK.json`, with the digests of the weights."""
    held: dict[str, dict[str, int]] = {"whole": {}, "shares": {}}
    before = digest(model.denoiser)
    train(model, folder / "trained", held=held["whole"])
    train(model, folder / "sharded", Precision(shard=True), held=held["shares"])
    told = {"same": digest(model.denoiser) == before, "size": sum(one.nbytes for one in model.denoiser.parameters())}
    (folder / f"held-{parallel.rank()}.json").write_text(json.dumps({**told, **held}))


def bytes_held() -> int:
    """The bytes of all tensors of this process that Python can see."""
    import torch
    from torch.distributed.tensor import DTensor

    gc.collect()  # what an earlier run left in cycles is no longer held
    tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not isinstance(one, DTensor))
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def digest(module: Any) -> str:
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def main(folder: Path, model: str) -> None:
    from duo import cli
    from duo.models import load_family

    load = plugins.load
    plugins.load = lambda kind, name: leaves().get((kind, name)) or load(kind, name)
    codes = [cli.main(["run", str(folder / "recipe.toml"), "--out", str(folder / "run")])]
    train_sharded(load_family(model), folder)
    rounded = Precision(dtype="bfloat16", gradient_checkpointing=True, offload=True)
    for name, precision in (("rounded", rounded), ("rounded-sharded", replace(rounded, shard=True))):
        train(load_family(model), folder / name, precision, max_train_steps=1)
    parallel.barrier()
    codes.append(cli.main(["pairs", str(folder / "broken.toml"), "--out", str(folder / "broken")]))
    print(json.dumps(codes))  # noqa: T201 (how the test is told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
