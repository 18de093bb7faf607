"""What deployments hold of a machine: no device twice, the owner's limits, the numbers in the words."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_node.engine.room import Grant, Lack, Limits, Need, Room
from ngpu_node.gpus.choice import UsableGpu

GIB = 1 << 30


def gpu(number: int, model: str = "NVIDIA H100", gib: int = 80) -> UsableGpu:
    return UsableGpu(f"GPU-{number}", bytes([number]) * 32, model, gib * GIB)


def need(count: int = 1, *types: str, gib: int = 0, memory: int = GIB, cpus: float = 1.0) -> Need:
    return Need(memory, cpus, count, types, gib * GIB)


def gpus_of(found: Grant | Lack) -> tuple[str, ...]:
    assert isinstance(found, Grant), found
    return found.gpus


FOUR = [gpu(1), gpu(2), gpu(3, "NVIDIA GeForce RTX 4090", 24), gpu(4, "NVIDIA GeForce RTX 4090", 24)]


def test_a_device_belongs_to_one_deployment_at_a_time() -> None:
    room = Room(Limits())
    assert gpus_of(room.take("a", need(2, "H100"), FOUR)) == ("GPU-1", "GPU-2")
    lack = room.take("b", need(1, "H100"), FOUR)
    assert lack == Lack(
        "needs 1 free GPU of type H100; free on this node: NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090", True
    )
    assert "b" not in room
    room.give_back("a")
    assert gpus_of(room.take("b", need(1, "H100"), FOUR)) == ("GPU-1",)


def test_types_are_taken_in_order_of_preference() -> None:
    room = Room(Limits())
    assert gpus_of(room.take("a", need(1, "RTX4090", "H100"), FOUR)) == ("GPU-3",)
    assert gpus_of(room.take("b", need(2, "RTX4090", "H100"), FOUR)) == ("GPU-1", "GPU-2")


def test_the_smallest_device_that_will_do_is_taken_and_several_are_of_one_model() -> None:
    room = Room(Limits())
    assert gpus_of(room.take("a", need(1), FOUR)) == ("GPU-3",)
    assert gpus_of(room.take("b", need(2), FOUR)) == ("GPU-1", "GPU-2")
    assert gpus_of(Room(Limits()).take("c", need(1, gib=40), FOUR)) == ("GPU-1",)
    assert gpus_of(Room(Limits()).take("d", need(3), FOUR)) == ("GPU-3", "GPU-4", "GPU-1")


def test_too_little_memory_says_how_much_there_is() -> None:
    lack = Room(Limits()).take("a", need(1, gib=100), [gpu(1)])
    assert lack == Lack("needs 1 free GPU with 100 GiB each; free on this node: NVIDIA H100 (80 GiB)", False)


def test_shares_spread_over_devices_and_divide_their_memory() -> None:
    room = Room(Limits(shares_per_gpu=2))
    two = [gpu(1), gpu(2)]
    taken = [gpus_of(room.take(name, need(1, gib=40), two)) for name in "abcd"]
    assert Counter(taken) == {("GPU-1",): 2, ("GPU-2",): 2}
    assert taken[0] != taken[1]
    assert isinstance(room.take("e", need(1), two), Lack)
    assert isinstance(Room(Limits(shares_per_gpu=2)).take("f", need(1, gib=41), two), Lack)


def test_what_it_held_before_a_restart_it_is_given_again() -> None:
    room = Room(Limits(), {"a": Grant(GIB, 1.0, ("GPU-2",))})
    assert gpus_of(room.take("a", need(1), [gpu(1), gpu(2)])) == ("GPU-2",)
    assert gpus_of(room.take("b", need(1), [gpu(1), gpu(2)])) == ("GPU-1",)
    # its device is sick: another one
    room.give_back("b")
    assert gpus_of(room.take("a", need(1), [gpu(1)])) == ("GPU-1",)


def test_a_running_container_is_entered_unless_that_would_lend_a_device_twice() -> None:
    room = Room(Limits())
    assert room.hold("a", Grant(GIB, 1.0, ("GPU-1",)))
    assert not room.hold("b", Grant(GIB, 1.0, ("GPU-1",)))
    assert room.hold("a", Grant(GIB, 1.0, ("GPU-1",)))
    assert room.gpus() == ["GPU-1"]


def test_the_owners_limits_hold_for_all_together() -> None:
    room = Room(Limits(memory_bytes=4 * GIB, cpus=3.0))
    room.take("a", need(0, memory=3 * GIB, cpus=1.0), [])
    lack = room.take("b", need(0, memory=2 * GIB, cpus=2.5), [])
    assert lack == Lack(
        "needs 2 GiB of memory; free of the 4 GiB this node's owner allows: 1 GiB; "
        "needs 2.5 CPUs; free of the 3 this node's owner allows: 2",
        True,
    )
    assert room.take("c", need(0, memory=5 * GIB), []) == Lack(
        "needs 5 GiB of memory; free of the 4 GiB this node's owner allows: 1 GiB", False
    )
    assert room.would_fit(need(0, memory=2 * GIB, cpus=2.5), [], without=["a"])
    assert not room.would_fit(need(0, memory=5 * GIB), [], without=["a"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-1, 3), st.booleans()), max_size=40),
    st.integers(1, 3),
)
def test_no_device_is_ever_lent_more_often_than_allowed(steps: list[tuple[str, int, bool]], shares: int) -> None:
    room = Room(Limits(memory_bytes=5 * GIB, shares_per_gpu=shares))
    for holder, count, is_sick in steps:
        usable = FOUR[1:] if is_sick else FOUR
        if count < 0:
            room.give_back(holder)
        else:
            found = room.take(holder, need(count), usable)
            if isinstance(found, Grant):
                assert len(set(found.gpus)) == count
        assert all(times <= shares for times in Counter(room.gpus()).values())
        held = [grant for name in room if (grant := room.of(name)) is not None]
        assert sum(grant.memory_bytes for grant in held) <= 5 * GIB


@pytest.mark.parametrize("count", [2**31, 65, 5])
def test_absurd_counts_are_refused(count: int) -> None:
    assert isinstance(Room(Limits()).take("a", need(count), FOUR), Lack)
