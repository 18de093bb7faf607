"""The watch over a machine that changes under it: each condition is produced while it runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_node.changes import Changes
from ngpu_node.gpus.driver import DriverFault, FaultKind, GpuProcess, Sample, Vitals
from ngpu_node.gpus.health import ConditionKind, Phase, Policy
from ngpu_node.gpus.inventory import InventoryState, Withheld, of_fault, of_survey
from ngpu_node.gpus.metering import Busy, Method
from ngpu_node.gpus.nvml import NvmlDriver
from ngpu_node.gpus.processes import ProcessTable
from ngpu_node.gpus.watch import MAX_GONE, Clocks, GpuWatch, Pace, Surroundings
from ngpu_protocol.identity import gpu_id, parse_address
from tests.support.fake_nvml import FakeNvml, load
from tests.support.scripted_driver import GIB, ScriptedDriver, fault, reading, survey

NODE = parse_address("0x" + "11" * 20)
FIRST, SECOND = (f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in range(2))
PACE = Pace(survey_s=0.2, again_s=0.1, round_s=0.02)
POLICY = Policy(clean_looks=3, clean_s=0.1, throttle_s=0.1, xid_quiet_s=0.3, leftover_s=0.1)
CONTAINER = "c" * 64


@contextmanager
def fake_machine(folder: Path, gpus: int = 2) -> Iterator[FakeNvml]:
    fake = FakeNvml(folder / "nvml", gpus=gpus)
    with load(fake.path):
        yield fake


@asynccontextmanager
async def watching(watch: GpuWatch) -> AsyncIterator[GpuWatch]:
    await watch.look()
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        yield watch
        nursery.cancel_scope.cancel()


def a_watch(driver: NvmlDriver | ScriptedDriver, **more: object) -> GpuWatch:
    return GpuWatch(driver, NODE, Changes(), pace=PACE, policy=POLICY, **more)  # type: ignore[arg-type]


async def until(holds: Callable[[], object], *, within_s: float = 60) -> None:
    with trio.fail_after(within_s):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.005)


def offered(watch: GpuWatch) -> set[bytes]:
    return {offer.id for offer in watch.offers()}


def conditions(watch: GpuWatch, uuid: str) -> set[ConditionKind]:
    health = watch.health(uuid)
    return set() if health is None else {condition.kind for condition in health.conditions}


BOTH = {gpu_id(NODE, FIRST), gpu_id(NODE, SECOND)}


@pytest.mark.needs_gcc
@pytest.mark.parametrize(
    ("breaks", "mends", "kind"),
    [
        ({"error": 15}, {"error": None}, ConditionKind.LOST),
        ({"error": 16}, {"error": None}, ConditionKind.RESET_REQUIRED),
        ({"error": 999}, {"error": None}, ConditionKind.UNREADABLE),
        ({"ecc_uncorrected": 2}, {"ecc_uncorrected": 0}, ConditionKind.ECC),
        ({"retired_pages_pending": 1}, {"retired_pages_pending": 0}, ConditionKind.PAGES_PENDING),
        ({"rows_pending": 1}, {"rows_pending": 0}, ConditionKind.ROWS_PENDING),
        ({"rows_failed": 1}, {"rows_failed": 0}, ConditionKind.ROWS_FAILED),
        ({"temperature": 95}, {"temperature": 40}, ConditionKind.HOT),
        ({"clocks_event_reasons": 0x48}, {"clocks_event_reasons": 1}, ConditionKind.HOT),
        ({"clocks_event_reasons": 0x80}, {"clocks_event_reasons": 1}, ConditionKind.POWER),
    ],
)
def test_a_sick_device_is_withdrawn_and_comes_back_after_a_clean_check(
    tmp_path: Path, breaks: dict[str, object], mends: dict[str, object], kind: ConditionKind
) -> None:
    @trio_test
    async def story() -> None:
        with fake_machine(tmp_path) as machine:
            async with watching(a_watch(NvmlDriver())) as watch:
                assert offered(watch) == BOTH
                machine.set(0, **breaks)
                await until(lambda: offered(watch) == {gpu_id(NODE, SECOND)})
                assert kind in conditions(watch, FIRST)
                assert watch.reason_against(FIRST)
                assert watch.reason_against(SECOND) == ""
                machine.set(0, **mends)
                await until(lambda: offered(watch) == BOTH)
                health = watch.health(FIRST)
                assert health is not None
                assert health.phase is Phase.WELL

    story()


@pytest.mark.needs_gcc
def test_an_error_event_withdraws_the_device_for_a_while(tmp_path: Path) -> None:
    @trio_test
    async def story() -> None:
        with fake_machine(tmp_path) as machine:
            async with watching(a_watch(NvmlDriver())) as watch:
                machine.add("gpu1.xid 1 31")
                machine.add("gpu0.xid 1 79")
                await until(lambda: offered(watch) == {gpu_id(NODE, SECOND)})
                assert "Xid 79" in watch.reason_against(FIRST)
                health = watch.health(SECOND)
                assert health is not None
                assert health.last_xids == (31,)
                await until(lambda: offered(watch) == BOTH)

    story()


@pytest.mark.needs_gcc
def test_memory_that_does_not_come_back_withdraws_the_device(tmp_path: Path) -> None:
    held: set[str] = set()

    @trio_test
    async def story() -> None:
        with fake_machine(tmp_path) as machine:
            watch = a_watch(NvmlDriver(), surroundings=Surroundings(held=lambda: held))
            async with watching(watch):
                held.add(FIRST)
                machine.set(0, memory_used=80 * GIB)
                await until(lambda: watch._health[FIRST]._held)
                held.clear()
                await until(lambda: conditions(watch, FIRST) == {ConditionKind.MEMORY})
                assert offered(watch) == {gpu_id(NODE, SECOND)}
                machine.set(0, memory_used=0)
                await until(lambda: offered(watch) == BOTH)

    story()


@pytest.mark.needs_gcc
def test_a_device_that_vanishes_and_returns_elsewhere_is_the_same_device(tmp_path: Path) -> None:
    @trio_test
    async def story() -> None:
        with fake_machine(tmp_path) as machine:
            async with watching(a_watch(NvmlDriver())) as watch:
                lost = machine.gpus.pop(0)
                machine.write()
                await until(lambda: offered(watch) == {gpu_id(NODE, SECOND)})
                await until(lambda: watch.inventory.gpu(FIRST) is None)
                assert watch.reason_against(FIRST)
                assert [one["uuid"] for one in watch.status()["gone"]] == [FIRST]
                machine.gpus.append(lost)
                machine.write()
                await until(lambda: offered(watch) == BOTH)
                found = watch.inventory.gpu(FIRST)
                assert found is not None
                assert found.reading.index == 1

    story()


@pytest.mark.needs_gcc
def test_a_driver_that_is_unloaded_and_reloaded_is_found_again(tmp_path: Path) -> None:
    @trio_test
    async def story() -> None:
        with fake_machine(tmp_path) as machine:
            async with watching(a_watch(NvmlDriver())) as watch:
                machine.set_machine(generation=2, init=9)
                await until(lambda: watch.inventory.state is InventoryState.NOT_LOADED)
                assert offered(watch) == set()
                assert "not loaded" in watch.inventory.reason
                machine.set_machine(init=0)
                await until(lambda: offered(watch) == BOTH)
                assert watch.inventory.state is InventoryState.OK

    story()


@pytest.mark.needs_gcc
def test_a_driver_that_blocks_stalls_nothing_and_offers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpu_node.gpus.watch.ROUND_TIMEOUT_S", 0.1)
    monkeypatch.setattr("ngpu_node.gpus.watch.SURVEY_TIMEOUT_S", 0.1)

    @trio_test
    async def story() -> None:
        with fake_machine(tmp_path) as machine:
            async with watching(a_watch(NvmlDriver())) as watch:
                machine.set(0, block_ms=400)
                # seen while the call hangs: a loop that waited for it would see nothing before it is over
                await until(lambda: watch.status()["driver_stuck_for_s"] is not None and not offered(watch))
                assert conditions(watch, SECOND) == {ConditionKind.DRIVER}
                machine.set(0, block_ms=None)
                await until(lambda: offered(watch) == BOTH)

    story()


@trio_test
async def test_a_look_that_is_slow_at_the_end_of_a_task_makes_no_device_sick() -> None:
    driver = ScriptedDriver(survey(reading(0)), pids=(4711,))
    name = gpu_id(NODE, "GPU-00000000")
    async with watching(a_watch(driver)) as watch:
        sampling = watch._samplings["GPU-00000000"]
        sampling._cost_us = 1500.0  # so that looks are rarer than ticks, and one more at the end tells something
        task = watch.start([name], "workspace", time.monotonic_ns())
        await trio.sleep(0.5)
        await until(lambda: sampling.is_worth_a_look(time.time_ns() // 1000))
        goes_on = threading.Event()
        driver.wait = lambda: goes_on.wait(60) and None
        with trio.fail_after(60):
            await watch.look_before_stop([name])  # it does not wait for the end of its look
        watch.stop(task, time.monotonic_ns())
        for turn in range(20):
            if turn == 10:  # some rounds of vitals are due since
                goes_on.set()
            await trio.sleep(0.01)
            assert watch.offers()
            assert watch.status()["driver_stuck_for_s"] is None


@trio_test
async def test_a_machine_without_a_driver_is_a_state_and_changes_when_one_comes() -> None:
    driver = ScriptedDriver(fault(FaultKind.NO_DRIVER, "no NVIDIA driver on this machine"))
    async with watching(a_watch(driver)) as watch:
        assert (watch.inventory.state, watch.offers()) == (InventoryState.NO_DRIVER, ())
        driver.found = survey(reading(0))
        await until(watch.offers)
        assert watch.inventory.state is InventoryState.OK


@trio_test
async def test_withheld_devices_and_memory_are_not_offered() -> None:
    driver = ScriptedDriver(survey(reading(0), reading(1)))
    async with watching(a_watch(driver, withheld=Withheld(("GPU-00000001",), 41 * GIB))) as watch:
        (offer,) = watch.offers()
        assert (offer.id, offer.model, offer.memory_bytes) == (gpu_id(NODE, "GPU-00000000"), "NVIDIA H200", 100 * GIB)


@trio_test
async def test_whoever_reports_is_told_when_offers_change() -> None:
    driver = ScriptedDriver(survey(reading(0)))
    changes = Changes()
    watch = GpuWatch(driver, NODE, changes, pace=PACE, policy=POLICY)
    async with watching(watch):
        seen = changes.count
        driver.vitals["GPU-00000000"] = fault(FaultKind.LOST, "fallen off the bus")
        with trio.fail_after(60):
            await changes.beyond(seen)
        assert watch.offers() == ()


@trio_test
async def test_a_sick_parent_withdraws_its_instances() -> None:
    from ngpu_node.gpus.driver import MigInstance

    whole = reading(0, mig_enabled=True)
    driver = ScriptedDriver(survey(whole, reading(0, uuid="MIG-1", mig=MigInstance(whole.uuid, 1, 0))))
    async with watching(a_watch(driver)) as watch:
        assert len(watch.offers()) == 1
        driver.vitals[whole.uuid] = Vitals(ecc_uncorrected=1)
        await until(lambda: not watch.offers())


class Load:
    """A scripted device that is busy at a rate, ticking in real time."""

    def __init__(self, driver: ScriptedDriver, pid: int) -> None:
        self.driver = driver
        self.pid = pid
        self.percent = 0

    async def run(self) -> None:
        while True:
            await trio.sleep(0.05)
            at_us = time.time_ns() // 1000
            self.driver.by_process = (Sample(self.pid, at_us, self.percent),)
            self.driver.device = (*tuple(self.driver.device)[-20:], Sample(None, at_us, self.percent))  # type: ignore[arg-type]


def a_process_in_the_container(folder: Path) -> ProcessTable:
    (folder / "4711").mkdir()
    (folder / "4711" / "cgroup").write_text(f"0::/system.slice/docker-{CONTAINER}.scope\n")
    return ProcessTable(folder)


async def one_task(watch: GpuWatch, load: Load, seconds: float) -> Busy:
    name = gpu_id(NODE, "GPU-00000000")
    load.percent = 50
    task = watch.start([name], "workspace", time.monotonic_ns())
    await trio.sleep(seconds)
    await watch.look_before_stop([name])
    return watch.stop(task, time.monotonic_ns())


@pytest.mark.parametrize("method", [Method.PROCESS, Method.DEVICE])
def test_a_task_is_metered_while_the_watch_runs(tmp_path: Path, method: Method) -> None:
    @trio_test
    async def story() -> None:
        driver = ScriptedDriver(survey(reading(0)), pids=(4711,))
        driver.device = [Sample(None, time.time_ns() // 1000 - n * 50_000, 0) for n in range(20, 0, -1)]
        if method is Method.DEVICE:
            driver.by_process = fault(FaultKind.UNSUPPORTED)
        load = Load(driver, 4711)
        around = Surroundings(holders=lambda: {CONTAINER: "workspace"})
        watch = a_watch(driver, surroundings=around, processes=a_process_in_the_container(tmp_path))
        await watch.look()
        assert watch.status()["gpus"][0]["metering"]["method"] == str(method)
        async with trio.open_nursery() as nursery:
            await nursery.start(watch.run)
            if method is Method.PROCESS:
                nursery.start_soon(load.run)
            else:
                nursery.start_soon(_only_device, load)
            for _ in range(3):  # again, where the device itself stood still for a time
                began = time.monotonic()
                busy = await one_task(watch, load, 1.5)
                assert busy.busy_ns / 1e9 < (time.monotonic() - began) / 2 + 0.05
                assert busy.method is method
                if busy.busy_ns / 1e9 > 0.55:
                    break
            await trio.sleep(0.6)
            looks = watch.status()["gpus"][0]["metering"]["looks"]
            await trio.sleep(0.4)
            assert watch.status()["gpus"][0]["metering"]["looks"] == looks, "nobody looks when no task runs"
            nursery.cancel_scope.cancel()
        assert busy.busy_ns / 1e9 > 0.55

    story()


async def _only_device(load: Load) -> None:
    while True:
        await trio.sleep(0.05)
        sample = Sample(None, time.time_ns() // 1000, load.percent)
        load.driver.device = (*tuple(load.driver.device)[-20:], sample)  # type: ignore[arg-type]


@trio_test
async def test_a_device_that_faults_under_a_task_leaves_it_unmetered() -> None:
    driver = ScriptedDriver(survey(reading(0)))
    async with watching(a_watch(driver)) as watch:
        name = gpu_id(NODE, "GPU-00000000")
        task = watch.start([name], "workspace", time.monotonic_ns())
        driver.by_process = DriverFault(FaultKind.LOST, "look", "fallen off the bus")
        await trio.sleep(0.8)
        await watch.look_before_stop([name])
        assert watch.stop(task, time.monotonic_ns()) == Busy(0, Method.NONE)


@trio_test
async def test_looking_costs_little(tmp_path: Path) -> None:
    """Of our own: what the driver takes is measured on a real one (`scripts/gpu-check`)."""
    driver = ScriptedDriver(survey(reading(0)))
    watch = a_watch(driver, processes=a_process_in_the_container(tmp_path))
    watch._pace = Pace(survey_s=60, again_s=60, round_s=60)
    async with watching(watch):
        driver.by_process = (Sample(4711, time.time_ns() // 1000 + 10**9, 50),)
        for _ in range(3):  # again, where caches were cold
            task = watch.start([gpu_id(NODE, "GPU-00000000")], "workspace", time.monotonic_ns())
            cpu = time.process_time()
            await trio.sleep(2)
            cpu_s = time.process_time() - cpu
            watch.stop(task, time.monotonic_ns())
            if cpu_s < 0.1:
                break
    assert cpu_s < 0.1, f"{cpu_s:.3f} s of CPU in 2 s"
    assert os.getpid()


def test_a_program_of_the_owners_that_grew_while_a_workspace_ran_withdraws_nothing(tmp_path: Path) -> None:
    for pid, group in ((7, "/user.slice"), (8, f"/system.slice/docker-{CONTAINER}.scope")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"0::{group}\n")
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) S 1 1 1 0 -1 4194304 0")
    held: set[str] = set()
    now_s = [1000.0]
    clocks = Clocks(monotonic_ns=lambda: int(now_s[0] * 1e9))

    @trio_test
    async def story() -> None:
        driver = ScriptedDriver(survey(reading(0)), {"GPU-00000000": Vitals(memory_used_bytes=0, processes=())})
        surroundings = Surroundings(held=lambda: held)
        watch = a_watch(driver, surroundings=surroundings, processes=ProcessTable(tmp_path), clocks=clocks)
        await watch.look()
        for pid, kept in ((7, set()), (8, {ConditionKind.MEMORY})):
            held.add("GPU-00000000")
            await watch._round()
            processes = (GpuProcess(pid, 9 * GIB),)
            driver.vitals["GPU-00000000"] = Vitals(memory_used_bytes=9 * GIB, processes=processes)
            held.clear()
            for _ in range(3):
                await watch._round()
                now_s[0] += 2 * POLICY.leftover_s
            assert conditions(watch, "GPU-00000000") == kept

    story()


def test_what_ran_in_a_container_is_not_the_owners_while_it_ends(tmp_path: Path) -> None:
    def says(group: str, state: str, flags: int) -> None:
        (tmp_path / "8" / "cgroup").write_text(f"4:memory:{group}\n")
        (tmp_path / "8" / "stat").write_text(f"8 (a) b) {state} 1 1 1 0 -1 {flags} 0")

    (tmp_path / "8").mkdir()
    watch = a_watch(ScriptedDriver(survey(reading(0))), processes=ProcessTable(tmp_path))
    driver = ScriptedDriver(survey(reading(0)), {"GPU-00000000": Vitals(processes=(GpuProcess(8, GIB),))})

    def owners() -> set[int]:
        return watch._round_of(["GPU-00000000"], driver)[1]

    says("/", "D", 0x400004)
    assert owners() == {8}, "nobody knows better"
    says(f"/docker/{CONTAINER}", "S", 0x400000)
    assert owners() == set()
    says("/", "D", 0x400004)  # killed, and version 1 says no more where it ran
    assert [owners(), owners()] == [set(), set()]
    says("/", "S", 0x400000)
    assert owners() == {8}, "another process by its number"
    says("/", "Z", 0x400004)
    assert owners() == set()


def test_devices_that_are_gone_are_looked_for_seldom_after_a_while_and_instances_forgotten() -> None:
    now_s = [1000.0]
    clocks = Clocks(monotonic_ns=lambda: int(now_s[0] * 1e9))
    watch = GpuWatch(ScriptedDriver(survey()), NODE, Changes(), clocks=clocks)
    gone = fault(FaultKind.GONE)

    def sees(*numbers: int, kind: str = "GPU") -> None:
        watch._take(of_survey(survey(*(reading(number, uuid=f"{kind}-{number}") for number in numbers))))
        for uuid in [uuid for uuid in watch._health if watch.inventory.gpu(uuid) is None]:
            watch._health[uuid].observe(gone, now_s[0])

    sees(0, 1)
    sees(0)
    assert not watch._is_settled(), "it may come back any moment"
    now_s[0] += 599
    assert not watch._is_settled()
    now_s[0] += 2
    sees(0)
    assert watch._is_settled()
    watch._take(of_fault(fault(FaultKind.NOT_LOADED)))
    assert not watch._is_settled(), "that is new"
    sees(0)
    assert watch.health("GPU-1") is not None, "it comes back after a clean check only"
    for number in range(5, 25):
        sees(number, kind="MIG")
    assert len(watch.status()["gone"]) == 2 + 19
    now_s[0] += 601
    sees(0)
    assert [one["uuid"] for one in watch.status()["gone"]] == ["GPU-1", "MIG-24"]
    for number in range(100, 400):
        sees(number)
    assert len(watch._health) <= MAX_GONE + 1
