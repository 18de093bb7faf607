"""What a style is, and how one is learned from pictures.

A style is a palette and a texture:

- The *palette* is found by k-means on pixels in a perceptual space, one mini-batch of pixels after another (Sculley,
  Web-scale k-means clustering, WWW 2010): each centre is the running mean of the pixels nearest to it.
- The *texture* is how much contrast pictures have at each scale: the standard deviation of light in each band of a
  pyramid of box blurs, octave by octave, and in which direction light changes (the structure tensor's main axis and how
  clearly it prevails). Statistics of this kind are what texture synthesis matches (Heeger and Bergen, SIGGRAPH 1995).

Learning goes picture by picture, several rounds, and says after each how far it is. The same pictures in the same order
give the same style. Arrays of light and colour are float32 in 0 to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]
Progress = Callable[[float], None]

COLOURS = 6
BANDS = 6
ROUNDS = 4
PIXELS_A_ROUND = 4096
_LIGHT = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


@dataclass(frozen=True)
class Style:
    """A learned style.

    Attributes:
        palette: `COLOURS` by 3, from dark to light.
        shares: how much of the pictures each colour covers; sums to 1.
        bands: contrast of light in each octave, from coarse to fine.
        angle: direction in which light changes most, in radians from the columns' axis, -pi/2 to pi/2.
        coherence: how clearly that direction prevails, 0 (all alike) to 1 (stripes).
    """

    palette: Plane
    shares: Plane
    bands: Plane
    angle: float
    coherence: float

    def document(self) -> dict[str, Any]:
        """Return what is kept of it, as JSON has it."""
        return {
            "palette": [[round(float(part), 5) for part in colour] for colour in self.palette],
            "shares": [round(float(share), 5) for share in self.shares],
            "bands": [round(float(band), 6) for band in self.bands],
            "angle": round(self.angle, 5),
            "coherence": round(self.coherence, 5),
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Style":
        """Return the style that `document` returned."""
        return cls(
            palette=np.array(document["palette"], dtype=np.float32).reshape(COLOURS, 3),
            shares=np.array(document["shares"], dtype=np.float32).reshape(COLOURS),
            bands=np.array(document["bands"], dtype=np.float32).reshape(BANDS),
            angle=float(document["angle"]),
            coherence=float(document["coherence"]),
        )


def learn(pictures: Sequence[Callable[[], Plane]], *, seed: int = 0, progress: Progress = lambda share: None) -> Style:
    """Return the style of *pictures*.

    Args:
        pictures: each loads one picture, height by width by 3; one at a time is in memory.
        seed: decides which pixels are looked at.
        progress: told the share done, 0 to 1, after each picture of each round; what it raises ends the learning.
    """
    if not pictures:
        raise ValueError("a style is learned from at least one picture")
    chance = np.random.default_rng(seed)
    centres = _first_centres(pictures[0](), chance)
    seen = np.zeros(COLOURS, dtype=np.float64)
    bands = np.zeros(BANDS, dtype=np.float64)
    tensor = np.zeros(3, dtype=np.float64)
    for turn in range(ROUNDS):
        if turn == ROUNDS - 1:
            seen[:] = 0  # shares are counted with the centres where they came to rest
        for index, load in enumerate(pictures):
            picture = load()
            _pull(centres, seen, _some_pixels(picture, chance))
            if turn == 0:
                light = light_of(picture)
                bands += band_contrasts(light)
                tensor += structure(light)
            progress((turn * len(pictures) + index + 1) / (ROUNDS * len(pictures)))
    order = np.argsort(centres @ _LIGHT.astype(np.float64))
    counts = np.maximum(seen[order], 0)
    angle, coherence = _axis(tensor)
    return Style(
        palette=np.clip(centres[order], 0, 1).astype(np.float32),
        shares=(counts / max(counts.sum(), 1)).astype(np.float32),
        bands=(bands / len(pictures)).astype(np.float32),
        angle=angle,
        coherence=coherence,
    )


def light_of(picture: Plane) -> Plane:
    """Return the relative luminance of each pixel (Rec. 709 weights)."""
    return np.asarray(picture @ _LIGHT, dtype=np.float32)


def band_contrasts(light: Plane) -> npt.NDArray[np.float64]:
    """Return the standard deviation of light in each octave, from coarse to fine; 0 where a picture is too small."""
    found = np.zeros(BANDS, dtype=np.float64)
    here = light
    for band in reversed(range(BANDS)):
        if min(here.shape) < 4:
            break
        coarser = blurred(here)
        found[band] = float((here - coarser).std())
        here = coarser[::2, ::2]
    return found


def blurred(light: Plane) -> Plane:
    """Return *light* under the 3 by 3 binomial filter, edges repeated."""
    wide = np.pad(light, 1, mode="edge")
    across = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return np.asarray((across[:-2] + 2 * across[1:-1] + across[2:]) / 4, dtype=np.float32)


def structure(light: Plane) -> npt.NDArray[np.float64]:
    """Return the mean structure tensor of *light*: products of its derivatives, (across**2, across * down, down**2)."""
    smooth = blurred(light)
    down, across = np.gradient(smooth) if min(smooth.shape) > 1 else (smooth * 0, smooth * 0)
    return np.array([(across * across).mean(), (across * down).mean(), (down * down).mean()], dtype=np.float64)


def _axis(tensor: npt.NDArray[np.float64]) -> tuple[float, float]:
    across, mixed, down = (float(part) for part in tensor)
    total = across + down
    if total <= 1e-12:
        return 0.0, 0.0
    spread = float(np.hypot(across - down, 2 * mixed))
    return float(0.5 * np.arctan2(2 * mixed, across - down)), min(1.0, spread / total)


def _some_pixels(picture: Plane, chance: np.random.Generator) -> npt.NDArray[np.float64]:
    flat = picture.reshape(-1, 3)
    return flat[chance.integers(0, len(flat), PIXELS_A_ROUND)].astype(np.float64)


def _first_centres(picture: Plane, chance: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return centres far from one another (k-means++: each drawn by its squared distance to those before)."""
    pixels = _some_pixels(picture, chance)
    centres = [pixels[0]]
    for _ in range(COLOURS - 1):
        distance = np.min([((pixels - centre) ** 2).sum(axis=1) for centre in centres], axis=0) + 1e-9
        centres.append(pixels[chance.choice(len(pixels), p=distance / distance.sum())])
    return np.array(centres, dtype=np.float64)


def _pull(centres: npt.NDArray[np.float64], seen: npt.NDArray[np.float64], pixels: npt.NDArray[np.float64]) -> None:
    """Move each centre to the mean of its pixels so far, those of this batch included."""
    nearest = ((pixels[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2).argmin(axis=1)
    for index in range(len(centres)):
        mine = pixels[nearest == index]
        if len(mine):
            seen[index] += len(mine)
            centres[index] += (mine.mean(axis=0) - centres[index]) * (len(mine) / seen[index])
