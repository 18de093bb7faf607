"""From vitals and events to the conditions of a device, and to whether it may serve.

Pure: readings and the monotonic time in, `DeviceHealth` changes. One object a device, kept by UUID for as long as the
daemon runs, also while the device is gone.

A device stops serving at the first sick condition. It serves again only after a clean check: no condition left for
`Policy.clean_s` over at least `Policy.clean_looks` looks, and then a survey made anew (`wants_check`, `checked`), since
a card that answers questions about its temperature may still have forgotten who it is. Conditions that are not sick
are shown to the owner and change nothing else.

    WELL ──condition──▶ SICK ──none left──▶ RECOVERING ──quiet, then a clean survey──▶ WELL
                          ◀────condition────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ngpu_node.gpus.driver import DriverFault, FaultKind, Throttle, Vitals
from ngpu_node.gpus.inventory import MAX_MEMORY_BYTES
from ngpu_node.gpus.xids import Blame, blame, in_words


class ConditionKind(StrEnum):
    """What is wrong, in a stable word."""

    LOST = "gpu_lost"
    RESET_REQUIRED = "gpu_reset_required"
    GONE = "gpu_gone"
    UNREADABLE = "unreadable"
    """The driver answers for other devices, not for this one."""
    DRIVER = "driver"
    """The driver answers for none."""
    XID = "xid"
    ECC = "ecc_uncorrected"
    PAGES_PENDING = "retired_pages_pending"
    ROWS_PENDING = "rows_pending"
    ROWS_FAILED = "rows_failed"
    HOT = "thermal_throttling"
    POWER = "power_brake"
    HELD_BACK = "hardware_slowdown"
    """The hardware halved its clocks or worse and does not say whether heat or power made it."""
    SLOWED = "slowed"
    MEMORY = "memory_not_returned"


class Phase(StrEnum):
    """Whether a device may serve."""

    WELL = "well"
    SICK = "sick"
    RECOVERING = "recovering"
    """Nothing is wrong any more, and it has not been so for long enough."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing wrong with a device.

    Attributes:
        detail: a sentence for the owner.
        sick: whether the device must not serve.
        since_s: monotonic time it was first seen.
    """

    kind: ConditionKind
    detail: str
    sick: bool
    since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How long things may last.

    Attributes:
        throttle_s: held back by heat or by the power supply for longer is a sickness; below it is a warm day.
        xid_quiet_s: how long an error of the device's own counts after it happened.
        leftover_bytes: memory that a stopped workspace may seem to keep (the driver's own bookkeeping varies).
        leftover_s: how long the driver may take to give it back.
    """

    clean_looks: int = 3
    clean_s: float = 30.0
    throttle_s: float = 20.0
    xid_quiet_s: float = 300.0
    leftover_bytes: int = 256 << 20
    leftover_s: float = 15.0


_FAULTS = {
    FaultKind.LOST: ConditionKind.LOST,
    FaultKind.RESET_REQUIRED: ConditionKind.RESET_REQUIRED,
    FaultKind.GONE: ConditionKind.GONE,
    FaultKind.STUCK: ConditionKind.DRIVER,
    FaultKind.NOT_LOADED: ConditionKind.DRIVER,
    FaultKind.MISMATCH: ConditionKind.DRIVER,
    FaultKind.NO_DRIVER: ConditionKind.DRIVER,
}


