"""Driver calls off the event loop, one at a time, each with a time limit.

On a sick card NVML calls block for seconds, or for ever. A call that takes too long is given up: the caller gets a
`DriverFault` of kind STUCK, and the thread is left to the driver. Until it returns, no other call is made and everyone
is told at once how long it has hung, so that hung threads never pile up: there is at most one. What a call returns
after it was given up is dropped.

The thread is a daemon thread of trio's: one that never returns does not keep the process from ending.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from ngpu_node.gpus.driver import Driver, DriverFault, FaultKind

T = TypeVar("T")


@dataclass(slots=True)
class _Call:
    """A call under way; *done* is set by its thread, whatever became of it."""

    what: str
    began_s: float
    done: bool = False


class DriverCalls:
    """The one way to the driver.

    Attributes:
        abandoned: how many calls were given up so far.
    """

    def __init__(self, driver: Driver, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self.abandoned = 0
        self._driver = driver
        self._monotonic_s = monotonic_s
        self._one = trio.Lock()
        self._given_up: _Call | None = None

    @property
    def stuck_for_s(self) -> float | None:
        """For how long a call that was given up has hung; None while the driver answers."""
        hung = self._hung()
        return None if hung is None else self._monotonic_s() - hung.began_s

    async def run(self, what: str, call: Callable[[Driver], T], *, timeout_s: float) -> T:
        """Return what *call* gives, made in a thread with the driver open.

        Args:
            what: the call, for people.
            timeout_s: for the call itself. Those that wait before it have limits of their own, and a driver that is
                slow with one of them is not stuck.

        Raises:
            DriverFault: the call's own, or STUCK: it, or one before it, did not return in time.
        """
        async with self._one:
            self._raise_if_hung()
            with trio.move_on_after(timeout_s):
                return await self._run(what, call)
        self.abandoned += 1
        raise DriverFault(FaultKind.STUCK, what, f"the NVIDIA driver did not answer within {timeout_s:g} s")

    async def _run(self, what: str, call: Callable[[Driver], T]) -> T:
        this = _Call(what, self._monotonic_s())

        def made() -> T:
            try:
                self._driver.open()
                return call(self._driver)
            finally:
                this.done = True

        try:
            # A limiter of its own, since a thread that was given up holds its place until it returns.
            return await trio.to_thread.run_sync(made, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        finally:
            self._given_up = this  # forgotten as soon as anyone sees that it is done

    def _hung(self) -> _Call | None:
        if self._given_up is not None and self._given_up.done:
            self._given_up = None
        return self._given_up

    def _raise_if_hung(self) -> None:
        hung = self._hung()
        if hung is not None:
            hangs_s = self._monotonic_s() - hung.began_s
            raise DriverFault(FaultKind.STUCK, hung.what, f"the NVIDIA driver has not answered for {hangs_s:.0f} s")
