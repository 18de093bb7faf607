"""The bootstraps this node serves, grouped into services.

A service is one operator's several bootstraps on one store: what one of them wished (deployments), asked (orders) or
is owed (receipts, spooled answers), any other of the same service may ask about. Nothing crosses from one service to
another, the numbers of workspaces included. Immutable once built: the owner restarts the node to trust others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ngpu_protocol.identity import Address


@dataclass(frozen=True, slots=True)
class TrustedBootstrap:
    """One bootstrap whose orders are taken.

    Attributes:
        address: signs its orders, and follows from the PeerId it must prove when dialled.
        multiaddrs: where it listens, each ending in `/p2p/<PeerId>`; tried in this order.
        service: the owner's word for whoever runs it; bootstraps of one word share everything.
    """

    address: Address
    multiaddrs: tuple[str, ...]
    service: str

    @property
    def peer_id(self) -> str:
        """Its PeerId, as the multiaddrs end."""
        return self.multiaddrs[0].rpartition("/p2p/")[2]


class Trust:
    """Which bootstraps are trusted, and which of them belong together."""

    def __init__(self, bootstraps: Iterable[TrustedBootstrap]) -> None:
        self._bootstraps = {bootstrap.address: bootstrap for bootstrap in bootstraps}

    def __iter__(self) -> Iterator[TrustedBootstrap]:
        return iter(self._bootstraps.values())

    def __len__(self) -> int:
        return len(self._bootstraps)

    def service_of(self, address: Address) -> str | None:
        """Return the service of the bootstrap at *address*; None for one that is not trusted."""
        bootstrap = self._bootstraps.get(address)
        return None if bootstrap is None else bootstrap.service

    def members(self, service: str) -> tuple[Address, ...]:
        """Return the addresses of all trusted bootstraps of *service*."""
        return tuple(b.address for b in self._bootstraps.values() if b.service == service)

    def same_service(self, one: Address, other: Address) -> bool:
        """Tell whether both are trusted and belong to one service."""
        service = self.service_of(one)
        return service is not None and service == self.service_of(other)
