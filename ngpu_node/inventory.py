"""The GPUs of this machine, as NVML tells them.

NVML calls may block for seconds on a sick card, so they run in one thread of their own and never on the event loop; a
call that hangs leaves the last inventory standing, with a reason. Health, MIG and metering are not this module's:
they read the same library, on top of the devices found here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pynvml  # type: ignore[import-untyped]
import structlog
import trio

from ngpu_node.errors import DeploymentImpossible
from ngpu_protocol.identity import Address, gpu_id

log = structlog.get_logger(__name__)

LOOK_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device.

    Attributes:
        uuid: NVML's, stable over restarts and re-ordering; it stays on this machine.
        id: how the device is called outside, 32 bytes (`identity.gpu_id`).
        model: NVML's spelling.
    """

    uuid: str
    id: bytes
    model: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found; `problem` says why there is nothing, or less than expected, empty when all is well."""

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


async def look(node: Address, *, timeout_s: float = LOOK_TIMEOUT_S) -> Inventory:
    """Return the devices NVML shows now. Never raises for what drivers and cards do, and never blocks the loop."""
    with trio.move_on_after(timeout_s):
        # Abandoned, not awaited, when it hangs: the thread ends when the driver lets go of it.
        return await trio.to_thread.run_sync(_look, node, abandon_on_cancel=True, limiter=_one_at_a_time())
    return Inventory(problem=f"the NVIDIA driver did not answer within {timeout_s:g} s")


_limiters: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("ngpu_node.inventory")


def _one_at_a_time() -> trio.CapacityLimiter:
    try:
        return _limiters.get()
    except LookupError:
        limiter = trio.CapacityLimiter(1)
        _limiters.set(limiter)
        return limiter


def _look(node: Address) -> Inventory:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Inventory(problem=_in_words(error))
    try:
        return _devices(node)
    except pynvml.NVMLError as error:
        return Inventory(problem=_in_words(error))
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            log.info("nvml_shutdown_failed", error=str(error))


def _devices(node: Address) -> Inventory:
    gpus: list[Gpu] = []
    problems: list[str] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        # One lost card must not hide the others.
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
            gpus.append(
                Gpu(
                    uuid=uuid,
                    id=gpu_id(node, uuid),
                    model=_text(pynvml.nvmlDeviceGetName(handle)),
                    memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2).total),
                )
            )
        except pynvml.NVMLError as error:
            problems.append(f"GPU {index}: {_in_words(error)}")
    return Inventory(tuple(gpus), "; ".join(problems))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _in_words(error: Exception) -> str:
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is installed but not loaded: try `nvidia-smi`, or reboot"
    return f"the NVIDIA driver says: {error}"


def choose(count: int, types: Sequence[str], gpus: Iterable[Gpu], taken: Iterable[str]) -> tuple[Gpu, ...]:
    """Return *count* free devices of the first of *types* that has enough of them (any type when there are none).

    Args:
        types: models in order of preference, spelled by people: `RTX4090` matches `NVIDIA GeForce RTX 4090`.
        taken: UUIDs that are held already.

    Raises:
        DeploymentImpossible: there are not enough; the message has the numbers.
    """
    if count == 0:
        return ()
    held = set(taken)
    free = [gpu for gpu in gpus if gpu.uuid not in held]
    for wanted in types or [""]:
        fitting = [gpu for gpu in free if _plain(wanted) in _plain(gpu.model)]
        if len(fitting) >= count:
            return tuple(fitting[:count])
    kind = f" of type {' or '.join(types)}" if types else ""
    there = ", ".join(gpu.model for gpu in free) or "none"
    raise DeploymentImpossible(f"needs {count} free GPU{'s' if count > 1 else ''}{kind}; free on this node: {there}")


def _plain(model: str) -> str:
    return "".join(character for character in model.lower() if character.isalnum())
