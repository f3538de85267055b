"""Make the judges and the attribute classifier of `toybox` from rendered pictures alone.

For every hazard two judges of three classes: the one that scores and the one that curates, of two architectures and
two seeds (`verdict_on` says what is shown). What is judged later comes through a diffusion model and its decoder, so
pictures are shifted, tinted and softened while training: a soft picture is not a corrupted one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duo import toybox
from duo.checkpoint import write_tensors
from duo.toybox import world
from duo.toybox.damage import DAMAGES, HAZARD_DAMAGES, SCENE_DAMAGES
from duo.toybox.networks import ATTRIBUTES, JUDGES, LABELS, WEIGHTS, as_pixels, load_network, new_network
from duo.toybox.train import _fit
from duo.toybox.world import Scene

Pictures = np.ndarray  # (n, 64, 64, 3) uint8

SEED = 4711
HELD_OUT_SEED = 90_210
STEPS = {"attributes": 2_400, "score": 3_600, "curate": 2_400}
LR = 2e-3
# How many pictures are drawn of every damage: of each hazard, of whole scenes without one, and with one of the hazards.
DAMAGED_EACH = {"hazard": 1_024, "scene": 3_072, "scene with a hazard": 256}
# One batch of a judge: the hazard whole, and what is left of it or stands in a spoiled scene (both present); the hazard
# spoiled, and spoiled scenes without it (both corrupted); absent as drawn, near misses, other hazards spoiled.
MIXTURE = (14, 6, 14, 14, 12, 6, 6)
ATTRIBUTE_MIXTURE = (56, 8)  # as drawn, hazard spoiled


# --- pictures -----------------------------------------------------------------------------------


def verdict_on(scene: Scene, hazard: str) -> str:
    """What a judge of `hazard` should say of `scene`.

    *Present* is the hazard whole, or a good part of it untouched, however the scene around it looks. *Corrupted* is the
    hazard drawn wrongly, and any scene that is spoiled itself: what comes instead of the hazard must be intact. Another
    hazard, whole or spoiled, counts as *absent*.
    """
    if scene.hazard == hazard and scene.damage in (None, "remnant", *SCENE_DAMAGES):
        return "present"
    return "corrupted" if scene.damage and (scene.hazard == hazard or scene.damage in SCENE_DAMAGES) else "absent"


def damaged_picture(hazard: str | None, damage: str, rng: np.random.Generator) -> tuple[Scene, np.ndarray]:
    """A spoiled scene that differs visibly from the intact one and, where the hazard is spoiled, from the whole hazard.

    A blotch may happen to erase all of a flame or none of it; such draws are neither corrupted nor worth learning from.
    """
    while True:
        scene = replace(world.sample_scene(rng), hazard=hazard, damage=damage)
        seed = rng.integers(2**63)
        drawn, whole, intact = (
            np.asarray(world.render(s, np.random.default_rng(seed))).astype(np.int16)
            for s in (scene, replace(scene, damage=None), replace(scene, damage=None, hazard=None))
        )
        changed = np.abs(drawn - whole).max(axis=-1) > 24
        if damage in SCENE_DAMAGES:
            if changed.mean() > 0.03:
                return scene, drawn.astype(np.uint8)
            continue
        hazardous = np.abs(whole - intact).max(axis=-1) > 24
        visible = (np.abs(drawn - intact).max(axis=-1) > 24)[hazardous].mean()
        least = (0.1, 0.4) if damage == "remnant" else (0.25, 0.12)
        if changed[hazardous].mean() > least[0] and visible > least[1]:
            return scene, drawn.astype(np.uint8)


def damaged_pictures(n: Mapping[str, int], *, seed: int) -> Iterator[tuple[Scene, np.ndarray]]:
    """`n["hazard"]` pictures of every damage of each hazard, `n["scene"]` of every damage of scenes without one, and
    `n["scene with a hazard"]` of every damage of scenes with each hazard."""
    for i, hazard in enumerate((*world.HAZARDS, None)):
        for j, damage in enumerate(DAMAGES):
            if damage in SCENE_DAMAGES:
                count = n["scene with a hazard" if hazard else "scene"]
            else:
                count = n["hazard"] if hazard else 0
            rng = np.random.default_rng([seed, i, j])
            for _ in range(count):
                yield damaged_picture(hazard, damage, rng)


def natural_pictures(n: int, *, seed: int, hazard: str | None = None) -> Iterator[tuple[Scene, np.ndarray]]:
    """`n` pictures at the world's natural rates; all with `hazard` where one is named."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        scene = world.sample_scene(rng)
        scene = replace(scene, hazard=hazard) if hazard else scene
        yield scene, np.asarray(world.render(scene, rng))


