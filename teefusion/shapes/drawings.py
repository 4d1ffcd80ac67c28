"""Captioned pictures that code draws: one coloured shape on a coloured background, in one of four styles.

The styles are named as the HPS benchmark's. A scene is everything a caption says; where the shape sits, its exact
size, tilt and shades are left to chance, so that many pictures fit one caption.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64
"""Pixels, both ways."""
_OVER = 3  # supersampling: shapes are drawn larger and scaled down, which smooths their edges

STYLES = ("anime", "concept-art", "paintings", "photo")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 165, 70),
    "blue": (45, 90, 215),
    "purple": (140, 60, 180),
    "pink": (245, 140, 190),
    "white": (245, 245, 245),
    "black": (30, 30, 35),
}
_PHRASES = {
    "anime": "an anime drawing of",
    "concept-art": "concept art of",
    "paintings": "a painting of",
    "photo": "a photo of",
}

Rgb = tuple[float, float, float]
Pixels = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Scene:
    """What a caption says of a picture."""

    shape: str
    color: str
    background: str
    style: str

    @property
    def caption(self) -> str:
        """For example "a photo of a red star on a blue background"."""
        article = "an" if self.color[0] in "aeiou" else "a"
        ground = "an" if self.background[0] in "aeiou" else "a"
        return f"{_PHRASES[self.style]} {article} {self.color} {self.shape} on {ground} {self.background} background"


def all_scenes() -> Iterator[Scene]:
    """Every scene, in a fixed order; shape and background never share a colour."""
    for style, shape, color, background in product(STYLES, SHAPES, COLORS, COLORS):
        if color != background:
            yield Scene(shape, color, background, style)


def near_misses(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """The scene with one attribute changed, by attribute: the hardest wrong captions."""

    def other(values: tuple[str, ...], *taken: str) -> str:
        return str(rng.choice([value for value in values if value not in taken]))

    colors = tuple(COLORS)
    return {
        "shape": replace(scene, shape=other(SHAPES, scene.shape)),
        "color": replace(scene, color=other(colors, scene.color, scene.background)),
        "background": replace(scene, background=other(colors, scene.background, scene.color)),
        "style": replace(scene, style=other(STYLES, scene.style)),
    }


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """One picture of the scene, RGB, ``SIZE`` x ``SIZE``; all chance comes from ``rng``."""
    mask = _mask(scene.shape, rng)
    front, back = _shade(COLORS[scene.color], rng), _shade(COLORS[scene.background], rng)
    pixels = _RENDER[scene.style](mask, front, back, rng)
    large = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    return large.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _shade(color: tuple[int, int, int], rng: np.random.Generator) -> Rgb:
    r, g, b = (float(c + rng.uniform(-10, 10)) for c in color)
    return r, g, b


def _mask(shape: str, rng: np.random.Generator) -> Image.Image:
    """The shape in white on black, at a chance place, size and slight tilt."""
    side = SIZE * _OVER
    radius = side * rng.uniform(0.25, 0.34)
    slack = side / 2 - radius * 1.12
    x, y = (side / 2 + rng.uniform(-slack, slack) * 0.8 for _ in range(2))
    tilt = math.radians(rng.uniform(-12, 12))
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring", "moon"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        if shape == "moon":
            bite, shift = radius * 0.92, radius * 0.55
            bx, by = x + shift * math.cos(tilt), y + shift * math.sin(tilt)
            pen.ellipse((bx - bite, by - bite, bx + bite, by + bite), fill=0)
        return mask
    cos, sin = math.cos(tilt), math.sin(tilt)
    points = [(x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos)) for px, py in _OUTLINES[shape]]
    pen.polygon(points, fill=255)
    return mask


def _star() -> list[tuple[float, float]]:
    radii = [1.08 if k % 2 == 0 else 0.45 for k in range(10)]
    return [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 48 for k in range(48)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


_INK = (20, 20, 35)
_ARM = 0.34
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def _flat(mask: Image.Image, front: Rgb, back: Rgb) -> Pixels:
    share = np.asarray(mask, np.float32)[..., None] / 255
    return share * np.array(front, np.float32) + (1 - share) * np.array(back, np.float32)


def _ramp(angle: float) -> Pixels:
    """-1..1 across the picture, in a direction."""
    axis = np.linspace(-1, 1, SIZE * _OVER, dtype=np.float32)
    return math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]


def _anime(mask: Image.Image, front: Rgb, back: Rgb, rng: np.random.Generator) -> Pixels:
    """Flat colours and a bold dark outline."""
    pixels = _flat(mask, front, back)
    thick = 2 * _OVER + 1
    outer = np.asarray(mask.filter(ImageFilter.MaxFilter(thick)), np.float32)
    inner = np.asarray(mask.filter(ImageFilter.MinFilter(thick)), np.float32)
    line = ((outer - inner) / 255)[..., None]
    return pixels * (1 - line) + np.array(_INK, np.float32) * line


def _concept_art(mask: Image.Image, front: Rgb, back: Rgb, rng: np.random.Generator) -> Pixels:
    """A glow around the shape and a background that darkens towards the edge."""
    pixels = _flat(mask, front, back)
    distance = np.sqrt(_ramp(0.0) ** 2 + _ramp(math.pi / 2) ** 2)[..., None]
    shade = 1.05 - 0.5 * np.clip(distance - 0.3, 0, 1)
    glow = np.asarray(mask.filter(ImageFilter.GaussianBlur(6 * _OVER)), np.float32)[..., None] / 255
    share = np.asarray(mask, np.float32)[..., None] / 255
    lit = pixels * shade + (1 - share) * glow * (np.array(front, np.float32) * 0.75 + 40 - pixels * 0.5)
    return np.where(share > 0.5, pixels, lit)


def _painting(mask: Image.Image, front: Rgb, back: Rgb, rng: np.random.Generator) -> Pixels:
    """Visible brush strokes: blurred noise, stretched along one direction, and a ragged edge."""
    side = SIZE * _OVER
    wide = side * 3 // 2  # so that no corner is left bare when the strokes are turned
    noise = Image.fromarray(rng.normal(0, 1, (wide // 4, wide // 16)).astype(np.float32))
    strokes = noise.resize((wide, wide), Image.Resampling.BICUBIC)
    turned = strokes.rotate(float(rng.uniform(20, 70)), Image.Resampling.BILINEAR)
    margin = (wide - side) // 2
    texture: Pixels = np.asarray(turned.crop((margin, margin, margin + side, margin + side)))
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(1.5 * _OVER)), np.float32) / 255
    ragged = np.clip((soft + 0.18 * texture - 0.5) * 4 + 0.5, 0, 1)[..., None]
    pixels: Pixels = ragged * np.array(front, np.float32) + (1 - ragged) * np.array(back, np.float32)
    return pixels + 26 * texture[..., None]


def _photo(mask: Image.Image, front: Rgb, back: Rgb, rng: np.random.Generator) -> Pixels:
    """Lit from the upper left: a shaded body, a cast shadow, a vignette and a little grain."""
    side = SIZE * _OVER
    share = np.asarray(mask, np.float32)[..., None] / 255
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(5 * _OVER)), np.float32)[..., None] / 255
    light = _ramp(math.radians(225))[..., None]
    shine = soft**2 * (light > -0.2) * np.clip(light + 0.2, 0, 1)
    body: Pixels = np.array(front, np.float32) * (0.82 + 0.3 * light) + 45 * shine
    shift = 4 * _OVER
    shadow = np.roll(np.asarray(mask.filter(ImageFilter.GaussianBlur(3 * _OVER)), np.float32), (shift, shift), (0, 1))
    distance = np.sqrt(_ramp(0.0) ** 2 + _ramp(math.pi / 2) ** 2)[..., None]
    ground = np.array(back, np.float32) * (1.08 - 0.22 * distance**2) * (1 - 0.55 * shadow[..., None] / 255)
    grain = rng.normal(0, 5, (side, side, 1)).astype(np.float32)
    return share * body + (1 - share) * ground + grain


_RENDER = {"anime": _anime, "concept-art": _concept_art, "paintings": _painting, "photo": _photo}
