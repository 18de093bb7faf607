"""Which nodes should run which workspaces: a pure function from what is wanted and who is there to the desired state.

An image workspace goes to `replicas` suitable nodes (all of them when it names no number): first where it already is,
so that a node joining moves nothing, then where fewest workspaces are. A service workspace goes to every node that
offers the model server it names: the owner put it there, nothing has to be started. A node that is not admitted gets
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec


@dataclass(frozen=True, slots=True)
class Host:
    """A node as far as assignment is concerned.

    Attributes:
        gpu_models: model name of each GPU it offers, as the node spells it.
        services: `project/model` of each registered model server.
        running: ids of the workspaces deployed there now, in any state.
    """

    node: Address
    admitted: bool = True
    draining: bool = False
    gpu_models: Sequence[str] = ()
    services: Collection[str] = ()
    running: Collection[str] = field(default_factory=frozenset)


def assign(workspaces: Sequence[WorkspaceSpec], hosts: Sequence[Host]) -> Mapping[Address, Sequence[WorkspaceSpec]]:
    """Return what each host should run, in the order of *workspaces*; every host has an entry.

    A draining host keeps what it runs and gets nothing new.
    """
    desired: dict[Address, list[WorkspaceSpec]] = {host.node: [] for host in hosts}
    for spec in workspaces:
        suitable = [host for host in hosts if suits(spec, host)]
        if spec.is_image and spec.replicas is not None:
            suitable.sort(key=lambda host: (spec.id not in host.running, len(desired[host.node]), host.node))
            suitable = suitable[: spec.replicas]
        for host in suitable:
            desired[host.node].append(spec)
    return desired


def suits(spec: WorkspaceSpec, host: Host) -> bool:
    """Return whether *host* could run *spec* at all."""
    if not host.admitted or (host.draining and spec.id not in host.running):
        return False
    if spec.service is not None:
        return spec.service in host.services
    return _matching_gpus(spec, host) >= spec.gpu_count


def _matching_gpus(spec: WorkspaceSpec, host: Host) -> int:
    if not spec.gpu_types:
        return len(host.gpu_models)
    wanted = {_bare(name) for name in spec.gpu_types}
    return sum(1 for model in host.gpu_models if _bare(model) in wanted)


def _bare(model: str) -> str:
    """Return *model* without vendor words, case and punctuation: `NVIDIA GeForce RTX 4090` and `RTX4090` are one."""
    lowered = model.lower()
    for word in ("nvidia", "geforce", "tesla"):
        lowered = lowered.replace(word, "")
    return "".join(letter for letter in lowered if letter.isalnum())
