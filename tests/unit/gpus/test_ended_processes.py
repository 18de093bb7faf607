"""What processes did that have ended: whose it is, and what it takes to know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from ngpu_node.gpus.driver import DriverFault, FaultKind, Look, Sample
from ngpu_node.gpus.looks import Ask, Looked, have
from ngpu_node.gpus.metering import BusyMeter, Method
from ngpu_node.gpus.presence import RESTLESS_US, Owners, Presence
from ngpu_node.gpus.sampling import DeviceSampling
from tests.support.scripted_driver import ScriptedDriver, fault, reading, survey

OURS, OTHERS = "a" * 64, "b" * 64
HOLDERS = {OURS: "ours", OTHERS: "others"}
WHERE: dict[int, list[str] | None] = {1: [OURS], 2: [OURS], 3: [], 4: [OTHERS], 5: None}
S = 1_000_000
TICK = 200_000


def seen(*pids: int, at_us: int = 0) -> Look:
    return Look((), at_us, at_us * 1000, pids=pids)


@pytest.mark.parametrize(
    ("before", "now", "heir"),
    [
        ((1, 2), (2,), "ours"),
        ((1, 2), (), "ours"),
        ((1, 3), (3,), "ours"),
        ((1, 3), (1,), None),  # the owner's ended
        ((1, 3), (), None),  # both did: nobody can say
        ((1, 4), (), None),
        ((1, 5), (), None),  # one of them cannot be found
        ((1, 2), (1, 2), None),
        ((), (), None),
    ],
)
def test_the_remainder_is_whose_processes_ended_if_they_are_one_workspaces(
    before: tuple[int, ...], now: tuple[int, ...], heir: str | None
) -> None:
    presence = Presence()
    presence.settle(0, presence.saw(seen(*before), Owners(WHERE, HOLDERS)), ["ours"])
    owners = presence.saw(seen(*now, at_us=S), Owners({}, HOLDERS))
    assert presence.heir(owners, of_all=False) == heir


def test_one_that_ended_after_the_last_tick_is_remembered_until_its_own_tick_was_read() -> None:
    presence = Presence()
    presence.settle(0, presence.saw(seen(1), Owners(WHERE, HOLDERS)), ["ours"])
    owners = presence.saw(seen(at_us=S), Owners({}, HOLDERS))
    presence.settle(S - 1, owners, ["ours"])
    assert presence.held == {1}
    owners = presence.saw(seen(at_us=S + TICK), Owners({}, HOLDERS))
    assert presence.heir(owners, of_all=False) == "ours"
    presence.settle(S + 1, owners, ["ours"])
    assert presence.known == frozenset()


def test_the_device_s_own_samples_are_enough_only_while_processes_end_and_one_workspace_is_there() -> None:
    presence = Presence()
    owners = presence.saw(seen(1, 2), Owners(WHERE, HOLDERS))
    presence.settle(0, owners, ["ours"])
    assert presence.alone(S) == frozenset(), "none has ended"
    owners = presence.saw(seen(2, at_us=S), Owners({}, HOLDERS))
    presence.settle(2 * S, owners, ["ours"])
    assert presence.alone(2 * S) == {OURS}
    assert presence.alone(2 * S + RESTLESS_US) == frozenset()
    owners = presence.saw(seen(2, 3, at_us=3 * S), Owners(WHERE, HOLDERS))
    presence.settle(3 * S, owners, ["ours"])
    assert presence.alone(3 * S) == frozenset(), "the owner came"


def test_a_driver_that_lists_no_processes_is_not_asked_twice() -> None:
    presence = Presence()
    assert presence.wants_list(0)
    owners = presence.saw(Look((Sample(1, 0, 5),), 0, 0), Owners(WHERE, HOLDERS))
    presence.settle(0, owners, ["ours"])
    assert presence.known == {1}
    assert presence.held == frozenset(), "who else is there cannot be known"
    assert not presence.wants_list(S)
    assert presence.wants_list(3 * S)


# -- calls -------------------------------------------------------------------------------------------------------------


def asked(driver: ScriptedDriver, **changes: object) -> Looked:
    ask = Ask("GPU-00000000", Method.PROCESS, 0, **changes)  # type: ignore[arg-type]

    def containers(pids: Iterable[int]) -> dict[int, list[str] | None]:
        return {pid: WHERE[pid] for pid in pids}

    return have(driver, ask, containers, lambda pid: pid in (driver.pids or ()))


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({"known": frozenset({1}), "held": frozenset({1}), "may_look_twice": True}, ["process_look"]),
        ({"known": frozenset({1}), "held": frozenset({1}), "wants_list": True}, ["process_look", "processes"]),
        ({"known": frozenset({1, 2}), "held": frozenset({1, 2})}, ["process_look", "processes"]),
        ({"known": frozenset({1, 3}), "held": frozenset({1}), "may_look_twice": True}, ["process_look", "processes"]),
        (
            {"known": frozenset({1, 2}), "held": frozenset({1, 2}), "may_look_twice": True},
            ["process_look", "device_look"],
        ),
        ({"known": frozenset({1}), "alone": frozenset({OURS})}, ["device_look"]),
        ({"alone": frozenset({OURS})}, ["device_look"]),
        ({"alone": frozenset({OTHERS})}, ["device_look", "process_look"]),
    ],
    ids=[
        "all live",
        "time for a list",
        "not to be afforded",
        "the owner's ended",
        "one ended",
        "alone",
        "a new one",
        "a stranger came",
    ],
)
def test_a_second_call_is_made_only_where_a_workspace_s_process_ended(
    changes: dict[str, object], calls: list[str]
) -> None:
    driver = ScriptedDriver(survey(reading(0)), by_process=[Sample(1, TICK, 50)], pids=(1,))
    looked = asked(driver, **changes)
    assert driver.calls == calls
    assert looked.calls == len([call for call in calls if call != "processes"])
    assert looked.look is not None
    assert (looked.whole is not None) == ("device_look" in calls)


def test_the_first_answer_stands_where_the_second_call_fails() -> None:
    driver = ScriptedDriver(survey(reading(0)), by_process=[Sample(1, TICK, 50)], device=fault(FaultKind.OTHER))
    looked = asked(driver, known=frozenset({1, 2}), held=frozenset({1, 2}), may_look_twice=True)
    assert looked.look is not None
    assert looked.whole is None
    assert looked.fault is None


def test_a_fault_of_the_only_call_is_the_answer() -> None:
    driver = ScriptedDriver(survey(reading(0)), by_process=DriverFault(FaultKind.LOST, "look", "lost"))
    looked = asked(driver)
    assert looked.look is None
    assert looked.fault is not None


# -- together ----------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """A sampled device on which a task of "ours" runs from 1 s on; each look is said by the test."""

    meter: BusyMeter = field(default_factory=BusyMeter)

    def __post_init__(self) -> None:
        self.sampling = DeviceSampling("GPU", self.meter, Method.PROCESS)
        self.now_us = S
        self.task = self.meter.start(["GPU"], "ours", self.now_us * 1000)
        self.sampling.wake(self.now_us, self.now_us * 1000)

    def look(self, living: dict[int, float], device: float | None = None) -> None:
        self.now_us += 2 * TICK
        at_us = self.now_us - 30_000
        pids = tuple(living)
        look = Look(
            tuple(Sample(p, at_us, c) for p, c in living.items() if c), self.now_us, self.now_us * 1000, pids=pids
        )
        whole = None
        if device is not None:
            ticks = tuple(Sample(None, at_us - n * TICK, device) for n in (1, 0))
            whole = Look(ticks, self.now_us, self.now_us * 1000, pids=pids)
        self.sampling.ask(self.now_us)
        self.sampling.took(look, Owners(WHERE, HOLDERS), whole=whole, calls=1 if whole is None else 2)

    def busy_s(self) -> float:
        return self.meter.stop(self.task, self.now_us * 1000).busy_ns / 1e9


def test_what_an_ended_process_did_is_the_device_s_less_what_the_living_did() -> None:
    told = Told()
    for _ in range(10):
        told.look({1: 30, 3: 20})
    told.look({3: 20}, device=50)
    assert told.busy_s() == pytest.approx(11 * 0.4 * 0.30, abs=0.02)


def test_the_living_are_never_given_more_than_the_device_did() -> None:
    told = Told()
    told.look({1: 50, 2: 40})
    told.look({1: 60}, device=40)
    assert told.busy_s() == pytest.approx(0.4 * 0.90 + 0.4 * 0.40, abs=0.03)


def test_a_remainder_nobody_can_be_shown_to_have_done_is_nobody_s() -> None:
    told = Told()
    told.look({1: 50, 3: 40})
    told.look({}, device=80)
    assert told.busy_s() == pytest.approx(0.4 * 0.50, abs=0.02)
