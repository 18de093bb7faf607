"""What a survey of the driver comes to: which devices this node may offer, and why not the others.

Pure. Capacity is keyed by UUID: a device is offered once however often the driver lists it, and under its own name
after it moved to another index. A machine without a usable GPU has an inventory too, with a state and a reason; the
node runs on and serves workspaces that need none.

What a driver says is not believed blindly. Other networks advertised 2^64 - 1 GPUs when a count underflowed, and sold
one card twice; so counts and sizes no machine has are refused, and of two devices with one UUID neither is offered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ngpu_node.gpus.driver import DeviceReading, DriverFault, FaultKind, Survey
from ngpu_protocol.gpu_models import canonical_gpu_model

#: The largest machines hold 16 GPUs; 64 leaves room.
MAX_GPUS = 64
#: The largest GPU has 288 GiB; 4 TiB leaves room.
MAX_MEMORY_BYTES = 4 << 40


class InventoryState(StrEnum):
    """How the machine stands as a whole."""

    OK = "ok"
    """Every device the driver lists was described."""
    NO_DRIVER = "no_driver"
    NOT_LOADED = "driver_not_loaded"
    MISMATCH = "driver_mismatch"
    NO_PERMISSION = "no_permission"
    STUCK = "driver_stuck"
    """The driver does not answer; what was known before still stands, but nothing is offered."""
    FAILED = "driver_error"
    NO_DEVICE = "no_device"
    """The driver works and lists nothing."""
    ABSURD = "absurd_count"
    """The driver lists more devices than a machine can hold: none is believed."""
    PARTIAL = "partial"
    """Some devices could not be described or not be believed."""
    NOT_LOOKED = "not_looked"
    """The driver was not asked yet."""


_STATES = {
    FaultKind.NO_DRIVER: InventoryState.NO_DRIVER,
    FaultKind.NOT_LOADED: InventoryState.NOT_LOADED,
    FaultKind.MISMATCH: InventoryState.MISMATCH,
    FaultKind.NO_PERMISSION: InventoryState.NO_PERMISSION,
    FaultKind.STUCK: InventoryState.STUCK,
}


@dataclass(frozen=True, slots=True)
class Withheld:
    """What the owner keeps for himself.

    Attributes:
        devices: UUIDs (a unique beginning will do), PCI addresses, or models.
        memory_bytes: kept free on every device that is offered.
    """

    devices: tuple[str, ...] = ()
    memory_bytes: int = 0

    def covers(self, device: DeviceReading) -> bool:
        """Tell whether the owner named *device*, or the device an instance is a slice of."""
        return any(_names(name, device) for name in self.devices)

    def unmatched(self, devices: Sequence[DeviceReading]) -> tuple[str, ...]:
        """Return what the owner named and none of *devices* is: a misspelling would offer what he wants to keep."""
        named = [name for name in self.devices if name.strip()]
        return tuple(name for name in named if not any(_names(name, device) for device in devices))


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device and whether it may be offered.

    Attributes:
        offered_bytes: memory a workspace may count on.
        withheld: why it is never offered, empty when it may be. Its health is another matter (`health`).
    """

    reading: DeviceReading
    offered_bytes: int
    withheld: str = ""

    @property
    def uuid(self) -> str:
        return self.reading.uuid

    @property
    def told_model(self) -> str:
        """What others are told it is: the driver's words, or its canonical name where those, with the memory that is
        offered, would be taken for another size of it. A card of which memory is withheld costs what it is.
        """
        model = self.reading.model
        true = canonical_gpu_model(model, self.reading.memory_total_bytes)
        return model if canonical_gpu_model(model, self.offered_bytes) == true else true


@dataclass(frozen=True, slots=True)
class Inventory:
    """The machine's devices at one survey.

    Attributes:
        reason: a sentence about *state*; empty when all is well.
        stated_count: what the driver said, believed or not.
        unmatched: what the owner withholds and none of the devices is.
    """

    state: InventoryState
    reason: str = ""
    driver_version: str = ""
    nvml_version: str = ""
    cuda_version: str = ""
    stated_count: int = 0
    gpus: tuple[Gpu, ...] = ()
    unmatched: tuple[str, ...] = ()

    def gpu(self, uuid: str) -> Gpu | None:
        """Return the device *uuid*."""
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)


NOT_LOOKED = Inventory(InventoryState.NOT_LOOKED, "the driver was not asked yet")


