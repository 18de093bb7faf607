"""Kademlia's iterative lookup: asking ever closer peers until the closest have answered.

The walk keeps a few questions under way, always to the nearest candidates not asked yet, and ends when the *width*
nearest that answer have answered. A candidate that is silent for *patience_s* no longer counts: another takes its
place at once, and the walk does not wait for it at the end. (The library asks in rounds, each as slow as its slowest
peer: one that hangs costs 10 s a round. Then it asks the 20 nearest a second time, for the value.)

Knows nothing of messages or streams: the caller's *ask* does the talking.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import trio

from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position

__all__ = ["CallFailed", "walk"]

MAX_CANDIDATES = 1024


class CallFailed(Exception):
    """A peer could not be asked, or gave no sensible answer."""


class _State(Enum):
    NEW = auto()
    ASKED = auto()
    SLOW = auto()
    ANSWERED = auto()
    FAILED = auto()


@dataclass(slots=True)
class _Candidate:
    peer: KadPeer
    distance: int
    state: _State = _State.NEW
    asked_s: float = 0.0


async def walk(
    target: int,
    start: Iterable[KadPeer],
    ask: Callable[[KadPeer], Awaitable[Sequence[KadPeer]]],
    *,
    own_id: bytes,
    width: int,
    parallel: int,
    patience_s: float,
    enough: Callable[[], bool] = lambda: False,
) -> list[KadPeer]:
    """Return up to *width* peers nearest to *target* that answered, the nearest first.

    Questions still under way at the end are cancelled. Bound the whole with a cancel scope.

    Args:
        start: candidates to begin with.
        ask: puts the question to one peer and returns the peers it names; raises `CallFailed`.
        own_id: never asked.
        enough: looked at after each answer; True ends the walk.
    """
    candidates: dict[bytes, _Candidate] = {}
    changed = trio.Event()

    def offer(peers: Iterable[KadPeer]) -> None:
        for peer in peers:
            if peer.id != own_id and peer.id not in candidates and len(candidates) < MAX_CANDIDATES:
                candidates[peer.id] = _Candidate(peer, kad_position(peer.id) ^ target)

    async def put(candidate: _Candidate) -> None:
        try:
            offer(await ask(candidate.peer))
            candidate.state = _State.ANSWERED
        except CallFailed:
            candidate.state = _State.FAILED
        changed.set()

    offer(start)
    async with trio.open_nursery() as nursery:
        while not enough():
            now_s = trio.current_time()
            asked = [candidate for candidate in candidates.values() if candidate.state is _State.ASKED]
            for candidate in asked:
                if now_s - candidate.asked_s >= patience_s:
                    candidate.state = _State.SLOW
            hopeful = [c for c in candidates.values() if c.state not in (_State.FAILED, _State.SLOW)]
            hopeful.sort(key=lambda candidate: candidate.distance)
            nearest = hopeful[:width]
            if all(candidate.state is _State.ANSWERED for candidate in nearest):
                break
            under_way = sum(candidate.state is _State.ASKED for candidate in hopeful)
            for candidate in nearest:
                if candidate.state is _State.NEW and under_way < parallel:
                    candidate.state, candidate.asked_s = _State.ASKED, now_s
                    under_way += 1
                    nursery.start_soon(put, candidate)
            waiting = [c.asked_s for c in hopeful if c.state is _State.ASKED]
            with trio.move_on_at(min(waiting) + patience_s):
                await changed.wait()
            changed = trio.Event()
        nursery.cancel_scope.cancel()
    answered = [candidate for candidate in candidates.values() if candidate.state is _State.ANSWERED]
    answered.sort(key=lambda candidate: candidate.distance)
    return [candidate.peer for candidate in answered[:width]]
