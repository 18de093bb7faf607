"""Commits made by the event loop itself: one for all that was asked for in one of its turns, where the disk is fast.

A daemon's durable writes have a thread, since an fsync may take long. Where it does not, the thread costs more than the
fsync: sqlite3 lets go of the interpreter at every step and must get it back from a loop that is busy, and the wake-up
waits for the loop in turn. (Redis with `appendfsync always` syncs in its loop for the same reason.) So the loop commits
as long as commits wait little for the disk, by their own measure (`Pace`), and hands over to the thread when they do
not. What this cannot help: a disk that hangs for good in the middle of a commit holds the loop with it. Nothing could
be promised then anyway; the watchdog of systemd ends the daemon, and connections break off.

Why not one commit for each job: it costs as much for one as for many. Why not one for the whole turn, however long:
then two daemons that pass requests back and forth work in waves, each idle while the other has all of them. With the
threads both were busy at once for a quarter of the time at 16 clients. So a turn's first job waits `TURN_S` at most, or
as long as a commit takes lately where that is longer, and not for the end of the turn. Measured with the databases in
memory and each daemon on a core of its own, which leaves out the disk and the scheduler: 569 requests/s with the
threads, 757 with turns of 1 ms, 683 with turns of 3 ms; in another run 745 with turns of 1 ms and 854 with 0.5 ms (and
frames held for half as long); 0.25 ms gains nothing more and costs 10 % of processor time.

What is lazy rides along, or is committed after the time given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog
import trio

log = structlog.get_logger(__name__)

TURN_S = 0.0005

JobT = TypeVar("JobT")


class Pace:
    """Whether the loop may commit by itself, by how long its commits wait for the disk. Pure: times are given.

    Args:
        limit_s: what a commit may wait on a moving average; 0 keeps the loop from all commits. One slow one (a
            checkpoint, a neighbour's flush) passes.
        pause_s: how long the thread has the work after that, before the loop tries again.
    """

    def __init__(self, limit_s: float = 0.003, pause_s: float = 2.0) -> None:
        self._limit_s = limit_s
        self._pause_s = pause_s
        self._average_s = limit_s / 2
        self._not_before_s = 0.0

    def allows(self, now_s: float) -> bool:
        """Return whether the loop may commit now."""
        return self._limit_s > 0 and now_s >= self._not_before_s

    def waited(self, waited_s: float, now_s: float) -> None:
        """Take note of a commit that the loop made."""
        self._average_s += (waited_s - self._average_s) / 8
        if self._average_s > self._limit_s:
            self._average_s = self._limit_s / 2
            self._not_before_s = now_s + self._pause_s


class TurnCommits(Generic[JobT]):
    """Gathers jobs in one trio run and commits them from its loop; `close` ends it.

    Args:
        commit: commits the jobs it is given, lazy ones first, and tells whoever waits for them. Never raises.
        lazy_s: how long a lazy job may wait for others.
    """

    def __init__(
        self, commit: Callable[[list[JobT]], None], *, lazy_s: float, pace: Pace | None = None, turn_s: float = TURN_S
    ) -> None:
        self._commit = commit
        self._lazy_s = lazy_s
        self._turn_s = turn_s
        self._pace = pace or Pace()
        self._jobs: list[JobT] = []
        self._lazy: list[JobT] = []
        self._first_s = 0.0
        self._commit_s = 0.0  # what a commit takes, on a moving average
        self._turn_begins = _Bell()
        self._lazy_there = _Bell()
        self._scope = trio.CancelScope()
        self._closed = False
        trio.lowlevel.spawn_system_task(self._serve)

    @property
    def allowed(self) -> bool:
        """Whether commits are quick enough for the loop."""
        return not self._closed and self._pace.allows(time.monotonic())

    def add(self, job: JobT) -> None:
        """Have *job* committed at the end of this turn, or now where the turn has lasted long enough."""
        now_s = time.monotonic()
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._first_s = now_s
            self._turn_begins.ring()
        elif now_s - self._first_s > max(self._turn_s, self._commit_s):
            self.commit_now()

    def add_lazy(self, job: JobT) -> None:
        """Have *job* committed with what comes next, after `lazy_s` at the latest."""
        self._lazy.append(job)
        self._lazy_there.ring()

    def commit_now(self) -> None:
        """Commit everything gathered."""
        jobs, self._jobs, self._lazy = self._lazy + self._jobs, [], []
        if not jobs:
            return
        began_s, worked_s = time.monotonic(), time.thread_time()
        self._commit(jobs)
        now_s = time.monotonic()
        waited_s = now_s - began_s - (time.thread_time() - worked_s)  # what it worked it would work in the thread too
        self._pace.waited(waited_s, now_s)
        self._commit_s += (now_s - began_s - self._commit_s) / 8
        if not self._pace.allows(now_s):
            log.info("disk_slow", waited_s=round(waited_s, 4))

    def close(self) -> None:
        """Commit what is gathered; nothing is allowed any more."""
        self._closed = True
        self.commit_now()
        self._scope.cancel()

    async def _serve(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_turns)
                nursery.start_soon(self._commit_lazy)

    async def _end_turns(self) -> None:
        while True:
            await self._turn_begins.wait()
            if self._jobs:
                self.commit_now()

    async def _commit_lazy(self) -> None:
        while True:
            await self._lazy_there.wait()
            await trio.sleep(self._lazy_s)
            if self._lazy:
                self.commit_now()


class _Bell:
    """Wakes one task, which then runs after everything that could run already; rung while it works, it works again."""

    __slots__ = ("_rung", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._rung = False

    def ring(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)
        else:
            self._rung = True

    async def wait(self) -> None:
        if self._rung:
            self._rung = False
            return await trio.lowlevel.checkpoint()
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