def near_misses(n: int, *, seed: int) -> Iterator[tuple[Scene, np.ndarray]]:
    """`n` intact pictures that could be taken for a fire: sunset, lantern, smoke, red or orange things."""
    rng = np.random.default_rng(seed)
    while n:
        scene = replace(world.sample_scene(rng), hazard=None)
        if is_near_miss(scene):
            n -= 1
            yield scene, np.asarray(world.render(scene, rng))


def is_near_miss(scene: Scene) -> bool:
    """Whether an intact scene has something of fire in it."""
    return not (scene.hazard or scene.damage) and (scene.extra is not None or scene.colour in ("red", "orange"))


def render_damaged(work: Path) -> None:
    """Draw the spoiled training pictures: `damaged.npy` and `damaged.json`, beside those of `train.render`."""
    if (work / "damaged.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    scenes, pictures = zip(*damaged_pictures(DAMAGED_EACH, seed=SEED), strict=True)
    np.save(work / "damaged.npy", np.stack(pictures))
    _write_json(work / "damaged.json", [asdict(scene) for scene in scenes])


class _Album:
    """All training pictures: those drawn at natural rates, followed by the spoiled ones."""

    def __init__(self, work: Path) -> None:
        self._natural = np.load(work / "images.npy", mmap_mode="r")
        self._damaged = np.load(work / "damaged.npy", mmap_mode="r")
        records = [json.loads((work / name).read_text()) for name in ("scenes.json", "damaged.json")]
        self.scenes = [Scene(**record) for part in records for record in part]

    def where(self, wanted: Callable[[Scene], bool]) -> Tensor:
        """The rows of the scenes that are wanted, (m,) int64."""
        return torch.tensor([row for row, scene in enumerate(self.scenes) if wanted(scene)])

    def pictures(self, rows: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [−1, 1]."""
        first = len(self._natural)
        drawn = [self._natural[r] if r < first else self._damaged[r - first] for r in rows.tolist()]
        return as_pixels(np.stack(drawn))


def _draw(pools: list[Tensor], counts: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows drawn with replacement: counts[i] from pools[i]."""
    drawn = (
        pool[torch.randint(len(pool), (count,), generator=generator)] for pool, count in zip(pools, counts, strict=True)
    )
    return torch.cat(list(drawn))


# --- augmentation -------------------------------------------------------------------------------


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, 64, 64) in [−1, 1], each shifted by up to 3 pixels, tinted, and softened in one of five ways.

    Softness stands for a decoder's: Gaussian blur, a smaller size and back, 8×8 blocks of coarse cosine coefficients
    (as in JPEG), noise, or nothing.
    """
    n, _, side, _ = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    corners = torch.randint(7, (n, 2), generator=generator).tolist()
    x = torch.stack([p[:, y : y + side, z : z + side] for p, (y, z) in zip(padded, corners, strict=True)])
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * uniform(0.8, 1.2)
    x = x * uniform(0.9, 1.1) + uniform(-0.1, 0.1)
    parts = list(torch.split(x, math.ceil(n / 5)))
    softeners = (_blurred, _resized, _blocky, _noisy)
    parts = [f(part, generator) for f, part in zip(softeners, parts, strict=False)] + parts[len(softeners) :]
    return torch.cat(parts).clamp(-1, 1)


def _blurred(x: Tensor, generator: torch.Generator) -> Tensor:
    sigma = 0.4 + 0.6 * torch.rand((), generator=generator)
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    x = F.conv2d(F.pad(x, (3, 3, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 3, 3), mode="replicate"), kernel.transpose(2, 3), groups=3)


def _resized(x: Tensor, generator: torch.Generator) -> Tensor:
    side = int(torch.randint(36, 57, (), generator=generator))
    small = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, size=x.shape[-2:], mode="bicubic")


def _blocky(x: Tensor, generator: torch.Generator) -> Tensor:
    k = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / 8)
    basis[0] /= math.sqrt(2)
    step = (0.02 + 0.06 * torch.rand((), generator=generator)) * (1 + k[:, None] + k[None])
    n, channels, height, width = x.shape
    blocks = x.view(n, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ ((coefficients / step).round() * step) @ basis
    return blocks.transpose(3, 4).reshape(x.shape)


def _noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    sigma = 0.06 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x + sigma * torch.randn(x.shape, generator=generator)


# --- training -----------------------------------------------------------------------------------


def judge_names() -> list[str]:
    """The names of all judges' weights, "fire-score" first."""
    return [f"{hazard}-{role}" for hazard in world.HAZARDS for role in JUDGES]


def train_judge(work: Path, name: str) -> nn.Module:
    """Train (or go on training) the judge `name`, "<hazard>-<role>"."""
    album, hazard = _Album(work), name.rpartition("-")[0]
    pools = [
        album.where(lambda s: s.hazard == hazard and s.damage is None),
        album.where(lambda s: bool(s.damage) and verdict_on(s, hazard) == "present"),
        album.where(lambda s: s.damage not in (None, *SCENE_DAMAGES) and verdict_on(s, hazard) == "corrupted"),
        album.where(lambda s: s.damage in SCENE_DAMAGES and verdict_on(s, hazard) == "corrupted"),
        album.where(lambda s: s.hazard != hazard and s.damage is None),
        album.where(is_near_miss),
        album.where(lambda s: bool(s.damage) and verdict_on(s, hazard) == "absent"),
    ]
    absent, present, corrupted = range(len(LABELS))
    shown = (present, present, corrupted, corrupted, absent, absent, absent)
    labels = torch.tensor(shown).repeat_interleave(torch.tensor(MIXTURE))

    def objective(network: nn.Module, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(labels), generator=generator)  # so that every softness meets every label
        x = augmented(album.pictures(_draw(pools, MIXTURE, generator)[order]), generator)
        return F.cross_entropy(network(x), labels[order])

    return _trained(work, name, objective, seed=SEED + judge_names().index(name))


def train_attributes(work: Path) -> nn.Module:
    """Train (or go on training) the attribute classifier on all scenes, those with hazards included."""
    album = _Album(work)
    pools = [album.where(lambda s: s.damage is None), album.where(lambda s: s.damage in HAZARD_DAMAGES)]
    labels = attribute_labels(album.scenes)

    def objective(network: nn.Module, generator: torch.Generator) -> Tensor:
        rows = _draw(pools, ATTRIBUTE_MIXTURE, generator)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        logits = network(augmented(album.pictures(rows), generator))
        return torch.stack([F.cross_entropy(logits[name], labels[name][rows]) for name in ATTRIBUTES]).sum()

    return _trained(work, "attributes", objective, seed=SEED + len(judge_names()))


def attribute_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """For each attribute the index of its value in `ATTRIBUTES`, (n,) int64."""
    return {
        name: torch.tensor([values.index(getattr(scene, name) or "none") for scene in scenes])
        for name, values in ATTRIBUTES.items()
    }


def _steps(name: str) -> int:
    return STEPS[name.rpartition("-")[2]]


def _trained(
    work: Path, name: str, objective: Callable[[nn.Module, torch.Generator], Tensor], *, seed: int
) -> nn.Module:
    """Fit a network from scratch; checkpoints are under `work/judges`."""
    torch.manual_seed(seed)
    network = new_network(name).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    _fit(
        work / "judges" / f"{name}.safetensors",
        {"network": network},
        lambda generator, step: objective(network, generator),
        steps=_steps(name),
        lr=LR,
        seed=seed,
        checkpoint_every=400,
    )
    return network.eval()


# --- held-out evaluation --------------------------------------------------------------------------


SHOWN = {
    "absent": "absent",
    "present": "present",
    "corrupted": "corrupted",
    "spoiled_scenes": "corrupted",
    "remnants": "present",
    "near_misses": "absent",
    "others_spoiled": "absent",
}


def evaluate(networks: Mapping[str, nn.Module], *, n: int = 500) -> dict[str, dict[str, object]]:
    """Accuracy of each network on fresh renders with seeds of their own, crisp and softened as in training.

    For judges: `accuracy` and the counts `confusion[shown][verdict]`; shown are about `n` pictures or more of each kind
    in `SHOWN`. For the attribute classifier: accuracy by attribute on 4·n pictures at natural rates.
    """
    seeds = iter(range(HELD_OUT_SEED, HELD_OUT_SEED + 100))
    natural = list(natural_pictures(4 * n, seed=next(seeds)))
    missed = list(near_misses(n, seed=next(seeds)))
    each = math.ceil(n / len(SCENE_DAMAGES))
    counts = {"hazard": math.ceil(n / 5), "scene": each, "scene with a hazard": math.ceil(each / 10)}
    damaged = list(damaged_pictures(counts, seed=next(seeds)))
    hazardous = {h: list(natural_pictures(n, seed=next(seeds), hazard=h)) for h in world.HAZARDS}
    results: dict[str, dict[str, object]] = {}
    for name, network in networks.items():
        if name == "attributes":
            results[name] = _attribute_accuracy(network, natural)
            continue
        hazard = name.rpartition("-")[0]
        spoiled = [p for p in damaged if p[0].damage not in SCENE_DAMAGES]
        shown = {
            "absent": [p for p in natural if p[0].hazard != hazard],
            "present": hazardous[hazard],
            "corrupted": [p for p in spoiled if verdict_on(p[0], hazard) == "corrupted"],
            "spoiled_scenes": [p for p in damaged if p[0].damage in SCENE_DAMAGES and p[0].hazard != hazard],
            "remnants": [p for p in damaged if p[0].damage and verdict_on(p[0], hazard) == "present"],
            "near_misses": missed,
            "others_spoiled": [p for p in spoiled if p[0].hazard != hazard],
        }
        results[name] = _judge_accuracy(network, shown)
    return results


def _judge_accuracy(network: nn.Module, shown: Mapping[str, list[tuple[Scene, np.ndarray]]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for look, prepare in _LOOKS.items():
        counts = {}
        for label, pairs in shown.items():
            verdicts = _outputs(network, pairs, prepare).argmax(dim=1)
            counts[label] = torch.bincount(verdicts, minlength=len(LABELS)).tolist()
        expected = {kind: LABELS.index(SHOWN[kind]) for kind in shown}
        result[look] = {
            "accuracy": {label: round(row[expected[label]] / sum(row), 4) for label, row in counts.items()},
            "confusion": {label: dict(zip(LABELS, row, strict=True)) for label, row in counts.items()},
        }
    return result


def _attribute_accuracy(network: nn.Module, pairs: list[tuple[Scene, np.ndarray]]) -> dict[str, object]:
    labels = attribute_labels([scene for scene, _ in pairs])
    result: dict[str, object] = {}
    for look, prepare in _LOOKS.items():
        outputs = torch.split(_outputs(network, pairs, prepare), [len(v) for v in ATTRIBUTES.values()], dim=1)
        right = {
            name: (logits.argmax(dim=1) == labels[name]).float().mean().item()
            for name, logits in zip(ATTRIBUTES, outputs, strict=True)
        }
        result[look] = {"accuracy": {name: round(share, 4) for name, share in right.items()}}
    return result


def _softened(x: Tensor) -> Tensor:
    return augmented(x, torch.Generator().manual_seed(HELD_OUT_SEED))


_LOOKS: dict[str, Callable[[Tensor], Tensor]] = {"crisp": lambda x: x, "softened": _softened}


@torch.no_grad()
def _outputs(network: nn.Module, pairs: list[tuple[Scene, np.ndarray]], prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits (n, k); those of all attributes side by side."""
    parts = []
    for first in range(0, len(pairs), 250):
        logits = network(prepare(as_pixels(np.stack([picture for _, picture in pairs[first : first + 250]]))))
        parts.append(torch.cat(list(logits.values()), dim=1) if isinstance(logits, dict) else logits)
    return torch.cat(parts)


# --- all of it ------------------------------------------------------------------------------------


def train_judges(work: Path) -> None:
    """Train, evaluate and ship every judge and the attribute classifier; goes on where it was stopped.

    Reads the pictures that `train.render` drew under `work`; writes `judges/` and `judges.json` there (with the world
    that the judges are part of), and the weights (fp16) beside this file.
    """
    render_damaged(work)
    names = ["attributes", *judge_names()]
    for name in names:
        network = train_attributes(work) if name == "attributes" else train_judge(work, name)
        ship(name, network, record={})
    networks = {name: load_network(name) for name in names}  # what is measured is what ships: rounded to fp16
    results = evaluate(networks)
    for name, network in networks.items():
        ship(name, network, record=results[name])
    _write_json(work / "judges.json", {"world_digest": toybox.world_digest(), **results})  # of the weights as shipped


def ship(name: str, network: nn.Module, *, record: Mapping[str, object]) -> None:
    """Write a network's weights as fp16 into the package, with what is known of it."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    about = {"network": name, "renderer": world.RENDERER_VERSION, "seed": SEED, "steps": _steps(name)}
    write_tensors(WEIGHTS / f"{name}.safetensors", tensors, {**about, "held_out": record})


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, sort_keys=True, indent=1) + "\n")
    os.replace(temporary, path)
