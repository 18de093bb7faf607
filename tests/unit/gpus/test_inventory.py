"""What a survey of the driver comes to."""

from __future__ import annotations

import pytest

from ngpu_node.gpus.driver import FaultKind, MigInstance
from ngpu_node.gpus.inventory import Inventory, InventoryState, Moves, Withheld, moves, of_fault, of_survey
from ngpu_protocol.gpu_models import canonical_gpu_model
from tests.support.scripted_driver import GIB, fault, reading, survey


def offered(inventory: Inventory) -> list[str]:
    return [gpu.uuid for gpu in inventory.gpus if not gpu.withheld]


def test_every_device_described_is_offered() -> None:
    found = of_survey(survey(reading(0), reading(1)))
    assert (found.state, found.reason) == (InventoryState.OK, "")
    assert offered(found) == ["GPU-00000000", "GPU-00000001"]
    assert found.gpus[0].offered_bytes == 141 * GIB
    assert (found.driver_version, found.cuda_version, found.stated_count) == ("580.1", "13.0", 2)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (FaultKind.NO_DRIVER, InventoryState.NO_DRIVER),
        (FaultKind.NOT_LOADED, InventoryState.NOT_LOADED),
        (FaultKind.MISMATCH, InventoryState.MISMATCH),
        (FaultKind.NO_PERMISSION, InventoryState.NO_PERMISSION),
        (FaultKind.STUCK, InventoryState.STUCK),
        (FaultKind.OTHER, InventoryState.FAILED),
        (FaultKind.LOST, InventoryState.FAILED),
    ],
)
def test_a_driver_that_cannot_be_asked_is_a_state_with_its_reason(kind: FaultKind, state: InventoryState) -> None:
    found = of_fault(fault(kind, "why"))
    assert (found.state, found.reason, found.gpus) == (state, "why", ())


def test_a_driver_without_devices_says_so() -> None:
    found = of_survey(survey())
    assert found.state is InventoryState.NO_DEVICE
    assert "no GPU" in found.reason


@pytest.mark.parametrize("count", [65, 2**32 - 1, 2**64 - 1])
def test_a_count_no_machine_has_is_not_believed(count: int) -> None:
    found = of_survey(survey(reading(0), count=count))
    assert found.state is InventoryState.ABSURD
    assert str(count) in found.reason
    assert found.gpus == ()


def test_of_two_devices_with_one_uuid_neither_is_offered() -> None:
    found = of_survey(survey(reading(0), reading(1, uuid="GPU-00000000"), reading(2)))
    assert found.state is InventoryState.PARTIAL
    assert offered(found) == ["GPU-00000002"]
    assert "2 devices say they are GPU-00000000" in found.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_total_bytes": 0},
        {"memory_total_bytes": 2**63},
        {"memory_free_bytes": 142 * GIB},
        {"memory_free_bytes": -1},
        {"uuid": ""},
    ],
)
def test_sizes_no_device_has_are_not_believed(changes: dict[str, object]) -> None:
    found = of_survey(survey(reading(0, **changes), reading(1)))
    assert found.state is InventoryState.PARTIAL
    assert offered(found) == ["GPU-00000001"]


def test_one_lost_card_does_not_hide_the_others() -> None:
    found = of_survey(survey(reading(1), count=2, faults=((0, fault(FaultKind.LOST, "fallen off the bus")),)))
    assert found.state is InventoryState.PARTIAL
    assert found.reason == "GPU 0: fallen off the bus"
    assert offered(found) == ["GPU-00000001"]


def test_the_instances_of_a_split_device_are_offered_in_its_place() -> None:
    whole = reading(0, mig_enabled=True)
    slices = [reading(0, uuid=f"MIG-{n}", mig=MigInstance(whole.uuid, n, 0, "1g.18gb")) for n in range(2)]
    found = of_survey(survey(whole, *slices))
    assert found.state is InventoryState.OK
    assert offered(found) == ["MIG-0", "MIG-1"]
    assert "MIG" in found.gpus[0].withheld


@pytest.mark.parametrize(
    "name", ["GPU-00000001", "gpu-00000001", "0000:01:00.0", "00000000:01:00.0", "01:00.0", " 0000:01:00 "]
)
def test_an_owner_withholds_a_device_by_uuid_or_place(name: str) -> None:
    found = of_survey(survey(reading(0), reading(1)), Withheld(devices=(name,)))
    assert offered(found) == ["GPU-00000000"]
    assert found.gpus[1].withheld == "withheld by the owner"


def test_an_owner_withholds_a_model_and_every_slice_of_a_device() -> None:
    instance = reading(1, uuid="MIG-1", mig=MigInstance("GPU-00000001", 1, 0))
    found = of_survey(survey(reading(0, model="NVIDIA A2"), instance), Withheld(devices=("A2", "GPU-00000001")))
    assert offered(found) == []


def test_what_an_owner_withholds_and_is_not_there_is_told() -> None:
    named = ("RTX 5090", "GPU-00000000", "0000:07:00.0", "")
    found = of_survey(survey(reading(0), reading(1)), Withheld(devices=named))
    assert found.unmatched == ("RTX 5090", "0000:07:00.0")
    assert of_survey(survey(), Withheld()).unmatched == ()


def test_an_owner_withholds_memory() -> None:
    found = of_survey(
        survey(reading(0), reading(1, memory_total_bytes=8 * GIB, memory_free_bytes=0)), Withheld((), 8 * GIB)
    )
    assert offered(found) == ["GPU-00000000"]
    assert found.gpus[0].offered_bytes == 133 * GIB


def test_a_card_of_which_memory_is_withheld_is_told_as_the_card_it_is() -> None:
    card = reading(0, model="NVIDIA H100 PCIe", memory_total_bytes=80 * GIB, memory_free_bytes=0)
    (whole,) = of_survey(survey(card), Withheld()).gpus
    (less,) = of_survey(survey(card), Withheld((), 8 * GIB)).gpus
    assert (whole.told_model, less.told_model) == ("NVIDIA H100 PCIe", "H100-80G")
    assert canonical_gpu_model(less.told_model, less.offered_bytes) == "H100-80G"


def test_a_device_that_comes_back_elsewhere_is_the_same_device() -> None:
    before = of_survey(survey(reading(0), reading(1)))
    without = of_survey(survey(reading(1, index=0)))
    after = of_survey(survey(reading(1, index=0), reading(0, index=1)))
    assert moves(before, without) == Moves(vanished=("GPU-00000000",), renumbered=("GPU-00000001",))
    assert moves(without, after) == Moves(appeared=("GPU-00000000",))
