"""Whoever waits for a task to change: polls that hang on, server-sent events, calls that share an idempotency key.

Owns nothing but the waiting. A change is a hint to look at the store, where the truth is: what a sibling bootstrap
changes is not heard here, so waiters look now and then without one.
"""

from __future__ import annotations

import trio

# How often a waiter looks by itself: for tasks that another bootstrap carries.
LOOK_S = 1.0


class TaskWatch:
    """Tells waiters that a task may have changed."""

    def __init__(self) -> None:
        self._watched: dict[str, trio.Event] = {}

    def changed(self, task_id: str) -> None:
        """Wake whoever waits for *task_id*; costs a lookup when nobody does."""
        event = self._watched.pop(task_id, None)
        if event is not None:
            event.set()

    def wake_all(self) -> None:
        """Wake whoever waits, for whichever task: there is something to look at that is none of them."""
        watched, self._watched = self._watched, {}
        for event in watched.values():
            event.set()

    async def wait(self, task_id: str, timeout_s: float = LOOK_S) -> None:
        """Return when *task_id* may have changed, after *timeout_s* at the latest.

        Look at the task between two waits, not before the first one only: a change in between is not remembered for
        those who did not wait.
        """
        event = self._watched.get(task_id)
        if event is None:
            event = self._watched[task_id] = trio.Event()
        try:
            with trio.move_on_after(timeout_s):
                await event.wait()
        finally:
            if not event.is_set() and not event.statistics().tasks_waiting and self._watched.get(task_id) is event:
                del self._watched[task_id]
