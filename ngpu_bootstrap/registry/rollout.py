"""A new revision, one node at a time: the pure decision which revision each node should run now.

The rule: one node gets the new revision, one that does not serve the old one if there is such a node; the next gets it
when it is ready there. Where no node serves the old one there is nothing to protect: once one has the new one ready,
all the others get it at once. A new revision that fails on any node ends the roll: every node gets the old one back,
and keeps it until another revision comes. A node that is away holds nobody up; it gets the new one when it is back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ngpu_protocol.control import DeploymentPhase, DeploymentState
from ngpu_protocol.identity import Address


@dataclass(frozen=True, slots=True)
class Place:
    """A node the workspace is assigned to.

    Attributes:
        told: the revision it was told to run.
        is_here: whether it is connected and has reported.
        states: its deployments of the workspace, by revision.
    """

    node: Address
    told: int
    is_here: bool
    states: Mapping[int, DeploymentState]

    def serves(self, revision: int) -> bool:
        state = self.states.get(revision)
        return self.is_here and state is not None and state.state == DeploymentPhase.READY


@dataclass(frozen=True, slots=True)
class Failure:
    """Where and why a new revision failed."""

    node: Address
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Step:
    """What each node should run now, and where that leaves the roll.

    Attributes:
        finished: every node that is here serves the new revision.
        failure: it is over, and every node goes back.
    """

    revisions: Mapping[Address, int]
    finished: bool = False
    failure: Failure | None = None


def step(places: Sequence[Place], *, base: int, target: int) -> Step:
    """Return the next step from *base*, the revision that serves, to *target*."""
    ordered = sorted(places, key=lambda place: (place.serves(base), place.node))
    for place in ordered:
        state = place.states.get(target)
        if place.is_here and place.told == target and state is not None and state.state == DeploymentPhase.FAILED:
            failure = Failure(place.node, state.reason or "failed", state.detail)
            return Step({place.node: base for place in places}, failure=failure)
    revisions = {place.node: place.told if place.told == target else base for place in ordered}
    here = [place for place in ordered if place.is_here]
    arrived = [place for place in here if place.told == target and place.serves(target)]
    if len(arrived) == len(here) and (here or not places):
        return Step({place.node: target for place in places}, finished=True)
    waiting = [place for place in here if revisions[place.node] != target]
    if arrived and not any(place.serves(base) for place in here):
        revisions |= {place.node: target for place in waiting}
    elif waiting and len(waiting) + len(arrived) == len(here):  # none is under way
        revisions[waiting[0].node] = target
    return Step(revisions)
