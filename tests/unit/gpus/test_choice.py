"""How devices are chosen for a workspace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.errors import DeploymentImpossible
from ngpu_node.gpus.choice import TooFewGpus, UsableGpu, choose


def a_gpu(number: int, model: str = "NVIDIA GeForce RTX 4090", gib: int = 24) -> UsableGpu:
    return UsableGpu(f"GPU-{number}", bytes([number]) * 32, model, gib << 30)


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


@pytest.mark.parametrize(
    ("wanted", "model", "gib"),
    [
        ("V100-32Gi", "Tesla V100-SXM2-32GB", 32),
        ("A100-80G", "NVIDIA A100-SXM4-80GB", 80),
        ("A100", "NVIDIA A100-SXM4-40GB", 40),
        ("RTX-6000-ADA", "NVIDIA RTX 6000 Ada Generation", 48),
    ],
)
def test_a_model_is_told_by_the_names_bootstraps_place_by(wanted: str, model: str, gib: int) -> None:
    card = a_gpu(1, model, gib)
    assert choose(1, [wanted], [card], []) == (card,)


@pytest.mark.parametrize(
    ("wanted", "model"),
    [
        ("T4", "NVIDIA T400 4GB"),
        ("A10", "NVIDIA RTX A1000"),
        ("RTX3090", "NVIDIA GeForce RTX 3090 Ti"),
        ("A100-80G", "NVIDIA A100-SXM4-40GB"),
        ("H200", "NVIDIA H200 MIG 1g.18gb"),
    ],
)
def test_a_card_whose_name_begins_alike_is_another_one(wanted: str, model: str) -> None:
    with pytest.raises(TooFewGpus):
        choose(1, [wanted], [a_gpu(1, model, 40)], [])