class DeviceHealth:
    """The health of one device.

    Attributes:
        phase: whether it may serve.
        conditions: what is wrong now, sick ones first.
        last_xids: the newest error numbers of any kind, newest last, at most 16.
    """

    def __init__(self, uuid: str, policy: Policy = Policy()) -> None:
        self.uuid = uuid
        self.phase = Phase.WELL
        self.conditions: tuple[Condition, ...] = ()
        self.last_xids: tuple[int, ...] = ()
        self._policy = policy
        self._last_s = 0.0
        self._clean_since_s: float | None = None
        self._clean_looks = 0
        self._throttled_since_s: dict[ConditionKind, float] = {}
        self._xid: tuple[int, float] | None = None
        self._baseline_bytes: int | None = None
        self._released_s: float | None = None
        self._held = False

    @property
    def serves(self) -> bool:
        """Whether the device may be offered and hold workspaces."""
        return self.phase is Phase.WELL

    @property
    def wants_check(self) -> bool:
        """Whether all has been quiet for long enough, so that a clean survey would make it well."""
        return (
            self.phase is Phase.RECOVERING
            and self._clean_looks >= self._policy.clean_looks
            and self._quiet_s >= self._policy.clean_s
        )

    @property
    def reason(self) -> str:
        """Why it does not serve, empty when it does."""
        if self.phase is Phase.WELL:
            return ""
        sick = [condition.detail for condition in self.conditions if condition.sick]
        return "; ".join(sick) if sick else "was sick, waits for a clean check"

    def observe(
        self,
        reading: Vitals | DriverFault,
        now_s: float,
        *,
        xids: Iterable[int] = (),
        held: bool = False,
        owners_bytes: int = 0,
    ) -> bool:
        """Take in one look at the device; return whether its phase or its conditions changed.

        Args:
            reading: what the device said, or why nothing can be had of it.
            xids: the errors the driver reported of it since the last look.
            held: whether a workspace has the device now.
            owners_bytes: memory of programs that run in no container: what they take is not what a workspace left.
        """
        self._note_xids(xids, now_s)
        found = self._found(reading, now_s, held, owners_bytes)
        before = {condition.kind: condition for condition in self.conditions}
        now = tuple(
            replace(condition, since_s=before[condition.kind].since_s if condition.kind in before else now_s)
            for condition in sorted(found, key=lambda condition: not condition.sick)
        )
        changed = [(c.kind, c.sick) for c in now] != [(c.kind, c.sick) for c in self.conditions]
        self.conditions = now
        return self._step(now_s) or changed

    def checked(self, problem: str = "") -> bool:
        """Take in the result of the survey that was wanted; return whether the device serves again.

        Args:
            problem: why the check failed; empty when the device was described in full.
        """
        if self.phase is not Phase.RECOVERING:
            return False
        if problem:
            self._clean_since_s, self._clean_looks = None, 0
            return False
        self.phase = Phase.WELL
        return True

    # -- what is wrong -------------------------------------------------------------------------------------------------

    def _note_xids(self, xids: Iterable[int], now_s: float) -> None:
        for xid in xids:
            self.last_xids = (*self.last_xids, xid)[-16:]
            if blame(xid) is Blame.DEVICE:
                self._xid = (xid, now_s)

    def _found(self, reading: Vitals | DriverFault, now_s: float, held: bool, owners_bytes: int) -> list[Condition]:
        found: list[Condition] = []
        if self._xid is not None:
            xid, at_s = self._xid
            if now_s - at_s < self._policy.xid_quiet_s:
                found.append(Condition(ConditionKind.XID, f"the driver reported {in_words(xid)}", True))
            else:
                self._xid = None
        if isinstance(reading, DriverFault):
            kind = _FAULTS.get(reading.kind, ConditionKind.UNREADABLE)
            found.append(Condition(kind, reading.text, True))
            self._held = held or self._held
            return found
        reading = believable(reading)
        found += _of_memory_cells(reading)
        found += self._of_throttling(reading, now_s)
        found += self._of_memory(reading, now_s, held, owners_bytes)
        return found

    def _of_throttling(self, vitals: Vitals, now_s: float) -> list[Condition]:
        found: list[Condition] = []
        causes = {
            ConditionKind.HOT: (Throttle.HW_THERMAL, "its clocks are held down by heat", True),
            ConditionKind.POWER: (Throttle.POWER_BRAKE, "its clocks are held down by the power supply", True),
            ConditionKind.HELD_BACK: (Throttle.HW_SLOWDOWN, "its clocks are held down by heat or power", True),
            ConditionKind.SLOWED: (Throttle.SW_THERMAL, "it runs slower to stay below its temperature limit", False),
        }
        throttles = vitals.throttles
        if throttles & {Throttle.HW_THERMAL, Throttle.POWER_BRAKE}:
            throttles -= {Throttle.HW_SLOWDOWN}  # which says the same once more
        for kind, (throttle, words, sick) in causes.items():
            if throttle not in throttles:
                self._throttled_since_s.pop(kind, None)
                continue
            since_s = self._throttled_since_s.setdefault(kind, now_s)
            at = f" ({vitals.temperature_celsius} °C)" if vitals.temperature_celsius is not None else ""
            if now_s - since_s >= self._policy.throttle_s:
                found.append(Condition(kind, words + at, sick))
        limit = vitals.slowdown_celsius
        known = any(condition.kind is ConditionKind.HOT for condition in found)
        if limit and not known and vitals.temperature_celsius is not None and vitals.temperature_celsius >= limit:
            words = f"at {vitals.temperature_celsius} °C it is past its limit of {limit} °C"
            found.append(Condition(ConditionKind.HOT, words, True))
        return found

    def _of_memory(self, vitals: Vitals, now_s: float, held: bool, owners_bytes: int) -> list[Condition]:
        """Find memory that a workspace left behind: more in use than before it came, a while after it went."""
        used = vitals.memory_used_bytes
        if held:
            self._held, self._released_s = True, None
            return []
        if used is None:
            return []
        used = max(0, used - owners_bytes)
        if self._held:
            self._held, self._released_s = False, now_s
        if self._released_s is None or self._baseline_bytes is None:
            self._baseline_bytes, self._released_s = used, None
            return []
        left = used - self._baseline_bytes
        if left <= self._policy.leftover_bytes:
            self._released_s = None
            return []
        if now_s - self._released_s < self._policy.leftover_s:
            return []
        keepers = ", ".join(str(process.pid) for process in vitals.processes or ())
        by = f" (processes {keepers} are on the device)" if keepers else ""
        words = f"{left >> 20} MiB were not given back after a workspace stopped{by}"
        return [Condition(ConditionKind.MEMORY, words, True)]

    # -- what follows --------------------------------------------------------------------------------------------------

    @property
    def _quiet_s(self) -> float:
        return 0.0 if self._clean_since_s is None else self._last_s - self._clean_since_s

    def _step(self, now_s: float) -> bool:
        before = self.phase
        self._last_s = now_s
        if any(condition.sick for condition in self.conditions):
            self.phase, self._clean_since_s, self._clean_looks = Phase.SICK, None, 0
        elif self.phase is not Phase.WELL:
            self.phase = Phase.RECOVERING
            if self._clean_since_s is None:
                self._clean_since_s = now_s
            self._clean_looks += 1
        return self.phase is not before


