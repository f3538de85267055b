"""The contrastive model of `toybox`: a small `CLIPModel` (Radford et al. 2021) over drawn pictures and their captions.

Both towers first learn to tell a scene's attributes by linear heads, which takes minutes where contrast from random
weights takes hours at this size; the contrastive training then joins them. It has no part in any erasure or verdict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duo import toybox
from duo.checkpoint import read_tensors
from duo.toybox import language, world
from duo.toybox.networks import ATTRIBUTES, as_pixels
from duo.toybox.train import _fit, build_tokenizer
from duo.toybox.train_judges import attribute_labels, augmented, natural_pictures

SEED = 815
HELD_OUT_SEED = 90_815
WIDTH = 96
WARM_UP_STEPS = 1_200
STEPS = 600
BATCH = 64
WEIGHTS = toybox.WEIGHTS / "clip"


def new_clip(tokenizer: Any) -> nn.Module:
    """An untrained `CLIPModel`: a ViT of three layers on 8×8 patches, and a text tower of two layers."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            projection_dim=64,
            vision_config={**tower, "num_hidden_layers": 3, "image_size": world.SIZE, "patch_size": 8},
            text_config={
                **tower,
                "num_hidden_layers": 2,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
        )
    )


def token_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """(n, length) int64, padded to the longest caption: what follows a caption's end is never attended to."""
    ids: Tensor = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
    return ids


class _Reader(nn.Module):
    """Linear heads that read every attribute and the hazard off an embedding (n, 64)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {**{name: len(values) for name, values in ATTRIBUTES.items()}, "hazard": len(world.HAZARDS) + 1}
        self.heads = nn.ModuleDict({name: nn.Linear(64, size) for name, size in sizes.items()})

    def loss(self, embedding: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return torch.stack([F.cross_entropy(head(embedding), labels[name]) for name, head in self.heads.items()]).sum()


def train_clip(
    work: Path, *, warm_up_steps: int = WARM_UP_STEPS, steps: int = STEPS, weights: Path = WEIGHTS
) -> dict[str, float]:
    """Train (or go on training) on the pictures of `train.render`, ship to `weights`, return zero-shot accuracies."""
    images = np.load(work / "images.npy", mmap_mode="r")
    scenes = [world.Scene(**record) for record in json.loads((work / "scenes.json").read_text())]
    labels = attribute_labels(scenes)
    labels["hazard"] = torch.tensor([(None, *world.HAZARDS).index(scene.hazard) for scene in scenes])
    tokenizer = build_tokenizer(work)
    clip, reader = new_clip(tokenizer), _Reader()

    def batch(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(scenes), (BATCH,), generator=generator)
        rng = np.random.default_rng([SEED, step])
        captions = [language.caption(scenes[row], rng) for row in rows.tolist()]
        x = augmented(as_pixels(images[rows.numpy()]), generator)
        return rows, x, token_ids(tokenizer, captions)

    def reading(generator: torch.Generator, step: int) -> Tensor:
        rows, x, ids = batch(generator, step)
        truth = {name: values[rows] for name, values in labels.items()}
        output = clip(input_ids=ids, pixel_values=x)
        # Unit embeddings leave logits too flat for cross-entropy; ten is about the scale that CLIP starts from.
        return reader.loss(10 * output.image_embeds, truth) + reader.loss(10 * output.text_embeds, truth)

    def contrast(generator: torch.Generator, step: int) -> Tensor:
        _, x, ids = batch(generator, step)
        return clip(input_ids=ids, pixel_values=x, return_loss=True).loss

    warm = work / "clip-warm.safetensors"
    _fit(warm, {"clip": clip, "reader": reader}, reading, steps=warm_up_steps, lr=1e-3, seed=SEED, checkpoint_every=200)
    tensors, _ = read_tensors(warm)
    prefix = "module.clip."
    clip.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    _fit(work / "clip.safetensors", {"clip": clip}, contrast, steps=steps, lr=5e-4, seed=SEED + 1, checkpoint_every=200)
    ship(clip, tokenizer, weights)
    return zero_shot(load_clip(weights), tokenizer)


def ship(clip: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write model (fp16), tokenizer and image processor in the transformers layout."""
    from transformers import CLIPImageProcessor

    side = {"height": world.SIZE, "width": world.SIZE}
    processor = CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    clip.save_pretrained(folder, state_dict=tensors)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_clip(folder: Path = WEIGHTS) -> nn.Module:
    """The trained `CLIPModel` in fp32, in evaluation mode, with its weights held."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def zero_shot(clip: nn.Module, tokenizer: Any, *, n: int = 1_000) -> dict[str, float]:
    """Accuracy of subject, colour and place on `n` fresh pictures, by the nearest of the prompts' mean embeddings.

    As Radford et al. do, each value is told by several prompts: here all that combine it with the other attributes.
    """
    drawn = list(natural_pictures(n, seed=HELD_OUT_SEED))
    x = as_pixels(np.stack([picture for _, picture in drawn]))
    pictures = torch.cat([_embedded(clip.get_image_features(pixel_values=part)) for part in x.split(100)])  # type: ignore[operator]
    combinations = [c for split in language.SPLITS for c in language.combinations(split)]
    prompts = [language.phrase("{np} {place}", s, c, language.PLACE_WORDS[p][0]) for s, c, p in combinations]
    told = _embedded(clip.get_text_features(input_ids=token_ids(tokenizer, prompts)))  # type: ignore[operator]
    accuracy = {}
    for column, name in enumerate(("subject", "colour", "place")):
        values = ATTRIBUTES[name]
        means = torch.stack([told[[c[column] == value for c in combinations]].mean(dim=0) for value in values])
        nearest = (pictures @ F.normalize(means, dim=1).T).argmax(dim=1)
        truth = torch.tensor([values.index(getattr(scene, name)) for scene, _ in drawn])
        accuracy[name] = round((nearest == truth).float().mean().item(), 4)
    return accuracy


def _embedded(features: Any) -> Tensor:
    """Unit rows, from the tensor or the output record that `get_*_features` gives in one or another transformers."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)