def of_fault(fault: DriverFault) -> Inventory:
    """Return the inventory of a machine whose driver cannot be asked at all."""
    return Inventory(_STATES.get(fault.kind, InventoryState.FAILED), fault.text)


def of_survey(survey: Survey, withheld: Withheld = Withheld()) -> Inventory:
    """Judge what the driver described."""
    blank = Inventory(
        InventoryState.OK,
        driver_version=survey.driver_version,
        nvml_version=survey.nvml_version,
        cuda_version=survey.cuda_version,
        stated_count=survey.count,
        unmatched=withheld.unmatched(survey.devices),
    )
    if survey.count > MAX_GPUS:
        reason = f"the driver lists {survey.count} GPUs, more than any machine holds: none of them is believed"
        return replace(blank, state=InventoryState.ABSURD, reason=reason)
    seen = Counter(device.uuid for device in survey.devices)
    problems = [f"GPU {index}: {fault.text}" for index, fault in survey.faults]
    gpus: list[Gpu] = []
    for device in survey.devices:
        wrong = _unbelievable(device, seen[device.uuid])
        if wrong:
            problems.append(f"GPU {device.index}: {wrong}")
            continue
        gpus.append(_judged(device, withheld))
    if problems:
        return replace(blank, state=InventoryState.PARTIAL, reason="; ".join(problems), gpus=tuple(gpus))
    if not gpus:
        return replace(blank, state=InventoryState.NO_DEVICE, reason="the NVIDIA driver works and lists no GPU")
    return replace(blank, gpus=tuple(gpus))


def _unbelievable(device: DeviceReading, times: int) -> str:
    if not device.uuid:
        return "it has no UUID"
    if times > 1:
        return f"{times} devices say they are {device.uuid}"
    if not 0 < device.memory_total_bytes <= MAX_MEMORY_BYTES:
        return f"it says it has {device.memory_total_bytes} bytes of memory"
    if not 0 <= device.memory_free_bytes <= device.memory_total_bytes:
        return f"it says {device.memory_free_bytes} of {device.memory_total_bytes} bytes are free"
    return ""


def _judged(device: DeviceReading, withheld: Withheld) -> Gpu:
    if withheld.covers(device):
        return Gpu(device, 0, "withheld by the owner")
    if device.mig_enabled:
        return Gpu(device, 0, "split into MIG instances, which are offered instead")
    offered = device.memory_total_bytes - withheld.memory_bytes
    if offered <= 0:
        return Gpu(device, 0, "its owner withholds more memory than it has")
    return Gpu(device, offered)


@dataclass(frozen=True, slots=True)
class Moves:
    """What is different from the survey before: UUIDs that appeared and vanished, and those with another index."""

    appeared: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    renumbered: tuple[str, ...] = ()


def moves(before: Inventory, after: Inventory) -> Moves:
    """Compare two surveys by UUID."""
    old = {gpu.uuid: gpu.reading.index for gpu in before.gpus}
    new = {gpu.uuid: gpu.reading.index for gpu in after.gpus}
    return Moves(
        appeared=tuple(uuid for uuid in new if uuid not in old),
        vanished=tuple(uuid for uuid in old if uuid not in new),
        renumbered=tuple(uuid for uuid in new if uuid in old and old[uuid] != new[uuid]),
    )


def _names(name: str, device: DeviceReading) -> bool:
    """Tell whether the owner may mean *device*, or the device an instance is a slice of, by *name*.

    Generous: `RTX 3090` names a 3090 Ti too, since what is kept back by mistake is seen, and what is lent is regretted.
    """
    wanted = name.strip().lower()
    if not wanted:
        return False
    uuids = [device.uuid.lower(), device.mig.parent_uuid.lower() if device.mig else ""]
    if any(uuid.startswith(wanted) for uuid in uuids):
        return True
    if plain(wanted) and plain(wanted) in plain(device.model):
        return True
    return bool(device.pci_address) and _place(wanted) == _place(device.pci_address)


_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})(?:\.([0-7]))?")


def _place(address: str) -> str:
    """Return a PCI address as it is compared: `nvidia-smi` writes 8 digits of the domain, `lspci` often none."""
    match = _PCI.fullmatch(address.strip().lower())
    if match is None:
        return address
    domain, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return f"{domain:x}:{bus:x}:{device:x}.{function:x}"


def plain(model: str) -> str:
    """Return letters and digits alone, in lower case."""
    return "".join(character for character in model.lower() if character.isalnum())
