"""When to dial again a peer that is to stay connected. (Who does it is the node's link: `ngpu_node.links`.)

The library's own auto-connector waits 60 s after a failure and dials whoever it knows; a node must come back to
exactly its bootstraps, soon, and not all nodes at the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BackOff"]


@dataclass(frozen=True, slots=True)
class BackOff:
    """How long to wait before the next attempt: pure.

    The n-th failure in a row is followed by ``initial_s * factor**(n - 1)`` seconds, at most *max_s*, of which a random
    share of up to *jitter* is taken off, so that peers that lost the same bootstrap do not come back together.

    Attributes:
        initial_s: after the first failure.
        factor: growth per failure, at least 1.
        max_s: the longest wait.
        jitter: 0 for none, 1 for anything between nothing and the whole wait.
        stable_s: a connection that lived this long wipes out the failures before it; a shorter one counts as one.
    """

    initial_s: float = 0.25
    factor: float = 2.0
    max_s: float = 15.0
    jitter: float = 0.5
    stable_s: float = 5.0

    def delay_s(self, failures: int, chance: float) -> float:
        """Return the wait after *failures* (at least 1) in a row; *chance* is random in [0, 1)."""
        exponent = min(failures - 1, 64)  # beyond any max_s, before floats overflow
        longest = min(self.max_s, self.initial_s * self.factor**exponent)
        return longest * (1.0 - self.jitter * chance)
