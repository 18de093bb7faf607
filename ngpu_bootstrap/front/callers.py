"""Where a request comes from, and which of its fields are for the workspace. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.scheduling.affinity import MAX_KEY_BYTES
from ngpu_protocol.http1 import Headers, end_to_end, header

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Our own fields never travel: a client's Ngpu-Order would be taken for ours. Expect is this hop's own business.
_NOT_FORWARDED = (b"expect",)
# A wrapped answer becomes text in a string, so the workspace must not compress it.
_NOT_FORWARDED_WRAPPED = (b"expect", b"accept-encoding", b"content-length", b"content-type")


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Return the networks written in *texts*: `10.0.0.0/8`, or one address.

    Raises:
        ValueError: one of them is neither.
    """
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def client_address(peer: str, headers: Headers, trusted: Sequence[Network]) -> str:
    """Return the client's address: the connection's, or what trusted proxies say of it.

    `X-Forwarded-For` is read from the right, the end that the proxy next to us wrote; each address there counts only
    while the one that reported it is a trusted proxy.
    """
    address = peer.partition("%")[0]
    if not trusted or not is_within(address, trusted):
        return address
    chain: list[str] = []
    for name, value in headers:
        if name == b"x-forwarded-for":
            chain += [part.strip() for part in value.decode("latin-1").split(",")]
    for reported in reversed(chain):
        if not _is_address(reported):
            break
        address = reported
        if not is_within(address, trusted):
            break
    return address


def passed_on(headers: Headers, *, upgrade: bool) -> Headers:
    """Return the fields of a transparent request that go to the workspace, its switch of protocols included."""
    kept = [pair for pair in end_to_end(headers, drop=_NOT_FORWARDED) if not pair[0].startswith(b"ngpu-")]
    if upgrade:
        kept += [(b"connection", b"upgrade"), (b"upgrade", header(headers, b"upgrade") or b"")]
    return kept


def passed_on_wrapped(headers: Headers, content_type: bytes | None) -> Headers:
    """Return the fields of a wrapped request that go to the workspace, with *content_type* or else the client's own."""
    kept = [pair for pair in end_to_end(headers, drop=_NOT_FORWARDED_WRAPPED) if not pair[0].startswith(b"ngpu-")]
    content_type = content_type or header(headers, b"content-type")
    if content_type is not None:
        kept.append((b"content-type", content_type))
    return kept


def affinity_key(headers: Headers) -> bytes:
    """Return the client's key for calls that belong on one node (`Ngpu-Affinity`), b"" without one.

    Raises:
        BadRequest: it is longer than anything that is kept.
    """
    value = header(headers, b"ngpu-affinity")
    if value is None:
        return b""
    if len(value) > MAX_KEY_BYTES:
        raise BadRequest("bad_affinity_key", f"Ngpu-Affinity must have at most {MAX_KEY_BYTES} bytes")
    return value


def is_within(address: str, networks: Sequence[Network]) -> bool:
    """Return whether *address* is an IP address in one of *networks*."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
