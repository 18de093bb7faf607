"""Who may run a task again, and what the answers of two or three nodes mean. Pure.

A second node must have no reason to agree with the first: another owner, as far as one can tell (no wallet in common,
no public address in common). And it must be able to: the same revision, the same GPU models, since arithmetic in
floating point differs between models.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable

from ngpu_bootstrap.kinship import same_place, same_wallet
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address


class Outcome(enum.StrEnum):
    """What came of running a task again."""

    AGREED = "agreed"
    """The second node's answer is the first one's."""
    FIRST_LOST = "first_lost"
    """The third one's answer is the second one's."""
    SECOND_LOST = "second_lost"
    """The third one's answer is the first one's."""
    NOT_DETERMINISTIC = "not_deterministic"
    """Three different answers: the workspace is not what it says. Nobody loses."""
    UNDECIDED = "undecided"
    """Two different answers, and no third node to decide."""
    NO_SECOND = "no_second"
    """No node could run it again in time."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A node as far as running a task again goes.

    Attributes:
        ip, wallet: where it connects from and who is paid; empty where unknown.
        models: canonical names of the GPUs that the workspace has there.
        revision: of the workspace there.
    """

    node: Address
    ip: str
    wallet: str
    models: frozenset[str]
    revision: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node answered."""

    status: int
    hash: bytes


def may_judge(peers: Iterable[Peer], judged: Collection[Peer]) -> list[Peer]:
    """Return which of *peers* may run again what the *judged* ran, the first of which decides what is the same."""
    first = next(iter(judged))
    return [
        peer
        for peer in peers
        if (peer.revision, peer.models) == (first.revision, first.models)
        and not any(_is_akin(peer, other) for other in judged)
    ]


def decide(first: Answer, second: Answer, third: Answer | None) -> Outcome:
    """Return what the answers mean; *third* is None where there is none."""
    if first == second:
        return Outcome.AGREED
    if third is None:
        return Outcome.UNDECIDED
    if third == first:
        return Outcome.SECOND_LOST
    return Outcome.FIRST_LOST if third == second else Outcome.NOT_DETERMINISTIC


def _is_akin(one: Peer, other: Peer) -> bool:
    if one.node == other.node or same_wallet(one.wallet, other.wallet):
        return True
    return same_place(one.ip, other.ip, only_public=True)
