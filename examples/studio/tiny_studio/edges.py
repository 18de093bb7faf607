"""Contours of a picture: Canny's edge detector (IEEE PAMI 8(6), 1986), in NumPy.

Smooth, differentiate, keep only ridges of the gradient, then keep weak ridges that touch strong ones.
"""

import numpy as np
import numpy.typing as npt

from .styles import Plane, blurred

WEAK, STRONG = 0.08, 0.2  # of the steepest gradient there is


def canny(light: Plane) -> npt.NDArray[np.bool_]:
    """Return which pixels of *light* (height by width, 0 to 1) lie on a contour."""
    smooth = blurred(blurred(light))
    down, across = np.gradient(smooth)
    steepness = np.hypot(down, across)
    highest = float(steepness.max())
    if highest < 1e-3:  # a plain surface has noise and no contours
        return np.zeros(light.shape, dtype=np.bool_)
    ridge = _ridges(steepness, np.arctan2(down, across))
    return _connected(ridge & (steepness >= STRONG * highest), ridge & (steepness >= WEAK * highest))


def _ridges(steepness: Plane, angle: Plane) -> npt.NDArray[np.bool_]:
    """Return where *steepness* is highest along the gradient, which is taken in steps of 45 degrees."""
    wide = np.pad(steepness, 1)
    height, width = steepness.shape
    direction = np.round(angle / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(steepness.shape, dtype=np.bool_)
    for step, (row, column) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = wide[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        behind = wide[1 - row : 1 - row + height, 1 - column : 1 - column + width]
        ridge |= (direction == step) & (steepness >= ahead) & (steepness > behind)
    return ridge


def _connected(strong: npt.NDArray[np.bool_], weak: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return *strong* grown through *weak* over neighbours, diagonals included, until nothing is added."""
    while True:
        wide = np.pad(strong, 1)
        near = np.zeros_like(strong)
        for row in range(3):
            for column in range(3):
                near |= wide[row : row + strong.shape[0], column : column + strong.shape[1]]
        grown = strong | (near & weak)
        if (grown == strong).all():
            return strong
        strong = grown
