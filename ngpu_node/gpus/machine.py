"""What the machine is beside its GPUs: processor, memory, disk, kernel, and the toolkit that gives containers GPUs.

Reads files and runs one short command; blocks for milliseconds, so it is called off the event loop. What cannot be
found out is None: none of it is needed to work.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_TOOLKIT = ("nvidia-ctk", "nvidia-container-cli")
_COMMAND_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine a node runs on.

    Attributes:
        cores: that this process may use.
        disk_free_bytes: to this user, where the node keeps its data.
        toolkit_version: of the NVIDIA container toolkit; None where it is not installed.
    """

    cpu_model: str | None
    cores: int
    memory_bytes: int | None
    disk_bytes: int | None
    disk_free_bytes: int | None
    kernel: str
    system: str | None
    toolkit_version: str | None


def look_around(data_dir: Path, *, root: Path = Path("/")) -> Machine:
    """Return what this machine is."""
    size: int | None = None
    free: int | None = None
    try:
        disk = os.statvfs(data_dir)
        size, free = disk.f_frsize * disk.f_blocks, disk.f_frsize * disk.f_bavail
    except OSError:
        pass  # not made yet
    return Machine(
        cpu_model=_field(root / "proc/cpuinfo", r"(?m)^model name\s*:\s*(.+)$"),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_kibibytes(_field(root / "proc/meminfo", r"(?m)^MemTotal:\s*(\d+) kB$")),
        disk_bytes=size,
        disk_free_bytes=free,
        kernel=platform.release(),
        system=_field(root / "etc/os-release", r'(?m)^PRETTY_NAME="?([^"\n]+)"?$'),
        toolkit_version=_toolkit_version(),
    )


def _field(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text(errors="replace"))
    except OSError:
        return None
    return found[1].strip() if found else None


def _kibibytes(text: str | None) -> int | None:
    return None if text is None else int(text) * 1024


def _toolkit_version() -> str | None:
    for name in _TOOLKIT:
        program = shutil.which(name)
        if program is None:
            continue
        try:
            shown = subprocess.run(
                [program, "--version"], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if version := re.search(r"\d+\.\d+(?:\.\d+)*(?:[-~][\w.]+)?", shown):
            return version[0]
    return None
