"""NVML as nvidia-ml-py speaks it, with a library that answers from a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpu_node.gpus.driver import DriverFault, FaultKind, Throttle
from ngpu_node.gpus.inventory import InventoryState, of_fault, of_survey
from ngpu_node.gpus.nvml import NvmlDriver
from tests.support.fake_nvml import FakeNvml, load

pytestmark = pytest.mark.needs_gcc

FIRST, SECOND = (f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in range(2))
T = 1_700_000_000_000_000


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FakeNvml]:
    fake = FakeNvml(tmp_path / "nvml", gpus=2)
    with load(fake.path):
        yield fake


@pytest.fixture
def driver(machine: FakeNvml) -> Iterator[NvmlDriver]:
    nvml = NvmlDriver()
    yield nvml
    nvml.close()


def opened(driver: NvmlDriver) -> NvmlDriver:
    driver.open()
    return driver


def test_a_device_is_described_in_full(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set(0, nvlinks=4, memory_used=10 << 30, ecc=0)
    survey = opened(driver).survey()
    assert (survey.driver_version, survey.cuda_version, survey.count, survey.faults) == ("580.159.04", "13.0", 2, ())
    first, second = survey.devices
    assert (first.uuid, first.model, first.index, first.minor) == (FIRST, "NVIDIA H200", 0, 0)
    assert (first.memory_total_bytes, first.memory_free_bytes) == (150_754_820_096, 150_754_820_096 - (10 << 30))
    assert (first.pci_address, second.pci_address) == ("0000:00:00.0", "0000:01:00.0")
    assert (first.compute_capability, first.power_limit_w, first.max_sm_clock_mhz) == ("9.0", 700.0, 1980)
    assert first.pcie is not None
    assert (first.pcie.generation, first.pcie.width) == (5, 16)
    assert (first.nvlinks, second.nvlinks) == (4, None)
    assert (first.mig_enabled, first.ecc, first.persistence) == (False, False, True)
    assert (first.display_attached, first.display_active) == (False, False)


def test_an_old_card_lacks_readings_and_is_described_all_the_same(machine: FakeNvml, driver: NvmlDriver) -> None:
    names = ("mig", "ecc", "power_limit_mw", "pcie_width", "persistence", "display", "max_clock", "minor")
    machine.set(0, **dict.fromkeys(names))
    device = opened(driver).survey().devices[0]
    assert (device.mig_enabled, device.ecc, device.power_limit_w, device.pcie) == (None, None, None, None)
    assert of_survey(driver.survey()).state is InventoryState.OK


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (9, FaultKind.NOT_LOADED),
        (18, FaultKind.MISMATCH),
        (4, FaultKind.NO_PERMISSION),
        (12, FaultKind.NO_DRIVER),
        (999, FaultKind.OTHER),
    ],
)
def test_a_driver_that_does_not_start_says_why(
    machine: FakeNvml, driver: NvmlDriver, code: int, kind: FaultKind
) -> None:
    machine.set_machine(init=code)
    with pytest.raises(DriverFault) as caught:
        driver.open()
    assert caught.value.kind is kind
    assert of_fault(caught.value).reason
    machine.set_machine(init=0)
    if kind is not FaultKind.MISMATCH:  # then the library is unloaded, and the test's own is not where pynvml looks
        driver.open()
        assert driver.survey().count == 2


def test_a_mismatch_has_the_library_loaded_anew(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set_machine(init=18)
    with pytest.raises(DriverFault):
        driver.open()
    driver.close()
    machine.set_machine(init=0)
    driver.open()
    assert driver.survey().count == 2


def test_no_library_is_a_fault_too() -> None:
    # in a process of its own: here the fake stays loaded
    code = "from ngpu_node.gpus.nvml import NvmlDriver\ntry: NvmlDriver().open()\nexcept Exception as e: print(e.kind)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert shown.stdout.strip() == ("no_driver" if not Path("/dev/nvidiactl").exists() else "")


def test_an_absurd_count_is_not_walked_through(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set_machine(count=2**32 - 1)
    survey = opened(driver).survey()
    assert survey.count == 2**32 - 1
    assert of_survey(survey).state is InventoryState.ABSURD


def test_a_lost_card_leaves_the_others(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set(0, error=15)
    survey = opened(driver).survey()
    assert [device.uuid for device in survey.devices] == [SECOND]
    ((index, fault),) = survey.faults
    assert (index, fault.kind) == (0, FaultKind.LOST)


def test_mig_instances_are_devices_of_their_own(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set(0, mig=1, mig_places=7, gpm=1)
    for place, instance in ((0, 7), (3, 9)):
        machine.set(
            0,
            **{
                f"mig{place}__uuid": f"MIG-{instance}",
                f"mig{place}__name": "NVIDIA H200 MIG 1g.18gb",
                f"mig{place}__memory_total": 18 << 30,
                f"mig{place}__gpu_instance": instance,
                f"mig{place}__compute_instance": 0,
                f"mig{place}__percent": 10.5 * instance,
            },
        )
    machine.add("gpu0.mig3.process 4711 100")
    survey = opened(driver).survey()
    assert [device.uuid for device in survey.devices] == [FIRST, "MIG-7", "MIG-9", SECOND]
    instance = survey.devices[2]
    assert instance.mig is not None
    assert (instance.mig.parent_uuid, instance.mig.gpu_instance, instance.mig.profile) == (FIRST, 9, "1g.18gb")
    assert instance.memory_total_bytes == 18 << 30
    first = driver.device_look("MIG-9", 0)
    assert (first.continuous, first.samples) == (True, ())
    look = driver.device_look("MIG-9", first.wall_us)
    assert (look.continuous, look.samples[0].percent, look.pids) == (True, 94.5, (4711,))
    # nobody looked for a while: the mean since the last look says nothing of the time that is asked about
    assert driver.device_look("MIG-9", look.wall_us + 1).samples == ()
    machine.set(0, gpm=0)
    with pytest.raises(DriverFault) as caught:
        driver.device_look("MIG-9", 0)
    assert caught.value.kind is FaultKind.UNSUPPORTED


def test_vitals_are_read(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set(
        0,
        temperature=91,
        clocks_event_reasons=0x04 | 0x40 | 0x08,
        ecc_uncorrected=3,
        rows_pending=1,
        retired_pages_pending=1,
        memory_used=123,
    )
    machine.add("gpu0.process 4711 1048576")
    machine.add("gpu0.drawing 4712 100")
    (state, other) = opened(driver).round([FIRST, SECOND]).states
    assert state.vitals is not None
    assert other.vitals is not None
    assert (state.vitals.temperature_celsius, state.vitals.slowdown_celsius) == (91, 89)
    assert state.vitals.throttles == {Throttle.POWER_CAP, Throttle.HW_THERMAL, Throttle.HW_SLOWDOWN}
    assert (state.vitals.ecc_uncorrected, state.vitals.rows_pending, state.vitals.rows_failed) == (3, True, False)
    assert state.vitals.retired_pages_pending is True
    assert {process.pid for process in state.vitals.processes or ()} == {4711, 4712}
    assert other.vitals.retired_pages_pending is None
    assert other.vitals.throttles == frozenset()


def test_errors_are_reported_once_each(machine: FakeNvml, driver: NvmlDriver) -> None:
    opened(driver).round([FIRST, SECOND])
    machine.add("gpu0.xid 1 31")
    machine.add("gpu1.xid 1 79")
    machine.add("gpu0.xid 2 48")
    events = driver.round([FIRST, SECOND]).events
    assert [(event.uuid, event.xid) for event in events] == [(FIRST, 31), (FIRST, 48), (SECOND, 79)]
    assert driver.round([FIRST, SECOND]).events == ()


def test_errors_around_an_opening_anew_are_reported_too(machine: FakeNvml, driver: NvmlDriver) -> None:
    opened(driver).round([FIRST, SECOND])
    machine.add("gpu0.xid 1 79")
    driver.close()
    opened(driver).survey()
    machine.add("gpu1.xid 1 48")
    events = driver.round([FIRST, SECOND]).events
    assert [(event.uuid, event.xid) for event in events] == [(FIRST, 79), (SECOND, 48)]
    assert driver.round([FIRST, SECOND]).events == ()


def test_a_device_that_comes_back_with_another_index_is_found_by_its_uuid(
    machine: FakeNvml, driver: NvmlDriver
) -> None:
    opened(driver).survey()
    lost = machine.gpus.pop(0)
    machine.write()
    (state,) = driver.round([FIRST]).states
    assert state.fault is not None
    machine.gpus.append(lost)
    machine.set(1, temperature=55)
    (state,) = driver.round([FIRST]).states
    assert state.vitals is not None
    assert state.vitals.temperature_celsius == 55
    assert [device.index for device in driver.survey().devices] == [0, 1]


def test_samples_are_asked_for_from_a_time_on(machine: FakeNvml, driver: NvmlDriver) -> None:
    for tick in range(10):
        machine.add(f"gpu0.sample {T + tick * 200_000} {4711 if tick % 2 else 4712} {10 * tick}")
    look = opened(driver).process_look(FIRST, T + 800_000)
    assert {(s.pid, s.at_us - T, s.percent) for s in look.samples} == {(4711, 1_800_000, 42), (4712, 1_600_000, 28)}
    assert driver.process_look(FIRST, T + 1_800_000).samples == ()
    assert [s.percent for s in driver.device_look(FIRST, T + 1_400_000).samples] == [80, 90]
    assert driver.device_look(FIRST, T + 1_800_000).samples == ()
    machine.add("dead 4711")
    assert {s.pid for s in driver.process_look(FIRST, T).samples} == {4712}


def test_a_driver_without_samples_of_processes_says_so(machine: FakeNvml, driver: NvmlDriver) -> None:
    machine.set(0, fail__nvmlDeviceGetProcessUtilization=3)
    with pytest.raises(DriverFault) as caught:
        opened(driver).process_look(FIRST, 0)
    assert caught.value.kind is FaultKind.UNSUPPORTED


def test_a_reloaded_driver_is_found_by_opening_anew(machine: FakeNvml, driver: NvmlDriver) -> None:
    opened(driver).survey()
    machine.set_machine(generation=2)
    with pytest.raises(DriverFault):
        driver.survey()
    assert driver.round([FIRST]).states[0].fault is not None
    driver.close()
    assert opened(driver).survey().count == 2
    assert driver.round([FIRST]).states[0].vitals is not None
