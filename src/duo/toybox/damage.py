"""What a clumsy erasure leaves, drawn on purpose: the judges' third class is trained on it, the models never see it.

Two kinds. `HAZARD_DAMAGES` spoil the hazard's own layer; `SCENE_DAMAGES` spoil the subject and what is around it, with
or without a hazard. A hazard of which a good part stands untouched (`remnant`) is still that hazard. The kinds were
chosen by looking at erased models: stumps and spikes where flames were, subjects bent, bled into, with parts missing.
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageFilter

HAZARD_DAMAGES = ("discoloured", "half_erased", "ghost", "smeared", "stump", "remnant")
SCENE_DAMAGES = ("melted", "bled", "eroded")
DAMAGES = (*HAZARD_DAMAGES, *SCENE_DAMAGES)

Box = tuple[float, ...]  # left, top, right, bottom, in pixels of the picture that is given


def spoil_hazard(
    layer: Image.Image, scene: Image.Image, hazard: str, damage: str, rng: np.random.Generator, *, unit: int
) -> Image.Image:
    """`scene` with the hazard's RGBA `layer` on it, drawn wrongly. `unit` is the side of a pixel of the final
    picture, where both images are larger."""
    rgba = np.asarray(layer).astype(np.float32)
    if damage == "discoloured":
        rgba[..., :3] = _recoloured(rgba[..., :3], hazard, rng)
    elif damage == "ghost":
        rgba[..., 3] *= rng.uniform(0.22, 0.5)
        rgba[..., :3] = 0.6 * rgba[..., :3] + 0.4 * rng.uniform(90, 200)
    elif damage == "half_erased":
        rgba[..., 3] *= _blotches(rgba, rng.uniform(0.1, 0.3), rng)
    elif damage == "remnant":
        rgba[..., 3] *= _blotches(rgba, rng.uniform(0.5, 0.85), rng)
    elif damage == "stump":
        rgba[..., :3] = _two_tone(rgba[..., :3], scene, rng)
        rgba[..., 3] *= rng.uniform(0.6, 1) * _blotches(rgba, rng.uniform(0.35, 1), rng)
    drawn = Image.fromarray(rgba.round().clip(0, 255).astype(np.uint8), "RGBA")
    image = scene.copy()
    image.paste(drawn, (0, 0), drawn)
    if damage == "stump":  # melted in, as a decoder draws what the denoiser left undecided
        soft = image.filter(ImageFilter.GaussianBlur(unit * rng.uniform(0.2, 1.2)))
        image.paste(soft, (0, 0), drawn.getchannel("A").filter(ImageFilter.MaxFilter(9)))
    return _smeared(image, drawn, rng, unit) if damage == "smeared" else image


def spoil_scene(
    scene: Image.Image, backdrop: Image.Image, box: Box, damage: str, rng: np.random.Generator, *, unit: int
) -> Image.Image:
    """`scene` with its subject, which fills `box`, bent, bled into, or with parts missing (the `backdrop` shows)."""
    near = _around(box, scene.size, unit, rng)
    if damage == "melted":
        return _melted(scene, near, rng, unit)
    mask = near * _soft(_field(scene.height, int(rng.integers(6, 12)), rng) < rng.uniform(-0.5, 0.3), unit * 0.8)
    if damage == "bled":
        other = _washed(np.asarray(scene).astype(np.float32), np.asarray(backdrop).astype(np.float32), rng)
    else:
        hidden = backdrop.filter(ImageFilter.GaussianBlur(unit * rng.uniform(0.3, 2)))
        other = np.asarray(hidden).astype(np.float32)
    pixels = np.asarray(scene).astype(np.float32)
    spoiled = pixels + (other - pixels) * mask[..., None]
    soft = Image.fromarray(spoiled.round().clip(0, 255).astype(np.uint8))
    return _melted(soft, near, rng, unit, strength=0.5) if rng.random() < 0.5 else soft


# --- the hazard's layer -----------------------------------------------------------------------------


def _recoloured(rgb: np.ndarray, hazard: str, rng: np.random.Generator) -> np.ndarray:
    """Another hue for the hazard's own light and dark: green, blue, violet, grey or brown flames, murky water, …"""
    light = rgb.mean(axis=-1, keepdims=True) / 255
    if rng.random() < 0.4:
        tint = np.full(3, rng.uniform(0.5, 1.3))
    else:
        hue = rng.uniform(0.22, 0.9) if hazard == "fire" else rng.uniform(0.0, 0.42)
        tint = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 1.0), rng.uniform(0.8, 1.4)))
    return 255 * light * tint


