"""How a client waits: pauses between polls and between tries, as pure sequences."""

from __future__ import annotations

from collections.abc import Iterator

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
TRIES = 4
"""How often a repeatable call is sent at all when connections break."""


def pauses(longest_s: float = LONGEST_PAUSE_S) -> Iterator[float]:
    """Yield how long to wait before each next look: short at first, since most tasks are, then longer, for ever."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(longest_s, pause_s * 1.5)


def receipt_pauses() -> Iterator[float]:
    """Yield pauses between looks for a receipt, which comes moments after the answer."""
    return pauses(0.5)
