"""Places that many use: none takes them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, trio_test, wait_all_tasks_blocked

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.fair_share import may_take
from ngpu_bootstrap.front.places import Places
from ngpu_bootstrap.scheduling.waiting import Lines, Waiter


@given(st.integers(1, 300), st.integers(1, 20))
def test_however_many_take_all_they_may_another_finds_room(limit: int, greedy: int) -> None:
    own = [0] * greedy
    moved = True
    while moved:
        moved = False
        for one in range(greedy):
            if may_take(limit, sum(own), own[one]):
                own[one] += 1
                moved = True
    assert sum(own) <= limit
    if greedy < limit:
        assert may_take(limit, sum(own), 0)
        assert max(own) - min(own) <= 1
    assert sum(own) >= limit * greedy // (greedy + 1)  # and little lies idle


def test_a_workspaces_own_client_may_have_every_place_and_a_guest_what_it_leaves() -> None:
    def fill(caller: str) -> int:
        lines: Lines[str, int] = Lines()
        while lines.has_room(caller, 10):
            lines.join(Waiter(str(len(lines)), lambda slot: None, caller=caller))
        return len(lines)

    assert fill("") == 10
    assert fill("guest") == 5


# -- a declared route's places


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Crowd:
    """Callers of one route, and what becomes of their calls, named `<caller><number>`."""

    def __init__(self, nursery: trio.Nursery, places: Places) -> None:
        self.places = places
        self.running: list[str] = []
        self.refused: list[str] = []
        self._nursery = nursery
        self._leave: dict[str, trio.Event] = {}

    async def comes(self, *names: str) -> None:
        for name in names:
            self._leave[name] = trio.Event()
            self._nursery.start_soon(self._call, name)
            await wait_all_tasks_blocked()

    async def ends(self, name: str) -> None:
        self._leave[name].set()
        await wait_all_tasks_blocked()

    async def _call(self, name: str) -> None:
        try:
            async with self.places.one(name[0]):
                self.running.append(name)
                await self._leave[name].wait()
                self.running.remove(name)
        except NotServed as refusal:
            self.refused.append(name if refusal.headers["Retry-After"] == "10" else f"{name}: {refusal.headers}")


@asynccontextmanager
async def crowd(at_once: int, queue: int, wait_s: float = 60.0) -> AsyncIterator[Crowd]:
    async with trio.open_nursery() as nursery:
        one = Crowd(nursery, Places(at_once, queue, wait_s))
        yield one
        nursery.cancel_scope.cancel()
    assert (one.places.taken, one.places.waiting) == (0, 0)


@trio_test
async def test_calls_beyond_their_places_wait_in_turn_and_beyond_the_queue_they_are_refused(
    autojump_clock: MockClock,
) -> None:
    async with crowd(1, 2) as calls:
        await calls.comes("a1", "a2", "a3", "a4")
        assert (calls.running, calls.refused) == (["a1"], ["a4"]), "one that is alone may fill the queue"
        await calls.ends("a1")
        assert calls.running == ["a2"]
        await trio.sleep(61)
        assert calls.refused == ["a4", "a3"], "nobody waits for ever"


@trio_test
async def test_a_caller_that_fills_a_routes_queue_makes_room_for_another_and_they_go_by_turns(
    autojump_clock: MockClock,
) -> None:
    async with crowd(1, 4) as calls:
        await calls.comes("a1", "a2", "a3", "a4", "a5")
        await calls.comes("b1")
        assert calls.refused == ["a5"], "the newest of who has most there"
        await calls.comes("b2", "b3")
        assert calls.refused == ["a5", "a4", "b3"], "until all have the same"
        await calls.comes("c1", "c2")
        assert calls.refused[3:] == ["a3", "c2"], "nobody gives up what is not more than his share"
        went = []
        while calls.running:
            went += calls.running
            await calls.ends(calls.running[0])
        assert went == ["a1", "a2", "b1", "c1", "b2"]


@trio_test
async def test_a_call_that_leaves_the_queue_or_its_place_leaves_it_to_others(autojump_clock: MockClock) -> None:
    places = Places(1, 2, 60.0)
    async with trio.open_nursery() as nursery, places.one("a"):
        left = trio.CancelScope()

        async def call(scope: trio.CancelScope) -> None:
            with scope:
                async with places.one("b"):
                    await trio.sleep_forever()

        nursery.start_soon(call, left)
        nursery.start_soon(call, trio.CancelScope())
        await wait_all_tasks_blocked()
        assert places.waiting == 2
        left.cancel()
        await wait_all_tasks_blocked()
        assert (places.taken, places.waiting) == (1, 1)
        nursery.cancel_scope.cancel()
    assert (places.taken, places.waiting) == (0, 0)


@given(st.integers(0, 12), st.lists(st.sampled_from("abcd"), max_size=40))
def test_however_many_come_a_full_queue_is_shared_alike(queue: int, callers: list[str]) -> None:
    lines: Lines[str, bool] = Lines()
    waiting: Counter[str] = Counter()
    for number, caller in enumerate(callers):
        if len(lines) >= queue:
            last = lines.last_of_longest(caller)
            if last is None:
                assert waiting[caller] >= max(waiting.values(), default=0) - 1
                continue
            lines.leave(last)
            waiting[last.caller] -= 1
        lines.join(Waiter(str(number), lambda place: None, caller=caller))
        waiting[caller] += 1
        assert len(lines) == waiting.total() <= queue
