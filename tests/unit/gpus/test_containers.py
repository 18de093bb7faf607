"""A container that lost its GPUs is found by what `nvidia-smi -L` says inside it."""

from __future__ import annotations

import pytest

from ngpu_node.gpus.containers import lost_inside

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
