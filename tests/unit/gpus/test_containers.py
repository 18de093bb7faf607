"""A container that lost its GPUs is found by what `nvidia-smi -L` says inside it, or by what is seen from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from ngpu_node.gpus.containers import Outside, could_tell, look_outside, lost_inside, lost_outside

FIRST, SECOND = "GPU-b778b9a9-f164-3c6a-017d-c2608db76032", "GPU-00000000-1111-2222-3333-444444444444"
WELL = f"GPU 0: NVIDIA H200 (UUID: {FIRST})\n"


def test_a_container_that_sees_its_devices_is_well() -> None:
    assert lost_inside(0, WELL, [FIRST]) == ""
    assert lost_inside(0, WELL + f"GPU 1: NVIDIA H200 (UUID: {SECOND})\n", [FIRST]) == ""
    mig = WELL + "  MIG 1g.18gb     Device  0: (UUID: MIG-41b35de2-f09d-5a02-95f9-8a1aa4f9bf7b)\n"
    assert lost_inside(0, mig, ["MIG-41b35de2-f09d-5a02-95f9-8a1aa4f9bf7b"]) == ""


@pytest.mark.parametrize("code", [255, 9, 1])
def test_one_that_may_not_open_them_any_more_has_lost_them(code: int) -> None:
    reason = lost_inside(code, "Failed to initialize NVML: Unknown Error\n", [FIRST])
    assert "Failed to initialize NVML" in reason
    assert "daemon-reload" in reason
    assert "exit code" in lost_inside(code, "", [FIRST])


def test_one_that_sees_some_of_them_has_lost_the_others() -> None:
    assert SECOND in lost_inside(0, WELL, [FIRST, SECOND])


@pytest.mark.parametrize("code", [126, 127, -9])
def test_an_image_in_which_it_cannot_be_asked_is_not_suspected(code: int) -> None:
    assert lost_inside(code, "executable file not found in $PATH", [FIRST]) == ""


def test_a_workspace_without_devices_loses_none() -> None:
    assert lost_inside(255, "Failed to initialize NVML", []) == ""


# -- from outside ------------------------------------------------------------------------------------------------------

HELD = {FIRST: 0, SECOND: 3}
HERE = {"nvidia0", "nvidia3"}


def a_process(
    proc: Path, *, environ: bytes | None = None, nodes: list[str] | None = None, mounts: str | None = None
) -> int:
    """Make what /proc shows of a container's first process; None where it is not shown to this user."""
    place = proc / "77"
    place.mkdir()
    if environ is not None:
        (place / "environ").write_bytes(environ)
    if nodes is not None:
        (place / "root" / "dev").mkdir(parents=True)
        for name in nodes:
            (place / "root" / "dev" / name).touch()
    if mounts is not None:
        (place / "mountinfo").write_text(mounts)
    return 77


def test_only_where_nvidia_smi_did_not_run_is_it_looked_at_from_outside() -> None:
    assert could_tell(0)
    assert could_tell(255)
    assert not any(could_tell(code) for code in (126, 127, -1))


def test_what_a_container_was_told_and_given_is_read_from_its_first_process(tmp_path: Path) -> None:
    told = f"PATH=/bin\0NVIDIA_VISIBLE_DEVICES={FIRST},{SECOND}\0".encode()
    pid = a_process(tmp_path, environ=told, nodes=["nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"])
    view = look_outside(pid, tmp_path)
    assert view == Outside(frozenset({FIRST, SECOND}), frozenset({"nvidia0", "nvidia3"}))
    assert lost_outside(view, HELD, HERE) == ""


def test_an_engine_that_gave_none_is_found_out(tmp_path: Path) -> None:
    view = look_outside(a_process(tmp_path, environ=b"PATH=/bin\0", nodes=["null"]), tmp_path)
    assert view == Outside(frozenset(), frozenset())
    assert lost_outside(view, HELD, HERE) == f"the engine did not tell the container of {SECOND}, {FIRST}"


def test_a_device_node_that_is_missing_is_named(tmp_path: Path) -> None:
    told = f"NVIDIA_VISIBLE_DEVICES={FIRST},{SECOND}\0".encode()
    view = look_outside(a_process(tmp_path, environ=told, nodes=["nvidia0"]), tmp_path)
    assert lost_outside(view, HELD, HERE) == f"the container has no /dev/nvidia3 ({SECOND})"
    assert lost_outside(view, HELD, {"nvidia0"}) == "", "nor has the machine: it is another's, or pretended"
    assert lost_outside(view, {FIRST: 0, SECOND: None}, HERE) == ""


def test_where_only_the_mounts_may_be_read_they_tell_which_nodes_are_there_and_none_tells_nothing(
    tmp_path: Path,
) -> None:
    mount = "640 632 0:5 /nvidia3 /dev/nvidia3 ro,nosuid,noexec,relatime - devtmpfs udev rw,mode=755\n"
    others = "1 2 0:5 / / rw - overlay overlay rw\n641 632 0:5 /nvidiactl /dev/nvidiactl ro - devtmpfs udev rw\n"
    view = look_outside(a_process(tmp_path, mounts=others + mount), tmp_path)
    assert view == Outside(None, frozenset({"nvidia3"}))
    assert "/dev/nvidia0" in lost_outside(view, HELD, HERE)
    (tmp_path / "77" / "mountinfo").write_text(others)
    assert look_outside(77, tmp_path) == Outside()


def test_of_a_container_on_another_machine_nothing_is_said(tmp_path: Path) -> None:
    assert look_outside(77, tmp_path) == look_outside(0) == Outside()
    assert lost_outside(Outside(), HELD, HERE) == ""
    assert lost_outside(Outside(told=frozenset({"all"})), HELD, HERE) == ""
