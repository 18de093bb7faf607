"""Which nodes should run which workspaces: a pure function from what is wanted and who is there.

An image goes to `replicas` nodes that fit (all of them when it names no number). What is somewhere stays there as long
as it fits, so that a node that joins moves nothing; a node that is gone keeps its place for as long as the caller
waits for it (`Wanted.waited_for`). Free places go to the nodes with the GPU type that is preferred most, then to those
with fewest workspaces, then by address. Resources are counted down: GPUs (as often as their owner shares them), memory
and CPUs that specifications ask for, places on a node (`LIMIT_PER_NODE`). What is there is counted before anything
new, in the order of the workspaces.

When fewer nodes fit than are wanted, `Shortage` says what each of the others lacks.

A service goes to every node that offers the model server it names: the owner put it there, nothing has to be started.
A node that is not admitted gets nothing.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ngpu_protocol.control import GpuOffer, HostOffer
from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names
from ngpu_protocol.identity import Address
from ngpu_protocol.image_references import parse_image_reference
from ngpu_protocol.workspaces import WorkspaceSpec

LIMIT_PER_NODE = 256
"""Workspaces one node is told to run at most: a list of them must fit a message."""

_MIB = 1024 * 1024


class Lack(enum.StrEnum):
    """Why a node cannot run a workspace, in the order they are looked for."""

    NOT_ADMITTED = "not_admitted"
    NOT_CHALLENGED = "not_challenged"
    DRAINING = "draining"
    AREA = "area"
    ENGINE = "engine"
    REGISTRY = "registry"
    TAR_IMAGES = "tar_images"
    EGRESS = "egress"
    FAILED_THERE = "failed_there"
    GPU_TYPE = "gpu_type"
    GPU_COUNT = "gpu_count"
    GPU_MEMORY = "gpu_memory"
    GPU_RUNTIME = "gpu_runtime"
    GPUS_TAKEN = "gpus_taken"
    MEMORY = "memory"
    CPUS = "cpus"
    IMAGE_SIZE = "image_size"
    DISK = "disk"
    SLOTS = "slots"


# A node that lacks one of these must not run it; with any other it may go on while there is nowhere better.
_FORBIDDEN = frozenset({Lack.NOT_ADMITTED, Lack.NOT_CHALLENGED, Lack.AREA, Lack.EGRESS})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A workspace to be placed.

    Attributes:
        held: nodes it was assigned to before.
        waited_for: of those, nodes that are not there now and keep their place.
        image_bytes: what its image measures, 0 while nobody knows.
        failed_on: nodes where it failed for a fault of the node, with the fault.
        only: the nodes that may have it now, for a workspace that challenges them; None for every other.
    """

    spec: WorkspaceSpec
    held: Collection[Address] = ()
    waited_for: Collection[Address] = ()
    image_bytes: int = 0
    failed_on: Mapping[Address, str] = field(default_factory=dict)
    only: Collection[Address] | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """A node that is there.

    Attributes:
        draining: it takes nothing new.
        leaving: it has been draining for so long that what it has goes elsewhere.
        services: `project/model` of each registered model server.
        offer: what its machine has; None from a node that does not say, which is taken to have enough.
    """

    node: Address
    admitted: bool = True
    draining: bool = False
    leaving: bool = False
    gpus: Sequence[GpuOffer] = ()
    services: Collection[str] = ()
    offer: HostOffer | None = None


