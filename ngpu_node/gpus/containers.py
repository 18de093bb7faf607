"""Does a container still have its GPUs? What it says itself, and what can be seen of it from outside.

A container can lose its GPUs while the device is perfectly well: `systemctl daemon-reload` has the engine's control
groups written anew, without the devices the NVIDIA toolkit had added (nvidia-container-toolkit #48). Programs that have
the device open go on, whatever is opened next fails. From outside nothing of that shows; so the question is asked
inside, where the toolkit puts `nvidia-smi` (`lost_inside`).

An image without a C library cannot run it, and an engine that gave no GPU at all brings none. There this machine is
looked at: which devices the container was told it has, and which device nodes it was given (`look_outside`,
`lost_outside`). That shows GPUs that never came, or were taken out; not that opening one is refused.

Judging is pure; `look_outside` reads a few files of /proc.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

#: What to run inside, without a shell: images may have none.
COMMAND = ("nvidia-smi", "-L")

#: What an engine answers with when the program is not there, or cannot be started.
_NOT_RUN = (126, 127)
_TOLD = b"NVIDIA_VISIBLE_DEVICES="
_NODE = re.compile(r"nvidia[0-9]+")
_MOUNTED = re.compile(r"^\S+ \S+ \S+ \S+ /dev/(nvidia[0-9]+) ", re.MULTILINE)
MAX_READ_BYTES = 1 << 20
_UUID = re.compile(r"UUID: ((?:GPU|MIG)-[0-9a-zA-Z/-]+)")


def could_tell(exit_code: int) -> bool:
    """Tell whether `COMMAND` ran at all, and ended."""
    return exit_code >= 0 and exit_code not in _NOT_RUN


def lost_inside(exit_code: int, output: str, held: Collection[str]) -> str:
    """Return which GPUs the container cannot use any more and why, empty where it has all of *held* or cannot tell.

    Args:
        output: of `COMMAND`, both streams.
        held: UUIDs the container was started with.
    """
    if not held or not could_tell(exit_code):
        return ""
    seen = set(_UUID.findall(output))
    missing = sorted(uuid for uuid in held if uuid not in seen)
    if not missing:
        return ""
    if exit_code != 0:
        words = output.strip().splitlines()[-1] if output.strip() else f"exit code {exit_code}"
        return f"the container lost its GPUs: {words}; was `systemctl daemon-reload` run?"
    return f"the container does not see {', '.join(missing)} any more"


@dataclass(frozen=True, slots=True)
class Outside:
    """What this machine shows of a container; None for what it does not let this process see.

    Attributes:
        told: the devices its first process was told of (NVIDIA_VISIBLE_DEVICES), `all` among them.
        nodes: the device nodes in its /dev, `nvidia0` and so on.
    """

    told: frozenset[str] | None = None
    nodes: frozenset[str] | None = None


def lost_outside(view: Outside, held: Mapping[str, int | None], here: Collection[str]) -> str:
    """Return which GPUs a container was not given and how that shows, empty where it was or nothing can be said.

    Args:
        held: by UUID, the number of its device node.
        here: the device nodes of this machine: what it has none of itself it cannot give.
    """
    if view.told is not None and "all" not in view.told:
        missing = sorted(uuid for uuid in held if uuid not in view.told)
        if missing:
            return f"the engine did not tell the container of {', '.join(missing)}"
    if view.nodes is not None:
        for uuid, minor in sorted(held.items()):
            node = f"nvidia{minor}"
            if minor is not None and node in here and node not in view.nodes:
                return f"the container has no /dev/{node} ({uuid})"
    return ""


def look_outside(pid: int, proc: Path = Path("/proc")) -> Outside:
    """Return what can be seen of the container whose first process is *pid* on this machine.

    Its environment and /dev are shown to root alone. Its mounts anybody may read, and there a device node is where the
    toolkit's hook put it; none there says nothing, since a runtime may also have made nodes.
    """
    if pid <= 0:
        return Outside()
    place = proc / str(pid)
    told: frozenset[str] | None = None
    with contextlib.suppress(OSError):
        entries = _beginning(place / "environ").split(b"\0")
        values = [entry.removeprefix(_TOLD).decode(errors="replace") for entry in entries if entry.startswith(_TOLD)]
        told = frozenset(values[-1].split(",")) if values else frozenset()
    nodes: frozenset[str] | None = None
    try:
        nodes = nodes_in(place / "root" / "dev")
    except OSError:
        with contextlib.suppress(OSError):
            nodes = frozenset(_MOUNTED.findall(_beginning(place / "mountinfo").decode(errors="replace"))) or None
    return Outside(told, nodes)


def nodes_in(folder: Path) -> frozenset[str]:
    """Return the names of GPUs' device nodes in *folder*.

    Raises:
        OSError: it cannot be read.
    """
    return frozenset(name for name in os.listdir(folder) if _NODE.fullmatch(name))


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_READ_BYTES)
