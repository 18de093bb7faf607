"""The networks workspaces are on: how the node reaches them, and what they reach.

Owns the choice between two ways, made at start:

    internal   two bridges of the node's own, without traffic between their containers. One has no way out; the other,
               for workspaces whose specification says `egress`, leads outside but not to this machine or the owner's
               network (`firewall`). The node talks to containers' own addresses
    published  where the engine's bridges are not on this machine (a virtual machine, rootless, a remote engine): the
               engine publishes ports on loopback. There are no rules to keep containers from the engine's machine and
               its network; but they are on networks of the node's own too, without traffic between them, and the one
               for workspaces without egress does not lend its address to what leaves, so that nothing answers them

The network with egress is made when the first workspace asks for it. What is weaker here than it should be is said in
`findings`, each with what to do.

Other programs flush the packet filter. `watch` looks every `LOOK_INTERVAL_S` whether the rules are still in force, and
sets them again. While that cannot be done nothing may be on the network with egress: `lost` is called, the workspaces
there stop and say why, and come back once the rules are (`guarded`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from ngpu_node.config import ContainerSettings
from ngpu_node.engine.docker_engine import DockerEngine
from ngpu_node.engine.firewall import Firewall, FirewallUnavailable
from ngpu_node.engine.outlook import Finding
from ngpu_node.errors import DeploymentImpossible, EgressUnguarded, EngineFailed, EngineUnavailable

log = structlog.get_logger(__name__)

#: A look is two short programs; a flush is an owner's rare act, and nothing a workspace could bring about.
LOOK_INTERVAL_S = 10.0

_BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a container goes: the network's name, None for the engine's own; whom it asks for names.

    *publish*: its ports are published on loopback.
    """

    network: str | None
    publish: bool = False
    name_servers: tuple[str, ...] = ()


