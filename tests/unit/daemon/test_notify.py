"""What systemd hears, over real datagram sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ngpu_daemon.notify import Notifier, run_watchdog


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The service manager's end of the socket, and what it puts into `$NOTIFY_SOCKET`."""
    abstract = f"@ngpu-test-{os.getpid()}"
    address = str(tmp_path / "notify") if request.param == "path" else abstract
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0", 1))
        receiver.settimeout(5)
        yield receiver, address


def test_each_state_is_one_datagram(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    notifier.ready("listening on 4001")
    notifier.status("2 peers\nREADY=0")
    notifier.extend_timeout(1.5)
    notifier.stopping("draining")
    assert [receiver.recv(1000) for _ in range(4)] == [
        b"READY=1\nSTATUS=listening on 4001",
        b"STATUS=2 peers READY=0",
        b"EXTEND_TIMEOUT_USEC=1500000",
        b"STOPPING=1\nSTATUS=draining",
    ]


def test_outside_systemd_nothing_is_sent_and_nothing_fails() -> None:
    notifier = Notifier.from_environment({})
    notifier.ready("nobody listens")
    assert notifier.watchdog_s is None


@pytest.mark.parametrize("address", ["vsock:2:1", "relative", "/nowhere/to/be/found", "@nobody-there", "/" + "x" * 200])
def test_an_address_nobody_answers_at_is_no_error(address: str) -> None:
    Notifier.from_environment({"NOTIFY_SOCKET": address}).ready("up")


def test_a_full_socket_never_blocks_the_daemon(manager: tuple[socket.socket, str]) -> None:
    _, address = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    for _ in range(2000):
        notifier.status("nobody reads this")


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_interval_is_ours_only(environ: dict[str, str], watchdog_s: float | None) -> None:
    assert Notifier.from_environment({"NOTIFY_SOCKET": "/x", **environ}).watchdog_s == watchdog_s


def test_a_healthy_daemon_pings_twice_per_interval(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager

    async def main() -> None:
        with trio.move_on_after(9.9):
            await run_watchdog(Notifier(address, watchdog_s=4))

    trio.run(main, clock=MockClock(autojump_threshold=0))
    receiver.setblocking(False)
    assert [receiver.recv(100) for _ in range(5)] == [b"WATCHDOG=1"] * 5
    with pytest.raises(BlockingIOError):
        receiver.recv(100)


def test_an_unhealthy_daemon_is_silent(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager

    async def main() -> None:
        with trio.move_on_after(9.9):
            await run_watchdog(Notifier(address, watchdog_s=4), lambda: trio.current_time() < 3)

    trio.run(main, clock=MockClock(rate=0, autojump_threshold=0))
    receiver.setblocking(False)
    assert [receiver.recv(100) for _ in range(2)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        receiver.recv(100)


def test_without_a_watchdog_the_task_ends() -> None:
    trio.run(run_watchdog, Notifier())
