"""Driver calls never hold up the loop, and those that hang never pile up."""

from __future__ import annotations

import threading
import time

import pytest
import trio
from trio.testing import trio_test

from ngpu_node.gpus.calls import DriverCalls
from ngpu_node.gpus.driver import Driver, DriverFault, FaultKind
from tests.support.scripted_driver import ScriptedDriver, reading, survey


class Gate:
    """A driver that hangs while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.inside = 0
        self.most_inside = 0

    def pass_(self) -> None:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.open.wait(20)
        self.inside -= 1


def calls_through(gate: Gate) -> tuple[DriverCalls, ScriptedDriver]:
    driver = ScriptedDriver(survey(reading()), wait=gate.pass_)
    return DriverCalls(driver), driver


def count(driver: Driver) -> int:
    return driver.survey().count


@trio_test
async def test_a_call_returns_what_the_driver_gives() -> None:
    calls, driver = calls_through(Gate())
    assert await calls.run("survey", count, timeout_s=5) == 1
    assert await calls.run("survey", count, timeout_s=5) == 1
    assert driver.opened == 1
    assert calls.stuck_for_s is None


@trio_test
async def test_the_drivers_own_fault_comes_through() -> None:
    calls, driver = calls_through(Gate())
    driver.found = DriverFault(FaultKind.LOST, "call", "lost")
    with pytest.raises(DriverFault) as caught:
        await calls.run("survey", count, timeout_s=5)
    assert caught.value.kind is FaultKind.LOST
    assert calls.stuck_for_s is None


@trio_test
async def test_a_call_that_hangs_is_given_up_and_no_other_is_made() -> None:
    gate = Gate()
    calls, driver = calls_through(gate)
    gate.open.clear()
    began = time.monotonic()
    with pytest.raises(DriverFault) as caught:
        await calls.run("survey", count, timeout_s=0.05)
    assert caught.value.kind is FaultKind.STUCK
    assert "0.05 s" in caught.value.text
    for _ in range(50):
        with pytest.raises(DriverFault) as caught:
            await calls.run("vitals", count, timeout_s=5)
        assert caught.value.call == "survey", "who is told is told what hangs"
    assert time.monotonic() - began < 2
    assert calls.stuck_for_s is not None
    assert gate.most_inside == 1
    gate.open.set()
    while calls.stuck_for_s is not None:  # noqa: ASYNC110 - the thread has no event to set
        await trio.sleep(0.005)
    assert await calls.run("survey", count, timeout_s=5) == 1
    assert calls.abandoned == 1
    assert gate.most_inside == 1
    assert driver.calls == ["survey", "survey"], "what came late was dropped"


@trio_test
async def test_the_loop_runs_on_while_a_call_hangs() -> None:
    gate = Gate()
    calls, _ = calls_through(gate)
    gate.open.clear()
    slowest = 0.0
    async with trio.open_nursery() as nursery:

        async def hang() -> None:
            with pytest.raises(DriverFault):
                await calls.run("survey", count, timeout_s=0.3)

        nursery.start_soon(hang)
        for _ in range(20):
            began = time.monotonic()
            await trio.sleep(0.01)
            slowest = max(slowest, time.monotonic() - began)
    gate.open.set()
    assert slowest < 0.2


@trio_test
async def test_a_call_that_waits_for_a_slow_one_is_not_told_that_the_driver_is_stuck() -> None:
    gate = Gate()
    calls, _ = calls_through(gate)
    gate.open.clear()
    outcomes: list[str] = []

    async def ask(name: str, timeout_s: float) -> None:
        try:
            await calls.run(name, count, timeout_s=timeout_s)
            outcomes.append(f"{name} answered")
        except DriverFault as fault:
            outcomes.append(f"{name} {fault.kind}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "first", 5)
        await trio.sleep(0.02)
        nursery.start_soon(ask, "second", 0.05)
        nursery.start_soon(ask, "third", 5)
        await trio.sleep(0.2)
        gate.open.set()
    assert outcomes[0] == "first answered"
    assert sorted(outcomes[1:]) == ["second answered", "third answered"]
    assert gate.most_inside == 1
    assert calls.stuck_for_s is None


@trio_test
async def test_a_caller_that_leaves_does_not_unlock_the_driver() -> None:
    gate = Gate()
    calls, _ = calls_through(gate)
    gate.open.clear()
    with trio.move_on_after(0.05):
        await calls.run("survey", count, timeout_s=5)
    with pytest.raises(DriverFault):
        await calls.run("vitals", count, timeout_s=5)
    gate.open.set()
