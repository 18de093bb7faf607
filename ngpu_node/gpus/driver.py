"""What the node asks of the NVIDIA driver, in the node's own words.

The seam: `nvml.NvmlDriver` answers from a real machine, tests bring their own. Every method may block for seconds on a
sick card, so they are called through `calls.DriverCalls` only. Nothing here knows NVML's numbers.

A reading that a device does not have is None, never a made-up zero: an old card has no ECC, a MIG instance no clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class FaultKind(StrEnum):
    """Why the driver gave no answer."""

    NO_DRIVER = "no_driver"
    """The NVML library is not on this machine."""
    NOT_LOADED = "driver_not_loaded"
    """The library is there, the kernel module is not."""
    MISMATCH = "driver_mismatch"
    """Library and kernel module are of different versions: the driver was updated and not reloaded."""
    NO_PERMISSION = "no_permission"
    """This user may not talk to the driver."""
    LOST = "gpu_lost"
    """The device fell off the bus."""
    RESET_REQUIRED = "gpu_reset_required"
    """The device must be reset before it works again."""
    GONE = "gpu_gone"
    """The driver does not know that device (any more)."""
    STUCK = "driver_stuck"
    """A call did not return in time."""
    UNSUPPORTED = "not_supported"
    """This device or driver cannot tell."""
    NOTHING = "nothing_found"
    """There is no data for what was asked, such as no sample since the last."""
    OTHER = "driver_error"
    """Anything else; the text has the driver's words."""


class DriverFault(Exception):
    """The driver did not answer a call.

    Attributes:
        kind: why.
        call: what was asked, for people.
    """

    def __init__(self, kind: FaultKind, call: str, text: str) -> None:
        super().__init__(f"{text} ({call})")
        self.kind = kind
        self.call = call
        self.text = text


@dataclass(frozen=True, slots=True)
class PcieLink:
    """A device's PCIe link as it is trained now, and what device and slot could do."""

    generation: int
    width: int
    max_generation: int
    max_width: int


@dataclass(frozen=True, slots=True)
class MigInstance:
    """What makes a MIG instance: a slice of a device that workspaces see as a device of its own."""

    parent_uuid: str
    gpu_instance: int
    compute_instance: int
    profile: str = ""


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device as the driver describes it.

    Attributes:
        uuid: stable over restarts, re-ordering and other slots; `GPU-…`, or `MIG-…` for an instance.
        index: the driver's, good only until the next survey; for people who look at `nvidia-smi`.
        minor: the number of its `/dev/nvidia<n>`.
        memory_free_bytes: of *memory_total_bytes*, at the time of the survey.
        compute_capability: such as `9.0`.
        power_limit_w: what is enforced now.
        nvlinks: how many are up; None where the device has none.
        mig_enabled: None where it cannot; such a device itself cannot be used, its instances can.
        mig: set for an instance.
        sm_clock_mhz, memory_clock_mhz: at the time of the survey.
        display_attached: a monitor is connected to it.
        display_active: it drives a display, attached or not; memory is set aside for that.
    """

    uuid: str
    model: str
    memory_total_bytes: int
    memory_free_bytes: int
    index: int = 0
    minor: int | None = None
    pci_address: str = ""
    compute_capability: str = ""
    power_limit_w: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    max_memory_clock_mhz: int | None = None
    pcie: PcieLink | None = None
    nvlinks: int | None = None
    mig_enabled: bool | None = None
    mig: MigInstance | None = None
    ecc: bool | None = None
    persistence: bool | None = None
    display_attached: bool | None = None
    display_active: bool | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything the driver shows at one moment.

    Attributes:
        cuda_version: highest the driver supports, such as `13.0`.
        count: how many devices the driver says there are, before anyone judged that number.
        faults: devices that could not be described, by their index.
    """

    driver_version: str
    nvml_version: str
    cuda_version: str
    count: int
    devices: tuple[DeviceReading, ...] = ()
    faults: tuple[tuple[int, DriverFault], ...] = ()


class Throttle(StrEnum):
    """What holds a device's clocks down right now."""

    POWER_CAP = "power_cap"
    """It draws what its power limit allows: normal under load."""
    SW_THERMAL = "software_thermal"
    HW_THERMAL = "hardware_thermal"
    POWER_BRAKE = "power_brake"
    """The power supply asked for it."""
    HW_SLOWDOWN = "hardware_slowdown"


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with a context on a device; *memory_bytes* is None where the driver does not say."""

    pid: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Vitals:
    """What is looked at often.

    Attributes:
        ecc_uncorrected: errors since the driver was loaded.
        retired_pages_pending: a page waits for a reset to be taken out of use.
        rows_pending: a row waits for a reset to be remapped.
        rows_failed: the device has no spare row left for one it should remap.
        slowdown_celsius: where the device starts to protect itself.
        processes: None where the driver does not tell.
    """

    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    temperature_celsius: int | None = None
    slowdown_celsius: int | None = None
    throttles: frozenset[Throttle] = frozenset()
    ecc_uncorrected: int | None = None
    retired_pages_pending: bool | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    processes: tuple[GpuProcess, ...] | None = None


@dataclass(frozen=True, slots=True)
class XidEvent:
    """The driver reported error number *xid* of device *uuid*."""

    uuid: str
    xid: int


@dataclass(frozen=True, slots=True)
class Sample:
    """How busy a device was with one process (or with all).

    Attributes:
        pid: the process, None for the device as a whole.
        at_us: wall clock, microseconds: when the driver took it.
        percent: as the driver gives it, not yet judged.
    """

    pid: int | None
    at_us: int
    percent: float


@dataclass(frozen=True, slots=True)
class Look:
    """The answer to one look at a device's samples.

    Attributes:
        samples: since the time asked for; those of one process may be merged to their mean.
        wall_us: wall clock when the driver was asked.
        monotonic_ns: the monotonic clock at the same moment.
        continuous: the one sample is the exact mean of the time since the last look, as counters give it; else each
            stands for the driver's sampling period before it.
        pids: the processes with a context on the device, right after the samples; None where the driver does not tell,
            or was not asked.
    """

    samples: tuple[Sample, ...]
    wall_us: int
    monotonic_ns: int
    continuous: bool = False
    pids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The answers of one device to a round of vitals: the vitals, or why there are none."""

    uuid: str
    vitals: Vitals | None = None
    fault: DriverFault | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One round of looking at everything that belongs to health."""

    states: tuple[DeviceState, ...] = ()
    events: tuple[XidEvent, ...] = field(default=())


class Driver(Protocol):
    """What answers. All methods block, all raise `DriverFault`; none is called while another runs."""

    def open(self) -> None:
        """Get ready; harmless when ready already."""

    def close(self) -> None:
        """Let go of the library, so that a reloaded driver is found by the next `open`. Never raises."""

    def survey(self) -> Survey:
        """Describe every device."""

    def round(self, uuids: Sequence[str]) -> Round:
        """Read the vitals of *uuids* and the events since the last round; a device's fault stays with the device."""

    def process_look(self, uuid: str, since_us: int) -> Look:
        """Return the utilisation of processes on *uuid* after *since_us*."""

    def device_look(self, uuid: str, since_us: int) -> Look:
        """Return the utilisation of *uuid* as a whole after *since_us*, sample by sample, and who is on it."""

    def processes(self, uuid: str) -> tuple[int, ...] | None:
        """Return the processes with a context on *uuid*; None where the driver does not tell."""
