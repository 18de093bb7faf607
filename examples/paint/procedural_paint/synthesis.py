"""Pictures from words, by rule: no model, no training; the same words, seed and size are the same picture.

A prompt decides three things. Its colour words (`sunset`, `ocean`, `red` and so on) choose the palette, and where there
are none the hash of the whole prompt does. Its motif words (`sun`, `mountains`, `sea`, `stars`, `rings`) choose what is
drawn over the ground. The hash of prompt, negative prompt and seed chooses everything else. The ground is value noise,
bent by further noise; each step adds detail, so that more steps take longer and show it.

Pure functions of values; arrays are float32 in 0 to 1, height by width, or height by width by 3.
"""

import colorsys
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]
Progress = Callable[[float], None]

MAX_DETAIL = 7  # octaves of noise: beyond them a pixel shows nothing new

_PALETTES = {
    "sunset": ("#2b1055", "#7597de", "#ff6a88", "#ffb199", "#ffe29f"),
    "ocean": ("#03045e", "#0077b6", "#00b4d8", "#90e0ef", "#e8f9fd"),
    "forest": ("#081c15", "#1b4332", "#40916c", "#95d5b2", "#e9f5db"),
    "desert": ("#3d1f0d", "#a4562a", "#e09f3e", "#f2cc8f", "#fff3d6"),
    "night": ("#02030a", "#0b1a3a", "#1f3b73", "#5d7fb9", "#e6ecff"),
    "fire": ("#160000", "#6a040f", "#d00000", "#f48c06", "#ffe8a3"),
    "winter": ("#2b3a55", "#6d8fb3", "#b4cfe4", "#e3eef7", "#ffffff"),
    "red": ("#1a0003", "#5c0011", "#b3001b", "#ef4b5f", "#ffd9dd"),
    "green": ("#001a0a", "#00502b", "#0a8754", "#57c785", "#e0f8e6"),
    "blue": ("#00081f", "#012a6b", "#1f5fbf", "#6fa8f0", "#e2efff"),
    "gold": ("#1f1400", "#6b4a00", "#c08a00", "#f0c54a", "#fff5d6"),
    "purple": ("#14001f", "#3f0f6b", "#7c3aed", "#b794f4", "#f3e8ff"),
    "grey": ("#0b0b0c", "#3a3a3d", "#7a7a80", "#b9b9bf", "#f5f5f7"),
}
_ALSO = {"sea": "ocean", "dusk": "sunset", "dawn": "sunset", "snow": "winter", "ice": "winter", "gray": "grey"}
_MOTIFS = {
    "sun": "disc", "moon": "disc", "planet": "disc", "mountain": "ridges", "mountains": "ridges", "hills": "ridges",
    "sea": "waves", "ocean": "waves", "waves": "waves", "lake": "waves", "stars": "stars", "night": "stars",
    "galaxy": "stars", "rings": "rings", "ripples": "rings", "target": "rings",
}  # fmt: skip
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be painted.

    Attributes:
        seed: 0 to 2**63 - 1; with the words it decides every pixel.
        steps: 1 to 150: how much detail.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    width: int = 512
    height: int = 512
    steps: int = 20


def paint(wish: Wish, progress: Progress = lambda share: None) -> npt.NDArray[np.uint8]:
    """Return the picture, height by width by 3.

    Args:
        progress: told the share done, 0 to 1, after each part; what it raises ends the painting.
    """
    chance = np.random.default_rng(_entropy(wish))
    rows, columns = _grid(wish)
    scale = float(chance.uniform(2.5, 5.0))
    octaves = _octaves(wish.steps)
    bend = 0.35 + 0.5 * wish.steps / 150
    across = _noise(chance, rows, columns, scale, octaves)
    progress(0.25)
    down = _noise(chance, rows, columns, scale, octaves)
    progress(0.5)
    ground = _noise(chance, rows + bend * down, columns + bend * across, scale, octaves)
    progress(0.75)
    picture = _coloured(_stretched(ground), palette(wish))
    for motif in motifs(wish):
        picture = _DRAW[motif](picture, rows, columns, chance, palette(wish))
    progress(1.0)
    return _pixels(picture)


