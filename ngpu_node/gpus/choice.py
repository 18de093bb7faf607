"""The devices a workspace may be given, and which of them it gets. Pure.

A device is lent to as many workspaces as the owner's `shares_per_gpu` allows, one unless he says otherwise; with
more, each can count on its part of the memory. Nothing on the card holds a workspace to that part: it is what this
node promises when it lends the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ngpu_node.errors import DeploymentImpossible
from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class UsableGpu:
    """A device that may be used now.

    Attributes:
        uuid: NVML's, stable over restarts and re-ordering; it stays on this machine.
        id: how the device is called outside, 32 bytes (`identity.gpu_id`).
        model: NVML's spelling.
        memory_bytes: that a workspace may count on.
        minor: the number of its `/dev/nvidia<n>`; None where it has none.
    """

    uuid: str
    id: bytes
    model: str
    memory_bytes: int
    minor: int | None = None


class TooFewGpus(DeploymentImpossible):
    """There are not enough free devices now; there may be later."""


def choose(
    count: int,
    types: Sequence[str],
    gpus: Iterable[UsableGpu],
    taken: Iterable[str],
    *,
    memory_bytes: int = 0,
    shares: int = 1,
    before: Sequence[str] = (),
) -> tuple[UsableGpu, ...]:
    """Return *count* free devices of the first of *types* that has enough of them (any type when there are none).

    Those it had *before* are kept where they fit. Else the devices fewest share come first, and of those the smallest
    that will do, of one model where possible: large ones are kept for what needs them.

    Args:
        types: models in order of preference, spelled by people: `RTX4090` is `NVIDIA GeForce RTX 4090`. By the table
            bootstraps place by (`gpu_models`), so that what one sent here for a card it saw is not refused.
        taken: UUIDs that are held already, each as often as it is held.
        memory_bytes: least memory on each.
        shares: how many may hold one device.
        before: UUIDs it held before a restart.

    Raises:
        TooFewGpus: there are not enough; the message has the numbers.
    """
    if count == 0:
        return ()
    holders = Counter(taken)
    all_of_them = list(gpus)
    free = [gpu for gpu in all_of_them if holders[gpu.uuid] < shares]
    large = [gpu for gpu in free if gpu.memory_bytes // shares >= memory_bytes]
    for wanted in types or [""]:
        fitting = [gpu for gpu in large if not wanted or _is_of(gpu, wanted)]
        kept = [gpu for gpu in fitting if gpu.uuid in before]
        if len(kept) == count:
            return tuple(kept)
        fitting.sort(key=lambda gpu: (holders[gpu.uuid], gpu.memory_bytes))
        of_model: dict[str, list[UsableGpu]] = {}
        for gpu in fitting:
            of_model.setdefault(gpu.model, []).append(gpu)
        for alike in of_model.values():
            if len(alike) >= count:
                return tuple(alike[:count])
        if len(fitting) >= count:
            return tuple(fitting[:count])
    kind = f" of type {' or '.join(types)}" if types else ""
    size = f" with {_gib(memory_bytes)} each" if memory_bytes else ""
    there = ", ".join(_described(gpu, shares) if memory_bytes else gpu.model for gpu in free) or "none"
    raise TooFewGpus(f"needs {count} free GPU{'s' if count > 1 else ''}{kind}{size}; free on this node: {there}")


def _is_of(gpu: UsableGpu, wanted: str) -> bool:
    return canonical_gpu_model(wanted) in gpu_model_names(gpu.model, gpu.memory_bytes)


def _described(gpu: UsableGpu, shares: int) -> str:
    part = (
        f" ({_gib(gpu.memory_bytes // shares)}, shared by {shares})" if shares > 1 else f" ({_gib(gpu.memory_bytes)})"
    )
    return gpu.model + part


def _gib(count: int) -> str:
    return f"{count / _GIB:.3g} GiB"