class Networks:
    """The networks of one node."""

    def __init__(self, engine: DockerEngine, settings: ContainerSettings, mark: str) -> None:
        """Nothing is made before `prepare`.

        Args:
            mark: eight characters that tell this node from others on the engine.
        """
        self._engine = engine
        self._settings = settings
        self._closed, self._open = f"ngpu-{mark}", f"ngpu-{mark}-out"
        self._closed_bridge, self._open_bridge = f"ngpu{mark}", f"ngpu{mark}o"
        self._firewall = Firewall(mark)
        self._published = (f"ngpu-{mark}-p", f"ngpu{mark}p"), (f"ngpu-{mark}-po", f"ngpu{mark}po")
        self._is_internal = False
        self._is_apart = False
        self._has_open = False
        self._problem = ""
        self._opening = trio.Lock()
        self.lost: Callable[[str], None] = lambda reason: None
        self.guarded: Callable[[], None] = lambda: None

    @property
    def is_internal(self) -> bool:
        """Whether containers are talked to at their own addresses."""
        return self._is_internal

    @property
    def offers_egress(self) -> bool:
        """Whether a workspace that wants egress can have it here."""
        return self._settings.egress and (not self._is_internal or not self._problem)

    async def prepare(self) -> None:
        """Choose the way, and make the network that takes.

        Raises:
            EngineUnavailable, EngineFailed: the engine does not do it.
            DeploymentImpossible: the owner wants the internal network and it cannot be reached from here.
        """
        if self._settings.network == "published":
            await self._publish()
            return
        network = await self._engine.ensure_network(self._closed, self._closed_bridge)
        if network.routable:
            self._is_internal = True
            await self._close(with_open=False)
        elif self._settings.network == "internal":
            raise DeploymentImpossible(
                "the internal network's containers cannot be reached from here (the engine is on another machine or in "
                'a namespace of its own): set network = "published" under [containers]'
            )
        else:
            log.warning("containers_published", hint="no rules can be set for them: the engine's networks are not here")
            await self._engine.remove_network(network.name)
            await self._publish()

    async def _publish(self) -> None:
        """Have the networks of published containers, where the engine makes such."""
        (closed, closed_bridge), (open_, open_bridge) = self._published
        try:
            await self._engine.ensure_network(closed, closed_bridge, internal=False, masquerade=False)
            await self._engine.ensure_network(open_, open_bridge, internal=False)
        except EngineFailed as error:
            self._is_apart = False
            log.warning("networks_not_made", reason=str(error), hint="workspaces reach each other and the outside")
        else:
            self._is_apart = True

    async def restore(self) -> None:
        """Have the networks and rules again, after the engine was away: it may have made its own rules anew."""
        if not self._is_internal:
            await self._publish()
        else:
            await self._engine.ensure_network(self._closed, self._closed_bridge)
            async with self._opening:
                if self._has_open:
                    await self._engine.ensure_network(self._open, self._open_bridge, internal=False)
                await self._close(with_open=self._has_open)

    async def _close(self, *, with_open: bool) -> None:
        before = self._problem
        try:
            await self._firewall.apply(self._closed_bridge, self._open_bridge if with_open else None)
        except FirewallUnavailable as error:
            self._problem = str(error)
            if self._problem != before:
                log.warning("firewall_not_set", reason=self._problem, hint="workspaces reach services of this machine")
            if self._has_open:
                self.lost(self._problem)
        else:
            self._problem = ""
            if before:
                log.info("firewall_set")
                self.guarded()

    async def watch(self) -> None:
        """Keep the rules in force, until cancelled."""
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Set the rules again where they are not in force any more, or could not be set before."""
        if not self._is_internal:
            return
        async with self._opening:
            if not self._problem:
                try:
                    missing = await self._firewall.look(
                        self._closed_bridge, self._open_bridge if self._has_open else None
                    )
                except FirewallUnavailable as error:
                    missing = str(error)
                if not missing:
                    return
                log.warning("firewall_changed", reason=missing, hint="somebody flushed the packet filter; set again")
            await self._close(with_open=self._has_open)

    async def place(self, *, egress: bool) -> Place:
        """Return where a container goes that may reach the outside, or may not.

        Raises:
            DeploymentImpossible: it cannot be had here, with the reason.
            EngineUnavailable, EngineFailed: the engine does not do it.
        """
        if egress and not self._settings.egress:
            raise DeploymentImpossible("the workspace wants egress, which this node's owner does not allow")
        if not self._is_internal:
            if not self._is_apart:
                return Place(None, publish=True)
            (closed, _), (open_, _) = self._published
            name_servers = tuple(self._settings.name_servers) if egress else ()
            return Place(open_ if egress else closed, publish=True, name_servers=name_servers)
        if not egress:
            return Place(self._closed)
        async with self._opening:
            # again where the rules could not be set before: another program may have held the packet filter just then
            if not self._has_open or self._problem:
                await self._engine.ensure_network(self._open, self._open_bridge, internal=False)
                self._has_open = True
                await self._close(with_open=True)
        if self._problem:
            raise EgressUnguarded(
                "the workspace wants egress, and this node cannot keep it out of its owner's network: "
                f"{self._problem}; `ngpu-node doctor` says what to do"
            )
        return Place(self._open, name_servers=tuple(self._settings.name_servers))

    async def finish(self) -> None:
        """Take the networks away, unless a container is still on them, and the rules with them."""
        names = (self._closed, self._open) if self._is_internal else [name for name, _ in self._published]
        for name in names:  # also one that only an earlier run had a workspace on
            try:
                await self._engine.remove_network(name)
            except (EngineUnavailable, EngineFailed) as error:
                # A container is on it that could not be removed: the rules must stay as long as it may run.
                log.info("network_kept", network=name, reason=str(error))
                return
        if self._is_internal:
            await self._firewall.remove(self._closed_bridge, self._open_bridge)

    def findings(self) -> list[Finding]:
        """Return how well workspaces are kept apart here."""
        if not self._is_internal:
            return [
                Finding(
                    "network",
                    "workspaces' ports are published on loopback; no rules keep them from the engine's machine and its "
                    "network. "
                    + (
                        "They do not reach each other, and without egress nothing outside answers them"
                        if self._is_apart
                        else "They reach each other, and the outside"
                    ),
                    "let the engine run on this machine, so that the node's own internal network can be used",
                )
            ]
        found = [
            Finding("network", f"workspaces are on a network of their own ({self._closed_bridge}), with no way out")
        ]
        if self._problem:
            found.append(
                Finding(
                    "firewall",
                    f"workspaces may reach services of this machine: {self._problem}",
                    "run the node as root or with CAP_NET_ADMIN (the systemd unit gives it that), install iptables, or "
                    f"yourself: iptables -I INPUT -i {self._closed_bridge} -m conntrack --ctstate NEW -j REJECT, "
                    "and the same with ip6tables",
                )
            )
        else:
            found.append(Finding("firewall", "workspaces cannot reach services of this machine"))
        if _bridge_filter_is_off():
            found.append(
                Finding(
                    "bridge filter",
                    "containers on one network reach each other: the kernel does not filter bridged packets",
                    "modprobe br_netfilter; sysctl -w net.bridge.bridge-nf-call-iptables=1",
                )
            )
        return found


def _bridge_filter_is_off() -> bool:
    try:
        return _BRIDGE_FILTER.read_text().strip() == "0"
    except OSError:
        return True
