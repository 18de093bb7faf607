"""Where others reach this peer: found out by asking those it dialled, and by reserving places at relays.

The peers asked (a node's bootstraps) dial back where this one listens. If one gets through, the address stands in the
record and the peer serves the DHT. If they answer and none gets through, it is behind NAT or a firewall: it is a
client of the DHT, and reserves a place at each of them, so that anybody reaches it through them. If nobody answers,
it is a client too, and what it listens on is stated as a hint.

`addresses` the owner announces are believed as they are, and make the peer one that can be dialled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import structlog
import trio

from ngpu_daemon.interfaces import reachable_listeners
from ngpu_protocol.p2p import Host, P2PError, PeerDisconnected
from ngpu_protocol.p2p.autonat import ask_dialable
from ngpu_protocol.p2p.circuits import CIRCUIT, Circuits
from ngpu_protocol.p2p.identify import identify

__all__ = ["Reachability"]

log = structlog.get_logger(__name__)

CHECK_EVERY_S = 600.0
#: While nobody could be asked yet.
CHECK_SOON_S = 15.0
ASKED = 3
ASK_TIMEOUT_S = 15.0
RETRY_S = 1.0
MAX_RETRY_S = 300.0
MAX_RELAYS = 4
MAX_ADDRESSES_PER_RELAY = 2


@dataclass(slots=True)
class _Place:
    """A reservation, or why there is none.

    Attributes:
        due_s: when to ask (again), on trio's clock.
    """

    addresses: tuple[str, ...] = ()
    due_s: float = 0.0
    failures: int = 0
    problem: str = ""


class Reachability:
    """What is known of it; `run` keeps it true."""

    def __init__(
        self,
        host: Host,
        circuits: Circuits,
        *,
        helpers: Callable[[], Sequence[str]],
        announce: Sequence[str],
        serve: Literal["auto", "always", "never"],
        relays: bool,
        changed: Callable[[], None],
    ) -> None:
        """Tie the parts together.

        Args:
            helpers: returns PeerIds of those asked to dial back and to relay, if they are connected.
            announce: multiaddrs the owner says others reach this peer at.
            serve: whether to serve the DHT: if the peer can be dialled, or in any case, or never.
            relays: whether to reserve places where it cannot be dialled.
            changed: told when `addresses` or `is_server` are others.
        """
        self._host = host
        self._circuits = circuits
        self._helpers = helpers
        self._announce = tuple(text.partition("/p2p/")[0] for text in announce)
        self._serve = serve
        self._relays = relays
        self._changed = changed
        self._confirmed: tuple[str, ...] = ()
        self._places: dict[str, _Place] = {}
        self._news = trio.Event()
        self._checked_s = -math.inf
        self._checked_with: frozenset[str] = frozenset()
        self._told: object = None
        self.dialable: bool | None = True if announce else None

    @property
    def is_server(self) -> bool:
        """Whether this peer should keep and answer for the DHT."""
        return self._serve == "always" or (self._serve == "auto" and self.dialable is True)

    @property
    def direct(self) -> tuple[str, ...]:
        """Multiaddrs, without ``/p2p``, at which it is dialled."""
        if self._serve == "always" or self.dialable is None:
            return tuple(dict.fromkeys((*self._announce, *self._confirmed, *self._candidates())))
        if not self.dialable:
            return ()
        beside = self._candidates() if any(_is_loopback(text) for text in self._confirmed) else []
        return tuple(dict.fromkeys((*self._announce, *self._confirmed, *beside)))

    @property
    def relayed(self) -> tuple[str, ...]:
        """Multiaddrs through relays, ending in ``/p2p-circuit``."""
        return tuple(text for place in self._places.values() for text in place.addresses)

    @property
    def addresses(self) -> tuple[str, ...]:
        """All of them, the direct first."""
        return (*self.direct, *self.relayed)

    def describe(self) -> dict[str, object]:
        """Return how it stands, for the owner."""
        return {
            "dialable": self.dialable,
            "direct": list(self.direct),
            "relayed": list(self.relayed),
            "relay_problems": {peer: place.problem for peer, place in self._places.items() if place.problem},
        }

    def _candidates(self) -> list[str]:
        return reachable_listeners(self._host.addresses)

    async def run(self) -> NoReturn:
        """Find out, and keep places at relays, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while True:
                self._news = trio.Event()
                wait_s = await self._round()
                self._tell()
                with trio.move_on_after(wait_s):
                    await self._news.wait()
        raise AssertionError("it runs for ever")

    def look(self) -> None:
        """Look anew at who can be asked."""
        self._news.set()

    async def _watch(self) -> None:
        while True:
            async with self._host.events() as events:
                async for event in events:
                    if event.peer_id not in self._helpers():
                        continue
                    if isinstance(event, PeerDisconnected):
                        # What lies between may be another now: asked anew when it is back.
                        self._checked_with -= {event.peer_id}
                    self._news.set()
            await trio.sleep(1)  # this task fell behind: from the start, in a moment

    def _tell(self) -> None:
        now = (self.addresses, self.is_server)
        if now != self._told:
            self._told = now
            self._changed()

    async def _round(self) -> float:
        """Do what is due, and return for how long nothing more will be."""
        connected = [peer for peer in self._helpers() if self._host.is_directly_connected(peer)]
        for peer in [peer for peer in self._places if peer not in connected]:
            del self._places[peer]  # a reservation ends with the connection
            self._circuits.forget(peer)
        if not connected:
            return CHECK_EVERY_S
        every_s = CHECK_EVERY_S if self.dialable is not None else CHECK_SOON_S
        new = not frozenset(connected) <= self._checked_with
        if not self._announce and (new or trio.current_time() - self._checked_s >= every_s):
            await self._check(connected)
        if self.dialable is True or not self._relays:
            for peer in self._places:
                self._circuits.forget(peer)
            self._places.clear()
        else:
            await self._reserve(connected[:MAX_RELAYS])
        due_s = [place.due_s for place in self._places.values()]
        check_s = self._checked_s + every_s if not self._announce else math.inf
        return max(0.1, min(min([check_s, *due_s]) - trio.current_time(), CHECK_EVERY_S))

    # Can it be dialled?

    async def _check(self, connected: Sequence[str]) -> None:
        self._checked_s, self._checked_with = trio.current_time(), frozenset(connected)
        if not self._host.addresses:
            self.dialable = False
            return
        answers: list[str | None] = []
        for peer in connected[:ASKED]:
            try:
                answers.append(await self._ask(peer))
            except P2PError as error:
                log.debug("dial_back_not_offered", peer=peer, reason=str(error))
        before = (self.dialable, self._confirmed)
        if answers:
            self._confirmed = tuple(dict.fromkeys(answer for answer in answers if answer))
            self.dialable = bool(self._confirmed)
        if (self.dialable, self._confirmed) != before:
            log.info("reachability", dialable=self.dialable, at=list(self._confirmed), asked=len(answers))

    async def _ask(self, peer: str) -> str | None:
        candidates = self._candidates()
        said = await identify(self._host, peer, timeout_s=ASK_TIMEOUT_S)
        # As the peer sees us, with the ports listened on: what a forwarded port, or a host with a mapped address, has.
        seen = said.observed.split("/")
        if len(seen) > 2 and seen[1] in ("ip4", "ip6"):
            ports = {text.split("/")[4] for text in self._host.addresses if text.startswith(f"/{seen[1]}/")}
            candidates += [f"/{seen[1]}/{seen[2]}/tcp/{port}" for port in sorted(ports)]
        return await ask_dialable(self._host, peer, list(dict.fromkeys(candidates)), timeout_s=ASK_TIMEOUT_S)

    # Places at relays.

    async def _reserve(self, relays: Sequence[str]) -> None:
        for relay in relays:
            place = self._places.setdefault(relay, _Place())
            if place.due_s > trio.current_time():
                continue
            try:
                made = await self._circuits.reserve(relay)
            except P2PError as error:
                place.addresses, place.problem = (), str(error)
                place.failures += 1
                place.due_s = trio.current_time() + min(MAX_RETRY_S, RETRY_S * 2 ** min(place.failures - 1, 16))
                log.debug("relay_place_refused", relay=relay, reason=str(error), failures=place.failures)
                continue
            place.failures, place.problem = 0, ""
            place.due_s = trio.current_time() + made.lasts_s / 2
            # Where it was dialled works for one at least; what it states itself may work for others.
            dialled = self._host.dialled_at(relay)
            own = [f"{dialled}/p2p/{relay}{CIRCUIT}"] if dialled is not None else []
            place.addresses = tuple(dict.fromkeys((*own, *made.addresses)))[:MAX_ADDRESSES_PER_RELAY]


def _is_loopback(multiaddr: str) -> bool:
    return multiaddr.startswith(("/ip4/127.", "/ip6/::1/"))
