"""SIGTERM once: finish what runs. Twice: now."""

from __future__ import annotations

import signal

import pytest
import trio
from trio.testing import MockClock, trio_test

from ngpu_daemon.drain import Drain


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_starts_draining_and_a_second_ends_it(number: signal.Signals) -> None:
    async def main() -> None:
        drain = Drain()
        async with trio.open_nursery() as nursery:
            await nursery.start(drain.run)
            assert not drain.is_requested
            signal.raise_signal(number)
            await drain.requested.wait()
            assert not drain.immediate.is_set()
            signal.raise_signal(signal.SIGTERM)
            await drain.immediate.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)


@trio_test
async def test_grace_ends_as_soon_as_work_is_finished() -> None:
    drain, finished = Drain(), trio.Event()
    drain.request("test")
    finished.set()
    assert await drain.grace(finished, 60)


def virtual(main: object) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))  # type: ignore[arg-type]


def test_grace_ends_at_its_limit() -> None:
    async def main() -> None:
        started = trio.current_time()
        assert not await Drain().grace(trio.Event(), 30)
        assert trio.current_time() - started == pytest.approx(30, abs=0.1)

    virtual(main)


def test_grace_ends_at_the_second_signal() -> None:
    async def main() -> None:
        drain = Drain()
        drain.request("first")
        started = trio.current_time()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def impatient() -> None:
                await trio.sleep(5)
                drain.request("second")

            assert not await drain.grace(trio.Event(), 30)
        assert trio.current_time() - started == pytest.approx(5, abs=0.1)

    virtual(main)


def test_a_cancelled_grace_is_cancelled() -> None:
    async def main() -> None:
        with trio.move_on_after(1) as scope:
            await Drain().grace(trio.Event(), 30)
        assert scope.cancelled_caught

    virtual(main)
