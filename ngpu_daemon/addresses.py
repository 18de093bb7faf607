"""Which addresses are the public internet's: what keeps a URL that a stranger names out of the operator's network.

An IPv6 address may carry an IPv4 one, which is where the connection ends up: it is judged by that one. Pure.
"""

from __future__ import annotations

import ipaddress

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NEVER_PUBLIC = (
    ipaddress.IPv6Network("::/96"),  # IPv4-compatible, given up, yet some stacks still route it
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # a network's own NAT64 (RFC 8215): may carry private addresses
    ipaddress.IPv6Network("fec0::/10"),  # site-local, given up (RFC 3879)
)


def carried(address: IpAddress) -> IpAddress:
    """Return the IPv4 address inside *address*, or *address* where it carries none."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def is_public(address: IpAddress) -> bool:
    """Tell whether *address* is one of the public internet's, also where it carries an IPv4 address inside."""
    inner = carried(address)
    if isinstance(inner, ipaddress.IPv6Address) and any(inner in network for network in _NEVER_PUBLIC):
        return False
    return inner.is_global and not inner.is_multicast
