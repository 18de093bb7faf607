"""What each deployment holds of this machine: GPUs by UUID, memory, CPUs. Pure.

The one table by which a device is never lent twice. What a deployment holds is written down before its container
starts (`state`) and is its own until the engine said that the container is gone. So it survives this daemon: the
next one begins with the same table and gives a deployment the same devices again, and holders that are wanted no more
give back what they held once their containers are removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ngpu_node.gpus.choice import TooFewGpus, UsableGpu, choose

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Need:
    """What a deployment asks for.

    Attributes:
        gpu_types: in order of preference; none for any.
        gpu_memory_bytes: least memory on each GPU.
    """

    memory_bytes: int
    cpus: float
    gpu_count: int = 0
    gpu_types: tuple[str, ...] = ()
    gpu_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What all deployments together may hold; None for whatever there is."""

    memory_bytes: int | None = None
    cpus: float | None = None
    shares_per_gpu: int = 1


@dataclass(frozen=True, slots=True)
class Grant:
    """What one deployment holds; *gpus* are UUIDs."""

    memory_bytes: int
    cpus: float
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lack:
    """Why there is no room, in words for people; *ever*: there would be, if nobody else held anything."""

    reason: str
    ever: bool


class Room:
    """The table of one node, by holder. The caller writes each change down."""

    def __init__(self, limits: Limits, held: Mapping[str, Grant] | None = None) -> None:
        self._limits = limits
        self._held = dict(held or {})

    def __contains__(self, holder: str) -> bool:
        return holder in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def of(self, holder: str) -> Grant | None:
        """Return what *holder* holds."""
        return self._held.get(holder)

    def gpus(self) -> list[str]:
        """Return the UUIDs that are held, each as often as it is."""
        return [uuid for grant in self._held.values() for uuid in grant.gpus]

    def take(self, holder: str, need: Need, gpus: Sequence[UsableGpu]) -> Grant | Lack:
        """Give *holder* what it needs, or say what is missing. What it held before is first given back.

        Args:
            gpus: the devices that may be used now.
        """
        before = self._held.get(holder)
        found = self._find(need, gpus, {holder}, before.gpus if before else ())
        if isinstance(found, Grant):
            self._held[holder] = found
        else:
            self._held.pop(holder, None)
        return found

    def hold(self, holder: str, grant: Grant) -> bool:
        """Enter what *holder* has already, a container that runs; False where that would lend a device too often."""
        others = [uuid for name, other in self._held.items() if name != holder for uuid in other.gpus]
        if any(others.count(uuid) >= self._limits.shares_per_gpu for uuid in grant.gpus):
            return False
        self._held[holder] = grant
        return True

    def give_back(self, holder: str) -> bool:
        """Forget what *holder* held; True if that was something."""
        return self._held.pop(holder, None) is not None

    def would_fit(self, need: Need, gpus: Sequence[UsableGpu], without: Collection[str]) -> bool:
        """Tell whether there would be room if the holders *without* left."""
        return isinstance(self._find(need, gpus, without, ()), Grant)

    def _find(
        self, need: Need, gpus: Sequence[UsableGpu], without: Collection[str], before: Sequence[str]
    ) -> Grant | Lack:
        others = [grant for holder, grant in self._held.items() if holder not in without]
        lacks = [*self._lack_of_size(need, others)]
        try:
            chosen = self._choose(need, gpus, others, before)
        except TooFewGpus as error:
            lacks.append(str(error))
        if not lacks:
            return Grant(need.memory_bytes, need.cpus, tuple(gpu.uuid for gpu in chosen))
        return Lack("; ".join(lacks), ever=bool(others) and self._fits_alone(need, gpus))

    def _fits_alone(self, need: Need, gpus: Sequence[UsableGpu]) -> bool:
        try:
            self._choose(need, gpus, [], ())
        except TooFewGpus:
            return False
        return not any(self._lack_of_size(need, []))

    def _choose(
        self, need: Need, gpus: Sequence[UsableGpu], others: Sequence[Grant], before: Sequence[str]
    ) -> tuple[UsableGpu, ...]:
        return choose(
            need.gpu_count,
            need.gpu_types,
            gpus,
            [uuid for grant in others for uuid in grant.gpus],
            memory_bytes=need.gpu_memory_bytes,
            shares=self._limits.shares_per_gpu,
            before=before,
        )

    def _lack_of_size(self, need: Need, others: Sequence[Grant]) -> Iterable[str]:
        if self._limits.memory_bytes is not None:
            free = self._limits.memory_bytes - sum(grant.memory_bytes for grant in others)
            if need.memory_bytes > free:
                yield (
                    f"needs {_gib(need.memory_bytes)} of memory; free of the {_gib(self._limits.memory_bytes)} this "
                    f"node's owner allows: {_gib(max(0, free))}"
                )
        if self._limits.cpus is not None:
            spare = self._limits.cpus - sum(grant.cpus for grant in others)
            if need.cpus > spare + 1e-9:
                yield (
                    f"needs {need.cpus:g} CPUs; free of the {self._limits.cpus:g} this node's owner allows: "
                    f"{max(0.0, spare):g}"
                )


def _gib(count: int) -> str:
    return f"{count / _GIB:.3g} GiB"
