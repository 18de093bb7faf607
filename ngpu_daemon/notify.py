"""What systemd is told: ready, status, stopping, and that the event loop still turns.

The sd_notify protocol (sd_notify(3)): one datagram of `KEY=value` lines to the AF_UNIX socket that `$NOTIFY_SOCKET`
names, a leading `@` standing for the abstract namespace. Outside systemd every call does nothing. A lost message is
never an error of the daemon: systemd restarts a service that stays silent, which is the point of the watchdog.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

import structlog
import trio

log = structlog.get_logger(__name__)


class Notifier:
    """Sends to the service manager named by the environment, or to nobody.

    Attributes:
        watchdog_s: how long systemd lets this process be silent, in seconds; None without a watchdog.
    """

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """Return the notifier for this process; `$WATCHDOG_PID` of another process means no watchdog here."""
        address = environ.get("NOTIFY_SOCKET") or None
        if address is not None and address[0] not in "/@":
            address = None  # vsock, for a manager outside this machine
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = environ.get("WATCHDOG_USEC", "")
        watched = address is not None and ours and microseconds.isdigit() and int(microseconds) > 0
        return cls(address, int(microseconds) / 1_000_000 if watched else None)

    def ready(self, status: str) -> None:
        """Say that the daemon listens; *status* is the line `systemctl status` shows."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={_line(status)}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def extend_timeout(self, more_s: float) -> None:
        """Ask for *more_s* seconds from now before systemd kills a daemon that is still draining."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(more_s * 1_000_000)}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(message.encode(), address)
        except OSError as error:
            log.debug("systemd_not_notified", error=error.strerror)


def _line(text: str) -> str:
    return " ".join(text.split())


async def run_watchdog(notifier: Notifier, is_healthy: Callable[[], bool] = lambda: True) -> None:
    """Tell systemd that this process lives, twice per watchdog interval, for ever; return at once without a watchdog.

    Running as a trio task is half of the check: an event loop that is stuck sends nothing. *is_healthy* is the other
    half: while it answers False nothing is sent either, and systemd restarts the daemon.
    """
    if notifier.watchdog_s is None:
        return
    while True:
        if is_healthy():
            notifier.alive()
        else:
            log.error("watchdog_withheld", restart_after_s=notifier.watchdog_s)
        await trio.sleep(notifier.watchdog_s / 2)
