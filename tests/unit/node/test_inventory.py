"""Which GPUs are found, what is said when none are, and how devices are chosen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node import inventory
from ngpu_node.errors import DeploymentImpossible
from ngpu_node.inventory import Gpu, Inventory, choose, look
from ngpu_protocol.identity import gpu_id
from tests.support import fake_nvml
from tests.unit.node.builders import NODE


def a_gpu(number: int, model: str = "NVIDIA GeForce RTX 4090") -> Gpu:
    return Gpu(f"GPU-{number}", bytes([number]) * 32, model, 24 << 30)


def test_a_machine_without_a_driver_has_no_gpus_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise inventory.pynvml.NVMLError_LibraryNotFound()

    monkeypatch.setattr(inventory.pynvml, "nvmlInit", missing)
    found = trio.run(look, NODE.address)
    assert found.gpus == ()
    assert "no NVIDIA driver" in found.problem


@pytest.mark.needs_gcc
def test_gpus_are_named_so_that_serials_stay_here(tmp_path: Path) -> None:
    machine = fake_nvml.FakeNvml(tmp_path / "state", gpus=2)
    with fake_nvml.load(machine.path):
        found = trio.run(look, NODE.address)
    assert found.problem == ""
    assert [gpu.model for gpu in found.gpus] == ["NVIDIA H200", "NVIDIA H200"]
    assert [gpu.id for gpu in found.gpus] == [gpu_id(NODE.address, gpu.uuid) for gpu in found.gpus]
    assert found.gpus[0].memory_bytes == 150_754_820_096


def test_a_driver_that_hangs_does_not_hang_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory.pynvml, "nvmlInit", lambda: time.sleep(1.0))

    async def main() -> None:
        began = trio.current_time()
        found = await look(NODE.address, timeout_s=0.1)
        assert trio.current_time() - began < 0.8
        assert found == Inventory(problem="the NVIDIA driver did not answer within 0.1 s")

    trio.run(main)


def test_the_first_preferred_type_with_enough_free_devices_is_taken() -> None:
    gpus = [a_gpu(1), a_gpu(2, "NVIDIA A100-SXM4-80GB"), a_gpu(3, "NVIDIA A100-SXM4-80GB")]
    assert choose(0, ["H100"], gpus, []) == ()
    assert choose(1, ["RTX4090", "A100"], gpus, []) == (gpus[0],)
    assert choose(1, ["RTX4090", "A100"], gpus, ["GPU-1"]) == (gpus[1],)
    assert choose(2, ["RTX4090", "A100"], gpus, []) == (gpus[1], gpus[2])
    assert choose(3, [], gpus, []) == tuple(gpus)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DeploymentImpossible) as caught:
        choose(2, ["H100", "A100"], [a_gpu(1)], [])
    assert str(caught.value) == ("needs 2 free GPUs of type H100 or A100; free on this node: NVIDIA GeForce RTX 4090")


@given(st.integers(1, 8), st.sets(st.integers(0, 7)))
def test_a_device_is_never_given_twice(count: int, taken: set[int]) -> None:
    gpus = [a_gpu(number) for number in range(8)]
    held = [f"GPU-{number}" for number in taken]
    try:
        chosen = choose(count, [], gpus, held)
    except DeploymentImpossible:
        assert count > 8 - len(taken)
    else:
        assert len({gpu.uuid for gpu in chosen}) == count
        assert not {gpu.uuid for gpu in chosen} & set(held)