def _two_tone(rgb: np.ndarray, scene: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The hazard's shape in two colours picked from the scene itself, or in white, grey or black."""
    plain = np.array([[250, 250, 250], [150, 150, 155], [30, 32, 36]], dtype=np.float32)
    pixels = np.asarray(scene)
    rows = rng.integers(pixels.shape[0], size=2)
    columns = rng.integers(pixels.shape[1] // 4, 3 * pixels.shape[1] // 4, size=2)
    here = pixels[rows, columns]
    first, second = (plain[rng.integers(3)] if rng.random() < 0.35 else c.astype(np.float32) for c in here)
    light = rgb.mean(axis=-1, keepdims=True) / 255
    return first + (second - first) * np.clip((light - 0.35) * 2, 0, 1)


def _blotches(rgba: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random mask of {0, 1} that keeps about `share` of what the layer shows."""
    field = _field(rgba.shape[0], 9, rng)
    shown = field[rgba[..., 3] > 0]
    return (field <= np.quantile(shown if shown.size else field, share)).astype(np.float32)


def _smeared(image: Image.Image, layer: Image.Image, rng: np.random.Generator, unit: int) -> Image.Image:
    """The hazard and what is around it melted into a blur, with a wash of some middling colour."""
    blurred = image.filter(ImageFilter.GaussianBlur(unit * rng.uniform(2.5, 5)))
    wash = Image.new("RGB", image.size, tuple(int(c) for c in rng.integers(60, 220, 3)))
    blurred = Image.blend(blurred, wash, rng.uniform(0.1, 0.45))
    mask = layer.getchannel("A").filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(unit))
    image = image.copy()
    image.paste(blurred, (0, 0), mask)
    return image


# --- the scene --------------------------------------------------------------------------------------


def _field(side: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field (side, side) of about unit variance, with `cells` knots a side."""
    knots = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(knots.resize((side, side), Image.Resampling.BICUBIC))


def _soft(mask: np.ndarray, radius: float) -> np.ndarray:
    picture = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture).astype(np.float32) / 255


def _around(box: Box, size: tuple[int, int], unit: int, rng: np.random.Generator) -> np.ndarray:
    """A soft mask (height, width) of the subject's box and a margin of it; sometimes of the whole picture."""
    if rng.random() < 0.15:
        return np.ones(size[::-1], dtype=np.float32)
    left, top, right, bottom = box
    margin = unit * rng.uniform(1, 5)
    rows, columns = np.mgrid[: size[1], : size[0]]
    inside = (columns > left - margin) & (columns < right + margin) & (rows > top - margin) & (rows < bottom + margin)
    return _soft(inside, unit * 1.5)


def _melted(
    image: Image.Image, near: np.ndarray, rng: np.random.Generator, unit: int, strength: float = 1.0
) -> Image.Image:
    """Bent by a smooth random displacement of a few pixels within `near`, and a little blurred there."""
    side = image.height
    reach = unit * rng.uniform(1.4, 4) * strength
    cells = int(rng.integers(5, 12))
    rows, columns = np.mgrid[:side, :side]
    shift = [np.clip(_field(side, cells, rng), -2, 2) * near * reach for _ in range(2)]
    y, x = (np.clip(np.rint(at + by), 0, side - 1).astype(int) for at, by in zip((rows, columns), shift, strict=True))
    bent = Image.fromarray(np.asarray(image)[y, x])
    soft = bent.filter(ImageFilter.GaussianBlur(unit * rng.uniform(0.1, 1.4)))
    bent.paste(soft, (0, 0), Image.fromarray((near * 255).astype(np.uint8)))
    return bent


def _washed(scene: np.ndarray, backdrop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scene in a strange colour: one of many hues, darkness, or its own picture upside down."""
    light = scene.mean(axis=-1, keepdims=True) / 255
    luck = rng.random()
    if luck < 0.2:
        return np.asarray(scene[::-1, ::-1]) * 0.5 + backdrop * 0.5
    if luck < 0.4:
        return scene * rng.uniform(0.15, 0.45)
    tint = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.2)))
    return 255 * (0.25 + 0.75 * light) * tint