def believable(vitals: Vitals) -> Vitals:
    """Return *vitals* without readings no device can have, as drivers give them for "not known" (all bits set) or after
    a counter went below nothing: they say nothing, least of all that the device is sick.
    """
    used, free = vitals.memory_used_bytes, vitals.memory_free_bytes
    celsius, errors = vitals.temperature_celsius, vitals.ecc_uncorrected
    return replace(
        vitals,
        memory_used_bytes=used if used is not None and 0 <= used <= MAX_MEMORY_BYTES else None,
        memory_free_bytes=free if free is not None and 0 <= free <= MAX_MEMORY_BYTES else None,
        temperature_celsius=celsius if celsius is not None and -50 <= celsius <= 250 else None,
        ecc_uncorrected=errors if errors is not None and 0 <= errors < (1 << 32) - 1 else None,
    )


def _of_memory_cells(vitals: Vitals) -> list[Condition]:
    found: list[Condition] = []
    if vitals.ecc_uncorrected:
        words = f"{vitals.ecc_uncorrected} uncorrectable memory errors since the driver was loaded: reset the GPU"
        found.append(Condition(ConditionKind.ECC, words, True))
    pending: Sequence[tuple[bool | None, ConditionKind, str]] = (
        (vitals.retired_pages_pending, ConditionKind.PAGES_PENDING, "a memory page waits to be retired: reset the GPU"),
        (vitals.rows_pending, ConditionKind.ROWS_PENDING, "a memory row waits to be remapped: reset the GPU"),
        (vitals.rows_failed, ConditionKind.ROWS_FAILED, "it has no spare memory row left: have it replaced"),
    )
    found += [Condition(kind, words, True) for is_so, kind, words in pending if is_so]
    return found
