"""Processes of the benchmark: started, waited for, measured in CPU time, stopped.

CPU time is read from ``/proc`` for a process and everything below it, so that a system with workers (nginx, LiteLLM)
counts whole. Linux only, like the daemons.
"""

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_GRACE_S = 10.0


class StartError(Exception):
    """A system did not come up; the message ends with the last lines of its log."""


class Process:
    """A process in a session of its own, with its output in a log file.

    Args:
        name: as in the table.
        command: the program and its arguments.
        log: where its output goes.
        env: added to this process's environment.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._popen.pid

    def cpu_seconds(self) -> float:
        """Return the user and system time of this process and its descendants so far."""
        return tree_cpu_seconds(self.pid)

    def wait_for_http(self, url: str, timeout_s: float) -> None:
        """Return once *url* answers 200.

        Raises:
            StartError: it does not in time, or the process has ended.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._popen.poll() is not None:
                raise StartError(f"{self.name} ended with exit code {self._popen.returncode}\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise StartError(f"{self.name} did not answer {url} within {timeout_s:.0f} s\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        """Return the end of the process's output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ask the process to end, and kill it if it does not within `STOP_GRACE_S`."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait(STOP_GRACE_S)


def tree_cpu_seconds(root: int) -> float:
    """Return the CPU time of *root*, its descendants, and those of its children that have ended and been waited for."""
    times: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        # the name, in parentheses, may hold anything; what follows the last one is numbers (proc(5))
        fields = stat[stat.rindex(")") + 2 :].split()
        pid = int(entry)
        children.setdefault(int(fields[1]), []).append(pid)
        times[pid] = sum(int(value) for value in fields[11:15]) / _TICKS_PER_S
    total, pending = 0.0, [root]
    while pending:
        pid = pending.pop()
        total += times.get(pid, 0.0)
        pending += children.get(pid, [])
    return total
