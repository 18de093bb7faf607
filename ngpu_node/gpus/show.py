"""The GPUs as an owner sees them: plain values for `--json`, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ngpu_node.gpus.driver import Vitals
from ngpu_node.gpus.health import DeviceHealth
from ngpu_node.gpus.inventory import Gpu, Inventory
from ngpu_node.gpus.machine import Machine

_GIB = 2**30


def describe(
    inventory: Inventory,
    health: Mapping[str, DeviceHealth],
    vitals: Mapping[str, Vitals],
    metering: Mapping[str, tuple[str, int, int, str]],
    machine: Machine | None,
    *,
    held: Collection[str],
    stuck_for_s: float | None,
    reason_against: Callable[[str], str],
) -> dict[str, Any]:
    """Return all of it in values JSON knows.

    Args:
        metering: by UUID: method, looks, gaps, why the last gap.
        stuck_for_s: for how long the driver has not answered.
    """
    gone = [uuid for uuid in health if inventory.gpu(uuid) is None]
    return {
        "state": str(inventory.state),
        "reason": inventory.reason,
        "driver_version": inventory.driver_version,
        "nvml_version": inventory.nvml_version,
        "cuda_version": inventory.cuda_version,
        "withhold_unmatched": list(inventory.unmatched),
        "driver_stuck_for_s": None if stuck_for_s is None else round(stuck_for_s, 1),
        "gpus": [
            {
                **_device(gpu),
                "held": gpu.uuid in held,
                "offered": not gpu.withheld and not reason_against(gpu.uuid),
                "against": gpu.withheld or reason_against(gpu.uuid),
                "health": _health(health.get(gpu.uuid)),
                "vitals": _vitals(vitals.get(gpu.uuid)),
                "metering": _metering(metering.get(gpu.uuid)),
            }
            for gpu in inventory.gpus
        ],
        "gone": [{"uuid": uuid, "health": _health(health[uuid])} for uuid in gone],
        "machine": None if machine is None else asdict(machine),
    }


def _device(gpu: Gpu) -> dict[str, Any]:
    values = asdict(gpu.reading)
    return {**values, "memory_bytes": gpu.reading.memory_total_bytes, "offered_bytes": gpu.offered_bytes}


def _health(health: DeviceHealth | None) -> dict[str, Any] | None:
    if health is None:
        return None
    return {
        "phase": str(health.phase),
        "conditions": [{"kind": str(c.kind), "detail": c.detail, "sick": c.sick} for c in health.conditions],
        "last_xids": list(health.last_xids),
    }


def _vitals(vitals: Vitals | None) -> dict[str, Any] | None:
    if vitals is None:
        return None
    return {
        "memory_used_bytes": vitals.memory_used_bytes,
        "memory_free_bytes": vitals.memory_free_bytes,
        "temperature_celsius": vitals.temperature_celsius,
        "throttled_by": sorted(str(throttle) for throttle in vitals.throttles),
        "ecc_uncorrected": vitals.ecc_uncorrected,
        "processes": None if vitals.processes is None else len(vitals.processes),
    }


def _metering(values: tuple[str, int, int, str] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return dict(zip(("method", "looks", "gaps", "last_gap"), values, strict=True))


def print_gpus(found: Mapping[str, Any], console: Console) -> None:
    """Print what `describe` gave, with the engine beside it, as tables that 80 columns hold."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    if found["driver_version"]:
        say(f"driver {found['driver_version']}, CUDA {found['cuda_version']}, NVML {found['nvml_version']}")
    if found["reason"] or not found["gpus"]:
        say(f"{found['state']}: {found['reason'] or 'no GPU'}")
    if found["driver_stuck_for_s"] is not None:
        say(f"the driver has not answered for {found['driver_stuck_for_s']:.0f} s")
    if found["withhold_unmatched"]:
        names = ", ".join(found["withhold_unmatched"])
        say(f"gpus.withhold names what is not here: {names}")
    if found["gpus"]:
        for heads, row in ((_STATE, _state_row), (_NAME, _name_row), (_READINGS, _readings_row)):
            columns = [Column(head, no_wrap=head in _WHOLE, overflow="fold") for head in heads]
            table = Table(*columns, box=SIMPLE_HEAD, padding=0, show_edge=False)
            for gpu in found["gpus"]:
                table.add_row(*row(gpu))
            console.print(table)
            say("")
    for one in found["gone"]:
        details = "; ".join(condition["detail"] for condition in one["health"]["conditions"])
        say(f"not listed now: {one['uuid']}" + (f": {details}" if details not in ("", found["reason"]) else ""))
    machine, engine = found["machine"], found.get("engine")
    if machine is not None:
        memory = f"{machine['memory_bytes'] / _GIB:.0f} GiB" if machine["memory_bytes"] else "unknown memory"
        free = f"{machine['disk_free_bytes'] / _GIB:.0f} GiB of disk free, " if machine["disk_free_bytes"] else ""
        toolkit = f"NVIDIA container toolkit {machine['toolkit_version'] or 'not installed'}"
        by = f"container engine {engine['name']} {engine['version']}".rstrip() + ", " if engine is not None else ""
        say(
            f"{machine['cpu_model'] or 'processor'}, {machine['cores']} cores, {memory}, {free}"
            f"kernel {machine['kernel']}, {by}{toolkit}"
        )


