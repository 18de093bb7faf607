"""Both daemons as systemd runs them: a credential, readiness, watchdog, a drain that ends with exit code 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WAIT_S = 60


@dataclass
class Service:
    """A daemon started with what a service manager puts into its environment."""

    process: subprocess.Popen[str]
    manager: socket.socket
    log: Path

    def hear(self, prefix: str) -> str:
        """Return the next message that starts with *prefix*, skipping others."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            self.manager.settimeout(max(0.1, end - time.monotonic()))
            try:
                message = self.manager.recv(4096).decode()
            except TimeoutError:
                break
            if message.startswith(prefix):
                return message
        raise AssertionError(f"no {prefix} within {WAIT_S} s:\n{self.log.read_text()}")


def command(package: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", f"from {package}.cli import app; app()", *arguments]


@pytest.fixture(params=["ngpu_node", "ngpu_bootstrap"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    package = request.param
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "passphrase").write_text("secret\n")
    environ = {
        **os.environ,
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
        f"{package.upper()}_DATA_DIR": str(tmp_path / "data"),
        f"{package.upper()}_LISTEN": '["/ip4/127.0.0.1/tcp/0"]',
        f"{package.upper()}_NETWORK": "local",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "1000000",
        "JOURNAL_STREAM": "8:12345",
    }
    more = ["--engine", "none"] if package == "ngpu_node" else ["--http-listen", "127.0.0.1:0"]
    init = command(package, "init", "--data-dir", str(tmp_path / "data"), "--kdf", "light")
    subprocess.run(
        init, env=environ, cwd=ROOT, check=True, capture_output=True, timeout=WAIT_S, stdin=subprocess.DEVNULL
    )
    log = tmp_path / "log"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        log.open("w") as output,
    ):
        manager.bind(environ["NOTIFY_SOCKET"])
        process = subprocess.Popen(
            command(package, "run", *more),
            env=environ,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
        )
        try:
            yield Service(process, manager, log)
        finally:
            process.kill()
            process.wait(10)


def test_ready_alive_silent_while_frozen_and_drained_when_asked(service: Service) -> None:
    assert "\nSTATUS=" in service.hear("READY=1")
    for _ in range(2):
        service.hear("WATCHDOG=1")
    written = [path for path in (service.log.parent / "data").rglob("*") if not path.is_symlink()]
    assert {path.suffix for path in written} >= {".json", ".db"}
    assert [path.name for path in written if path.stat().st_mode & 0o077] == []

    service.process.send_signal(signal.SIGSTOP)
    service.manager.settimeout(0.2)
    while True:  # what was sent before it froze
        try:
            service.manager.recv(4096)
        except TimeoutError:
            break
    service.manager.settimeout(1.5)
    with pytest.raises(TimeoutError):
        service.manager.recv(4096)
    service.process.send_signal(signal.SIGCONT)
    service.hear("WATCHDOG=1")

    service.process.send_signal(signal.SIGTERM)
    service.hear("STOPPING=1")
    assert service.process.wait(WAIT_S) == 0
    events = [json.loads(line) for line in service.log.read_text().splitlines()]
    assert all(event["level"] != "error" for event in events), events
