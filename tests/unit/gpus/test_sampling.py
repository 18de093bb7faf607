"""Whose a sample is, and when to look."""

from __future__ import annotations

from ngpu_node.gpus.driver import FaultKind, Look, Sample
from ngpu_node.gpus.metering import Busy, BusyMeter, Metered, Method
from ngpu_node.gpus.sampling import DeviceSampling, Owners
from tests.support.scripted_driver import fault

WALL = 1_700_000_000_000_000
S = 1_000_000
OURS, OTHERS = "a" * 64, "b" * 64


class Device:
    """One device sampled every 200 ms, one task of the workspace in container OURS on it."""

    def __init__(self, method: Method = Method.PROCESS) -> None:
        self.meter = BusyMeter()
        self.sampling = DeviceSampling("GPU-1", self.meter, method)
        self.now_us = 1 * S
        self.task = self.begin()

    def begin(self, workspace: str = "ours") -> Metered:
        task = self.meter.start(["GPU-1"], workspace, self.now_us * 1000)
        self.sampling.wake(WALL + self.now_us, self.now_us * 1000)
        return task

    def looks(
        self,
        samples: dict[int | None, float],
        containers: dict[int, list[str] | None],
        *,
        count: int = 10,
        pids: tuple[int, ...] | None = None,
        cost_us: float = 0.0,
    ) -> None:
        for _ in range(count):
            self.now_us += 200_000
            assert self.sampling.ask(WALL + self.now_us) is not None
            found = tuple(Sample(pid, WALL + self.now_us - 16_000, percent) for pid, percent in samples.items())
            look = Look(found, WALL + self.now_us, self.now_us * 1000, pids=pids)
            self.sampling.took(look, Owners(containers, {OURS: "ours", OTHERS: "others"}), cost_us=cost_us)

    def end(self) -> Busy:
        return self.meter.stop(self.task, self.now_us * 1000)


def test_the_workspaces_processes_are_added_up_and_others_are_not() -> None:
    device = Device()
    device.looks({1: 30, 2: 20, 3: 40, 4: 5}, {1: [OURS], 2: [OURS], 3: [], 4: [OTHERS]})
    busy = device.end()
    assert busy.method is Method.PROCESS
    assert 0.95 < busy.busy_ns / 1e9 < 1.05


def test_a_container_within_a_container_is_found_by_either() -> None:
    device = Device()
    device.looks({1: 50}, {1: ["c" * 64, OURS]})
    assert device.end().busy_ns / 1e9 > 0.9


def test_a_process_that_cannot_be_found_makes_it_unknown() -> None:
    device = Device()
    device.looks({1: 50, 2: 10}, {1: [OURS], 2: None})
    assert device.end() == Busy(0, Method.NONE)
    assert "process 2" in device.sampling.last_gap


def test_an_idle_process_that_cannot_be_found_does_no_harm() -> None:
    device = Device()
    device.looks({1: 50, 2: 0}, {1: [OURS], 2: None})
    assert device.end().method is Method.PROCESS


def test_the_devices_samples_are_taken_for_a_workspace_that_has_it_alone() -> None:
    device = Device(Method.DEVICE)
    device.looks({None: 50}, {1: [OURS], 2: [OURS]}, pids=(1, 2))
    busy = device.end()
    assert busy.method is Method.DEVICE
    assert 0.95 < busy.busy_ns / 1e9 < 1.05


def test_they_are_not_where_anybody_else_is_or_may_be_on_it() -> None:
    for containers, pids in (
        ({1: [OURS], 2: []}, (1, 2)),
        ({1: [OURS], 2: [OTHERS]}, (1, 2)),
        ({1: [OURS], 2: None}, (1, 2)),
        ({1: [OURS]}, None),
    ):
        device = Device(Method.DEVICE)
        device.looks({None: 50}, containers, pids=pids)  # type: ignore[arg-type]
        assert device.end() == Busy(0, Method.NONE)


def test_nor_where_two_workspaces_have_it() -> None:
    device = Device(Method.DEVICE)
    other = device.begin("others")
    device.looks({None: 50}, {1: [OURS]}, pids=(1,))
    assert device.end() == Busy(0, Method.NONE)
    assert device.meter.stop(other, device.now_us * 1000) == Busy(0, Method.NONE)


def test_a_driver_that_does_not_answer_leaves_it_unknown() -> None:
    device = Device()
    for _ in range(10):
        device.now_us += 200_000
        device.sampling.failed(fault(FaultKind.STUCK, "it hangs"), WALL + device.now_us, device.now_us * 1000)
    assert device.end() == Busy(0, Method.NONE)
    assert device.sampling.last_gap == "it hangs"


def test_a_short_fault_costs_its_time_only() -> None:
    device = Device()
    device.looks({1: 99}, {1: [OURS]}, count=50)
    device.now_us += 200_000
    device.sampling.failed(fault(FaultKind.OTHER), WALL + device.now_us, device.now_us * 1000)
    device.looks({1: 99}, {1: [OURS]}, count=50)
    busy = device.end()
    assert busy.method is Method.PROCESS
    assert 19.6 < busy.busy_ns / 1e9 < 20.2


