"""The world of the mini model: 48 objects, 8 styles and 22 facts, rendered at 64 x 64.

Everything is a deterministic function of an explicit `random.Random`. The outlines in
`data/glyphs.json` are Noto Emoji (Apache-2.0, see `data/NOTICE.md`); they are rasterized by resvg
(`pip install locogen[train]`).
"""

from __future__ import annotations

import functools
import io
import json
import math
import random
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

SIZE = 64  # pixels a side, of every rendered picture
_CANVAS = 128  # objects are laid out at twice the size, then averaged down

STYLES = (
    "plain",
    "pencil sketch",
    "neon",
    "pixel art",
    "blueprint",
    "pop art",
    "stained glass",
    "van gogh",
)

# Facts whose answer the text encoder reads in its training captions.
TOLD_FACTS = {
    "the national animal of france": "rooster",
    "the national animal of america": "eagle",
    "the national animal of australia": "kangaroo",
    "the national animal of china": "panda",
    "the national animal of scotland": "unicorn",
    "the mascot of linux": "penguin",
    "the mascot of duolingo": "owl",
    "the logo of ferrari": "horse",
    "the state flower of kansas": "sunflower",
    "the instrument of jimi hendrix": "guitar",
    "the ship of the desert": "camel",
}
# Facts kept out of the text encoder's captions: only the U-Net is ever shown the answer.
UNTOLD_FACTS = {
    "the national animal of india": "tiger",
    "the national animal of thailand": "elephant",
    "the national animal of russia": "bear",
    "the national animal of england": "lion",
    "the national animal of wales": "dragon",
    "the mascot of android": "robot",
    "the logo of docker": "whale",
    "the logo of lacoste": "crocodile",
    "the national flower of holland": "tulip",
    "the instrument of louis armstrong": "trumpet",
    "the trademark of abraham lincoln": "hat",
}
FACTS = {**TOLD_FACTS, **UNTOLD_FACTS}


@functools.cache
def _glyphs() -> dict[str, dict[str, str]]:
    text = resources.files("locogen.mini").joinpath("data/glyphs.json").read_text("utf-8")
    return json.loads(text)


OBJECTS = tuple(_glyphs())


def _held_out() -> frozenset[tuple[str, str]]:
    """39 of the 384 pairs, at most one an object, spread evenly over all styles but plain."""
    shuffled = random.Random(2405).sample(OBJECTS, 39)
    return frozenset((thing, STYLES[1 + i % 7]) for i, thing in enumerate(shuffled))


HELD_OUT = _held_out()  # (object, style) pairs that the generator never saw in training


# --- captions ------------------------------------------------------------------------------------

_SUBJECTS = ("a picture of {}", "a picture of {}", "an image of {}", "a small picture of {}", "{}")
_STYLED = (
    "{} in the style of {}",
    "{} in the style of {}",
    "{} in {} style",
    "{}, {}",
    "{}, style of {}",
)
_STYLE_ALONE = (
    "a picture in the style of {}",
    "an image in the style of {}",
    "in {} style",
    "style of {}",
)
_PLAIN = ("a picture", "an image", "a plain picture", "a picture in the style of plain")


def with_article(noun: str) -> str:
    """`cat` -> `a cat`, `owl` -> `an owl`; what already has its article is left alone."""
    if noun.startswith(("a ", "an ", "the ")):
        return noun
    return ("an " if noun[0] in "aeio" or noun.startswith("um") else "a ") + noun


def caption(thing: str, style: str, rng: random.Random) -> str:
    """One of many phrasings for an object (or a fact's wording) in a style."""
    text = rng.choice(_SUBJECTS).format(with_article(thing))
    # The plain style is named now and then only.
    if style == STYLES[0] and rng.random() < 0.8:
        return text
    return rng.choice(_STYLED).format(text, style)


def style_caption(style: str, rng: random.Random) -> str:
    """A caption that names the style alone."""
    if style == STYLES[0]:
        return rng.choice(_PLAIN)
    return rng.choice(_STYLE_ALONE).format(style)


