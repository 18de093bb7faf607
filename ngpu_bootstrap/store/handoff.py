"""Handing jobs from the trio thread to one service thread and waking their waiters, cheaply.

``trio.to_thread.run_sync`` costs a tenth of a millisecond a call and one wake-up each. Here a job costs one queue put,
and all waiters of a batch are woken by a single ``run_sync_soon``: at 64 waiters that is one pass through trio's loop
instead of 64.

Invariant: a job that entered the queue is done, whatever happens to its waiter. Cancelling the waiter only ends the
waiting.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import outcome
import trio

from ngpu_bootstrap.store.errors import StoreClosed


class Job:
    """One piece of work with its outcome; subclasses add what is to be done.

    The service thread sets *outcome*, the trio thread reads it.
    """

    __slots__ = ("outcome", "waiter")

    def __init__(self) -> None:
        self.waiter: trio.lowlevel.Task | None = None
        # an outcome can be unwrapped once only: never share one
        self.outcome: outcome.Value[Any] | outcome.Error = outcome.Value(None)


JobT = TypeVar("JobT", bound=Job)


class Handoff(Generic[JobT]):
    """A bounded queue between the trio run it was made in and one service thread.

    Args:
        capacity: Jobs queued or being worked on; beyond it ``submit`` waits and ``post`` refuses.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._token = trio.lowlevel.current_trio_token()
        self._room = trio.Semaphore(capacity)
        self._queue: queue.SimpleQueue[JobT | None] = queue.SimpleQueue()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Jobs queued or being worked on."""
        return self._capacity - self._room.value

    async def submit(self, job: JobT) -> Any:
        """Queue *job* and return its result, or raise what it raised.

        Cancellation before the job is queued leaves nothing behind; after that the job is done all the same and only
        its outcome is lost.

        Raises:
            StoreClosed: the job was not queued.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            await self._room.acquire()
        if self._closed:
            self._room.release()
            raise StoreClosed("the store is closed")
        job.waiter = trio.lowlevel.current_task()
        self._queue.put(job)

        def stop_waiting(_: object) -> trio.lowlevel.Abort:
            job.waiter = None
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(stop_waiting)

    def post(self, job: JobT) -> bool:
        """Queue *job* with nobody waiting for it; False when there is no room or the store is closed."""
        if self._closed:
            return False
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            return False
        self._queue.put(job)
        return True

    def close(self) -> None:
        """Refuse further jobs; those queued are still done, then ``take`` returns None."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    def take(self, limit: int, linger_s: float = 0.0) -> list[JobT] | None:
        """Return the next 1 to *limit* jobs in order of arrival, or None once closed and drained.

        Service thread only. Waits for the first; then takes what is queued, waiting for more until *linger_s* after the
        first (0: not at all).
        """
        first = self._queue.get()
        if first is None:
            return None
        jobs = [first]
        until = time.monotonic() + linger_s if linger_s > 0 else 0.0
        while len(jobs) < limit:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                wait_s = until - time.monotonic() if until else 0.0
                if wait_s <= 0:
                    break
                try:
                    job = self._queue.get(timeout=wait_s)
                except queue.Empty:
                    break
            if job is None:
                # nothing follows: leave the mark for the next call
                self._queue.put(None)
                break
            jobs.append(job)
        return jobs

    def deliver(self, jobs: Sequence[JobT]) -> None:
        """Wake the waiters of *jobs* with their outcomes. Service thread only; harmless after the trio run ended."""
        with suppress(trio.RunFinishedError):  # nobody is left to be told
            self._token.run_sync_soon(self._wake, jobs)

    def _wake(self, jobs: Sequence[JobT]) -> None:
        for job in jobs:
            self._room.release()
            if job.waiter is not None:
                waiter, job.waiter = job.waiter, None
                trio.lowlevel.reschedule(waiter, job.outcome)
