"""The pool alone: whatever is asked of it in whatever order, it keeps its bound and forgets no connection."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.http1.errors import PoolTimeoutError
from ngpu_protocol.http1.pool import Pool
from tests.support.virtual_clock import virtual_clock


def make(max_connections: int = 2, dead: set[int] | None = None, now: list[float] | None = None) -> Pool[int]:
    return Pool(
        max_connections=max_connections,
        max_idle_s=10,
        is_usable=lambda connection: connection not in (dead or ()),
        now=lambda: now[0] if now else 0.0,
    )


def test_last_used_connection_comes_first() -> None:
    pool = make()
    assert [pool.take(), pool.take(), pool.take()] == [(None, True), (None, True), (None, False)]
    pool.release(1)
    pool.release(2)
    assert pool.take() == (2, True)


def test_dead_and_expired_connections_are_handed_out_for_closing_only() -> None:
    dead, now = {2}, [0.0]
    pool = make(3, dead, now)
    for _ in range(3):
        pool.take()
    for connection in (1, 2, 3):
        pool.release(connection)
    now[0] = 5
    assert pool.take() == (3, True)
    assert pool.take() == (1, True)
    assert pool.dropped() == [2]
    assert pool.open == 2
    pool.release(1)
    now[0] = 16
    assert pool.dropped() == [1]
    assert pool.dropped() == []
    assert (pool.open, pool.idle) == (1, 0)


@virtual_clock
async def test_nobody_overtakes_who_waits() -> None:
    pool = make(1)
    pool.take()
    async with trio.open_nursery() as nursery:
        served: list[int | None] = []

        async def wait() -> None:
            served.append(await pool.wait(5))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.take() == (None, False)
        pool.release(7)
        assert pool.take() == (None, False), "it is promised already"
    assert served == [7]


@virtual_clock
async def test_waiter_cancelled_in_the_moment_it_is_served_passes_on() -> None:
    pool = make(1)
    pool.take()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.wait, 5)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            pool.release(7)
    assert pool.take() == (7, True)


@virtual_clock
async def test_waiter_gives_up() -> None:
    pool = make(1)
    pool.take()
    with pytest.raises(PoolTimeoutError):
        await pool.wait(5)
    assert trio.current_time() == 5
    pool.release(7)
    assert (pool.idle, pool.waiting) == (1, 0)


@given(bound=st.integers(1, 3), steps=st.lists(st.sampled_from(["use", "release", "forget", "die", "later", "sweep"])))
def test_count_of_open_connections_is_right_after_any_steps(bound: int, steps: list[str]) -> None:
    dead: set[int] = set()
    now = [0.0]
    pool = make(bound, dead, now)
    used: list[int] = []
    made = 0
    closed = 0
    for step in steps:
        if step == "use":
            connection, granted = pool.take()
            if connection is not None:
                assert connection not in dead
                used.append(connection)
            elif granted:
                made += 1
                used.append(made)
            else:
                assert len(used) == bound
        elif step == "release" and used:
            pool.release(used.pop())
        elif step == "forget" and used:
            used.pop()
            pool.forget()
            closed += 1
        elif step == "die":
            dead.update(range(1, made + 1, 2))
        elif step == "later":
            now[0] += 6
        elif step == "sweep":
            closed += len(pool.dropped())
        assert pool.open == len(used) + pool.idle <= bound
    closed += len(pool.clear())
    assert made == closed + len(used)
    assert pool.open == len(used)
