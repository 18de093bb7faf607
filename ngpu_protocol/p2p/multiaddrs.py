"""Addresses with the peer they lead to, as configurations and records write them. Loads nothing of py-libp2p."""

from __future__ import annotations

from multiaddr import Multiaddr

from ngpu_protocol.p2p.errors import BadMultiaddrError

__all__ = ["split_peer"]


def split_peer(text: str) -> tuple[Multiaddr, str]:
    """Return a dialable multiaddr and the PeerId at its end.

    Raises:
        BadMultiaddrError: it does not parse, or does not end in ``/p2p/<PeerId>``.
    """
    try:
        multiaddr = Multiaddr(text)
        protocol, peer_text = list(multiaddr.items())[-1]  # a relayed address names the relay before
        if protocol.name != "p2p":
            raise ValueError("no PeerId at its end")
    except Exception as error:
        raise BadMultiaddrError(text, "expected such as /ip4/192.0.2.1/tcp/4001/p2p/16Uiu2HA…") from error
    return multiaddr, str(peer_text)
