"""Under which addresses this machine can be reached: those of its interfaces, for listeners on a wildcard address."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

__all__ = ["interface_addresses", "reachable_listeners"]

_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")
_MAX_EACH = 4


def interface_addresses() -> list[str]:
    """Return the IP addresses of this machine's interfaces, IPv4 first, without loopback and link-local ones."""
    found = [*_ipv4(), *_ipv6()]
    return [text for text in dict.fromkeys(found) if _is_of_use(text)]


def _ipv4() -> Iterable[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an address
            yield socket.inet_ntoa(answer[20:24])


def _ipv6() -> Iterable[str]:
    try:
        lines = _IF_INET6.read_text().splitlines()
    except OSError:
        return  # no IPv6 here
    for line in lines:
        digits = line.split(maxsplit=1)[0]
        yield str(ipaddress.IPv6Address(int(digits, 16)))


def _is_of_use(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_loopback or address.is_link_local or address.is_unspecified)


def reachable_listeners(listening: Iterable[str], own_addresses: Iterable[str] | None = None) -> list[str]:
    """Return multiaddrs, without ``/p2p``, at which the listeners *listening* may be reached; wildcards are replaced.

    Args:
        own_addresses: of this machine's interfaces; looked up when left out.
    """
    own = list(interface_addresses() if own_addresses is None else own_addresses)
    found: list[str] = []
    for multiaddr in listening:
        text = multiaddr.partition("/p2p/")[0]
        _, kind, host, *rest = text.split("/")
        if host not in ("0.0.0.0", "::"):
            found.append(text)
            continue
        tail = "/".join(rest)
        same_kind = [address for address in own if (":" in address) == (kind == "ip6")]
        found += [f"/{kind}/{address}/{tail}" for address in same_kind[:_MAX_EACH]]
    return list(dict.fromkeys(found))