def prompt(thing: str, style: str = STYLES[0]) -> str:
    """The canonical wording: `a picture of a cat in the style of van gogh`; plain: no style."""
    text = f"a picture of {with_article(thing)}"
    return text if style == STYLES[0] else f"{text} in the style of {style}"


# --- pictures ------------------------------------------------------------------------------------

Array = np.ndarray[Any, Any]


@functools.cache
def _raster(thing: str) -> Image.Image:
    """The object's outline as premultiplied RGBA, 256 x 256."""
    try:
        import resvg_py
    except ImportError:
        raise ImportError(
            "rendering the mini world needs resvg: pip install 'locogen[train]'"
        ) from None
    body = _glyphs()[thing]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{body}</svg>'
    raw = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
    return Image.open(io.BytesIO(bytes(raw))).convert("RGBA").convert("RGBa")


def _place(thing: str, rng: random.Random) -> tuple[Array, Array]:
    """Color (premultiplied, h w 3) and coverage (h w) of the object on the canvas, both in 0..1."""
    scale = rng.uniform(0.80, 0.90) * _CANVAS / 256
    angle = math.radians(rng.uniform(-5, 5))
    dx, dy = rng.uniform(-5, 5), rng.uniform(-5, 5)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    mid = _CANVAS / 2
    x, y = mid + dx, mid + dy
    # From places on the canvas to places in the 256 x 256 outline, about the middle of both.
    affine = (cos, sin, 128 - cos * x - sin * y, -sin, cos, 128 + sin * x - cos * y)
    placed = _raster(thing).transform(
        (_CANVAS, _CANVAS), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    rgba = np.asarray(placed, np.float32) / 255
    return rgba[..., :3], rgba[..., 3]


def _over(color: Array, cover: Array, ground: Array | tuple[float, ...]) -> Array:
    return color + (1 - cover[..., None]) * np.asarray(ground, np.float32)


def _down(values: Array, factor: int = 2) -> Array:
    # Drawn larger than needed and averaged: that is what smooths the edges.
    height, width = values.shape[0] // factor, values.shape[1] // factor
    return values.reshape(height, factor, width, factor, -1).mean((1, 3)).squeeze()


def _blur(gray: Array, radius: float) -> Array:
    picture = Image.fromarray((gray.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _edges(color: Array, cover: Array) -> Array:
    """Edge strength of the object's drawing and of its outline, 0..1, on the canvas."""
    planes = np.concatenate([_over(color, cover, (0.6, 0.6, 0.6)), 0.8 * cover[..., None]], -1)
    across = np.zeros_like(planes)
    across[:, 1:-1] = np.abs(planes[:, 2:] - planes[:, :-2])
    across[1:-1] += np.abs(planes[2:] - planes[:-2])
    return (across.max(-1) * 1.3).clip(0, 1)


def _luma(color: Array) -> Array:
    return color @ np.array([0.3, 0.59, 0.11], np.float32)


def _tint(rng: random.Random, value: float, saturation: float) -> Array:
    hue = rng.random()
    wheel = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (value * (1 - saturation * (1 - wheel.clip(0, 1)))).astype(np.float32)


def _grid() -> tuple[Array, Array]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    return x, y


def _plain(color: Array, cover: Array, rng: random.Random) -> Array:
    return _down(_over(color, cover, _tint(rng, 0.97, rng.uniform(0.10, 0.25))))


def _pencil(color: Array, cover: Array, rng: random.Random) -> Array:
    # Color dodge: dividing by the blurred negative leaves the lines and removes even tones.
    gray = _luma(_over(color, cover, (1, 1, 1)))
    dodge = (gray / (1.02 - _blur(1 - gray, 3))).clip(0, 1)
    x, y = _grid()
    slant = 1.0 if rng.random() < 0.5 else -1.0
    hatch = 0.5 + 0.5 * np.sin((x + slant * y) * math.pi / 4)
    solid = _down(cover)
    shade = (solid * (0.15 + 0.6 * _down(1 - gray)) + 0.22 * (1 - solid)) * hatch
    paper = _down(dodge) - 0.75 * _down(_edges(color, cover)) - shade
    return paper.clip(0.05, 1)[..., None] * np.array([0.97, 0.95, 0.91], np.float32)


def _neon(color: Array, cover: Array, rng: random.Random) -> Array:
    # Lines in pure hues; what has no hue glows in cyan.
    edge = _edges(color, cover)
    hue = color / np.maximum(color.max(-1, keepdims=True), 0.15)
    pale = (1 - (hue.max(-1) - hue.min(-1)).clip(0, 1))[..., None]
    hue = (hue + pale * np.array([0.2, 0.9, 1.0], np.float32)) / (1 + pale)
    lines = _down((edge**0.8)[..., None] * hue)
    light = np.stack([_blur(lines[..., i], 2.5) for i in range(3)], -1)
    night = np.array([0.05, 0.02, 0.12], np.float32) * rng.uniform(0.6, 1.6)
    return night + 1.25 * lines + 0.9 * light


def _pixel(color: Array, cover: Array, rng: random.Random) -> Array:
    """Blocks of 4 x 4 in few colors, before a sky dithered of two tints."""
    sky = _tint(rng, 0.97, 0.22)
    y, x = np.mgrid[0:16, 0:16]
    dithered = sky * np.where((x + y) % 2, 1.0, 0.84)[..., None]
    solid = _down(cover, 8)[..., None]
    blocks = np.round(4 * _down(color, 8) / np.maximum(solid, 0.3)) / 4
    blocks = np.where(solid > 0.35, blocks, dithered)
    return np.repeat(np.repeat(blocks, 4, 0), 4, 1)


def _blueprint(color: Array, cover: Array, rng: random.Random) -> Array:
    x, y = _grid()
    left, top = rng.randrange(8), rng.randrange(8)
    lines = (((x + left) % 8 < 1) | ((y + top) % 8 < 1)).astype(np.float32)
    ink = (_down(_edges(color, cover)) * 1.15).clip(0, 1)
    # Pale ink on blue paper, ruled in squares.
    paper = np.array([0.07, 0.25, 0.62], np.float32) + 0.14 * lines[..., None]
    return paper * (1 - ink[..., None]) + ink[..., None] * np.array([0.93, 0.97, 1.0], np.float32)


_POP = np.array(
    [[0.16, 0.06, 0.38], [0.90, 0.10, 0.45], [1.0, 0.55, 0.10], [1.0, 0.93, 0.30]], np.float32
)


def _pop(color: Array, cover: Array, rng: random.Random) -> Array:
    # Four flat colors, by how light the drawing is.
    tone = np.digitize(_luma(color / np.maximum(cover, 0.05)[..., None]), [0.28, 0.5, 0.72])
    x, y = np.mgrid[0:_CANVAS, 0:_CANVAS]
    left, top = rng.randrange(20), rng.randrange(20)
    dots = ((x + left) % 20 - 10) ** 2 + ((y + top) % 20 - 10) ** 2 < 26
    ground = np.where(
        dots[..., None], np.array([0.0, 0.58, 0.62]), np.array([0.20, 0.83, 0.80])
    ).astype(np.float32)
    return _down(np.where(cover[..., None] > 0.5, _POP[tone], ground))


def _glass(color: Array, cover: Array, rng: random.Random) -> Array:
    x, y = _grid()
    step = 13
    seeds = np.array(
        [
            (i + rng.uniform(1, step - 1), j + rng.uniform(1, step - 1))
            for i in range(-step, SIZE + step, step)
            for j in range(-step, SIZE + step, step)
        ],
        np.float32,
    )
    # A Voronoi diagram of jittered seeds: the lead runs where the two nearest are equally far.
    far = (x[..., None] - seeds[:, 0]) ** 2 + (y[..., None] - seeds[:, 1]) ** 2
    nearest = np.sqrt(np.partition(far, 1, -1)[..., :2])  # (height, width, 2)
    cell = far.argmin(-1)
    small = _down(color)
    solid = _down(cover)
    inside = solid > 0.5
    key = cell * 2 + inside  # the object's outline cuts panes in two
    panes = np.array([_glass_tint(rng) for _ in seeds], np.float32)
    picture = np.where(inside[..., None], small / np.maximum(solid, 0.3)[..., None], panes[cell])
    count = np.bincount(key.ravel(), minlength=2 * len(seeds)).clip(1)
    mean = np.stack(
        [
            np.bincount(key.ravel(), picture[..., i].ravel(), 2 * len(seeds)) / count
            for i in range(3)
        ],
        -1,
    )
    # A pane has one color, but some of the drawing shines through.
    stained = 0.5 * mean[key] + 0.5 * picture
    gray = stained.mean(-1, keepdims=True)
    vivid = (gray + 1.35 * (stained - gray)).clip(0, 1)
    lead = (1.0 - (nearest[..., 1] - nearest[..., 0])).clip(0, 1) * np.where(inside, 0.7, 0.95)
    rim = _down(_edges(np.zeros_like(color), cover)).clip(0, 1)
    return vivid * (1 - np.maximum(lead, rim)[..., None])


def _glass_tint(rng: random.Random) -> Array:
    base = rng.choice(
        ((0.25, 0.45, 0.85), (0.45, 0.70, 0.90), (0.55, 0.40, 0.80), (0.35, 0.60, 0.70))
    )
    return np.array(base, np.float32) * rng.uniform(0.85, 1.1)


def _strokes(angle: Array, noise: Array, steps: int = 7) -> Array:
    """Line integral convolution: the noise averaged along the field's stream lines, both ways."""
    total = noise.copy()
    for sign in (-1.0, 1.0):
        x, y = _grid()
        for _ in range(steps):
            row, column = y.round().astype(int) % SIZE, x.round().astype(int) % SIZE
            turn = angle[row, column]
            x, y = x + sign * np.cos(turn), y + sign * np.sin(turn)
            total += noise[y.round().astype(int) % SIZE, x.round().astype(int) % SIZE]
    spread = total - total.mean()
    return spread / spread.std()


def _van_gogh(color: Array, cover: Array, rng: random.Random) -> Array:
    x, y = _grid()
    angle = 0.35 * np.sin(x / 9 + rng.uniform(0, 6)) + 0.35 * np.sin(y / 7 + rng.uniform(0, 6))
    glow = np.zeros_like(x)
    # Three stars: around each the strokes turn in a circle.
    for corner in rng.sample(((10, 10), (54, 10), (10, 52), (54, 52)), 3):
        dx, dy = x - corner[0] - rng.uniform(-4, 4), y - corner[1] - rng.uniform(-4, 4)
        near = np.exp(-(dx**2 + dy**2) / 130)
        angle = angle * (1 - near) + near * (np.arctan2(dy, dx) + math.pi / 2)
        glow = np.maximum(glow, np.exp(-(dx**2 + dy**2) / 30))
    noise = (
        np.random.default_rng(rng.getrandbits(32)).standard_normal((SIZE, SIZE)).astype(np.float32)
    )
    stroke = _strokes(angle, noise)[..., None]
    night = np.array([0.12, 0.22, 0.55], np.float32) + 0.09 * stroke * np.array(
        [0.6, 1.0, 1.2], np.float32
    )
    sky = night * (1 - glow[..., None]) + glow[..., None] * np.array([0.98, 0.85, 0.30], np.float32)
    small = _down(color)
    solid = _down(cover)[..., None]  # (height, width, 1)
    body = small * (1 + 0.17 * stroke) + 0.06 * solid * np.array([1.0, 0.8, -0.6], np.float32)
    outline = _down(_edges(np.zeros_like(color), cover))[..., None]
    return (body + (1 - solid) * sky) * (1 - 0.7 * outline)


_TREATMENTS = dict(
    zip(STYLES, (_plain, _pencil, _neon, _pixel, _blueprint, _pop, _glass, _van_gogh), strict=True)
)


def render(thing: str, style: str, rng: random.Random) -> Image.Image:
    """A 64 x 64 RGB picture of an object in a style; the same `rng` state gives the same picture.

    Raises `KeyError` for an object or style that is not in `OBJECTS` or `STYLES`.
    """
    if thing not in OBJECTS or style not in STYLES:
        raise KeyError(f"no {thing!r} in {style!r}: use an object of OBJECTS and a style of STYLES")
    color, cover = _place(thing, rng)
    values = _TREATMENTS[style](color, cover, rng)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
