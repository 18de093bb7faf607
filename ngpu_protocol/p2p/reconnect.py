"""Staying connected to a peer, for ever.

The library's own auto-connector waits 60 s after a failure and dials whoever it knows; a node must come back to
exactly its bootstraps, soon, and not all nodes at the same moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import structlog
import trio

from ngpu_protocol.p2p.errors import BadMultiaddrError, DialError
from ngpu_protocol.p2p.events import PeerDisconnected
from ngpu_protocol.p2p.host import Host, parse_multiaddr

__all__ = ["BackOff", "keep_connected"]

_log = structlog.get_logger(__name__)


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


async def keep_connected(
    host: Host,
    addresses: str | Sequence[str] | Callable[[], Sequence[str]],
    *,
    back_off: BackOff | None = None,
    dial_timeout_s: float = 10.0,
    chance: Callable[[], float] = random.random,
) -> NoReturn:
    """Connect, wait until the connection is lost, connect again; until cancelled.

    Every round asks for the addresses anew when *addresses* is callable, and tries each of them in turn, so a peer
    that moved is found at its fresh address. They must all name one peer. Who came and went is told by
    `Host.events`; this logs the changes.

    Args:
        host: the host that dials.
        addresses: multiaddrs with ``/p2p/<PeerId>``.
        back_off: the waits; the default reaches 15 s after seven failures.
        dial_timeout_s: for one attempt at one address.
        chance: source of jitter, uniform in [0, 1).

    Raises:
        BadMultiaddrError: no address is given, or one is unusable: waiting would not mend it.
    """
    policy = back_off or BackOff()
    failures = 0
    while True:
        now = [addresses] if isinstance(addresses, str) else list(addresses() if callable(addresses) else addresses)
        if not now:
            raise BadMultiaddrError("", "no address to keep connected to")
        connected_at = trio.current_time()
        reason = await _connect_and_wait(host, now, dial_timeout_s)
        if trio.current_time() - connected_at >= policy.stable_s and not isinstance(reason, DialError):
            failures = 0
        failures += 1
        delay = policy.delay_s(failures, chance())
        if isinstance(reason, DialError):
            if failures & (failures - 1) == 0:  # the 1st, 2nd, 4th, 8th…: a peer away for a day is not 5,760 lines
                _log.info("peer_unreachable", multiaddr=reason.multiaddr, reason=reason.reason, attempts=failures)
        else:
            _log.info("peer_lost", peer=reason.peer_id, reason=reason.reason, retry_in_s=round(delay, 2))
        await trio.sleep(delay)


async def _connect_and_wait(host: Host, addresses: list[str], timeout_s: float) -> PeerDisconnected | DialError:
    """Return when the peer is gone, or with the last failure if no address works."""
    peers = {parse_multiaddr(address)[1].to_base58() for address in addresses}
    if len(peers) > 1:
        raise BadMultiaddrError(addresses[-1], "the addresses name different peers")
    async with host.events() as events:
        failure: DialError | None = None
        for address in addresses:
            try:
                peer_id = await host.connect(address, timeout_s=timeout_s)
                break
            except DialError as error:
                failure = error
        else:
            assert failure is not None
            return failure
        if not host.is_connected(peer_id):
            return PeerDisconnected(peer_id, None, "lost at once")
        async for event in events:
            if isinstance(event, PeerDisconnected) and event.peer_id == peer_id and not host.is_connected(peer_id):
                return event
    return PeerDisconnected(peer_id, None, "events overran" if host.is_connected(peer_id) else "lost")
