"""The configuration of a daemon's part in the network (`discovery`): checked without loading what it configures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ngpu_daemon.settings import Section
from ngpu_protocol.p2p.errors import BadMultiaddrError
from ngpu_protocol.p2p.multiaddrs import split_peer

__all__ = ["DiscoverySettings"]


def _peer_multiaddr(text: str) -> str:
    try:
        split_peer(text)
    except BadMultiaddrError as error:
        raise ValueError(str(error)) from None
    return text


def _address(text: str) -> str:
    parts = text.split("/")
    if len(parts) < 5 or parts[0] or parts[3] != "tcp" or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6"):
        raise ValueError(
            f"{text!r} is not a multiaddr such as /ip4/192.0.2.1/tcp/4911 or /dns4/gpu.example.org/tcp/4911"
        )
    return text


class DiscoverySettings(Section):
    """How this peer is found and finds others."""

    enabled: bool = Field(
        default=True,
        description="Take part in the DHT. Off: only those this peer dials, or that dial it by configuration, know it.",
    )
    peers: tuple[Annotated[str, AfterValidator(_peer_multiaddr)], ...] = Field(
        default=(),
        description="Peers to find the network through, besides configured bootstraps and remembered peers.",
        examples=[["/ip4/192.0.2.1/tcp/4910/p2p/16Uiu2HAm..."]],
    )
    announce: tuple[Annotated[str, AfterValidator(_address)], ...] = Field(
        default=(),
        max_length=8,
        description="Where others reach this peer, when that is not where it listens: a forwarded port, a DNS name.\n"
        "Believed as it is. Empty: found out by asking others to dial back.",
        examples=[["/dns4/gpu.example.org/tcp/4911"]],
    )
    serve: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Keep part of the DHT for others. auto: when this peer can be dialled. A bootstrap always does,\n"
        "unless never.",
    )
    relayed: bool = Field(
        default=True, description="Be reached through relays (this peer's bootstraps) while it cannot be dialled."
    )
    record_lifetime_s: int = Field(
        default=600, ge=30, le=3600, description="How long the others believe this peer's record without a newer one."
    )
    mdns: bool = Field(default=False, description="Find and be found on the local network by multicast DNS.")
