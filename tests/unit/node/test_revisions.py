"""One revision after another on a node, with plain values."""

from __future__ import annotations

from ngpu_node.revisions import MakeRoom, RevisionState, Step, Stop, TakeBack, settle
from ngpu_protocol.control import DeploymentPhase as Phase


def old(
    revision: int = 1, phase: Phase = Phase.READY, *, served: bool = True, made_room: bool = False
) -> RevisionState:
    return RevisionState(revision, phase, is_wished=False, served=served, made_room=made_room)


def new(phase: Phase, revision: int = 2, *, would_fit_alone: bool = False) -> RevisionState:
    return RevisionState(revision, phase, is_wished=True, would_fit_alone=would_fit_alone)


def stops(steps: list[Step]) -> list[int]:
    assert all(isinstance(step, Stop) for step in steps)
    return [step.revision for step in steps]


def test_a_workspace_that_is_not_wished_stops_whole() -> None:
    assert stops(settle([old(1), old(2, Phase.FAILED)])) == [1, 2]


def test_the_old_one_serves_while_the_new_one_comes_up_and_goes_when_that_is_ready() -> None:
    for phase in (Phase.QUEUED, Phase.PULLING, Phase.STARTING, Phase.UNHEALTHY, Phase.FAILED):
        assert settle([old(), new(phase)]) == []
    assert stops(settle([old(), new(Phase.READY)])) == [1]


def test_going_back_to_an_earlier_revision_is_the_same() -> None:
    assert settle([old(5), new(Phase.STARTING, 4)]) == []
    assert stops(settle([old(5), new(Phase.READY, 4)])) == [5]


def test_of_several_old_ones_the_newest_that_served_is_kept() -> None:
    here = [old(1), old(2), old(3, Phase.FAILED, served=False), new(Phase.STARTING, 4)]
    assert stops(settle(here)) == [1, 3]


def test_one_that_never_served_is_not_kept() -> None:
    assert stops(settle([old(1, Phase.STARTING, served=False), new(Phase.QUEUED)])) == [1]


def test_the_old_one_makes_room_only_where_that_is_enough() -> None:
    assert settle([old(), new(Phase.QUEUED, would_fit_alone=True)]) == [MakeRoom(1, 2)]
    assert settle([old(), new(Phase.QUEUED)]) == []
    assert settle([old(1, Phase.QUEUED, made_room=True), new(Phase.QUEUED, would_fit_alone=True)]) == []


def test_one_that_made_room_comes_back_when_its_successor_failed() -> None:
    assert settle([old(1, Phase.QUEUED, made_room=True), new(Phase.FAILED)]) == [TakeBack(1)]
    assert settle([old(1, Phase.QUEUED, made_room=True), new(Phase.STARTING)]) == []
