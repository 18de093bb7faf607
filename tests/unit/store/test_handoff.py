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
from ngpu_bootstrap.store.handoff import POSTED_S, Handoff, Job


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
async def test_what_is_posted_travels_with_the_next_job_and_before_it() -> None:
    told: list[object] = []
    with serving() as server:
        server.handoff.post(Numbered(1), lambda result: told.append(result.unwrap()))
        server.handoff.post(Numbered(2))
        server.go.release()
        assert await server.handoff.submit(Numbered(3)) == 30
        assert server.batches == [[1, 2, 3]]
        assert told == [10]


@trio_test
async def test_what_is_posted_does_not_wait_for_company_for_ever() -> None:
    told = trio.Event()
    with serving() as server:
        server.go.release()
        await trio.sleep(5 * POSTED_S)  # the thread has gone to sleep without a limit
        server.handoff.post(Numbered(1), lambda result: told.set())
        with trio.fail_after(5):
            await told.wait()
        assert server.batches == [[1]]


@trio_test
async def test_more_posted_than_a_batch_holds_is_taken_in_several() -> None:
    done = trio.Event()
    with serving() as server:
        for number in range(9):
            server.handoff.post(Numbered(number), (lambda result: done.set()) if number == 8 else None)
        server.go.release(10)
        with trio.fail_after(5):
            await done.wait()
    assert server.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@trio_test
async def test_a_listener_that_fails_harms_nobody() -> None:
    def fail(result: object) -> None:
        raise ValueError("a bug")

    with serving() as server:
        server.handoff.post(Numbered(1), fail)
        server.go.release()
        assert await server.handoff.submit(Numbered(2)) == 20


@trio_test
async def test_closing_finishes_what_was_posted() -> None:
    with serving() as server:
        for number in range(6):
            server.handoff.post(Numbered(number))
    assert [number for batch in server.batches for number in batch] == list(range(6))


def test_a_lone_caller_is_served_at_once_and_company_waited_for() -> None:
    slept: list[float] = []

    async def make() -> Handoff[Numbered]:
        return Handoff(1000)

    handoff = trio.run(make)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ngpu_bootstrap.store.handoff.time.sleep", slept.append)
        for _ in range(20):
            handoff._queue.put(Numbered(1))
            assert len(handoff.take(4, linger_s=0.002) or []) == 1
        assert slept == []
        for _ in range(20):
            for number in range(4):
                handoff._queue.put(Numbered(number))
            assert len(handoff.take(4, linger_s=0.002) or []) == 4
        assert slept[-1] == 0.002
        for _ in range(40):
            handoff._queue.put(Numbered(1))
            handoff.take(4, linger_s=0.002)
        slept.clear()
        handoff._queue.put(Numbered(1))
        handoff.take(4, linger_s=0.002)
        assert slept == []


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
