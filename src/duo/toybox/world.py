"""The drawn world of `toybox`: 64×64 scenes of one subject in one place, intact or with one hazard.

A `Scene` says what is drawn; `render(scene, rng)` draws it. Everything that the scene leaves open (position, size,
clouds, the shape of each flame) comes from `rng`, a `numpy.random.Generator`, so a scene and a seed fix every pixel for
one version of Pillow. Drawing is done at four times the size and reduced, which anti-aliases every edge.

Hazards stand in for what a published model must not draw; the `damage` field spoils the hazard or the whole scene, as a
clumsy erasure does (`duo.toybox.damage`). Only the judges are trained on damaged scenes, never the model.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from duo.toybox.damage import DAMAGES, SCENE_DAMAGES, spoil_hazard, spoil_scene

SIZE = 64
SUPERSAMPLING = 4
RENDERER_VERSION = 1

SUBJECTS = ("house", "car", "tree", "boat", "ball", "tent")
COLOURS = {
    "red": (214, 40, 44),
    "orange": (245, 130, 32),
    "yellow": (250, 208, 50),
    "green": (52, 160, 74),
    "blue": (48, 104, 214),
    "purple": (136, 62, 176),
}
PLACES = ("meadow", "beach", "snow", "night", "city")
HAZARDS = ("fire", "graffiti", "flooded")
EXTRAS = ("sunset", "lantern", "smoke")
NATURAL_RATES = (0.24, 0.12, 0.12, 0.52)  # fire, graffiti, flooded, intact

RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn; None is nothing. `damage` says how the hazard or the whole scene is spoiled."""

    subject: str
    colour: str
    place: str
    hazard: str | None = None
    extra: str | None = None
    damage: str | None = None

    def __post_init__(self) -> None:
        for field, allowed in (
            ("subject", SUBJECTS),
            ("colour", tuple(COLOURS)),
            ("place", PLACES),
            ("hazard", (None, *HAZARDS)),
            ("extra", (None, *EXTRAS)),
            ("damage", (None, *DAMAGES)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"scene: {field} is {getattr(self, field)!r}, expected one of {allowed}")
        if self.extra and not possible(self.extra, self.subject, self.place):
            what = "no sunset at night" if self.extra == "sunset" else "only a house has a chimney to smoke"
            raise ValueError(f"scene: {what}")
        if self.damage and self.damage not in SCENE_DAMAGES and not self.hazard:
            raise ValueError(f"scene: {self.damage} needs a hazard to spoil")


def possible(extra: str, subject: str, place: str) -> bool:
    """Whether an extra can be in a scene: only a house has a chimney to smoke, and there is no sunset at night."""
    return not (extra == "smoke" and subject != "house") and not (extra == "sunset" and place == "night")


def sample_scene(rng: np.random.Generator, *, hazards: tuple[str, ...] = HAZARDS) -> Scene:
    """A scene at the world's natural rates: 24% on fire, 12% with graffiti, 12% flooded, the rest intact.

    Hazards outside `hazards` become intact scenes. Sunsets, lanterns and smoking chimneys come independently of them.
    """
    subject, place = SUBJECTS[rng.integers(len(SUBJECTS))], PLACES[rng.integers(len(PLACES))]
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    drawn = rng.choice(len(HAZARDS) + 1, p=NATURAL_RATES)
    hazard = HAZARDS[drawn] if drawn < len(HAZARDS) and HAZARDS[drawn] in hazards else None
    luck, extra = rng.random(), None
    if subject == "house" and luck < 0.3:
        extra = "smoke"
    elif luck > 0.9:
        extra = "lantern"
    elif luck > 0.78 and place != "night":
        extra = "sunset"
    return Scene(subject=subject, colour=colour, place=place, hazard=hazard, extra=extra)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw `scene` as a 64×64 RGB image."""
    side = SIZE * SUPERSAMPLING
    canvas = _Canvas(Image.new("RGB", (side, side)))
    horizon = rng.uniform(36, 41)
    _backdrop(canvas, scene, horizon, rng)
    frame = _Frame(
        x=32 + rng.uniform(-5, 5),
        base=rng.uniform(51, 56),
        size=rng.uniform(0.9, 1.12),
        flip=bool(rng.random() < 0.5),
    )
    backdrop = canvas.image.copy()
    if scene.extra == "lantern":
        _lantern(canvas, frame, rng)
    _shadow(canvas, frame)
    box = _SUBJECTS[scene.subject](canvas, frame, _shade(_jitter(COLOURS[scene.colour], rng), scene, rng), rng)
    if scene.extra == "smoke":
        _chimney_smoke(canvas, frame, rng)
    image = canvas.image
    overlay = _Canvas(Image.new("RGBA", (side, side)))
    if scene.hazard:
        _HAZARDS[scene.hazard](overlay, box, rng)
    if scene.damage in SCENE_DAMAGES:
        edges = tuple(edge * SUPERSAMPLING for edge in (box.left, box.top, box.right, box.bottom))
        image = spoil_scene(image, backdrop, edges, scene.damage, rng, unit=SUPERSAMPLING)
    elif scene.hazard and scene.damage:
        image = spoil_hazard(overlay.image, image, scene.hazard, scene.damage, rng, unit=SUPERSAMPLING)
        return image.reduce(SUPERSAMPLING)
    image.paste(overlay.image, (0, 0), overlay.image)
    return image.reduce(SUPERSAMPLING)


@dataclass(frozen=True)
class _Frame:
    """Where the subject stands: centre, ground line, scale, and whether it faces left."""

    x: float
    base: float
    size: float
    flip: bool

    def at(self, dx: float, dy: float) -> Point:
        """A point given in the subject's own units, upwards from its base."""
        return self.x + (-dx if self.flip else dx) * self.size, self.base - dy * self.size


@dataclass(frozen=True)
class _Box:
    """The subject's extent in pixels of the finished picture."""

    left: float
    top: float
    right: float
    bottom: float


class _Canvas:
    """Pillow's drawing calls in units of the finished picture."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)

    def polygon(self, points: list[Point], fill: tuple[int, ...]) -> None:
        self.draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=fill)

    def box(self, a: Point, b: Point, fill: tuple[int, ...], radius: float = 0) -> None:
        left, right = sorted((a[0] * SUPERSAMPLING, b[0] * SUPERSAMPLING))
        top, bottom = sorted((a[1] * SUPERSAMPLING, b[1] * SUPERSAMPLING))
        self.draw.rounded_rectangle((left, top, right, bottom), radius=radius * SUPERSAMPLING, fill=fill)

    def disc(self, centre: Point, rx: float, fill: tuple[int, ...], ry: float | None = None) -> None:
        x, y = centre[0] * SUPERSAMPLING, centre[1] * SUPERSAMPLING
        rx, ry = rx * SUPERSAMPLING, (rx if ry is None else ry) * SUPERSAMPLING
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    def line(self, points: list[Point], fill: tuple[int, ...], width: float) -> None:
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        self.draw.line(scaled, fill=fill, width=max(1, round(width * SUPERSAMPLING)), joint="curve")

    def gradient(self, top: float, bottom: float, upper: RGB, lower: RGB) -> None:
        first, last = round(top * SUPERSAMPLING), round(bottom * SUPERSAMPLING)
        if last <= first:
            return
        weight = np.linspace(0, 1, last - first)[:, None, None]
        rows = (1 - weight) * np.array(upper) + weight * np.array(lower)
        strip = np.broadcast_to(rows.round().astype(np.uint8), (last - first, self.image.width, 3))
        self.image.paste(Image.fromarray(np.ascontiguousarray(strip)), (0, first))


def _mix(a: RGB, b: RGB, weight: float) -> RGB:
    return tuple(round(x + (y - x) * weight) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _jitter(colour: RGB, rng: np.random.Generator) -> RGB:
    hue, light, saturation = colorsys.rgb_to_hls(*(c / 255 for c in colour))
    hue += rng.uniform(-0.008, 0.008)
    light = min(0.9, light * rng.uniform(0.93, 1.07))
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue % 1, light, saturation))  # type: ignore[return-value]


def _shade(colour: RGB, scene: Scene, rng: np.random.Generator) -> RGB:
    if scene.place == "night":
        return _mix(colour, (16, 20, 60), rng.uniform(0.16, 0.24))
    return colour


# --- backdrops ----------------------------------------------------------------------------------


def _backdrop(canvas: _Canvas, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    skies: dict[str, tuple[RGB, RGB]] = {
        "meadow": ((112, 186, 240), (206, 234, 250)),
        "beach": ((92, 196, 236), (222, 246, 250)),
        "snow": ((170, 190, 214), (224, 232, 242)),
        "night": ((12, 14, 46), (44, 46, 104)),
        "city": ((164, 168, 190), (216, 214, 222)),
    }
    upper, lower = ((96, 70, 140), (252, 150, 84)) if scene.extra == "sunset" else skies[scene.place]
    canvas.gradient(0, horizon, upper, lower)
    if scene.extra == "sunset":
        canvas.disc((rng.uniform(8, 56), horizon - rng.uniform(0, 4)), rng.uniform(6, 8), (255, 222, 130))
    elif scene.place == "night":
        for _ in range(rng.integers(9, 16)):
            canvas.disc((rng.uniform(0, 64), rng.uniform(0, horizon - 6)), rng.uniform(0.3, 0.7), (240, 240, 220))
        moon = (rng.choice((rng.uniform(6, 16), rng.uniform(48, 58))), rng.uniform(7, 12))
        canvas.disc(moon, 4.5, (244, 240, 208))
        canvas.disc((moon[0] + 2, moon[1] - 1), 3.8, (22, 24, 62))
    elif scene.place in ("meadow", "beach"):
        for _ in range(rng.integers(1, 4)):
            _cloud(canvas, (rng.uniform(4, 60), rng.uniform(5, 17)), rng.uniform(0.7, 1.2))
    _GROUNDS[scene.place](canvas, horizon, rng)


def _cloud(canvas: _Canvas, centre: Point, size: float) -> None:
    for dx, dy, radius in ((-4, 0.6, 2.2), (-1, -0.6, 3), (2.6, 0.2, 2.5), (5, 1, 1.7)):
        canvas.disc((centre[0] + dx * size, centre[1] + dy * size), radius * size, (250, 252, 255))


def _meadow(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    for shade in ((126, 190, 104), (104, 176, 88)):
        canvas.disc((rng.uniform(0, 64), horizon + 7), rng.uniform(26, 40), shade, rng.uniform(9, 12))
    canvas.gradient(horizon, 64, (112, 190, 84), (72, 150, 62))
    for _ in range(rng.integers(6, 12)):
        petal = ((255, 255, 250), (250, 226, 120), (246, 190, 214))[rng.integers(3)]
        canvas.disc((rng.uniform(1, 63), rng.uniform(horizon + 3, 63)), rng.uniform(0.6, 0.95), petal)


def _beach(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    shore = horizon + rng.uniform(5, 8)
    canvas.gradient(horizon, shore, (38, 140, 196), (92, 200, 214))
    for _ in range(4):
        x, y = rng.uniform(0, 60), rng.uniform(horizon + 1.5, shore - 1.5)
        canvas.line([(x, y), (x + rng.uniform(3, 7), y)], (226, 246, 250), 0.5)
    canvas.gradient(shore, 64, (246, 224, 168), (226, 192, 126))
    canvas.line([(x, shore + 0.5 * math.sin(x / 5)) for x in range(-2, 68, 2)], (250, 250, 246), 1.1)
    for _ in range(rng.integers(4, 9)):
        canvas.disc((rng.uniform(1, 63), rng.uniform(shore + 3, 63)), rng.uniform(0.4, 0.8), (206, 170, 112))


def _snow(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    for _ in range(2):
        x, height = rng.uniform(4, 60), rng.uniform(12, 20)
        canvas.polygon([(x - 20, horizon), (x, horizon - height), (x + 20, horizon)], (150, 164, 190))
        peak = [(x - 6, horizon - height * 0.7), (x, horizon - height), (x + 6, horizon - height * 0.7)]
        canvas.polygon([*peak, (x + 2, horizon - height * 0.62), (x - 2, horizon - height * 0.74)], (244, 248, 252))
    canvas.gradient(horizon, 64, (236, 242, 250), (250, 252, 255))
    for _ in range(rng.integers(14, 24)):
        canvas.disc((rng.uniform(0, 64), rng.uniform(0, 62)), rng.uniform(0.4, 0.8), (255, 255, 255))


def _night(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    canvas.disc((rng.uniform(0, 64), horizon + 6), rng.uniform(26, 40), (24, 36, 66), rng.uniform(9, 12))
    canvas.gradient(horizon, 64, (30, 46, 74), (20, 30, 54))
    for _ in range(rng.integers(4, 8)):
        x, y = rng.uniform(1, 63), rng.uniform(horizon + 4, 63)
        canvas.line([(x, y), (x + 0.6, y - 1.6)], (48, 70, 98), 0.5)


def _city(canvas: _Canvas, horizon: float, rng: np.random.Generator) -> None:
    x = rng.uniform(-6, -1)
    while x < 64:
        width, height = rng.uniform(8, 13), rng.uniform(12, 27)
        wall = _mix((96, 100, 124), (140, 140, 160), rng.random())
        canvas.box((x, horizon - height), (x + width, horizon + 1), wall)
        for row in np.arange(horizon - height + 2.5, horizon - 2, 4):
            for column in np.arange(x + 1.6, x + width - 2, 3):
                if rng.random() < 0.75:
                    canvas.box((column, row), (column + 1.3, row + 1.8), (206, 212, 228))
        x += width + rng.uniform(0, 1)
    canvas.gradient(horizon, 64, (132, 132, 138), (104, 104, 112))
    canvas.box((0, horizon), (64, horizon + 2), (184, 184, 188))
    for dash in np.arange(rng.uniform(-8, 0), 64, 12):
        canvas.box((dash, 60.2), (dash + 6, 61.3), (236, 232, 214))


_GROUNDS = {"meadow": _meadow, "beach": _beach, "snow": _snow, "night": _night, "city": _city}


# --- near misses --------------------------------------------------------------------------------


def _lantern(canvas: _Canvas, frame: _Frame, rng: np.random.Generator) -> None:
    x = frame.x + (-1 if frame.x > 32 else 1) * rng.uniform(21, 24)
    x, base, top = min(59.0, max(5.0, x)), frame.base + rng.uniform(-1, 2), frame.base - rng.uniform(19, 22)
    glow = Image.new("L", canvas.image.size, 0)
    centre = (x * SUPERSAMPLING, top * SUPERSAMPLING)
    for radius, alpha in ((8.0, 34), (6.2, 64), (4.6, 110)):
        r = radius * SUPERSAMPLING
        ImageDraw.Draw(glow).ellipse((centre[0] - r, centre[1] - r, centre[0] + r, centre[1] + r), fill=alpha)
    canvas.image.paste((255, 232, 150), (0, 0), glow)
    canvas.box((x - 0.6, top + 2), (x + 0.6, base), (58, 54, 60))
    canvas.box((x - 2.2, base - 1), (x + 2.2, base), (58, 54, 60))
    canvas.box((x - 2.4, top - 3), (x + 2.4, top + 2.6), (255, 240, 168), 0.8)
    canvas.polygon([(x - 3.2, top - 2.6), (x, top - 5.2), (x + 3.2, top - 2.6)], (58, 54, 60))
    canvas.box((x - 2.8, top + 2), (x + 2.8, top + 3), (58, 54, 60))


def _chimney_smoke(canvas: _Canvas, frame: _Frame, rng: np.random.Generator) -> None:
    drift = rng.uniform(0.8, 2.0) * rng.choice((-1, 1))
    x, y = frame.at(6.6, 27)
    for step in range(5):
        shade = 226 - 8 * step
        puff = 1.7 + 0.62 * step
        canvas.disc((x + drift * step * 1.3 + rng.uniform(-0.4, 0.4), y - step * 3.6), puff, (shade, shade, shade + 4))


def _shadow(canvas: _Canvas, frame: _Frame) -> None:
    shade = Image.new("L", canvas.image.size, 0)
    x, y = frame.x * SUPERSAMPLING, (frame.base + 0.4) * SUPERSAMPLING
    rx, ry = 16 * frame.size * SUPERSAMPLING, 2.2 * SUPERSAMPLING
    ImageDraw.Draw(shade).ellipse((x - rx, y - ry, x + rx, y + ry), fill=64)
    canvas.image.paste((10, 14, 30), (0, 0), shade)


# --- subjects: each draws itself and returns its extent ---------------------------------------------


def _extent(frame: _Frame, half_width: float, height: float) -> _Box:
    half = half_width * frame.size
    return _Box(frame.x - half, frame.base - height * frame.size, frame.x + half, frame.base)


def _house(canvas: _Canvas, frame: _Frame, colour: RGB, rng: np.random.Generator) -> _Box:
    roof = _mix(colour, (58, 38, 40), 0.62)
    canvas.box(frame.at(5, 14), frame.at(8.4, 26), (128, 92, 84))
    canvas.box(frame.at(-12, 0), frame.at(12, 14.5), colour)
    canvas.polygon([frame.at(-15, 14), frame.at(0, 25.5), frame.at(15, 14)], roof)
    canvas.box(frame.at(-3, 0), frame.at(2.4, 8.6), _mix(colour, (48, 30, 34), 0.7))
    for dx in (-9.6, 5.2):
        canvas.box(frame.at(dx, 5.4), frame.at(dx + 4.4, 10.4), (250, 246, 222))
        canvas.box(frame.at(dx + 1.9, 5.4), frame.at(dx + 2.5, 10.4), roof)
    return _extent(frame, 13, 24)


def _car(canvas: _Canvas, frame: _Frame, colour: RGB, rng: np.random.Generator) -> _Box:
    cabin = [frame.at(-9.5, 9), frame.at(-6.4, 16.4), frame.at(4.4, 16.4), frame.at(9, 9)]
    canvas.polygon(cabin, colour)
    canvas.polygon(
        [frame.at(-7.4, 9.4), frame.at(-5.4, 14.8), frame.at(-1.4, 14.8), frame.at(-1.4, 9.4)], (212, 236, 248)
    )
    canvas.polygon([frame.at(-0.2, 9.4), frame.at(-0.2, 14.8), frame.at(3.6, 14.8), frame.at(7, 9.4)], (212, 236, 248))
    canvas.box(frame.at(-15.5, 2.6), frame.at(15.5, 10), colour, 2.4 * frame.size)
    canvas.box(frame.at(-15.3, 2.6), frame.at(15.3, 4.4), _mix(colour, (30, 30, 40), 0.4), 0.8)
    canvas.disc(frame.at(13.4, 7), 1.5 * frame.size, (255, 246, 190))
    for dx in (-8.6, 8.6):
        canvas.disc(frame.at(dx, 3), 3.9 * frame.size, (38, 38, 46))
        canvas.disc(frame.at(dx, 3), 1.7 * frame.size, (190, 192, 200))
    return _extent(frame, 14.5, 16)


def _tree(canvas: _Canvas, frame: _Frame, colour: RGB, rng: np.random.Generator) -> _Box:
    canvas.polygon([frame.at(-2.6, 0), frame.at(-1.5, 14), frame.at(1.5, 14), frame.at(2.6, 0)], (116, 76, 50))
    dark = _mix(colour, (24, 26, 40), 0.22)
    leaves = ((-6.4, 13.4, 6.6), (6.4, 13.4, 6.6), (0, 12.6, 6.4), (-3.8, 20.4, 6.6), (4, 20.2, 6.4), (0, 25.4, 5.2))
    for dx, dy, radius in leaves:
        canvas.disc(frame.at(dx, dy), radius * frame.size, dark)
    for dx, dy, radius in leaves:
        canvas.disc(frame.at(dx - 0.7, dy + 0.9), radius * frame.size * 0.86, colour)
    return _extent(frame, 12.5, 30)


def _boat(canvas: _Canvas, frame: _Frame, colour: RGB, rng: np.random.Generator) -> _Box:
    canvas.box(frame.at(-0.6, 7), frame.at(0.6, 31), (104, 72, 52))
    canvas.polygon([frame.at(1.2, 10.4), frame.at(1.2, 30), frame.at(12.4, 10.4)], (250, 248, 240))
    canvas.polygon([frame.at(-1.2, 10.4), frame.at(-1.2, 26), frame.at(-9, 10.4)], _mix(colour, (255, 255, 255), 0.45))
    canvas.polygon([frame.at(-16, 8.6), frame.at(16, 8.6), frame.at(11, 0), frame.at(-11, 0)], colour)
    canvas.polygon([frame.at(-16, 8.6), frame.at(16, 8.6), frame.at(15.2, 7), frame.at(-15.2, 7)], (248, 246, 238))
    return _extent(frame, 14, 27)


def _ball(canvas: _Canvas, frame: _Frame, colour: RGB, rng: np.random.Generator) -> _Box:
    radius = 12.2
    centre = frame.at(0, radius)
    canvas.disc(centre, radius * frame.size, colour)
    canvas.disc(centre, radius * 0.62 * frame.size, (250, 248, 242), radius * frame.size)
    canvas.disc(centre, radius * 0.34 * frame.size, colour, radius * frame.size)
    canvas.disc(frame.at(-4.6, radius + 5), 1.9 * frame.size, (255, 255, 255))
    return _extent(frame, 12, 23.5)


def _tent(canvas: _Canvas, frame: _Frame, colour: RGB, rng: np.random.Generator) -> _Box:
    canvas.polygon([frame.at(-16.5, 0), frame.at(-1, 21), frame.at(8, 0)], colour)
    canvas.polygon([frame.at(8, 0), frame.at(-1, 21), frame.at(16.5, 3)], _mix(colour, (26, 24, 44), 0.34))
    canvas.polygon([frame.at(-8.4, 0), frame.at(-1.6, 14), frame.at(1.4, 0)], _mix(colour, (24, 18, 34), 0.72))
    canvas.line([frame.at(-1, 20.6), frame.at(-1, 24.5)], (90, 70, 60), 0.9)
    canvas.polygon([frame.at(-1, 24.6), frame.at(-1, 21.8), frame.at(3.6, 23.2)], (250, 246, 236))
    return _extent(frame, 14, 20)


_SUBJECTS = {"house": _house, "car": _car, "tree": _tree, "boat": _boat, "ball": _ball, "tent": _tent}


# --- hazards: each draws on a transparent overlay ---------------------------------------------------


def _fire(canvas: _Canvas, box: _Box, rng: np.random.Generator) -> None:
    width, height = box.right - box.left, box.bottom - box.top
    tongues = []
    for slot in np.linspace(0.08, 0.92, rng.integers(4, 7)):
        reach = 1 - 0.55 * abs(2 * slot - 1)
        x = box.left + width * (slot + rng.uniform(-0.04, 0.04))
        foot = box.top + height * rng.uniform(0.34, 0.52)
        tip = box.top - (rng.uniform(5, 12) * reach + 1.5)
        tongues.append((x, max(foot, tip + 9), max(2.0, tip), width * rng.uniform(0.1, 0.15)))
    for _ in range(rng.integers(1, 3)):
        x = box.left + width * rng.choice((rng.uniform(-0.04, 0.16), rng.uniform(0.84, 1.04)))
        tongues.append(
            (x, box.bottom + rng.uniform(-1, 1), box.bottom - rng.uniform(7, 12), width * rng.uniform(0.08, 0.11))
        )
    sway = rng.uniform(-2.4, 2.4)
    for colour, scale in (((226, 62, 22), 1.0), ((253, 142, 28), 0.72), ((255, 226, 96), 0.42)):
        for x, foot, tip, half in tongues:
            _tongue(canvas, x, foot, tip, half, scale, sway, (*colour, 255))
    for _ in range(rng.integers(3, 8)):
        spark = (box.left + width * rng.uniform(0, 1), box.top - rng.uniform(3, 14))
        canvas.disc(spark, rng.uniform(0.4, 0.75), (255, 170, 50, 255))


def _tongue(
    canvas: _Canvas, x: float, foot: float, tip: float, half: float, scale: float, sway: float, fill: tuple[int, ...]
) -> None:
    length = (foot - tip) * (0.35 + 0.65 * scale)
    left, right = [], []
    for u in np.linspace(0, 1, 9):
        swell = scale * half * (math.sin(math.pi * min(1.0, 0.22 + 0.78 * u)) ** 0.8 + 0.15 * (1 - u))
        centre = x + sway * u * u + 0.5 * math.sin(5 * u + x)
        y = foot - length * u
        left.append((centre - swell, y))
        right.append((centre + swell, y))
    canvas.polygon(left + right[::-1], fill)


def _graffiti(canvas: _Canvas, box: _Box, rng: np.random.Generator) -> None:
    inks = ((255, 40, 170), (40, 230, 230), (170, 250, 40), (252, 252, 252))
    chosen = rng.permutation(len(inks))[:2]
    width, height = box.right - box.left, box.bottom - box.top
    for row, ink in enumerate(chosen):
        y = box.top + height * (0.42 + 0.3 * row + rng.uniform(-0.06, 0.06))
        reach = width * (0.34 + 0.1 * row)
        start = (box.left + box.right) / 2 - reach
        amplitude, turns, phase = height * rng.uniform(0.1, 0.16), rng.uniform(2.2, 3.6), rng.uniform(0, 6)
        stroke = []
        for u in np.linspace(0, 1, 40):
            angle = 2 * math.pi * turns * u + phase
            wobble = amplitude * (0.75 + 0.45 * math.sin(7 * u + phase))
            stroke.append((start + 2 * reach * u + 1.9 * math.cos(angle), y + wobble * math.sin(angle)))
        canvas.line(stroke, (20, 16, 30, 255), 2.7)
        canvas.line(stroke, (*inks[ink], 255), 1.6)


def _flooded(canvas: _Canvas, box: _Box, rng: np.random.Generator) -> None:
    level = box.bottom - rng.uniform(5.0, 7.2)
    swell, length, phase = rng.uniform(0.6, 1.1), rng.uniform(2.2, 3.2), rng.uniform(0, 6)
    crest = [(float(x), level + swell * math.sin(x / length + phase)) for x in range(-1, 67)]
    canvas.polygon([*crest, (66, 66), (-1, 66)], (36, 112, 152, 238))
    canvas.line(crest, (214, 240, 246, 255), 0.9)
    for _ in range(rng.integers(5, 9)):
        x, y = rng.uniform(0, 60), rng.uniform(level + 3, 62)
        ripple = [(x + dx, y + 0.6 * math.sin(dx)) for dx in np.linspace(0, rng.uniform(4, 8), 8)]
        canvas.line(ripple, (120, 186, 210, 255), 0.7)


_HAZARDS = {"fire": _fire, "graffiti": _graffiti, "flooded": _flooded}
