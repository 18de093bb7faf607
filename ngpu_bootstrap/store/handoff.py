"""Handing jobs from the trio thread to one service thread and waking their waiters, cheaply; or to nobody, where the
loop may serve them itself (`serve_here`).

``trio.to_thread.run_sync`` costs a tenth of a millisecond a call and one wake-up each. Here a job costs one queue put,
and all waiters of a batch are woken by a single ``run_sync_soon``: at 64 waiters that is one pass through trio's loop
instead of 64.

What nobody waits for is posted: it travels with the next job that somebody waits for, or alone once it is ``POSTED_S``
old. A batch costs the same for one job as for many, so under load what is posted is nearly free.

Invariant: a job that entered the queue is done, whatever happens to its waiter. Cancelling the waiter only ends the
waiting.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import outcome
import structlog
import trio

from ngpu_bootstrap.store.errors import StoreClosed
from ngpu_daemon.turn_commits import TurnCommits

POSTED_S = 0.01
_COMPANY = 1.4

_log = structlog.get_logger(__name__)

Told = Callable[[outcome.Value[Any] | outcome.Error], None]


class Job:
    """One piece of work with its outcome; subclasses add what is to be done.

    Whoever serves it sets *outcome*, the trio thread reads it once it is *done*.
    """

    __slots__ = ("done", "outcome", "tell", "waiter")

    def __init__(self) -> None:
        self.done = False
        self.waiter: trio.lowlevel.Task | None = None
        self.tell: Told | None = None
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
        # a semaphore in two fields: trio's own takes five times as long, twice for each job
        self._room = capacity
        self._no_room = trio.lowlevel.ParkingLot()
        self._queue: queue.SimpleQueue[JobT | None] = queue.SimpleQueue()
        self._posted: deque[JobT] = deque()
        self._asleep = False
        self._company = 1.0  # jobs that somebody waited for in a batch, on a moving average
        self._closed = False
        self._turns: TurnCommits[JobT] | None = None
        self._in_thread = 0

    def serve_here(self, serve: Callable[[Sequence[JobT]], None]) -> None:
        """Let trio's loop call *serve* for what is gathered in a turn, as long as that is quick and the thread idle.

        *serve* sets each job's outcome and never raises.
        """

        def served(jobs: list[JobT]) -> None:
            if self._in_thread:  # given work since these were gathered, and two must not write at once
                self._in_thread += len(jobs)
                for job in jobs:
                    self._queue.put(job)
                return
            serve(jobs)
            self._wake(jobs)

        self._turns = TurnCommits(served, lazy_s=POSTED_S)

    @property
    def waiting(self) -> int:
        """Jobs queued or being worked on."""
        return self._capacity - self._room

    async def submit(self, job: JobT, *, to_the_end: bool = False) -> Any:
        """Queue *job* and return its result, or raise what it raised.

        Cancellation before the job is queued leaves nothing behind; after that the job is done all the same and only
        its outcome is lost.

        Args:
            to_the_end: once queued, wait for the outcome even when cancelled: cheaper than a shielded scope, and what
                was cancelled before does not begin.

        Raises:
            StoreClosed: the job was not queued.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._room:
            self._room -= 1
        else:
            await self._no_room.park()  # whoever leaves gives us his place
        if self._closed:
            self._leave()
            raise StoreClosed("the store is closed")
        if self._turns is not None and not self._in_thread and self._turns.allowed:
            job.done = False
            self._turns.add(job)
            if job.done:
                return job.outcome.unwrap()
            job.waiter = trio.lowlevel.current_task()
        else:
            job.waiter = trio.lowlevel.current_task()
            self._in_thread += 1
            self._queue.put(job)

        def stop_waiting(_: object) -> trio.lowlevel.Abort:
            if to_the_end:
                return trio.lowlevel.Abort.FAILED
            job.waiter = None
            return trio.lowlevel.Abort.SUCCEEDED

        return await trio.lowlevel.wait_task_rescheduled(stop_waiting)

    def post(self, job: JobT, tell: Told | None = None) -> bool:
        """Queue *job* with nobody waiting for it; False when there is no room or the store is closed.

        Args:
            tell: called with the job's outcome, by trio's loop itself: it must be short and never raise.
        """
        if self._closed:
            return False
        if not self._room:
            return False
        self._room -= 1
        job.tell = tell
        if self._turns is not None and not self._in_thread and self._turns.allowed:
            self._turns.add_lazy(job)
            return True
        self._in_thread += 1
        self._posted.append(job)
        if self._asleep:
            self._asleep = False
            self._queue.put(None)  # means: look again
        return True

    def close(self) -> None:
        """Refuse further jobs; those queued are still done, then ``take`` returns None."""
        if not self._closed:
            self._closed = True
            if self._turns is not None:
                self._turns.close()
            self._queue.put(None)

    def take(self, limit: int, linger_s: float = 0.0) -> list[JobT] | None:
        """Return the next 1 to *limit* jobs, or None once closed and drained.

        Service thread only. Waits for the first; then takes what is queued. What was posted comes first: a later job
        may build on it, as none waits for it.

        Args:
            linger_s: under load, let more arrive for this long after the first; a caller who is mostly alone is served
                at once.
        """
        jobs: list[JobT] = []
        while True:
            first = self._first()
            if first is not None and linger_s > 0 and self._company >= _COMPANY:
                time.sleep(linger_s)
            room = limit if first is None else limit - 1
            while self._posted and len(jobs) < room:
                jobs.append(self._posted.popleft())
            if first is not None:
                jobs.append(first)
            if jobs:
                break
            if self._closed and self._queue.empty():
                return None
        if first is None:
            return jobs
        posted = len(jobs) - 1
        while len(jobs) < limit:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                jobs.append(job)
        self._company += (len(jobs) - posted - self._company) / 8
        return jobs

    def _first(self) -> JobT | None:
        """Return the next job that somebody waits for; None when there is another reason to look."""
        if self._closed and self._queue.empty():
            return None
        with suppress(queue.Empty):
            return self._queue.get(timeout=POSTED_S)
        # Nothing came for a while: sleep without a limit, unless something was posted before that could be seen.
        self._asleep = True
        if self._posted or self._closed:
            self._asleep = False
            return None
        job = self._queue.get()
        self._asleep = False
        return job

    def deliver(self, jobs: Sequence[JobT]) -> None:
        """Wake the waiters of *jobs* with their outcomes. Service thread only; harmless after the trio run ended."""
        with suppress(trio.RunFinishedError):  # nobody is left to be told
            self._token.run_sync_soon(self._back, jobs)

    def _leave(self) -> None:
        if self._no_room:
            self._no_room.unpark()
        else:
            self._room += 1

    def _back(self, jobs: Sequence[JobT]) -> None:
        self._in_thread -= len(jobs)
        self._wake(jobs)

    def _wake(self, jobs: Sequence[JobT]) -> None:
        for job in jobs:
            self._leave()
            job.done = True
            if job.waiter is not None:
                waiter, job.waiter = job.waiter, None
                trio.lowlevel.reschedule(waiter, job.outcome)
            elif job.tell is not None:
                try:
                    job.tell(job.outcome)
                except Exception:  # would end the whole run
                    _log.exception("store_listener_bug")
