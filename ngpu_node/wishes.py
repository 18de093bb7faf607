"""Lists of wishes by several bootstraps of one service: which of two is the older one, and what becomes of it.

Owns the order alone; what a list means is `deployments`. Bootstraps on one database each tell their nodes what that
database says, and learn of each other's changes about a second late. So a list that one of them sends may be older than
another's that is here already, and would stop a workspace the other has just started. Each says as of when it knew
(`Desired.as_of_ms`); one that knew less waits `POSTPONED_S`, in which its bootstrap catches up and sends the next. If
none comes, it stands all the same: a clock that was set back, or a database that was restored, keeps no list away.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from ngpu_protocol.identity import Address

POSTPONED_S = 3.0
#: After this the other's list is no longer one that this one could not know yet.
RECENT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Taken:
    bootstrap: Address
    as_of_ms: int
    at_s: float


class WishOrder:
    """The last list taken of each service."""

    def __init__(self) -> None:
        self._last: dict[str, _Taken] = {}

    def wait_s(self, service: str, bootstrap: Address, as_of_ms: int, now_s: float) -> float:
        """Return how long a list of *bootstrap* shall wait; 0 when it counts at once."""
        last = self._last.get(service)
        if last is None or not as_of_ms or last.bootstrap == bootstrap or as_of_ms >= last.as_of_ms:
            return 0.0
        return POSTPONED_S if now_s - last.at_s < RECENT_S else 0.0

    def taken(self, service: str, bootstrap: Address, as_of_ms: int, now_s: float) -> None:
        """Note that a list of *bootstrap* counts from now on."""
        self._last[service] = _Taken(bootstrap, as_of_ms, now_s)
