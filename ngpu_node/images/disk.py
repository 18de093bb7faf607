"""How much of the engine's disk is free, and how much an image will want of it.

An engine that is not on this machine has a disk this cannot see: `free` is None then, nothing is refused for want of
room, and the engine's own word (`no space left`) is what there is.
"""

from __future__ import annotations

import os
from collections.abc import Callable

FreeBytes = Callable[[], int | None]

UNPACKED_FACTOR = 2.0
"""Unpacked bytes for each compressed one, as assumed before a pull; programs come to 2 to 3, model weights to 1."""


def free_bytes_at(path: str) -> int | None:
    """Return what a user without privileges may still write below *path*; None when it is not here."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def room_for_pull(compressed: int) -> int:
    """Return the bytes a pull of *compressed* bytes takes at its height: what came, and what is unpacked of it."""
    return int(compressed * (1 + UNPACKED_FACTOR))


def room_for_archive(size: int) -> int:
    """Return the bytes loading a tar of *size* bytes takes at its height: unpacked in a corner, then as layers."""
    return 2 * size
