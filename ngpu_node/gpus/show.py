"""The GPUs as an owner sees them: plain values for `--json`, and a table of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

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
    """Print what `describe` gave as tables."""
    driver = f"driver {found['driver_version']}, CUDA {found['cuda_version']}" if found["driver_version"] else ""
    if found["reason"] or not found["gpus"]:
        console.print(f"{found['state']}: {found['reason'] or 'no GPU'}", markup=False, highlight=False)
    if found["gpus"]:
        table = Table("#", "GPU", "memory", "link", "W", "°C", "state", "metered", "UUID", title=driver or None)
        for gpu in found["gpus"]:
            table.add_row(*_row(gpu))
        console.print(table)
    for one in found["gone"]:
        details = "; ".join(condition["detail"] for condition in one["health"]["conditions"])
        console.print(f"gone: {one['uuid']}: {details}", markup=False, highlight=False)
    machine = found["machine"]
    if machine is not None:
        memory = f"{machine['memory_bytes'] / _GIB:.0f} GiB" if machine["memory_bytes"] else "unknown memory"
        free = f"{machine['disk_free_bytes'] / _GIB:.0f} GiB of disk free, " if machine["disk_free_bytes"] else ""
        console.print(
            f"{machine['cpu_model'] or 'processor'}, {machine['cores']} cores, {memory}, {free}kernel "
            f"{machine['kernel']}, NVIDIA container toolkit {machine['toolkit_version'] or 'not installed'}",
            markup=False,
            highlight=False,
        )


def _row(gpu: Mapping[str, Any]) -> list[str]:
    vitals = gpu["vitals"] or {}
    used = vitals.get("memory_used_bytes")
    memory = f"{gpu['memory_bytes'] / _GIB:.0f} GiB"
    if used is not None:
        memory = f"{used / _GIB:.1f} of {memory}"
    state = ("in use" if gpu["held"] else "free") if gpu["offered"] else gpu["against"]
    warnings = [c["detail"] for c in (gpu["health"] or {}).get("conditions", ()) if not c["sick"]]
    temperature = vitals.get("temperature_celsius")
    return [
        str(gpu["index"]) if gpu["mig"] is None else f"{gpu['index']}/{gpu['mig']['gpu_instance']}",
        gpu["model"],
        memory,
        f"{gpu['pcie']['generation']} x{gpu['pcie']['width']}" if gpu["pcie"] else "",
        f"{gpu['power_limit_w']:.0f}" if gpu["power_limit_w"] is not None else "",
        str(temperature) if temperature is not None else "",
        "; ".join([state, *warnings]),
        (gpu["metering"] or {}).get("method", "none"),
        gpu["uuid"],
    ]
