"""The engine that `.ci/engine` started for the tests: one that a test may kill, and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import docker
import pytest

ROOT = Path(__file__).parents[3]


class OwnEngine:
    """The engine at DOCKER_HOST, which nobody but the tests uses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hook = directory / "bin" / "nvidia-container-runtime-hook"

    @property
    def pid(self) -> int:
        return int((self.directory / "dockerd.pid").read_text())

    def kill(self) -> None:
        """Kill dockerd, which leaves its containers running, and wait until it is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while _lives(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def start(self) -> None:
        """Start dockerd again; returns when it answers."""
        subprocess.run([ROOT / ".ci" / "engine", "dockerd", self.directory], check=True, timeout=90)

    def ensure(self) -> None:
        """Have it answer, whatever a test left."""
        try:
            client = docker.from_env(timeout=5)
            client.ping()
            client.close()
        except Exception:
            self.start()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def own_engine() -> OwnEngine:
    """Return the tests' own engine.

    Skips where DOCKER_HOST is somebody's engine.
    """
    directory = Path(os.environ.get("DOCKER_HOST", "").removeprefix("unix://")).parent
    if not (directory / "containerd.toml").exists() or os.geteuid() != 0:
        pytest.skip("an engine is killed: only one that .ci/engine started will do")
    return OwnEngine(directory)
