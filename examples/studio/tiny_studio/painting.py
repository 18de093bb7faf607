"""Pictures in a style: from words, from another picture, or along another picture's contours.

The words and the seed choose the noise; the style chooses its contrast in each octave, its direction, and the colours
light turns into. `scale` is how far the words bend the picture away from the style's own ground.

Pure functions of values: the same wish in the same style is the same picture.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .edges import canny
from .styles import BANDS, Plane, Progress, Style, light_of

BLOCK = 32


@dataclass(frozen=True)
class Wish:
    """What is to be painted.

    Attributes:
        seed: 0 or more; with the words it decides every pixel.
        scale: 1 to 20: how much the words count beside the style.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    width: int = 512
    height: int = 512
    scale: int = 7


def paint(
    wish: Wish,
    style: Style,
    *,
    source: Plane | None = None,
    contours: bool = False,
    progress: Progress = lambda share: None,
) -> npt.NDArray[np.uint8]:
    """Return the picture, height by width by 3.

    Args:
        source: a picture of the wished size to begin with; None to begin with nothing.
        contours: take only the source's contours, and paint along them.
        progress: told the share done; what it raises ends the painting.
    """
    chance = np.random.default_rng(_entropy(wish))
    ground = _ground(wish, style, chance)
    progress(0.6)
    if source is None:
        picture = _coloured(ground, style)
    elif contours:
        picture = _drawn(_coloured(ground, style), canny(light_of(source)), style)
    else:
        share = wish.scale / 20
        light = (1 - 0.6 * share) * _ranked(light_of(source)) + 0.6 * share * ground
        picture = (1 - share) * 0.5 * source + (1 - 0.5 * (1 - share)) * _coloured(light.astype(np.float32), style)
    progress(1.0)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _ground(wish: Wish, style: Style, chance: np.random.Generator) -> Plane:
    """Return noise with the style's contrast in each octave, drawn out along its texture, as ranks from 0 to 1."""
    rows, columns = np.mgrid[0 : wish.height, 0 : wish.width].astype(np.float32) / min(wish.width, wish.height)
    cosine, sine = np.cos(style.angle), np.sin(style.angle)
    along, across = columns * cosine + rows * sine, rows * cosine - columns * sine
    stretch = 1 - 0.8 * style.coherence  # light changes along the axis: across it features grow long
    bend = np.float32(0.05 * wish.scale) * _noise(chance, rows, columns, 2.0)
    weights = np.maximum(style.bands, 1e-4) / max(float(style.bands.max()), 1e-4)
    total = np.zeros((wish.height, wish.width), dtype=np.float32)
    for band in range(BANDS):
        # an octave finer than two pixels shows nothing
        scale = 2.0 * 2**band
        if scale * 2 > min(wish.width, wish.height):
            break
        total += weights[band] * _noise(chance, across * stretch + bend, along + bend, scale)
    return _ranked(total)


def _ranked(light: Plane) -> Plane:
    """Return light stretched so that dark and light cover 0 to 1 evenly: shares of the palette then hold."""
    low, high = np.percentile(light, (1, 99))
    if high - low < 1e-6:
        return np.full(light.shape, 0.5, dtype=np.float32)
    edges = np.percentile(light, np.linspace(0, 100, 65))
    return np.interp(light, edges, np.linspace(0, 1, 65)).astype(np.float32)


def _coloured(light: Plane, style: Style) -> Plane:
    """Return each value of *light* as a colour: the style's colours cover their shares, blended where they meet."""
    shares = np.maximum(style.shares, 0.02)
    ends = np.cumsum(shares / shares.sum())
    middles = ends - shares / shares.sum() / 2
    parts = [np.interp(light, middles, style.palette[:, channel]) for channel in range(3)]
    return np.stack(parts, axis=-1).astype(np.float32)


def _noise(chance: np.random.Generator, rows: Plane, columns: Plane, scale: float) -> Plane:
    """Return value noise of mean 0: random numbers on a lattice, smoothly between them."""
    lattice = (chance.random((64, 64), dtype=np.float32) - np.float32(0.5)).ravel()
    noise = np.empty(rows.shape, dtype=np.float32)
    for top in range(0, len(rows), BLOCK):  # what is at hand at once stays in the processor's cache
        block = slice(top, top + BLOCK)
        noise[block] = _between(lattice, rows[block] * np.float32(scale), columns[block] * np.float32(scale))
    return noise


def _between(lattice: npt.NDArray[np.float32], down: Plane, across: Plane) -> Plane:
    """Return the values at these places of a *lattice* of 64 by 64, repeated without end."""
    whole_row, whole_column = np.floor(down), np.floor(across)
    part_row, part_column = _eased(down - whole_row), _eased(across - whole_column)
    low_row, low_column = whole_row.astype(np.intp), whole_column.astype(np.intp)
    first, second = (low_row & 63) << 6, ((low_row + 1) & 63) << 6
    left, right = low_column & 63, (low_column + 1) & 63
    upper, lower = lattice.take(first | left), lattice.take(second | left)
    upper += (lattice.take(first | right) - upper) * part_column
    lower += (lattice.take(second | right) - lower) * part_column
    return np.asarray(upper + (lower - upper) * part_row, dtype=np.float32)


def _eased(part: Plane) -> Plane:
    return part * part * (3 - 2 * part)


def _drawn(picture: Plane, lines: npt.NDArray[np.bool_], style: Style) -> Plane:
    """Return *picture* with *lines* drawn over it, dark where it is light and light where it is dark."""
    wide = np.pad(lines, 1).astype(np.float32)
    beside = np.maximum.reduce([wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]])
    cover = np.maximum(0.9 * wide[1:-1, 1:-1], 0.5 * beside)[..., None]
    is_dark = light_of(picture) < light_of(style.palette).mean()
    ink = np.where(is_dark[..., None], style.palette[-1], style.palette[0])
    return np.asarray(picture * (1 - cover) + ink * cover, dtype=np.float32)


def _entropy(wish: Wish) -> int:
    words = "\0".join((wish.prompt, wish.negative_prompt, str(wish.seed)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "big")
