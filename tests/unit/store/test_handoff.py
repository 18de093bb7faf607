"""Handing jobs to a thread: order, waking, cancellation, bounds, closing. The thread here is the test's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import outcome
import pytest
import trio
from trio.testing import trio_test, wait_all_tasks_blocked

from ngpu_bootstrap.store.errors import StoreClosed
from ngpu_bootstrap.store.handoff import Handoff, Job


class Numbered(Job):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Server:
    """Takes batches when told to, and answers each job with ten times its number."""

    def __init__(self, handoff: Handoff[Numbered]) -> None:
        self.handoff = handoff
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            self.go.acquire()
            batch = self.handoff.take(4)
            if batch is None:
                return
            self.batches.append([job.number for job in batch])
            for job in batch:
                job.outcome = outcome.Value(job.number * 10)
            self.handoff.deliver(batch)


@contextmanager
def serving(capacity: int = 100) -> Iterator[Server]:
    server = Server(Handoff(capacity))
    server.thread.start()
    try:
        yield server
    finally:
        server.handoff.close()
        for _ in range(100):
            server.go.release()
        server.thread.join()


@trio_test
async def test_jobs_are_taken_in_order_and_in_batches() -> None:
    results: dict[int, object] = {}

    async def ask(number: int) -> None:
        results[number] = await server.handoff.submit(Numbered(number))

    with serving() as server:
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(ask, number)
                await wait_all_tasks_blocked()
            server.go.release(2)
        assert server.batches == [[0, 1, 2, 3], [4, 5]]
    assert results == {number: number * 10 for number in range(6)}


@trio_test
async def test_a_caller_cancelled_before_it_queued_leaves_nothing() -> None:
    with serving() as server:
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.handoff.submit(Numbered(1))
        assert scope.cancelled_caught
        server.go.release()
        assert await server.handoff.submit(Numbered(2)) == 20
        assert server.batches == [[2]]


@trio_test
async def test_a_cancelled_waiter_does_not_take_its_job_back() -> None:
    with serving() as server:
        with trio.move_on_after(0.01) as scope:
            await server.handoff.submit(Numbered(1))
        assert scope.cancelled_caught
        server.go.release()
        assert await server.handoff.submit(Numbered(2)) == 20
        assert server.batches == [[1, 2]]


@trio_test
async def test_beyond_its_capacity_callers_wait_and_notes_are_refused() -> None:
    done = []

    async def ask(number: int) -> None:
        done.append(await server.handoff.submit(Numbered(number)))

    with serving(capacity=2) as server:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, number)
                await wait_all_tasks_blocked()
            assert server.handoff.post(Numbered(9)) is False
            server.go.release()
            await wait_all_tasks_blocked(0.02)
            assert sorted(done) == [0, 10]
            assert server.batches == [[0, 1]]
            server.go.release()
        assert sorted(done) == [0, 10, 20]


@trio_test
async def test_a_caller_waiting_for_room_can_be_cancelled() -> None:
    with serving(capacity=1) as server:
        assert server.handoff.post(Numbered(1))
        with trio.move_on_after(0.01) as scope:
            await server.handoff.submit(Numbered(2))
        assert scope.cancelled_caught
        server.go.release(2)
        assert await server.handoff.submit(Numbered(3)) == 30
        assert [number for batch in server.batches for number in batch] == [1, 3]


@trio_test
async def test_closing_refuses_new_jobs_and_finishes_the_queued() -> None:
    results = []

    async def ask() -> None:
        results.append(await server.handoff.submit(Numbered(1)))

    with serving() as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            server.handoff.close()
            with pytest.raises(StoreClosed):
                await server.handoff.submit(Numbered(2))
            assert server.handoff.post(Numbered(3)) is False
            server.go.release()
    assert results == [10]


@trio_test
async def test_callers_waiting_for_room_when_it_closes_are_told() -> None:
    async def ask() -> None:
        with pytest.raises(StoreClosed):
            await server.handoff.submit(Numbered(2))

    with serving(capacity=1) as server:
        server.handoff.post(Numbered(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            server.handoff.close()
            server.go.release(2)
    assert server.batches == [[1]]


def test_delivering_after_the_run_ended_is_harmless() -> None:
    async def make() -> Handoff[Numbered]:
        handoff: Handoff[Numbered] = Handoff(1)
        assert handoff.post(Numbered(1))
        return handoff

    handoff = trio.run(make)
    batch = handoff.take(1)
    assert batch is not None
    handoff.deliver(batch)