def repaint(
    image: npt.NDArray[np.uint8], wish: Wish, strength: float, progress: Progress = lambda share: None
) -> npt.NDArray[np.uint8]:
    """Return *image* (of the wished size) drawn anew: its light kept, its colours and contours moved to the wish's.

    Args:
        strength: 0 returns the image as it is, 1 leaves of it only where it was light and dark.
    """
    if strength <= 0:
        progress(1.0)
        return image.copy()
    chance = np.random.default_rng(_entropy(wish))
    rows, columns = _grid(wish)
    source = image.astype(np.float32) / 255
    reach = 0.06 * strength * min(wish.width, wish.height)
    octaves = _octaves(wish.steps)
    shift_down = (_noise(chance, rows, columns, 3.0, octaves) - 0.5) * 2 * reach
    progress(0.3)
    shift_across = (_noise(chance, rows, columns, 3.0, octaves) - 0.5) * 2 * reach
    progress(0.6)
    at_row = np.clip(np.arange(wish.height)[:, None] + shift_down, 0, wish.height - 1).astype(np.intp)
    at_column = np.clip(np.arange(wish.width)[None, :] + shift_across, 0, wish.width - 1).astype(np.intp)
    moved = source[at_row, at_column]
    light = moved @ np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
    drawn = _coloured(light, palette(wish))
    progress(1.0)
    return _pixels((1 - strength) * moved + strength * drawn)


def palette(wish: Wish) -> npt.NDArray[np.float32]:
    """Return five colours from dark to light: of the first colour word, or of the prompt's hash."""
    for word in _WORD.findall(wish.prompt.lower()):
        name = _ALSO.get(word, word)
        if name in _PALETTES and name not in _WORD.findall(wish.negative_prompt.lower()):
            return np.array([_rgb(colour) for colour in _PALETTES[name]], dtype=np.float32)
    hue = hashlib.sha256(wish.prompt.encode()).digest()[0] / 256
    steps = ((0.03, 0.8, 0.10), (0.0, 0.7, 0.28), (0.05, 0.65, 0.5), (0.1, 0.7, 0.72), (0.14, 0.8, 0.94))
    return np.array([colorsys.hls_to_rgb((hue + shift) % 1, light, much) for shift, much, light in steps], np.float32)


def motifs(wish: Wish) -> list[str]:
    """Return what the prompt's words ask for, each once, without what the negative prompt names."""
    unwanted = {_MOTIFS.get(word) for word in _WORD.findall(wish.negative_prompt.lower())}
    named = (_MOTIFS.get(word) for word in _WORD.findall(wish.prompt.lower()))
    # far before near: the sky, then what stands before it
    order = ("stars", "disc", "rings", "ridges", "waves")
    found = {motif for motif in named if motif is not None and motif not in unwanted}
    return sorted(found, key=order.index)


