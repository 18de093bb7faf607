"""Which container a process runs in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ngpu_node.gpus.processes import ProcessTable, containers_in, ends, lives

A, B = "0123456789abcdef" * 4, "fedcba9876543210" * 4


@pytest.mark.parametrize(
    ("cgroup", "containers"),
    [
        (f"0::/system.slice/docker-{A}.scope\n", (A,)),
        (f"0::/docker/{A}\n", (A,)),
        (f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope\n", (A,)),
        (f"0::/machine.slice/libpod-{A}.scope/container\n", (A,)),
        (f"0::/kubepods.slice/kubepods-burstable.slice/cri-containerd-{A}.scope\n", (A,)),
        (f"0::/docker/{A}/docker/{B}\n", (A, B)),
        (f"0::/../../system.slice/docker-{A}.scope\n", (A,)),
        (f"12:pids:/docker/{A}\n11:memory:/docker/{A}\n1:name=systemd:/docker/{A}\n", (A,)),
        (f"3:cpu,cpuacct:/user.slice\n2:memory:/docker/{A}\n0::/user.slice\n", (A,)),
        ("0::/user.slice/user-1000.slice/session-1.scope\n", ()),
        ("0::/\n", ()),
        ("", ()),
        (f"0::/something-{A}0\n", ()),
        (f"0::/{A[:63]}\n", ()),
    ],
)
def test_the_container_is_read_from_the_control_group(cgroup: str, containers: tuple[str, ...]) -> None:
    assert containers_in(cgroup) == containers


def put(proc: Path, pid: int, cgroup: bytes) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cgroup").write_bytes(cgroup)


def test_processes_are_looked_up_and_unknown_ones_are_none(tmp_path: Path) -> None:
    put(tmp_path, 7, f"0::/docker/{A}\n".encode())
    put(tmp_path, 8, b"0::/user.slice\n")
    put(tmp_path, 9, b"0::/\xff\xfe\n")
    table = ProcessTable(tmp_path)
    assert table.containers([7, 8, 9, 10], 0.0) == {7: (A,), 8: (), 9: (), 10: None}


def test_a_process_that_ended_is_remembered_for_its_last_samples(tmp_path: Path) -> None:
    put(tmp_path, 7, f"0::/docker/{A}\n".encode())
    table = ProcessTable(tmp_path)
    table.containers([7], 0.0)
    (tmp_path / "7" / "cgroup").unlink()
    assert table.containers([7], 5.0) == {7: (A,)}
    assert table.containers([7], 5.1) == {7: (A,)}
    assert table.containers([7], 5.2) == {7: None}


def test_this_process_can_be_found() -> None:
    assert ProcessTable().containers([os.getpid()], 0.0)[os.getpid()] is not None


def test_a_process_lives_until_it_ends_whether_or_not_anybody_waits_for_it() -> None:
    import subprocess
    import time

    process = subprocess.Popen(["sleep", "100"])
    assert lives(process.pid)
    assert not ends(process.pid)
    process.kill()
    deadline = time.monotonic() + 10
    while lives(process.pid):  # nobody has waited for it: it is a zombie
        assert time.monotonic() < deadline
    assert Path(f"/proc/{process.pid}").exists()
    assert ends(process.pid)
    process.wait()
    assert not lives(process.pid)
    assert ends(process.pid)
