"""The devices a workspace may be given, and which of them it gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ngpu_node.errors import DeploymentImpossible
from ngpu_node.gpus.inventory import same_model


@dataclass(frozen=True, slots=True)
class UsableGpu:
    """A device that may be used now.

    Attributes:
        uuid: NVML's, stable over restarts and re-ordering; it stays on this machine.
        id: how the device is called outside, 32 bytes (`identity.gpu_id`).
        model: NVML's spelling.
        memory_bytes: that a workspace may count on.
    """

    uuid: str
    id: bytes
    model: str
    memory_bytes: int


class TooFewGpus(DeploymentImpossible):
    """There are not enough free devices now; there may be later."""


def choose(count: int, types: Sequence[str], gpus: Iterable[UsableGpu], taken: Iterable[str]) -> tuple[UsableGpu, ...]:
    """Return *count* free devices of the first of *types* that has enough of them (any type when there are none).

    Args:
        types: models in order of preference, spelled by people: `RTX4090` matches `NVIDIA GeForce RTX 4090`.
        taken: UUIDs that are held already.

    Raises:
        TooFewGpus: there are not enough; the message has the numbers.
    """
    if count == 0:
        return ()
    held = set(taken)
    free = [gpu for gpu in gpus if gpu.uuid not in held]
    for wanted in types or [""]:
        fitting = [gpu for gpu in free if not wanted or same_model(wanted, gpu.model)]
        if len(fitting) >= count:
            return tuple(fitting[:count])
    kind = f" of type {' or '.join(types)}" if types else ""
    there = ", ".join(gpu.model for gpu in free) or "none"
    raise TooFewGpus(f"needs {count} free GPU{'s' if count > 1 else ''}{kind}; free on this node: {there}")
