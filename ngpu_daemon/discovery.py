"""A daemon's part in the network beyond its own links: the DHT, its advertisement there, and being reached by anybody.

Built by both daemons; each says what its record holds (`describe`) and which peers it trusts to help. What others may
do with this peer through it is bounded in `ngpu_protocol.p2p`. Nothing here is needed to serve: with every other peer
gone, orders still come over the links.

Peers that were met are remembered, so that a start finds the network with every peer it was configured with gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import structlog
import trio

from ngpu_daemon.advertiser import Advertiser, SequenceFile
from ngpu_daemon.discovery_settings import DiscoverySettings
from ngpu_daemon.interfaces import reachable_listeners
from ngpu_daemon.known_peers import KnownPeers
from ngpu_daemon.reachability import Reachability
from ngpu_protocol.capabilities import Capability, CapabilityKind
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.node_records import NodeRecord, Role, dial_addresses
from ngpu_protocol.p2p import Host, P2PError
from ngpu_protocol.p2p.autonat import AUTONAT_PROTOCOL, DialBack
from ngpu_protocol.p2p.circuits import CIRCUIT, attach_circuits
from ngpu_protocol.p2p.dht import Dht, DhtSettings, open_dht
from ngpu_protocol.p2p.directory import Directory, FoundNode
from ngpu_protocol.p2p.hole_punch import attach_hole_punching
from ngpu_protocol.p2p.relay import Relay
from ngpu_protocol.p2p.relay_messages import HOP_PROTOCOL, RelayLimits

__all__ = ["Discovery"]

log = structlog.get_logger(__name__)

REMEMBER_EVERY_S = 60.0
LOOK_FOR_BOOTSTRAPS_S = 600.0
VISIT_TIMEOUT_S = 5.0
MAX_NEARBY = 16
BOOTSTRAPS = Capability.of(CapabilityKind.ROLE, Role.BOOTSTRAP)


class Discovery:
    """One daemon's part; `run` is its life, once the host is there.

    Attributes:
        directory: finds nodes and bootstraps; None while it does not run, or is turned off.
        relay: the relay this host is, None if it is none.
    """

    def __init__(
        self,
        account: Account,
        host: Host,
        settings: DiscoverySettings,
        data_dir: Path,
        *,
        describe: Callable[[], NodeRecord],
        changed: Callable[[], Awaitable[object]],
        trusted: Sequence[str] = (),
        helpers: Callable[[], Sequence[str]] = lambda: (),
        is_bootstrap: bool = False,
        may_reserve: Callable[[str], bool] | None = None,
        relay_limits: RelayLimits | None = None,
    ) -> None:
        """Tie the parts together; handlers are registered here, before anybody is dialled.

        Args:
            describe: what the peer offers now; addresses, identity, sequence and times are filled in.
            changed: returns when *describe* may have something else to say.
            trusted: multiaddrs of bootstraps from the configuration.
            helpers: PeerIds asked to dial back and to relay; those connected are used.
            is_bootstrap: it can be dialled, its operator says by running one.
            may_reserve: be a relay for the peers it says so of.
        """
        self._account = account
        self._host = host
        self._settings = settings
        self._describe = describe
        self._changed_outside = changed
        self._trusted = tuple(trusted)
        self._known = KnownPeers(data_dir / "peers.json")
        self._sequences = SequenceFile(data_dir / "record-sequence")
        self._moved = trio.Event()
        self._nearby: dict[str, None] = {}  # PeerIds met on the local network
        self._dht: Dht | None = None
        self._advertiser: Advertiser | None = None
        self.directory: Directory | None = None
        self.relay: Relay | None = None
        if not settings.enabled:
            return
        self._reach = Reachability(
            host,
            attach_circuits(host, reached=self._reached),
            helpers=lambda: (*helpers(), *self._nearby),
            announce=settings.announce,
            serve="always" if is_bootstrap and settings.serve == "auto" else settings.serve,
            relays=settings.relayed and not is_bootstrap,
            changed=self._reach_changed,
        )
        host.state_addresses(lambda: self._reach.direct)
        # A bootstrap is dialled; it has no use for holes, and its own dials need no port of their own.
        self._puncher = None if is_bootstrap else attach_hole_punching(host, direct=lambda: self._reach.direct)
        host.handle(AUTONAT_PROTOCOL, DialBack(host).serve)
        if may_reserve is not None:
            self.relay = Relay(host, may_reserve=may_reserve, addresses=lambda: self._reach.direct, limits=relay_limits)
            host.handle(HOP_PROTOCOL, self.relay.serve)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Take part until cancelled; nothing if it is turned off."""
        if not self._settings.enabled:
            task_status.started()
            await trio.sleep_forever()
        seeds = dict.fromkeys((*self._settings.peers, *self._trusted, *self._known.multiaddrs))
        own_end = f"/p2p/{self._host.peer_id}"
        settings = DhtSettings(
            server=self._reach.is_server, seeds=tuple(seed for seed in seeds if not seed.endswith(own_end))
        )
        async with open_dht(self._host, settings, addresses=lambda: self._reach.direct) as dht:
            self._dht = dht
            self.directory = Directory(self._host, dht)
            self._advertiser = Advertiser(
                self._account,
                dht,
                self.directory,
                self._sequences,
                describe=self._describe_here,
                changed=self._changed,
                lifetime_ms=self._settings.record_lifetime_s * 1000,
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._advertiser.run)
                nursery.start_soon(self._reach.run)
                nursery.start_soon(self._remember)
                nursery.start_soon(self._look_for_bootstraps)
                if self._settings.mdns:
                    nursery.start_soon(self._look_nearby, nursery)
                task_status.started()
        raise AssertionError("its tasks run for ever")

    async def withdraw(self) -> None:
        """Tell the network that this peer stops, for at most 3 s, and remember whom it knew."""
        if self._dht is not None and self._advertiser is not None:
            self._known.remember(self._dht.seeds())
            await self._advertiser.withdraw()

    # -- what the record says

    def _describe_here(self) -> NodeRecord:
        return self._describe().model_copy(update={"addresses": self._reach.addresses[:16]})

    def own_record(self) -> NodeRecord:
        """Return what this peer says of itself now, not yet signed."""
        return self._describe_here() if self._settings.enabled else self._describe()

    async def _changed(self) -> None:
        async with trio.open_nursery() as nursery:

            async def outside() -> None:
                await self._changed_outside()
                nursery.cancel_scope.cancel()

            nursery.start_soon(outside)
            await self._moved.wait()
            self._moved = trio.Event()
            nursery.cancel_scope.cancel()

    async def _reached(self, peer: str) -> None:
        """Go on directly with who came through a relay, where the NATs between allow it."""
        if self._puncher is not None:
            await self._puncher.reach(peer)

    def _reach_changed(self) -> None:
        if self._dht is not None:
            self._dht.become(server=self._reach.is_server)
        self._moved.set()

    # -- others

    async def addresses_of(self, node: Address) -> list[str]:
        """Return where *node* says it is, in its newest record, direct before relayed; nothing if nobody knows."""
        if self.directory is None:
            return []
        signed = await self.directory.record(node)
        return [] if signed is None else dial_addresses(signed.record)

    async def find(self, capability: Capability, *, check_alive: bool = False) -> list[FoundNode]:
        """Return nodes that offer *capability*; none while discovery is off."""
        if self.directory is None:
            return []
        return await self.directory.find(capability, check_alive=check_alive)

    def known_peers(self) -> list[str]:
        """Return the PeerIds of those known here, whether connected or not."""
        return [] if self._dht is None else [seed.rpartition("/p2p/")[2] for seed in self._dht.seeds()]

    async def _remember(self) -> None:
        assert self._dht is not None
        while True:
            await trio.sleep(REMEMBER_EVERY_S)
            self._known.remember(self._dht.seeds())

    async def _look_for_bootstraps(self) -> None:
        """Know of bootstraps beyond those configured: they are dialled when nobody else is left."""
        assert self._dht is not None
        await self._dht.wait_seeded()
        while True:
            found = await self.find(BOOTSTRAPS)
            addresses = [
                f"{text.partition('/p2p/')[0]}/p2p/{one.signed.record.peer_id}"
                for one in found
                if one.node != self._account.address
                for text in one.signed.record.addresses[:2]
                if CIRCUIT not in text
            ]
            self._dht.greet(addresses)
            self._known.remember([*addresses, *self._dht.seeds()])
            await trio.sleep(LOOK_FOR_BOOTSTRAPS_S)

    async def _look_nearby(self, nursery: trio.Nursery) -> None:
        # Loaded here: who does not turn it on pays nothing for it.
        from ngpu_daemon.mdns import run_mdns

        own_end = f"/p2p/{self._host.peer_id}"

        def heard(addresses: list[str]) -> None:
            if not any(text.endswith(own_end) for text in addresses):
                nursery.start_soon(self._visit, addresses)

        await run_mdns(
            self._host.network.name,
            lambda: [text + own_end for text in reachable_listeners(self._host.addresses)],
            heard,
        )

    async def _visit(self, addresses: Sequence[str]) -> None:
        """Connect to who said it is nearby; such a peer can say whether we can be dialled, too."""
        assert self._dht is not None
        for address in addresses:
            try:
                peer = await self._host.connect(address, timeout_s=VISIT_TIMEOUT_S)
            except P2PError as error:
                log.info("nearby_peer_unreachable", multiaddr=address, reason=str(error))
                continue
            if len(self._nearby) < MAX_NEARBY:
                self._nearby[peer] = None
            self._reach.look()
            self._dht.meet(peer)
            log.info("nearby_peer", multiaddr=address)
            return

    # -- what is shown

    def status(self) -> dict[str, Any]:
        """Return how it stands, for the owner."""
        if self._dht is None or self._advertiser is None:
            return {"enabled": self._settings.enabled}
        latest = self._advertiser.latest
        shown = {
            "enabled": True,
            "server": self._dht.is_server,
            "peers_known": len(self._dht.table),
            "record_sequence": None if latest is None else latest.record.sequence,
            "record_copies": self._advertiser.copies,
            **self._reach.describe(),
        }
        if self.relay is not None:
            shown |= {"relay_reservations": self.relay.reservations, "relay_circuits": self.relay.circuits}
        return shown