#: What is copied is of no use cut or broken.
_WHOLE = ("#", "UUID", "PCI")
_STATE = ("#", "GiB used", "free", "offered", "°C", "metered", "state")
_NAME = ("#", "GPU", "UUID")
_READINGS = ("#", "PCI", "CC", "PCIe", "NVLink", "MIG", "ECC", "persist.", "display", "W", "MHz", "max.")


def _state_row(gpu: Mapping[str, Any]) -> list[str]:
    vitals = gpu["vitals"] or {}
    state = ("in use" if gpu["held"] else "free") if gpu["offered"] else gpu["against"]
    warnings = [c["detail"] for c in (gpu["health"] or {}).get("conditions", ()) if not c["sick"]]
    return [
        _number(gpu),
        _gib(vitals.get("memory_used_bytes")),
        _gib(vitals.get("memory_free_bytes", gpu["memory_free_bytes"])),
        f"{gpu['offered_bytes'] / _GIB:.0f} of {gpu['memory_bytes'] / _GIB:.0f} GiB",
        _or_blank(vitals.get("temperature_celsius")),
        (gpu["metering"] or {}).get("method", "none"),
        "; ".join([state, *warnings]),
    ]


def _name_row(gpu: Mapping[str, Any]) -> list[str]:
    return [_number(gpu), gpu["model"], gpu["uuid"]]


def _readings_row(gpu: Mapping[str, Any]) -> list[str]:
    pcie, watts = gpu["pcie"], gpu["power_limit_w"]
    display = "active" if gpu["display_active"] else "attached" if gpu["display_attached"] else "none"
    return [
        _number(gpu),
        gpu["pci_address"],
        gpu["compute_capability"],
        f"{pcie['generation']} x{pcie['width']}" if pcie else "",
        f"{gpu['nvlinks']} up" if gpu["nvlinks"] is not None else "none",
        gpu["mig"]["profile"] if gpu["mig"] else _switch(gpu["mig_enabled"]),
        _switch(gpu["ecc"]),
        _switch(gpu["persistence"]),
        "" if gpu["display_active"] is None and gpu["display_attached"] is None else display,
        f"{watts:.0f}" if watts is not None else "",
        _or_blank(gpu["sm_clock_mhz"]),
        _or_blank(gpu["max_sm_clock_mhz"]),
    ]


def _number(gpu: Mapping[str, Any]) -> str:
    return str(gpu["index"]) if gpu["mig"] is None else f"{gpu['index']}/{gpu['mig']['gpu_instance']}"


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / _GIB:.1f}"


def _or_blank(value: int | None) -> str:
    return "" if value is None else str(value)


def _switch(value: bool | None) -> str:
    return "" if value is None else "on" if value else "off"
