"""The NVIDIA driver through NVML: surveys, vitals and samples of a real machine.

All of it blocks; see `calls`. What was learnt from a real driver (580, H200; `tests/bench/gpu_samples.py` records it
anew):

- `nvmlDeviceGetProcessUtilization` takes 1.5 ms of CPU, as `nvmlDeviceGetSamples` does: the driver waits busily for the
  card's own processor.
- It answers NOT_FOUND for "nothing since then", and forgets the samples of a process that has ended.
- The total energy takes 10 ms of CPU, the PCIe throughput 20 ms: neither is asked.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import pynvml  # type: ignore[import-untyped]

from ngpu_node.gpus.driver import (
    DeviceReading,
    DeviceState,
    DriverFault,
    FaultKind,
    GpuProcess,
    Look,
    MigInstance,
    PcieLink,
    Round,
    Sample,
    Survey,
    Throttle,
    Vitals,
    XidEvent,
)
from ngpu_node.gpus.nvml_session import DEVICE_FAULTS, NvmlSession, flag, text

#: Asking for more devices than any machine has would only take long; `inventory` refuses such a count.
MAX_ASKED = 128
MAX_EVENTS = 256
MAX_NVLINKS = 18

_THROTTLES = {
    0x04: Throttle.POWER_CAP,
    0x08: Throttle.HW_SLOWDOWN,
    0x20: Throttle.SW_THERMAL,
    0x40: Throttle.HW_THERMAL,
    0x80: Throttle.POWER_BRAKE,
}
_FIRST_ROOM = 128
_MOST_ROOM = 1 << 16
_NOT_AVAILABLE = (1 << 64) - 1


class NvmlDriver:
    """The `driver.Driver` of a real machine."""

    def __init__(self) -> None:
        self._nvml = NvmlSession()
        self._events: Any = None
        self._watched: set[str] = set()
        self._room = _FIRST_ROOM
        self._counters: dict[str, tuple[Any, int]] = {}
        self._late: tuple[XidEvent, ...] = ()

    def open(self) -> None:
        """Load and initialise the library (`driver.Driver.open`)."""
        self._nvml.open()

    def close(self) -> None:
        """Shut the library down, and unload it where it did not fit the kernel module (`driver.Driver.close`)."""
        for sample, _ in self._counters.values():
            self._nvml.quietly("nvmlGpmSampleFree", sample)
        # Else an error between two rounds would be lost with the set, and the library is opened anew often while any
        # device is sick.
        self._late = (*self._late, *self._news())[-MAX_EVENTS:]
        if self._events is not None:
            self._nvml.quietly("nvmlEventSetFree", self._events)
        self._counters, self._events, self._watched = {}, None, set()
        self._nvml.close()

    # -- survey --------------------------------------------------------------------------------------------------------

    def survey(self) -> Survey:
        """Describe every device (`driver.Driver.survey`)."""
        ask = self._nvml.ask
        self._nvml.forget()
        cuda = int(ask("nvmlSystemGetCudaDriverVersion_v2"))
        driver_version, nvml_version = (
            text(ask("nvmlSystemGetDriverVersion")),
            text(ask("nvmlSystemGetNVMLVersion")),
        )
        count = int(ask("nvmlDeviceGetCount"))
        devices: list[DeviceReading] = []
        faults: list[tuple[int, DriverFault]] = []
        for index in range(min(count, MAX_ASKED)):
            # One lost card must not hide the others.
            try:
                devices += self._describe(index, ask("nvmlDeviceGetHandleByIndex", index))
            except DriverFault as fault:
                faults.append((index, fault))
        for device in devices:
            # Not only at the next round: after the library was opened anew nobody listens.
            try:
                self._watch(device.uuid)
            except DriverFault as fault:
                self._faulted(device.uuid, fault)
        return Survey(
            driver_version=driver_version,
            nvml_version=nvml_version,
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}",
            count=count,
            devices=tuple(devices),
            faults=tuple(faults),
        )

    def _describe(self, index: int, handle: Any) -> list[DeviceReading]:
        may = self._nvml.may
        uuid, model, total, free = self._named(handle)
        capability = may("CudaComputeCapability", handle)
        limit = may("EnforcedPowerLimit", handle)
        pci = may("PciInfo", handle)
        device = DeviceReading(
            uuid=uuid,
            model=model,
            memory_total_bytes=total,
            memory_free_bytes=free,
            index=index,
            minor=may("MinorNumber", handle),
            pci_address=text(pci.busId).lower().removeprefix("0000") if pci is not None else "",
            compute_capability=f"{capability[0]}.{capability[1]}" if capability is not None else "",
            power_limit_w=limit / 1000 if limit is not None else None,
            sm_clock_mhz=may("ClockInfo", handle, pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=may("ClockInfo", handle, pynvml.NVML_CLOCK_MEM),
            max_sm_clock_mhz=may("MaxClockInfo", handle, pynvml.NVML_CLOCK_SM),
            max_memory_clock_mhz=may("MaxClockInfo", handle, pynvml.NVML_CLOCK_MEM),
            pcie=self._pcie(handle),
            nvlinks=self._nvlinks(handle),
            mig_enabled=flag(may("MigMode", handle)),
            ecc=flag(may("EccMode", handle)),
            persistence=flag(may("PersistenceMode", handle)),
            display_attached=flag(may("DisplayMode", handle)),
            display_active=flag(may("DisplayActive", handle)),
        )
        return [device, *self._instances(device, handle)] if device.mig_enabled else [device]

    def _instances(self, device: DeviceReading, parent: Any) -> list[DeviceReading]:
        found: list[DeviceReading] = []
        for number in range(self._nvml.may("MaxMigDeviceCount", parent) or 0):
            try:
                handle = self._nvml.ask("nvmlDeviceGetMigDeviceHandleByIndex", parent, number)
            except DriverFault as fault:
                if fault.kind in (FaultKind.NOTHING, FaultKind.GONE):
                    continue  # places are numbered whether or not an instance is in them
                raise
            uuid, model, total, free = self._named(handle)
            found.append(
                DeviceReading(
                    uuid=uuid,
                    model=model,
                    memory_total_bytes=total,
                    memory_free_bytes=free,
                    index=device.index,
                    minor=device.minor,
                    pci_address=device.pci_address,
                    compute_capability=device.compute_capability,
                    mig=MigInstance(
                        parent_uuid=device.uuid,
                        gpu_instance=self._nvml.may("GpuInstanceId", handle) or 0,
                        compute_instance=self._nvml.may("ComputeInstanceId", handle) or 0,
                        profile=model.rpartition("MIG ")[2] if "MIG " in model else "",
                    ),
                    ecc=device.ecc,
                    persistence=device.persistence,
                )
            )
        return found

    def _named(self, handle: Any) -> tuple[str, str, int, int]:
        uuid = text(self._nvml.ask("nvmlDeviceGetUUID", handle))
        model = text(self._nvml.ask("nvmlDeviceGetName", handle))
        total, free, _ = self._memory(handle)
        self._nvml.learn(uuid, handle)
        return uuid, model, total, free

    def _pcie(self, handle: Any) -> PcieLink | None:
        names = ("CurrPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkGeneration", "MaxPcieLinkWidth")
        values = [self._nvml.may(name, handle) for name in names]
        return None if any(value is None for value in values) else PcieLink(*values)

    def _nvlinks(self, handle: Any) -> int | None:
        up: int | None = None
        for link in range(MAX_NVLINKS):
            state = self._nvml.may("NvLinkState", handle, link)
            if state is None:
                break
            up = (up or 0) + int(state == 1)
        return up

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        """Return total, free and used bytes; *used* without what the driver keeps for itself where it can tell."""
        try:
            info = self._nvml.ask("nvmlDeviceGetMemoryInfo", handle, version=pynvml.nvmlMemory_v2)
        except DriverFault as fault:
            if fault.kind is not FaultKind.UNSUPPORTED:
                raise
            info = self._nvml.ask("nvmlDeviceGetMemoryInfo", handle)
        return int(info.total), int(info.free), int(info.used)

    # -- health --------------------------------------------------------------------------------------------------------

    def round(self, uuids: Sequence[str]) -> Round:
        """Read vitals and events (`driver.Driver.round`)."""
        states: list[DeviceState] = []
        for uuid in uuids:
            try:
                states.append(DeviceState(uuid, self._vitals(self._nvml.handle(uuid))))
                self._watch(uuid)
            except DriverFault as fault:
                states.append(DeviceState(uuid, fault=fault))
                self._faulted(uuid, fault)
        late, self._late = self._late, ()
        return Round(tuple(states), (*late, *self._news()))

    def _faulted(self, uuid: str, fault: DriverFault) -> None:
        if fault.kind in DEVICE_FAULTS:
            self._nvml.forget(uuid)
            self._watched.discard(uuid)

    def _vitals(self, handle: Any) -> Vitals:
        may = self._nvml.may
        _, free, used = self._memory(handle)
        rows = may("RemappedRows", handle)
        bits = may("CurrentClocksEventReasons", handle)
        if bits is None:  # it was called so before driver 535
            bits = may("CurrentClocksThrottleReasons", handle)
        return Vitals(
            memory_used_bytes=used,
            memory_free_bytes=free,
            temperature_celsius=may("Temperature", handle, pynvml.NVML_TEMPERATURE_GPU),
            slowdown_celsius=may("TemperatureThreshold", handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
            throttles=frozenset(word for bit, word in _THROTTLES.items() if (bits or 0) & bit),
            ecc_uncorrected=may(
                "TotalEccErrors", handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            ),
            retired_pages_pending=flag(may("RetiredPagesPendingStatus", handle)),
            rows_pending=bool(rows[2]) if rows is not None else None,
            rows_failed=bool(rows[3]) if rows is not None else None,
            processes=self._processes(handle),
        )

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        found: dict[int, GpuProcess] = {}
        for kind in ("Graphics", "Compute"):
            try:
                listed = self._listed(f"nvmlDeviceGet{kind}RunningProcesses_v3", handle)
            except DriverFault as fault:
                if fault.kind in DEVICE_FAULTS and fault.kind is not FaultKind.GONE:
                    raise
                if kind == "Compute":
                    return None
                continue
            for each in listed:
                unknown = each.usedGpuMemory == _NOT_AVAILABLE
                found[int(each.pid)] = GpuProcess(int(each.pid), None if unknown else int(each.usedGpuMemory))
        return tuple(found.values())

    def _listed(self, call: str, handle: Any) -> Sequence[Any]:
        function = self._nvml.raw(call)
        return self._filled(call, pynvml.c_nvmlProcessInfo_v3_t, lambda room, count: int(function(handle, count, room)))

    def _filled(self, call: str, kind: Any, made: Callable[[Any, Any], int]) -> Sequence[Any]:
        """Return what the C function *call* writes into an array of *kind*, in one call where the room is enough.

        Args:
            made: makes the call with the array and a reference to its length.
        """
        while True:
            room = (kind * self._room)()
            count = ctypes.c_uint(self._room)
            code = made(room, ctypes.byref(count))
            if code != pynvml.NVML_ERROR_INSUFFICIENT_SIZE or self._room > _MOST_ROOM:
                break
            self._room = max(2 * self._room, count.value)
        if code == pynvml.NVML_ERROR_NOT_FOUND:
            return ()
        if code != pynvml.NVML_SUCCESS:
            raise self._nvml.fault(call, code)
        found: Sequence[Any] = room[: min(count.value, self._room)]
        return found

    def _watch(self, uuid: str) -> None:
        """Have the driver note the errors of *uuid* from now on, where it can."""
        if uuid in self._watched or uuid.startswith("MIG-"):
            return
        self._watched.add(uuid)
        try:
            if self._events is None:
                self._events = self._nvml.ask("nvmlEventSetCreate")
            handle = self._nvml.handle(uuid)
            self._nvml.ask("nvmlDeviceRegisterEvents", handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        except DriverFault as fault:
            if fault.kind in DEVICE_FAULTS:
                raise

    def _news(self) -> tuple[XidEvent, ...]:
        news: list[XidEvent] = []
        for _ in range(MAX_EVENTS if self._events is not None else 0):
            try:
                data = self._nvml.ask("nvmlEventSetWait_v2", self._events, 0)
            except DriverFault:  # a timeout: no more of them
                break
            if not data.eventType & pynvml.nvmlEventTypeXidCriticalError:
                continue
            try:
                uuid = text(self._nvml.ask("nvmlDeviceGetUUID", data.device))
            except DriverFault:
                # A device that reports an error while it falls off the bus can no longer say who it is; its vitals
                # fail in the same round.
                continue
            news.append(XidEvent(uuid, int(data.eventData)))
        return tuple(news)

    # -- utilisation ---------------------------------------------------------------------------------------------------

    def process_look(self, uuid: str, since_us: int) -> Look:
        """Return what each process used (`driver.Driver.process_look`)."""
        try:
            return self._process_look(self._nvml.handle(uuid), since_us)
        except DriverFault as fault:
            self._faulted(uuid, fault)
            raise

    def _process_look(self, handle: Any, since_us: int) -> Look:
        call = "nvmlDeviceGetProcessUtilization"
        function, since = self._nvml.raw(call), ctypes.c_ulonglong(since_us)
        wall_us, monotonic_ns = time.time_ns() // 1000, time.monotonic_ns()
        found = self._filled(
            call,
            pynvml.c_nvmlProcessUtilizationSample_t,
            lambda room, count: int(function(handle, room, count, since)),
        )
        samples = tuple(Sample(int(each.pid), int(each.timeStamp), int(each.smUtil)) for each in found)
        return Look(samples, wall_us, monotonic_ns)

    def device_look(self, uuid: str, since_us: int) -> Look:
        """Return what the device as a whole did (`driver.Driver.device_look`)."""
        try:
            handle = self._nvml.handle(uuid)
            if uuid.startswith("MIG-"):
                return self._instance_look(uuid, handle, since_us)
            return self._device_look(handle, since_us)
        except DriverFault as fault:
            self._faulted(uuid, fault)
            raise

    def _device_look(self, handle: Any, since_us: int) -> Look:
        wall_us, monotonic_ns = time.time_ns() // 1000, time.monotonic_ns()
        try:
            found = self._nvml.ask("nvmlDeviceGetSamples", handle, pynvml.NVML_GPU_UTILIZATION_SAMPLES, since_us)[1]
        except DriverFault as fault:
            if fault.kind is not FaultKind.NOTHING:
                raise
            found = []
        samples = tuple(Sample(None, int(each.timeStamp), int(each.sampleValue.uiVal)) for each in found)
        return Look(samples, wall_us, monotonic_ns, pids=self._pids(handle))

    def processes(self, uuid: str) -> tuple[int, ...] | None:
        """Return who is on the device (`driver.Driver.processes`)."""
        try:
            return self._pids(self._nvml.handle(uuid))
        except DriverFault as fault:
            self._faulted(uuid, fault)
            raise

    def _pids(self, handle: Any) -> tuple[int, ...] | None:
        processes = self._processes(handle)
        return None if processes is None else tuple(process.pid for process in processes)

    def _instance_look(self, uuid: str, handle: Any, since_us: int) -> Look:
        """Return the mean of a MIG instance since the last look, by the counters of Hopper and later (GPM).

        A last look from before *since_us* is none: its mean would be of a time nobody asks about as well. Before Hopper
        the driver tells nothing about a single instance: UNSUPPORTED.
        """
        ask = self._nvml.ask
        parent = ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        if not ask("nvmlGpmQueryDeviceSupport", parent).isSupportedDevice:
            raise DriverFault(FaultKind.UNSUPPORTED, "nvmlGpmQueryDeviceSupport", "this GPU cannot meter its instances")
        instance = ask("nvmlDeviceGetGpuInstanceId", handle)
        now = ask("nvmlGpmSampleAlloc")
        wall_us, monotonic_ns = time.time_ns() // 1000, time.monotonic_ns()
        try:
            ask("nvmlGpmMigSampleGet", parent, instance, now)
        except DriverFault:
            self._nvml.quietly("nvmlGpmSampleFree", now)
            raise
        before, taken_us = self._counters.get(uuid, (None, 0))
        self._counters[uuid] = now, wall_us
        if before is None or taken_us < since_us:
            if before is not None:
                self._nvml.quietly("nvmlGpmSampleFree", before)
            return Look((), wall_us, monotonic_ns, continuous=True, pids=self._pids(handle))
        wanted = pynvml.c_nvmlGpmMetricsGet_t()
        wanted.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        wanted.numMetrics = 1
        wanted.sample1, wanted.sample2 = before, now
        wanted.metrics[0].metricId = pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL
        try:
            ask("nvmlGpmMetricsGet", wanted)
        finally:
            self._nvml.quietly("nvmlGpmSampleFree", before)
        if wanted.metrics[0].nvmlReturn != pynvml.NVML_SUCCESS:
            raise self._nvml.fault("nvmlGpmMetricsGet", wanted.metrics[0].nvmlReturn)
        percent = float(wanted.metrics[0].value)
        samples = (Sample(None, wall_us, percent),)
        return Look(samples, wall_us, monotonic_ns, continuous=True, pids=self._pids(handle))
