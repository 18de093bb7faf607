"""A new revision, one node at a time."""

from __future__ import annotations

from ngpu_bootstrap.registry.rollout import Failure, Place, step
from ngpu_protocol.control import DeploymentState
from ngpu_protocol.identity import Address


def node(number: int) -> Address:
    return Address(f"0x{number:040x}")


def place(number: int, told: int = 1, *, here: bool = True, **states: str) -> Place:
    """Return a place whose revisions stand as in `r1="ready"`."""
    by_revision = {
        int(name[1:]): DeploymentState("7", int(name[1:]), state, "said so", reason="exited" * (state == "failed"))
        for name, state in states.items()
    }
    return Place(node(number), told, here, by_revision)


def told(*places: Place) -> list[int]:
    revisions = step(places, base=1, target=2).revisions
    return [revisions[one.node] for one in places]


def test_one_node_begins_and_the_next_follows_when_it_is_ready() -> None:
    old = [place(number, r1="ready") for number in (1, 2, 3)]
    assert told(*old) == [2, 1, 1]
    assert told(place(1, 2, r1="ready", r2="pulling"), *old[1:]) == [2, 1, 1]
    assert told(place(1, 2, r2="starting"), *old[1:]) == [2, 1, 1]
    assert told(place(1, 2, r2="unhealthy"), *old[1:]) == [2, 1, 1]
    assert told(place(1, 2, r1="ready", r2="ready"), *old[1:]) == [2, 2, 1]
    # the old one had to go first: it is still its turn
    assert told(place(1, 2, r2="ready"), place(2, 2, r2="starting"), old[2]) == [2, 2, 1]


def test_it_is_finished_when_every_node_that_is_here_serves_it() -> None:
    arrived = [place(1, 2, r2="ready"), place(2, 2, r2="ready")]
    assert step(arrived, base=1, target=2).finished
    assert step([*arrived, place(3, here=False)], base=1, target=2).finished
    assert step([], base=1, target=2).finished
    assert not step([place(1, here=False)], base=1, target=2).finished
    assert not step([*arrived, place(3, r1="ready")], base=1, target=2).finished


def test_a_node_that_does_not_serve_goes_first() -> None:
    assert told(place(1, r1="ready"), place(2, r1="unhealthy"), place(3, r1="ready")) == [1, 2, 1]


def test_where_nothing_serves_all_follow_the_first_that_does() -> None:
    assert told(place(1, r1="failed"), place(2), place(3, r1="pulling")) == [2, 1, 1]
    assert told(place(1, 2, r2="ready"), place(2), place(3, r1="pulling")) == [2, 2, 2]


def test_a_failure_on_one_node_of_three_ends_it_and_the_old_one_stays() -> None:
    places = [place(1, 2, r2="ready"), place(2, 2, r1="ready", r2="failed"), place(3, r1="ready")]
    ended = step(places, base=1, target=2)
    assert ended.failure == Failure(node(2), "exited", "said so")
    assert set(ended.revisions.values()) == {1}
    assert not ended.finished


def test_a_failure_of_the_old_one_or_of_a_node_that_was_not_told_ends_nothing() -> None:
    assert step([place(1, 2, r1="failed", r2="pulling"), place(2, r1="ready")], base=1, target=2).failure is None
    assert step([place(1, r2="failed"), place(2, r1="ready")], base=1, target=2).failure is None


def test_a_node_that_is_away_holds_nobody_up() -> None:
    away = place(1, 2, here=False, r2="pulling")
    assert told(away, place(2, r1="ready"), place(3, r1="ready")) == [2, 2, 1]
