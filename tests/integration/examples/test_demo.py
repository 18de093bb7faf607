"""``scripts/demo`` as its user runs it: with an engine, without, interrupted, kept and stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from examples.demo import kept

ROOT = Path(__file__).resolve().parents[3]
NO_ENGINE = "unix:///nonexistent/docker.sock"


def demo(*arguments: str, engine: str | None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if engine is not None:
        environment["DOCKER_HOST"] = engine
    return subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that *pid* has started and that still run."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def last_line(output: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(output.rstrip().splitlines()[-1])
    return document


def assert_three_verified_tasks(document: dict[str, Any], engine: str) -> None:
    assert document["ok"] is True
    assert document["engine"] == engine
    assert [task["mode"] for task in document["tasks"]] == ["sync", "async", "stream"]
    assert all(task["verified"] for task in document["tasks"])
    assert set(document["tasks"][0]) == {"task_id", "mode", "node_addr", "verified", "wall_ms"}


def test_without_an_engine_three_tasks_are_verified() -> None:
    run = demo("--json", engine=NO_ENGINE)
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    assert output.count("no Docker engine answers") == 1
    assert_three_verified_tasks(last_line(output), "none")


@pytest.mark.needs_docker
def test_with_an_engine_the_workspace_is_a_container_and_nothing_is_left() -> None:
    engine = docker.from_env()
    images = {image.id for image in engine.images.list(all=True)}
    run = demo("--json", engine=None)
    output, _ = run.communicate(timeout=110)
    assert run.returncode == 0, output
    assert_three_verified_tasks(last_line(output), "docker")
    assert "ngpu-demo" not in " ".join(tag for image in engine.images.list() for tag in image.tags)
    assert {image.id for image in engine.images.list(all=True)} <= images
    names = [container.name for container in engine.containers.list(all=True)]
    assert not [name for name in names if "demo" in name]


def test_ctrl_c_stops_and_removes_everything() -> None:
    run = demo("--json", engine=NO_ENGINE)
    assert run.stdout is not None
    for line in run.stdout:
        if "adding the workspace" in line:
            break
    children = children_of(run.pid)
    assert len(children) >= 5  # a bootstrap, two nodes, two model servers, and perhaps a command
    run.send_signal(signal.SIGINT)
    output = run.stdout.read()
    assert run.wait(timeout=60) == 130
    assert not [pid for pid in children if alive(pid)]
    assert last_line(output)["ok"] is False
    assert "interrupted" in output


def test_what_is_kept_serves_until_it_is_stopped() -> None:
    if kept.FILE.exists():
        pytest.skip("a demonstration is kept running on this machine")
    run = demo("--keep", engine=NO_ENGINE)
    try:
        output, _ = run.communicate(timeout=100)
        assert run.returncode == 0, output
        curls = [line for line in output.splitlines() if line.startswith("curl ")]
        assert len(curls) == 3
        for curl in curls:
            answer = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
            assert "chat.completion" in answer.stdout
        url = next(line.split()[-1] for line in output.splitlines() if line.startswith("running at"))
        assert httpx.get(url + "/ready").json()["peers"] == 2
        processes = json.loads(kept.FILE.read_text())["processes"]
    finally:
        stop = demo("--stop", engine=NO_ENGINE)
        stop.communicate(timeout=60)
    assert stop.returncode == 0
    deadline = time.monotonic() + 5
    while any(alive(pid) for _, pid, _ in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [name for name, pid, _ in processes if alive(pid)]
    assert not kept.FILE.exists()
