"""Which node runs an attempt: a pure choice among live candidates, with a reason for each that is passed over.

The rule: a candidate is excluded for the first reason that holds, in the order of `Exclusion`. Among the rest, one
with a free slot beats one without; then the lower share of slots in use wins; among near-equals (within
`NEAR_EQUAL` of the best share) chance decides, so that several bootstraps with the same second-old news do not herd
onto one node. Nothing here knows the network, the clock or randomness: `now` and the draw are arguments.

Slots in use are an estimate. This bootstrap knows its own running attempts exactly; what others run on the same node
is what the node's last heartbeat left over. A wrong guess costs one refusal, which is retried elsewhere at once.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence

from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address

SILENCE_LIMIT_MS = 5_000
NEAR_EQUAL = 0.1


class Exclusion(enum.StrEnum):
    """Why a candidate is passed over, most basic first."""

    NOT_ADMITTED = "not_admitted"
    SILENT = "silent"
    DRAINING = "draining"
    NOT_DEPLOYED = "not_deployed"
    WRONG_REVISION = "wrong_revision"
    NOT_READY = "not_ready"
    TRIED = "tried"
    NO_FREE_SLOT = "no_free_slot"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of one node for one workspace.

    Attributes:
        heard_at_ms: when the node last said anything.
        revision: of the deployment there; None when the workspace is not deployed on the node.
        capacity: tasks the deployment may run at once, by the workspace's declaration and the node's slots.
        in_use: of those, running or believed to run.
    """

    node: Address
    admitted: bool
    heard_at_ms: int
    draining: bool
    revision: int | None
    ready: bool
    capacity: int
    in_use: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The node to ask, or None with the reason each candidate was passed over.

    `waitable` says that at least one candidate serves the workspace and only lacks a free slot: waiting helps.
    `refusable` candidates were tried for this very task already.
    """

    node: Address | None
    excluded: dict[Address, Exclusion]
    waitable: bool


def choose(
    candidates: Sequence[Candidate],
    *,
    revision: int,
    now_ms: int,
    draw: float,
    tried: Collection[Address] = (),
) -> Choice:
    """Return the candidate to run the next attempt.

    Args:
        candidates: every node this bootstrap knows, in any order.
        revision: of the workspace as it is now; a deployment of another one does not run its tasks.
        draw: a number in [0, 1) that stands for chance among near-equals.
        tried: nodes that refused or failed this task already.
    """
    excluded: dict[Address, Exclusion] = {}
    eligible: list[Candidate] = []
    for candidate in candidates:
        reason = exclusion(candidate, revision=revision, now_ms=now_ms, tried=tried)
        if reason is None:
            eligible.append(candidate)
        else:
            excluded[candidate.node] = reason
    if not eligible:
        waitable = any(reason is Exclusion.NO_FREE_SLOT for reason in excluded.values())
        return Choice(None, excluded, waitable)
    if len(eligible) == 1:
        return Choice(eligible[0].node, excluded, True)
    best = min(_share(candidate) for candidate in eligible)
    near = sorted(
        (candidate.node for candidate in eligible if _share(candidate) <= best + NEAR_EQUAL),
    )
    return Choice(near[int(draw * len(near))], excluded, True)


def exclusion(candidate: Candidate, *, revision: int, now_ms: int, tried: Collection[Address] = ()) -> Exclusion | None:
    """Return the first reason to pass *candidate* over, or None when it may run the attempt now."""
    if not candidate.admitted:
        return Exclusion.NOT_ADMITTED
    if now_ms - candidate.heard_at_ms > SILENCE_LIMIT_MS:
        return Exclusion.SILENT
    if candidate.draining:
        return Exclusion.DRAINING
    if candidate.revision is None:
        return Exclusion.NOT_DEPLOYED
    if candidate.revision != revision:
        return Exclusion.WRONG_REVISION
    if not candidate.ready:
        return Exclusion.NOT_READY
    if candidate.node in tried:
        return Exclusion.TRIED
    if candidate.in_use >= candidate.capacity:
        return Exclusion.NO_FREE_SLOT
    return None


def _share(candidate: Candidate) -> float:
    return candidate.in_use / candidate.capacity
