"""A choice explained afterwards: every candidate, why it was passed over, and what it was thought to take.

A choice notes what it compared, by reference, which costs next to nothing. All candidates are photographed now and then
while tasks are placed (`Pool.photograph`), and an explanation joins the choice's own figures with the nearest one.
The log keeps the last `LIMIT` placements in memory; writing each with its task would cost every call what few read.
What shall outlive the daemon is taken from it now and then (`due`), in a form that is bounded however many candidates
there were (`pack`). Pure.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field

from ngpu_bootstrap.scheduling.pool import Captured, Choice, Pool
from ngpu_bootstrap.scheduling.reasons import Exclusion
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address

LIMIT = 4096
LASTING = 1024
PASSING = 32
"""Placements that wait to be written at most, those somebody may well ask for later and others; no more are written."""
PACKED_CANDIDATES = 64
"""Candidates named in a packed placement; the others are counted by reason."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node as a choice saw it.

    Attributes:
        excluded: why it was passed over; None for one that could have been chosen.
        rank: place of its GPUs in the client's order.
        expected_s: expected finish, handicapped by failures and standing; the least is the best.
        compared: whether it was among those drawn.
    """

    node: Address
    excluded: str | None
    rank: int
    slots: int
    in_use: int
    expected_s: float
    compared: bool


@dataclass(frozen=True, slots=True)
class Placement:
    """Why an attempt went where it did.

    Attributes:
        why: `ranked`, `only_one` with a free slot among those drawn, `affinity`, or `all_set_aside`.
        candidates_at_ms: when the candidates that were not compared stood so; None when that is no longer known, and
            only those compared are listed.
        left_out: how many more there were, by why they were passed over (empty: they could have been chosen).
    """

    attempt: int
    node: Address
    at_ms: int
    why: str
    candidates_at_ms: int | None
    candidates: Sequence[Candidate]
    left_out: Mapping[str, int] = field(default_factory=dict)


class PlacementLog:
    """The last placements."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._noted: deque[tuple[str, int, Choice]] = deque(maxlen=limit)
        self._lasting: deque[tuple[str, int, Choice]] = deque()
        self._passing: deque[tuple[str, int, Choice]] = deque()

    def note(self, task_id: str, attempt: int, choice: Choice, *, lasting: bool) -> None:
        """Keep that *attempt* went where *choice* says; *lasting*: to be written in any case."""
        noted = (task_id, attempt, choice)
        self._noted.append(noted)
        waiting, most = (self._lasting, LASTING) if lasting else (self._passing, PASSING)
        if len(waiting) < most:
            waiting.append(noted)

    def due(self, before_ms: int) -> Iterator[tuple[str, Placement]]:
        """Yield what is to be written of the placements before *before_ms*, each once: task id and placement."""
        for waiting in (self._lasting, self._passing):
            while waiting and waiting[0][2].at_ms < before_ms:
                task_id, attempt, choice = waiting.popleft()
                yield task_id, explained(attempt, choice)

    def of(self, task_id: str) -> list[Placement]:
        """Return what is kept of a task's placements, first attempt first."""
        return [explained(attempt, choice) for noted, attempt, choice in self._noted if noted == task_id]


def pack(placement: Placement) -> str:
    """Return *placement* for the store: at most `PACKED_CANDIDATES` named, those compared before the others."""
    named = placement.candidates[:PACKED_CANDIDATES]
    left_out = Counter(placement.left_out)
    left_out.update(one.excluded or "" for one in placement.candidates[PACKED_CANDIDATES:])
    return json.dumps(
        {
            "node": placement.node,
            "at_ms": placement.at_ms,
            "why": placement.why,
            "candidates_at_ms": placement.candidates_at_ms,
            "candidates": [
                (one.node, one.excluded or "", one.rank, one.slots, one.in_use, one.expected_s, one.compared)
                for one in named
            ],
            "left_out": left_out,
        },
        separators=(",", ":"),
    )


def unpack(attempt: int, packed: str) -> Placement:
    """Return what was packed."""
    values = json.loads(packed)
    return Placement(
        attempt=attempt,
        node=Address(values["node"]),
        at_ms=values["at_ms"],
        why=values["why"],
        candidates_at_ms=values["candidates_at_ms"],
        candidates=[
            Candidate(Address(node), excluded or None, rank, slots, in_use, expected_s, compared)
            for node, excluded, rank, slots, in_use, expected_s, compared in values["candidates"]
        ],
        left_out=values["left_out"],
    )


def explained(attempt: int, choice: Choice) -> Placement:
    """Return *choice* in full."""
    pool = choice.entry.pool
    others, at_ms = _everyone(choice, pool)
    tried = {host.node for host in choice.tried}
    found: dict[Address, Candidate] = {}
    for node, reason, rank, slots, in_use, expected_s in others:
        if reason is None:
            reason = Exclusion.TRIED if node in tried else Exclusion.NO_FREE_SLOT if in_use >= slots else None
        found[node] = Candidate(node, reason, rank, slots, in_use, expected_s, compared=False)
    for expected_s, entry, share in choice.seen:
        slots = entry.room.slots
        in_use = round(share * slots)
        found[entry.load.node] = Candidate(entry.load.node, None, entry.rank, slots, in_use, expected_s, compared=True)
    chosen = choice.entry.load.node
    candidates = sorted(
        found.values(), key=lambda one: (one.node != chosen, not one.compared, one.excluded or "", one.rank, one.node)
    )
    return Placement(attempt, chosen, choice.at_ms, choice.why, at_ms, candidates)


def _everyone(choice: Choice, pool: Pool) -> tuple[Sequence[Captured], int | None]:
    """Return the candidates as the photograph before the choice has them, or the one after if that is nearer."""
    around = [one for one in pool.photographs if choice.photograph <= one.number <= choice.photograph + 1]
    if not around:
        return (), None
    nearest = min(around, key=lambda one: abs(one.at_ms - choice.at_ms))
    return nearest.candidates, nearest.at_ms