def test_a_device_that_turns_out_to_have_no_samples_is_not_metered_any_more() -> None:
    device = Device()
    device.sampling.failed(fault(FaultKind.UNSUPPORTED), WALL + device.now_us, device.now_us * 1000)
    device.now_us += S
    assert device.end() == Busy(0, Method.NONE)
    assert device.sampling.delay_s(WALL + device.now_us) is None
    device.task = device.begin()
    assert device.end() == Busy(0, Method.NONE)


def test_looks_follow_the_ticks() -> None:
    device = Device()
    device.looks({1: 50}, {1: [OURS]}, count=5)
    delay_s = device.sampling.delay_s(WALL + device.now_us)
    assert delay_s is not None
    assert 0.19 < delay_s < 0.25


def test_looks_become_rarer_where_they_are_dear() -> None:
    device = Device()
    device.looks({1: 50}, {1: [OURS]}, count=5, cost_us=1500)
    assert device.sampling.interval_us == 400_000, "0.375 % of a core"
    delay_s = device.sampling.delay_s(WALL + device.now_us)
    assert delay_s is not None
    assert 0.35 < delay_s < 0.45
    device.looks({1: 50}, {1: [OURS]}, count=50, cost_us=4000)
    assert device.sampling.interval_us == 1_000_000


def test_a_look_at_the_end_of_a_task_is_made_where_it_shows_something_and_can_be_afforded() -> None:
    device = Device()
    device.looks({1: 50}, {1: [OURS]}, count=10, cost_us=1500)
    assert not device.sampling.is_worth_a_look(WALL + device.now_us + 100_000), "there was no tick since"
    assert not device.sampling.is_worth_a_look(WALL + device.now_us + 250_000), "looks were dear enough"
    assert device.sampling.is_worth_a_look(WALL + device.now_us + 3_000_000)
    device.sampling.rest()
    assert not device.sampling.is_worth_a_look(WALL + device.now_us + 3_000_000)


def test_looks_at_a_silent_device_keep_the_pace() -> None:
    device = Device()
    device.looks({1: 50}, {1: [OURS]}, count=5)
    looked = 0
    until_us = device.now_us + 20_000_000
    while device.now_us < until_us:
        delay_s = device.sampling.delay_s(WALL + device.now_us)
        assert delay_s is not None
        device.now_us += max(1000, int(delay_s * 1e6))
        device.sampling.took(Look((), WALL + device.now_us, device.now_us * 1000), Owners({}, {}))
        looked += 1
    assert looked < 110


def test_a_clock_set_back_does_not_put_looks_off() -> None:
    device = Device()
    device.looks({1: 50}, {1: [OURS]}, count=5)
    delay_s = device.sampling.delay_s(WALL + device.now_us - 3600 * S)
    assert delay_s is not None
    assert delay_s <= 0.4


def test_a_device_without_tasks_is_not_looked_at() -> None:
    device = Device()
    device.looks({1: 50}, {1: [OURS]}, count=5)
    device.end()
    assert device.meter.wanted() == ["GPU-1"], "the last task's tail is still unknown"
    device.looks({1: 50}, {1: [OURS]}, count=2)
    assert device.meter.wanted() == []
    device.sampling.rest()
    assert device.sampling.delay_s(WALL + device.now_us) is None


def test_a_task_on_a_device_nobody_meters_says_so() -> None:
    meter = BusyMeter()
    assert meter.stop(meter.start(["GPU-1"], "w", 0), 10**9) == Busy(0, Method.NONE)
    assert meter.stop(meter.start([], "w", 0), 10**9) == Busy(0, Method.NONE)


def test_a_task_on_two_devices_pays_for_both_or_is_unknown() -> None:
    meter = BusyMeter()
    for uuid in ("GPU-1", "GPU-2"):
        meter.method(uuid, Method.PROCESS)
    from ngpu_node.gpus.samples import Window

    task = meter.start(["GPU-1", "GPU-2"], "w", 0)
    for uuid in ("GPU-1", "GPU-2"):
        meter.measured(uuid, Window(0, 10**9, {1: 5 * 10**8}), {1: "w"})
    assert meter.stop(task, 10**9) == Busy(10**9, Method.PROCESS)
    task = meter.start(["GPU-1", "GPU-2"], "w", 10**9)
    meter.measured("GPU-1", Window(10**9, 3 * 10**9, {1: 5 * 10**8}), {1: "w"})
    meter.measured("GPU-2", Window(10**9, 3 * 10**9, None), {})
    assert meter.stop(task, 3 * 10**9) == Busy(0, Method.NONE)


def test_clocks_nobody_feeds_do_not_remember_for_ever() -> None:
    meter = BusyMeter()
    meter.method("GPU-1", Method.PROCESS)
    for second in range(1000):
        for part in range(10):
            now_ns = (second * 10 + part) * 10**8
            meter.stop(meter.start(["GPU-1"], "w", now_ns), now_ns + 10**7)
    (clock,) = meter._clocks["GPU-1"].values()
    assert len(clock.trace) < 2000
    assert len(clock.tails) < 2000


def test_counters_are_read_when_a_task_begins_and_ticks_when_one_can_be_seen() -> None:
    for continuous, waits_s in ((True, 0.0), (False, 0.23)):
        meter = BusyMeter()
        sampling = DeviceSampling("MIG-1", meter, Method.DEVICE, continuous=continuous)
        meter.start(["MIG-1"], "ours", S * 1000)
        sampling.wake(WALL + S, S * 1000)
        assert sampling.delay_s(WALL + S) == waits_s