@dataclass(frozen=True, slots=True)
class Shortage:
    """Fewer nodes fit than are wanted (or none at all).

    Attributes:
        wanted: replicas, or 1 where no number was named.
        fitting: nodes that have the workspace.
        lacks: how many other nodes lack what.
        reason: the commonest lack, or `nodes` when every node there is has it.
        detail: all of that as a sentence.
    """

    wanted: int
    fitting: int
    lacks: Mapping[Lack, int]
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who should run what: nodes by workspace id, and what could not be placed."""

    placed: Mapping[str, Sequence[Address]]
    short: Mapping[str, Shortage]


@dataclass(slots=True)
class _Room:
    """What is left on a host while workspaces are placed."""

    host: Host
    gpus: list[int]
    memory_bytes: int | None
    cpus: float | None
    workspaces: int = 0
    of_types: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, host: Host) -> _Room:
        offer = host.offer
        return cls(
            host,
            [gpu.shares for gpu in host.gpus],
            offer.memory_bytes if offer is not None and offer.memory_bytes else None,
            offer.cpus if offer is not None and offer.cpus else None,
        )

    def take(self, spec: WorkspaceSpec) -> None:
        for index in self.free_gpus(spec)[: spec.gpu_count]:
            self.gpus[index] -= 1
        if self.memory_bytes is not None:
            self.memory_bytes -= spec.memory_bytes or 0
        if self.cpus is not None:
            self.cpus -= spec.cpus or 0.0
        self.workspaces += 1

    def usable(self, wanted: str, memory_bytes: int = 0) -> list[int]:
        """Return the indices of the GPUs of type *wanted*, of any for the empty one, with that much memory."""
        found = self.of_types.get((wanted, memory_bytes))
        if found is None:
            name = canonical_gpu_model(wanted) if wanted else ""
            found = self.of_types[wanted, memory_bytes] = [
                index
                for index, gpu in enumerate(self.host.gpus)
                if gpu.memory_bytes >= memory_bytes
                and (not name or name in gpu_model_names(gpu.model, gpu.memory_bytes))
            ]
        return found

    def free_gpus(self, spec: WorkspaceSpec) -> list[int]:
        """Return the GPUs that *spec* may have: all of one type, the first it names that has enough free."""
        for wanted in spec.gpu_types or [""]:
            found = [index for index in self.usable(wanted, spec.min_gpu_memory_bytes) if self.gpus[index] > 0]
            if len(found) >= spec.gpu_count:
                return found
        return []

    def preference(self, spec: WorkspaceSpec) -> int:
        """Return the place in the list of types of the one it would get here."""
        if not spec.gpu_count:
            return 0
        for place, wanted in enumerate(spec.gpu_types):
            if sum(self.gpus[index] > 0 for index in self.usable(wanted, spec.min_gpu_memory_bytes)) >= spec.gpu_count:
                return place
        return len(spec.gpu_types)


def assign(workspaces: Sequence[Wanted], hosts: Sequence[Host]) -> Assignment:
    """Return which nodes should run which workspaces. Same arguments, same answer, in whatever order hosts come."""
    rooms = {host.node: _Room.of(host) for host in sorted(hosts, key=lambda host: host.node)}
    placed: dict[str, list[Address]] = {}
    for wanted in workspaces:
        spec = wanted.spec
        if spec.is_image:
            placed[spec.id] = _keep(wanted, rooms)
        else:
            placed[spec.id] = [
                host.node
                for host in (room.host for room in rooms.values())
                if host.admitted and not host.leaving and spec.service in host.services
            ]
    short: dict[str, Shortage] = {}
    # A challenge is soon over; what comes after it would hold the GPU for good.
    for wanted in sorted(workspaces, key=lambda one: one.only is None):
        if wanted.spec.is_image:
            _fill(wanted, rooms, placed[wanted.spec.id])
            missing = _shortage(wanted, rooms, placed[wanted.spec.id])
            if missing is not None:
                short[wanted.spec.id] = missing
    return Assignment(placed, short)


def _keep(wanted: Wanted, rooms: Mapping[Address, _Room]) -> list[Address]:
    """Return the nodes that have it and keep it; those that are there before those waited for."""
    spec = wanted.spec
    there = [node for node in sorted(wanted.held) if node in rooms]
    there.sort(key=lambda node: rooms[node].preference(spec))
    kept: list[Address] = []
    for node in there:
        if len(kept) == spec.replicas:
            return kept
        if lack(wanted, rooms[node]) is None:
            rooms[node].take(spec)
            kept.append(node)
    absent = sorted(set(wanted.waited_for) - set(rooms)) if wanted.only is None else []
    room_left = len(absent) if spec.replicas is None else spec.replicas - len(kept)
    return kept + absent[:room_left]


def _fill(wanted: Wanted, rooms: Mapping[Address, _Room], placed: list[Address]) -> None:
    """Add the best of the other nodes, and where they are too few, the ones that had it and are no longer quite fit."""
    spec = wanted.spec
    limit = spec.replicas if spec.replicas is not None else len(rooms) + len(placed)
    if len(placed) >= limit:
        return
    kept = set(placed)
    # a workspace takes room of each node once, so the order among the free ones does not change on the way
    free = [room for node, room in rooms.items() if node not in kept and lack(wanted, room) is None]
    free.sort(key=lambda room: (room.preference(spec), room.workspaces, room.host.node))
    for room in free[: limit - len(placed)]:
        room.take(spec)
        placed.append(room.host.node)
    for node in sorted(wanted.held):
        if len(placed) >= limit:
            return
        if node in rooms and node not in placed and lack(wanted, rooms[node]) not in _FORBIDDEN:
            rooms[node].take(spec)
            placed.append(node)


def lack(wanted: Wanted, room: _Room) -> Lack | None:
    """Return the first thing that keeps *wanted* off a node with that much room, None when it fits."""
    spec, host = wanted.spec, room.host
    offer = host.offer if host.offer is not None else HostOffer(engine=True)
    has_it = host.node in wanted.held
    checks = (
        (Lack.NOT_ADMITTED, not host.admitted),
        (Lack.NOT_CHALLENGED, wanted.only is not None and host.node not in wanted.only),
        (Lack.DRAINING, host.leaving or (host.draining and not has_it)),
        (Lack.AREA, bool(spec.area) and spec.area != offer.area),
        (Lack.ENGINE, not offer.engine and not has_it),
        (Lack.REGISTRY, not _registry_allowed(spec, offer)),
        (Lack.TAR_IMAGES, spec.image_url is not None and not offer.tar_images),
        (Lack.EGRESS, spec.egress and not offer.egress),
        (Lack.FAILED_THERE, host.node in wanted.failed_on),
    )
    for reason, holds in checks:
        if holds:
            return reason
    if spec.gpu_count and (missing := _lacking_gpus(spec, room, offer)) is not None:
        return missing
    if room.memory_bytes is not None and (spec.memory_bytes or 0) > room.memory_bytes:
        return Lack.MEMORY
    if room.cpus is not None and (spec.cpus or 0) > room.cpus:
        return Lack.CPUS
    if offer.max_image_bytes is not None and wanted.image_bytes > offer.max_image_bytes:
        return Lack.IMAGE_SIZE
    if not has_it and offer.disk_free_bytes is not None and wanted.image_bytes >= max(1, offer.disk_free_bytes):
        return Lack.DISK
    if not has_it and offer.disk_free_bytes == 0:
        return Lack.DISK
    if room.workspaces >= LIMIT_PER_NODE:
        return Lack.SLOTS
    return None


def _lacking_gpus(spec: WorkspaceSpec, room: _Room, offer: HostOffer) -> Lack | None:
    types = spec.gpu_types or [""]
    if spec.gpu_types and not any(room.usable(wanted) for wanted in types):
        return Lack.GPU_TYPE
    if max(len(room.usable(wanted)) for wanted in types) < spec.gpu_count:
        return Lack.GPU_COUNT
    if max(len(room.usable(wanted, spec.min_gpu_memory_bytes)) for wanted in types) < spec.gpu_count:
        return Lack.GPU_MEMORY
    if not offer.gpu_runtime:
        return Lack.GPU_RUNTIME
    return None if room.free_gpus(spec) else Lack.GPUS_TAKEN


def _registry_allowed(spec: WorkspaceSpec, offer: HostOffer) -> bool:
    if not offer.registries or spec.image is None:
        return True
    return parse_image_reference(spec.image).domain.lower() in {name.lower() for name in offer.registries}


def _shortage(wanted: Wanted, rooms: Mapping[Address, _Room], placed: Sequence[Address]) -> Shortage | None:
    spec = wanted.spec
    number = spec.replicas if spec.replicas is not None else 1
    if wanted.only is not None:
        number = len(wanted.only)
    if len(placed) >= number:
        return None
    has_it = set(placed)
    lacks = Counter(
        found for node, room in rooms.items() if node not in has_it and (found := lack(wanted, room)) is not None
    )
    reason = str(lacks.most_common(1)[0][0]) if lacks else "nodes"
    parts = [f"{count} {_words(found, spec, wanted.image_bytes)}" for found, count in lacks.most_common()]
    there = f"{len(rooms)} {'node is' if len(rooms) == 1 else 'nodes are'} connected"
    detail = f"{number} {'replica' if number == 1 else 'replicas'} wanted, {len(placed)} placed; {there}"
    return Shortage(number, len(placed), lacks, reason, f"{detail}: {', '.join(parts)}" if parts else detail)


def _words(found: Lack, spec: WorkspaceSpec, image_bytes: int) -> str:
    types = " or ".join(spec.gpu_types) or "GPU"
    return {
        Lack.NOT_ADMITTED: "not admitted by the operator",
        Lack.NOT_CHALLENGED: "not being challenged now",
        Lack.DRAINING: "draining",
        Lack.AREA: f"outside the area {spec.area}",
        Lack.ENGINE: "without a container engine that answers",
        Lack.REGISTRY: "whose owner takes no images from that registry",
        Lack.TAR_IMAGES: "whose owner takes no images from URLs",
        Lack.EGRESS: "whose owner lets no workspace reach the outside",
        Lack.FAILED_THERE: "where it failed for a fault of the node",
        Lack.GPU_TYPE: f"without a GPU of type {types}",
        Lack.GPU_COUNT: f"with fewer than {spec.gpu_count} {types}",
        Lack.GPU_MEMORY: f"with too little GPU memory ({spec.min_gpu_memory_bytes // _MIB} MiB wanted on each)",
        Lack.GPU_RUNTIME: "whose engine cannot give GPUs to containers",
        Lack.GPUS_TAKEN: "whose GPUs are taken by other workspaces",
        Lack.MEMORY: f"with too little memory left ({(spec.memory_bytes or 0) // _MIB} MiB wanted)",
        Lack.CPUS: f"with too few CPUs left ({spec.cpus or 0:g} wanted)",
        Lack.IMAGE_SIZE: f"whose owner takes no image of {image_bytes // _MIB} MiB",
        Lack.DISK: "with too little disk left" + (f" for an image of {image_bytes // _MIB} MiB" if image_bytes else ""),
        Lack.SLOTS: f"with {LIMIT_PER_NODE} workspaces already",
    }[found]
