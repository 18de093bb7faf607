"""Child processes of the demonstration and the benchmark: started, waited for, stopped; nobody else's are touched.

Each runs in a session of its own, so that Ctrl-C in the terminal reaches only the parent, which then stops them in
order. Output goes to a log file, whose end is shown when something goes wrong.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STOP_GRACE_S = 15.0
_POLL_S = 0.05


class StartError(Exception):
    """A process did not come up, or ended while it was needed; the message ends with the last lines of its log."""


class Process:
    """A running program.

    Args:
        name: what people call it.
        command: the program and its arguments.
        log: the file its output goes to.
        env: added to this process's environment.
        cwd: where it runs.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._popen.pid

    def check(self) -> None:
        """Do nothing while the process runs.

        Raises:
            StartError: it has ended.
        """
        if self._popen.poll() is not None:
            raise StartError(f"{self.name} ended with exit code {self._popen.returncode}:\n{self.log_tail()}")

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Return once *ready* does; *what* completes the sentence "<name> …" when it does not in time.

        Raises:
            StartError: it does not in time, or the process has ended.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} {what} within {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def log_tail(self, lines: int = 15) -> str:
        """Return the end of the process's output, indented, and where the rest is."""
        last = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(f"    {line}" for line in last) + f"\n    (whole log: {self.log})"

    def ask_to_stop(self) -> None:
        """Send SIGTERM, if it runs."""
        if self._popen.poll() is None:
            self._popen.terminate()

    def wait_stopped(self, grace_s: float = STOP_GRACE_S) -> int:
        """Return the exit code once the process has ended; kill it if it does not within *grace_s*."""
        try:
            return self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait(grace_s)

    def stop(self) -> int:
        """Ask the process to end, wait, and return its exit code."""
        self.ask_to_stop()
        return self.wait_stopped()


def start_time(pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the program's name, in parentheses, may hold anything; numbers follow the last one (proc(5), field 22)
    return int(stat[stat.rindex(")") + 2 :].split()[19])


def stop_by_id(pid: int, started: int, grace_s: float = STOP_GRACE_S) -> bool:
    """Stop a process that an earlier run of this program left; False if it is gone or its id is another's now."""
    if start_time(pid) != started:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while start_time(pid) == started and not _is_zombie(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(_POLL_S)
    return True


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat[stat.rindex(")") + 2] == "Z"
