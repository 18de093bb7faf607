"""How devices are chosen for a workspace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.errors import DeploymentImpossible
from ngpu_node.gpus.choice import UsableGpu, choose


def a_gpu(number: int, model: str = "NVIDIA GeForce RTX 4090") -> UsableGpu:
    return UsableGpu(f"GPU-{number}", bytes([number]) * 32, model, 24 << 30)


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