def _entropy(wish: Wish) -> int:
    words = "\0".join((wish.prompt, wish.negative_prompt, str(wish.seed)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "big")


def _octaves(steps: int) -> int:
    return min(MAX_DETAIL, 2 + steps // 8)


def _grid(wish: Wish) -> tuple[Plane, Plane]:
    """Return row and column coordinates; the shorter side runs from 0 to 1."""
    short = min(wish.width, wish.height)
    rows = np.arange(wish.height, dtype=np.float32)[:, None] / short
    columns = np.arange(wish.width, dtype=np.float32)[None, :] / short
    return np.broadcast_to(rows, (wish.height, wish.width)), np.broadcast_to(columns, (wish.height, wish.width))


def _noise(chance: np.random.Generator, rows: Plane, columns: Plane, scale: float, octaves: int) -> Plane:
    """Return value noise: random numbers on a lattice, smoothly between them, summed over finer and finer lattices."""
    total = np.zeros(np.broadcast_shapes(rows.shape, columns.shape), dtype=np.float32)
    weight, weights = 1.0, 0.0
    for _ in range(octaves):
        lattice = chance.random((64, 64), dtype=np.float32)
        total += weight * _between(lattice, rows * scale, columns * scale)
        weights += weight
        weight, scale = weight / 2, scale * 2
    return total / weights


def _between(lattice: Plane, rows: Plane, columns: Plane) -> Plane:
    low_row, low_column = np.floor(rows).astype(np.intp), np.floor(columns).astype(np.intp)
    down, across = _eased(rows - low_row), _eased(columns - low_column)
    here_row, next_row = low_row % 64, (low_row + 1) % 64
    here_column, next_column = low_column % 64, (low_column + 1) % 64
    upper = lattice[here_row, here_column] * (1 - across) + lattice[here_row, next_column] * across
    lower = lattice[next_row, here_column] * (1 - across) + lattice[next_row, next_column] * across
    return (upper * (1 - down) + lower * down).astype(np.float32)


def _eased(part: Plane) -> Plane:
    return part * part * (3 - 2 * part)


def _stretched(plane: Plane) -> Plane:
    low, high = float(plane.min()), float(plane.max())
    return (plane - low) / max(high - low, 1e-6)


def _coloured(light: Plane, colours: npt.NDArray[np.float32]) -> Plane:
    """Return each value of *light* as the colour at that place of the palette."""
    place = np.clip(light, 0, 1) * (len(colours) - 1)
    low = np.minimum(place.astype(np.intp), len(colours) - 2)
    part = (place - low)[..., None].astype(np.float32)
    return colours[low] * (1 - part) + colours[low + 1] * part


def _pixels(picture: Plane) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255


def _over(picture: Plane, cover: Plane, colour: npt.NDArray[np.float32]) -> Plane:
    return picture * (1 - cover[..., None]) + colour * cover[..., None]


def _disc(
    picture: Plane, rows: Plane, columns: Plane, chance: np.random.Generator, colours: npt.NDArray[np.float32]
) -> Plane:
    row, column = chance.uniform(0.2, 0.5), chance.uniform(0.25, 0.75) * float(columns.max())
    radius = chance.uniform(0.08, 0.18)
    distance = np.hypot(rows - row, columns - column)
    glow = np.clip(1 - (distance - radius) / (2 * radius), 0, 1) ** 2 * 0.6
    edge = np.clip((radius - distance) * 200, 0, 1)
    return _over(_over(picture, glow.astype(np.float32), colours[3]), edge.astype(np.float32), colours[4])


def _ridges(
    picture: Plane, rows: Plane, columns: Plane, chance: np.random.Generator, colours: npt.NDArray[np.float32]
) -> Plane:
    for layer, colour in enumerate((colours[2], colours[1], colours[0])):
        along = _noise(chance, np.zeros_like(columns[:1]), columns[:1], 3.0 + 2 * layer, 6)
        skyline = (0.45 + 0.17 * layer - 0.5 * (along - 0.35)) * float(rows.max())
        cover = np.clip((rows - skyline) * 150, 0, 1)
        picture = _over(picture, cover.astype(np.float32), colour)
    return picture


def _waves(
    picture: Plane, rows: Plane, columns: Plane, chance: np.random.Generator, colours: npt.NDArray[np.float32]
) -> Plane:
    shore = 0.62 * float(rows.max())
    depth = np.clip((rows - shore) / max(float(rows.max()) - shore, 1e-6), 0, 1)
    ripple = 0.5 + 0.5 * np.sin(2 * np.pi * (18 * depth**0.5 + 0.6 * _noise(chance, rows * 8, columns, 4.0, 3) * 4))
    sea = _coloured((0.25 + 0.45 * ripple * (1 - 0.6 * depth)).astype(np.float32), colours)
    cover = np.clip((rows - shore) * 300, 0, 1)[..., None]
    return picture * (1 - cover) + sea * cover


def _stars(
    picture: Plane, rows: Plane, columns: Plane, chance: np.random.Generator, colours: npt.NDArray[np.float32]
) -> Plane:
    dark = picture * 0.45
    sown = chance.random(rows.shape, dtype=np.float32)
    bright = np.clip((sown - 0.9975) / 0.0025, 0, 1)
    return _over(dark, bright, colours[4])


def _rings(
    picture: Plane, rows: Plane, columns: Plane, chance: np.random.Generator, colours: npt.NDArray[np.float32]
) -> Plane:
    row, column = float(rows.max()) / 2, float(columns.max()) / 2
    distance = np.hypot(rows - row, columns - column) * chance.uniform(12, 24)
    cover = np.clip(np.sin(2 * np.pi * distance) * 4, 0, 1) * np.clip(1.4 - distance / 12, 0, 0.85)
    return _over(picture, cover.astype(np.float32), colours[1])


_DRAW = {"disc": _disc, "ridges": _ridges, "waves": _waves, "stars": _stars, "rings": _rings}
