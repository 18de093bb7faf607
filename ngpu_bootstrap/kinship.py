"""Whether two nodes may be one owner's, as far as a bootstrap can tell. Pure.

Two nodes that pay one wallet, or connect from one address, may share a machine: they are challenged together, and
neither judges the other. That they do not proves nothing; wallets and addresses can be had.
"""

from __future__ import annotations

import ipaddress

_HOST_BITS_V6 = 64
"""A machine has a whole network of this size of IPv6, and may come from a new address of it each time."""


def same_wallet(one: str, other: str) -> bool:
    """Return whether both are known and the same."""
    return bool(one) and one == other


def same_place(one: str, other: str, *, only_public: bool = False) -> bool:
    """Return whether two IP addresses may be one machine's: equal, or for IPv6 of one network of 64 bits.

    Args:
        only_public: on one machine, or behind one proxy, all have the same address, and it says nothing.
    """
    found, against = _place(one), _place(other)
    if found is None or against is None or found != against:
        return bool(one) and one == other and not only_public
    return found.is_global or not only_public


def _place(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    bits = 32 if address.version == 4 else _HOST_BITS_V6
    return ipaddress.ip_network((address, bits), strict=False)
