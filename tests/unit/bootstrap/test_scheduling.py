"""The choice of a node: every exclusion, the order of preference, and that capacity holds."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.scheduling import Candidate, Exclusion, choose, exclusion
from ngpu_protocol.identity import Address

NOW = 1_000_000


def node(number: int) -> Address:
    return Address(f"0x{number:040x}")


READY = Candidate(
    node=node(1), admitted=True, heard_at_ms=NOW, draining=False, revision=1, ready=True, capacity=4, in_use=0
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"admitted": False}, Exclusion.NOT_ADMITTED),
        ({"heard_at_ms": NOW - 5_001}, Exclusion.SILENT),
        ({"draining": True}, Exclusion.DRAINING),
        ({"revision": None}, Exclusion.NOT_DEPLOYED),
        ({"revision": 2}, Exclusion.WRONG_REVISION),
        ({"ready": False}, Exclusion.NOT_READY),
        ({"in_use": 4}, Exclusion.NO_FREE_SLOT),
        ({"capacity": 0}, Exclusion.NO_FREE_SLOT),
        ({"heard_at_ms": NOW - 5_000}, None),
        ({"in_use": 3}, None),
    ],
)
def test_each_exclusion_has_its_reason(change: dict[str, object], reason: Exclusion | None) -> None:
    candidate = dataclasses.replace(READY, **change)  # type: ignore[arg-type]
    assert exclusion(candidate, revision=1, now_ms=NOW) is reason


def test_a_node_tried_before_is_passed_over() -> None:
    choice = choose([READY], revision=1, now_ms=NOW, draw=0.0, tried={READY.node})
    assert choice.node is None
    assert choice.excluded == {READY.node: Exclusion.TRIED}
    assert not choice.waitable


def test_the_least_loaded_wins() -> None:
    busy = dataclasses.replace(READY, in_use=2)
    idle = dataclasses.replace(READY, node=node(2), in_use=1)
    for draw in (0.0, 0.5, 0.999):
        assert choose([busy, idle], revision=1, now_ms=NOW, draw=draw).node == idle.node


def test_chance_decides_among_near_equals_and_order_does_not() -> None:
    candidates = [dataclasses.replace(READY, node=node(number)) for number in range(4)]
    drawn = {choose(candidates, revision=1, now_ms=NOW, draw=draw).node for draw in (0.0, 0.3, 0.6, 0.9)}
    assert len(drawn) == 4
    for draw in (0.1, 0.7):
        assert choose(candidates, revision=1, now_ms=NOW, draw=draw) == choose(
            candidates[::-1], revision=1, now_ms=NOW, draw=draw
        )


def test_waiting_helps_only_where_a_slot_is_all_that_lacks() -> None:
    full = dataclasses.replace(READY, in_use=4)
    draining = dataclasses.replace(READY, draining=True)
    assert choose([full], revision=1, now_ms=NOW, draw=0).waitable
    assert not choose([draining], revision=1, now_ms=NOW, draw=0).waitable
    assert not choose([], revision=1, now_ms=NOW, draw=0).waitable


candidates_strategy = st.lists(
    st.builds(
        Candidate,
        node=st.integers(0, 50).map(node),
        admitted=st.booleans(),
        heard_at_ms=st.integers(NOW - 10_000, NOW),
        draining=st.booleans(),
        revision=st.sampled_from([None, 1, 2]),
        ready=st.booleans(),
        capacity=st.integers(0, 5),
        in_use=st.integers(0, 6),
    ),
    max_size=20,
    unique_by=lambda candidate: candidate.node,
)


@given(candidates_strategy, st.floats(0, 1, exclude_max=True))
def test_never_beyond_capacity_and_never_excluded_without_a_reason(candidates: list[Candidate], draw: float) -> None:
    choice = choose(candidates, revision=1, now_ms=NOW, draw=draw)
    by_node = {candidate.node: candidate for candidate in candidates}
    for address, reason in choice.excluded.items():
        assert exclusion(by_node[address], revision=1, now_ms=NOW) is reason
    eligible = set(by_node) - set(choice.excluded)
    if choice.node is None:
        assert not eligible
    else:
        assert choice.node in eligible
        assert by_node[choice.node].in_use < by_node[choice.node].capacity
