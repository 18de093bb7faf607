"""NVML loaded, initialised and asked: every call by name, every error in the node's words.

Owns the library's life: it is shut down and opened again to find devices that
came back, and unloaded as well where it does not fit the kernel module, since after an update of the driver the
library on disk is another one. Handles are kept by UUID and dropped whenever a device faults: after a lost card came
back they point nowhere.
"""

from __future__ import annotations

import _ctypes
import contextlib
from typing import Any

import pynvml  # type: ignore[import-untyped]

from ngpu_node.gpus.driver import DriverFault, FaultKind

_KINDS = {
    pynvml.NVML_ERROR_UNINITIALIZED: FaultKind.NOT_LOADED,
    pynvml.NVML_ERROR_NOT_SUPPORTED: FaultKind.UNSUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: FaultKind.UNSUPPORTED,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: FaultKind.UNSUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION: FaultKind.NO_PERMISSION,
    pynvml.NVML_ERROR_NOT_FOUND: FaultKind.NOTHING,
    pynvml.NVML_ERROR_NO_DATA: FaultKind.NOTHING,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: FaultKind.NOT_LOADED,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: FaultKind.NO_DRIVER,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: FaultKind.MISMATCH,
    pynvml.NVML_ERROR_GPU_IS_LOST: FaultKind.LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED: FaultKind.RESET_REQUIRED,
    pynvml.NVML_ERROR_GPU_NOT_FOUND: FaultKind.GONE,
    # what a stale handle of a device that vanished is answered with
    pynvml.NVML_ERROR_INVALID_ARGUMENT: FaultKind.GONE,
}
_WORDS = {
    FaultKind.NO_DRIVER: "no NVIDIA driver on this machine (libnvidia-ml.so.1 not found)",
    FaultKind.NOT_LOADED: "the NVIDIA driver is installed but not loaded: try `nvidia-smi`, or reboot",
    FaultKind.MISMATCH: "the NVIDIA driver was updated but not reloaded: reload its modules, or reboot",
    FaultKind.NO_PERMISSION: "this user may not use /dev/nvidia*: check its groups and the unit's device rules",
    FaultKind.LOST: "the GPU has fallen off the bus",
    FaultKind.RESET_REQUIRED: "the GPU must be reset",
    FaultKind.GONE: "the driver does not know this GPU any more",
}

#: These end whatever is asked of a device; any other only leaves one reading out.
DEVICE_FAULTS = frozenset(
    {
        FaultKind.LOST,
        FaultKind.RESET_REQUIRED,
        FaultKind.GONE,
        FaultKind.NOT_LOADED,
        FaultKind.MISMATCH,
        FaultKind.NO_DRIVER,
    }
)


class NvmlSession:
    """The library, open or not."""

    def __init__(self) -> None:
        self._open = False
        self._unload = False
        self._handles: dict[str, Any] = {}

    def open(self) -> None:
        """Load and initialise the library; harmless when that was done.

        Raises:
            DriverFault: it cannot be.
        """
        if not self._open:
            self.ask("nvmlInit")
            self._open = True

    def close(self) -> None:
        """Let go of everything. Never raises."""
        if self._open:
            self.quietly("nvmlShutdown")
        self._handles, self._open = {}, False
        if self._unload and pynvml.nvmlLib is not None:
            library, pynvml.nvmlLib = pynvml.nvmlLib, None
            pynvml._nvmlGetFunctionPointer_cache.clear()
            _ctypes.dlclose(library._handle)
        self._unload = False

    def ask(self, call: str, *arguments: Any, **named: Any) -> Any:
        """Return what pynvml's function *call* gives.

        Raises:
            DriverFault: NVML's error, or UNSUPPORTED where this pynvml has no such function.
        """
        function = getattr(pynvml, call, None)
        if function is None:
            raise DriverFault(FaultKind.UNSUPPORTED, call, "this nvidia-ml-py is too old to ask for it")
        try:
            return function(*arguments, **named)
        except pynvml.NVMLError as error:
            raise self.fault(call, error.value) from error

    def may(self, name: str, handle: Any, *arguments: int) -> Any:
        """Return `nvmlDeviceGet<name>` of a device, or None where it has no such reading.

        Raises:
            DriverFault: nothing can be had of that device now.
        """
        try:
            return self.ask(f"nvmlDeviceGet{name}", handle, *arguments)
        except DriverFault as fault:
            # INVALID_ARGUMENT also means "no such link, no such threshold": not the device's end here
            if fault.kind in DEVICE_FAULTS and fault.kind is not FaultKind.GONE:
                raise
            return None

    def quietly(self, call: str, *arguments: Any) -> None:
        """Make a call whose failure changes nothing: what it frees goes away with the library."""
        with contextlib.suppress(DriverFault):
            self.ask(call, *arguments)

    def raw(self, call: str) -> Any:
        """Return the C function *call*, where pynvml's own would ask the driver twice."""
        try:
            return pynvml._nvmlGetFunctionPointer(call)
        except pynvml.NVMLError as error:
            raise self.fault(call, error.value) from error

    def fault(self, call: str, code: int) -> DriverFault:
        """Return NVML's error number *code* in the node's words."""
        kind = _KINDS.get(code, FaultKind.OTHER)
        self._unload = self._unload or kind is FaultKind.MISMATCH
        return DriverFault(kind, call, _WORDS.get(kind) or f"the NVIDIA driver says: {pynvml.NVMLError(code)}")

    # -- handles -------------------------------------------------------------------------------------------------------

    def handle(self, uuid: str) -> Any:
        """Return the handle of the device or MIG instance *uuid*.

        Raises:
            DriverFault: GONE, or why the driver would not say.
        """
        handle = self._handles.get(uuid)
        if handle is None:
            try:
                handle = self.ask("nvmlDeviceGetHandleByUUID", uuid.encode())
            except DriverFault as fault:
                if fault.kind is not FaultKind.NOTHING:
                    raise
                raise DriverFault(FaultKind.GONE, fault.call, _WORDS[FaultKind.GONE]) from fault
            self._handles[uuid] = handle
        return handle

    def learn(self, uuid: str, handle: Any) -> None:
        """Remember the handle of *uuid*."""
        self._handles[uuid] = handle

    def forget(self, uuid: str | None = None) -> None:
        """Ask anew for the handle of *uuid*, or of every device, when it is wanted next."""
        if uuid is None:
            self._handles = {}
        else:
            self._handles.pop(uuid, None)


def text(value: str | bytes) -> str:
    """Return pynvml's text, which is bytes in some versions."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def flag(value: Any) -> bool | None:
    """Return a switch's current state; some calls give the pending one beside it, some nothing."""
    if value is None:
        return None
    return bool(value[0] if isinstance(value, (list, tuple)) else value)
