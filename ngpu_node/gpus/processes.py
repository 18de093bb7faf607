"""Which container a process runs in, by its control group.

The kernel knows it better than the engine: `/proc/<pid>/cgroup` names the container's 64-digit id in its path, whatever
the engine (docker, podman, containerd) and the version of control groups; a container within a container has both ids,
the outer one first. Ours are then told by comparing with what the engine says it started.

Process numbers are the driver's, from the machine's own PID namespace. A daemon in a namespace of its own, or behind
`hidepid`, cannot find them: that is answered as unknown, never as "in no container".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_CONTAINER = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
#: For how long what was known of a process still holds after it ended: its last samples come late.
REMEMBERED_S = 5.0
_PF_EXITING = 4


def containers_in(cgroup: str) -> tuple[str, ...]:
    """Return the ids of the containers in the text of a `/proc/<pid>/cgroup`, outermost first.

    Version 2 has one line, `0::/system.slice/docker-<id>.scope`; version 1 one for each controller,
    `4:memory:/docker/<id>`, of which the first that names a container is taken.
    """
    for line in cgroup.splitlines():
        found = _CONTAINER.findall(line.split(":", 2)[-1])
        if found:
            return tuple(dict.fromkeys(found))
    return ()


def lives(pid: int, proc: Path = Path("/proc")) -> bool:
    """Return whether process *pid* has not ended; one that nobody waited for yet has."""
    return _stat(pid, proc)[:1] not in ([], [b"Z"], [b"X"])


def ends(pid: int, proc: Path = Path("/proc")) -> bool:
    """Return whether process *pid* is about to end or has; what the kernel still does for it may take long."""
    flags = _stat(pid, proc)[6:7]
    return not flags or bool(int(flags[0]) & _PF_EXITING)


def _stat(pid: int, proc: Path) -> list[bytes]:
    """Return the fields of `/proc/<pid>/stat` from the state on, which is the third; nothing without one."""
    try:
        return (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


class ProcessTable:
    """Looks processes up; blocks, a few microseconds each."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._seen: dict[int, tuple[tuple[str, ...], float]] = {}

    def lives(self, pid: int) -> bool:
        """Return whether process *pid* has not ended."""
        return lives(pid, self._proc)

    def ends(self, pid: int) -> bool:
        """Return whether process *pid* is about to end or has."""
        return ends(pid, self._proc)

    def containers(self, pids: Iterable[int], now_s: float) -> dict[int, tuple[str, ...] | None]:
        """Return the containers of each process, outermost first; None for one that cannot be found.

        Args:
            now_s: the monotonic clock.
        """
        found: dict[int, tuple[str, ...] | None] = {}
        for pid in pids:
            try:
                # errors=replace: a group may bear any bytes as its name
                text = (self._proc / str(pid) / "cgroup").read_text(errors="replace")
            except OSError:
                found[pid] = self._seen[pid][0] if pid in self._seen else None
                continue
            found[pid] = containers_in(text)
            self._seen[pid] = (containers_in(text), now_s)
        self._seen = {pid: entry for pid, entry in self._seen.items() if now_s - entry[1] <= REMEMBERED_S}
        return found
