"""What SIGTERM and SIGINT mean to a daemon: finish what runs, take nothing new; asked twice, stop now.

Owns the two events; what draining consists of belongs to each daemon. `daemon.py` starts `Drain.run` in its nursery,
stops admitting work when `requested` is set, waits for running work in `grace`, and returns.
"""

from __future__ import annotations

import signal

import structlog
import trio

log = structlog.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Drain:
    """The wish that this daemon stop.

    Attributes:
        requested: set when the first signal came (or `request` was called): admit nothing new.
        immediate: set when the second came: the grace period is over.
    """

    def __init__(self) -> None:
        self.requested = trio.Event()
        self.immediate = trio.Event()

    @property
    def is_requested(self) -> bool:
        return self.requested.is_set()

    def request(self, reason: str) -> None:
        """Start draining; called while draining already, end the grace period."""
        if self.requested.is_set():
            log.warning("drain_cut_short", reason=reason)
            self.immediate.set()
        else:
            log.info("drain_started", reason=reason)
            self.requested.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Turn signals into requests until cancelled. Ready once the signals are caught; main thread only."""
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                self.request(signal.Signals(number).name)

    async def grace(self, finished: trio.Event, grace_s: float) -> bool:
        """Wait until *finished*, at most *grace_s* seconds and not past a second signal.

        Returns:
            True when *finished* came first: nothing was cut off.
        """
        async with trio.open_nursery() as nursery:

            async def end_on_second_signal() -> None:
                await self.immediate.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_on_second_signal)
            with trio.move_on_after(grace_s):
                await finished.wait()
            nursery.cancel_scope.cancel()
        return finished.is_set()
