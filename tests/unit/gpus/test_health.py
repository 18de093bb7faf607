"""When a device may serve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ngpu_node.gpus.driver import DriverFault, FaultKind, GpuProcess, Throttle, Vitals
from ngpu_node.gpus.health import ConditionKind, DeviceHealth, Phase, Policy
from ngpu_node.gpus.xids import Blame, blame, in_words
from tests.support.scripted_driver import fault

WELL = Vitals(memory_used_bytes=0, temperature_celsius=40, slowdown_celsius=89, ecc_uncorrected=0, processes=())
GIB = 2**30


class Device:
    """A device under observation every second."""

    def __init__(self) -> None:
        self.health = DeviceHealth("GPU-1", Policy(clean_looks=3, clean_s=10, xid_quiet_s=60))
        self.now_s = 1000.0

    def sees(
        self,
        reading: Vitals | DriverFault = WELL,
        *,
        seconds: int = 1,
        xids: tuple[int, ...] = (),
        held: bool = False,
        owners_bytes: int = 0,
    ) -> DeviceHealth:
        for _ in range(seconds):
            self.now_s += 1
            self.health.observe(reading, self.now_s, xids=xids, held=held, owners_bytes=owners_bytes)
        return self.health

    @property
    def kinds(self) -> list[ConditionKind]:
        return [condition.kind for condition in self.health.conditions]


def test_a_device_without_conditions_serves() -> None:
    health = Device().sees()
    assert (health.phase, health.conditions, health.reason) == (Phase.WELL, (), "")
    assert health.serves


@pytest.mark.parametrize(
    ("reading", "kind"),
    [
        (replace(WELL, ecc_uncorrected=1), ConditionKind.ECC),
        (replace(WELL, retired_pages_pending=True), ConditionKind.PAGES_PENDING),
        (replace(WELL, rows_pending=True), ConditionKind.ROWS_PENDING),
        (replace(WELL, rows_failed=True), ConditionKind.ROWS_FAILED),
        (replace(WELL, temperature_celsius=89), ConditionKind.HOT),
        (fault(FaultKind.LOST, "fallen off"), ConditionKind.LOST),
        (fault(FaultKind.RESET_REQUIRED, "reset it"), ConditionKind.RESET_REQUIRED),
        (fault(FaultKind.GONE, "gone"), ConditionKind.GONE),
        (fault(FaultKind.STUCK, "stuck"), ConditionKind.DRIVER),
        (fault(FaultKind.NOT_LOADED, "unloaded"), ConditionKind.DRIVER),
        (fault(FaultKind.OTHER, "Unknown Error"), ConditionKind.UNREADABLE),
    ],
)
def test_a_sick_device_stops_serving_at_the_first_look(reading: Vitals | DriverFault, kind: ConditionKind) -> None:
    device = Device()
    device.sees()
    health = device.sees(reading)
    assert device.kinds == [kind]
    assert health.phase is Phase.SICK
    assert not health.serves
    assert health.reason


def test_it_serves_again_only_after_quiet_and_a_clean_survey() -> None:
    device = Device()
    device.sees(fault(FaultKind.LOST, "fallen off"))
    health = device.sees(seconds=10)
    assert health.phase is Phase.RECOVERING
    assert not health.wants_check
    assert "clean check" in health.reason
    assert device.sees().wants_check
    assert not health.checked("not described")
    assert not health.serves
    assert not health.wants_check, "a failed check begins the quiet anew"
    assert device.sees(seconds=11).wants_check
    assert health.checked()
    assert health.serves


def test_a_condition_during_recovery_begins_it_anew() -> None:
    device = Device()
    device.sees(fault(FaultKind.LOST))
    device.sees(seconds=9)
    device.sees(fault(FaultKind.OTHER))
    assert device.health.phase is Phase.SICK
    assert not device.sees(seconds=10).wants_check
    assert not device.health.checked() or device.health.serves


def test_an_error_of_the_device_counts_for_a_while() -> None:
    device = Device()
    health = device.sees(xids=(79,))
    assert device.kinds == [ConditionKind.XID]
    assert "79" in health.reason
    assert "bus" in health.reason
    device.sees(seconds=59)
    assert health.phase is Phase.SICK
    device.sees()
    assert health.phase is Phase.RECOVERING
    assert health.last_xids == (79,)


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 63, 94])
def test_a_workspaces_own_errors_do_not_withdraw_the_device(xid: int) -> None:
    health = Device().sees(xids=(xid,))
    assert health.serves
    assert health.last_xids == (xid,)


def test_an_unknown_error_counts_against_the_device() -> None:
    assert blame(31) is Blame.WORKSPACE
    assert blame(4711) is Blame.DEVICE
    assert in_words(4711) == "Xid 4711"
    assert "bus" in in_words(79)


def test_throttling_by_heat_counts_when_it_lasts() -> None:
    device = Device()
    hot = replace(WELL, throttles=frozenset({Throttle.HW_THERMAL}), temperature_celsius=88)
    assert device.sees(hot, seconds=20).serves
    health = device.sees(hot)
    assert device.kinds == [ConditionKind.HOT]
    assert "88 °C" in health.reason


def test_a_card_whose_hardware_slows_it_and_does_not_say_why_counts_too() -> None:
    device = Device()
    slow = replace(WELL, throttles=frozenset({Throttle.HW_SLOWDOWN}))
    assert device.sees(slow, seconds=21).phase is Phase.SICK
    assert [condition.kind for condition in device.health.conditions] == [ConditionKind.HELD_BACK]
    both = replace(WELL, throttles=frozenset({Throttle.HW_SLOWDOWN, Throttle.POWER_BRAKE}))
    device.sees(both, seconds=21)
    assert [condition.kind for condition in device.health.conditions] == [ConditionKind.POWER]


def test_throttling_that_comes_and_goes_does_not_count() -> None:
    device = Device()
    for _ in range(10):
        device.sees(replace(WELL, throttles=frozenset({Throttle.POWER_BRAKE})), seconds=15)
        assert device.sees().serves


def test_the_power_supplys_brake_counts_and_the_power_cap_does_not() -> None:
    device = Device()
    assert device.sees(replace(WELL, throttles=frozenset({Throttle.POWER_CAP})), seconds=100).conditions == ()
    device.sees(replace(WELL, throttles=frozenset({Throttle.POWER_BRAKE})), seconds=21)
    assert device.kinds == [ConditionKind.POWER]
    assert not device.health.serves


def test_slowing_to_stay_cool_is_shown_and_serves() -> None:
    device = Device()
    health = device.sees(replace(WELL, throttles=frozenset({Throttle.SW_THERMAL})), seconds=30)
    assert device.kinds == [ConditionKind.SLOWED]
    assert health.serves


def test_memory_a_workspace_left_behind_withdraws_the_device_until_it_is_back() -> None:
    device = Device()
    device.sees(replace(WELL, memory_used_bytes=GIB))  # the owner's own desktop
    device.sees(replace(WELL, memory_used_bytes=60 * GIB), seconds=50, held=True)
    left = replace(WELL, memory_used_bytes=3 * GIB, processes=(GpuProcess(4711, 2 * GIB),))
    assert device.sees(left, seconds=15).serves, "the driver may take a while"
    health = device.sees(left)
    assert device.kinds == [ConditionKind.MEMORY]
    assert "2048 MiB" in health.reason
    assert "4711" in health.reason
    device.sees(replace(WELL, memory_used_bytes=GIB), seconds=11)
    assert health.wants_check


def test_what_the_owners_own_programs_take_meanwhile_is_not_what_a_workspace_left() -> None:
    device = Device()
    device.sees(replace(WELL, memory_used_bytes=2 * GIB), owners_bytes=2 * GIB)
    device.sees(replace(WELL, memory_used_bytes=60 * GIB), seconds=50, held=True, owners_bytes=2 * GIB)
    # he began a game
    assert device.sees(replace(WELL, memory_used_bytes=9 * GIB), seconds=60, owners_bytes=9 * GIB).serves
    device.sees(replace(WELL, memory_used_bytes=60 * GIB), seconds=50, held=True, owners_bytes=9 * GIB)
    # and ended it: what the workspace keeps is as much, and shows all the same
    device.sees(replace(WELL, memory_used_bytes=9 * GIB), seconds=17)
    assert device.kinds == [ConditionKind.MEMORY]


def test_memory_that_was_in_use_before_is_nobodys_fault() -> None:
    device = Device()
    device.sees(replace(WELL, memory_used_bytes=5 * GIB), held=True)  # adopted after a restart
    assert device.sees(replace(WELL, memory_used_bytes=4 * GIB), seconds=60).serves
    device.sees(held=True)
    assert device.sees(replace(WELL, memory_used_bytes=4 * GIB), seconds=60).serves


def test_a_device_without_such_readings_serves() -> None:
    assert Device().sees(Vitals()).serves


def test_what_changed_is_told_once() -> None:
    health = DeviceHealth("GPU-1")
    assert not health.observe(WELL, 1.0)
    assert health.observe(fault(FaultKind.LOST), 2.0)
    assert not health.observe(fault(FaultKind.LOST), 3.0)
    assert health.conditions[0].since_s == 2.0
    assert health.observe(WELL, 4.0)


@pytest.mark.parametrize("absurd", [(1 << 64) - 1, (1 << 32) - 1, -5])
def test_readings_that_no_device_can_have_say_nothing(absurd: int) -> None:
    device = Device()
    wrong = replace(WELL, memory_used_bytes=absurd << 30, temperature_celsius=absurd, ecc_uncorrected=absurd)
    device.sees(WELL, seconds=3, held=True)
    assert device.sees(wrong, seconds=60).phase is Phase.WELL
    assert device.health.conditions == ()


def test_errors_counted_anew_after_a_reload_are_errors_all_the_same() -> None:
    device = Device()
    assert device.sees(replace(WELL, ecc_uncorrected=7)).phase is Phase.SICK
    assert device.sees(replace(WELL, ecc_uncorrected=0)).phase is Phase.RECOVERING
    assert device.sees(replace(WELL, ecc_uncorrected=1)).phase is Phase.SICK
