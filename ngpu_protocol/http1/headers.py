"""Header fields as lists of byte pairs, and what a proxy must take out of them.

Names are lower case as parsed; every function here compares without regard to case. Order and repetition are kept: a
proxy may change neither (RFC 9110 section 5.3).
"""

from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1, plus the framing this hop decides itself. "keep-alive", "proxy-connection" and "te" are
# connection-specific even where Connection does not list them. "trailer" stays: trailers are forwarded.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    )
)

# RFC 9110 section 6.5.1: fields that must not be merged from, or sent in, a trailer section.
FORBIDDEN_IN_TRAILERS = HOP_BY_HOP | frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"host",
        b"set-cookie",
        b"trailer",
    )
)


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the first value of *name* (lower case), or None."""
    for key, value in headers:
        if key == name or key.lower() == name:
            return value
    return None


def comma_list(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """Return the members of a comma-separated field over all its lines, lower-cased, in order.

    For fields whose members are tokens (Connection, Upgrade, Expect): quoted strings are not understood.
    """
    members: list[bytes] = []
    for key, value in headers:
        if key == name or key.lower() == name:
            members.extend(member for part in value.lower().split(b",") if (member := part.strip(b" \t")))
    return members


def end_to_end(headers: Iterable[tuple[bytes, bytes]], *, drop: Iterable[bytes] = ()) -> Headers:
    """Return the fields a proxy forwards: all but the hop-by-hop ones, those Connection names, and *drop*.

    Content-Length stays: it is the length of the content, and the next hop frames by it. "Expect" stays too; a proxy
    that asks for its own 100 Continue drops it.

    Args:
        headers: The fields of a message as received.
        drop: Further names to leave out, lower case.
    """
    fields = list(headers)
    dropped = HOP_BY_HOP.union(drop)
    for key, value in fields:
        if key == b"connection" or key.lower() == b"connection":
            dropped = dropped.union(part.strip(b" \t") for part in value.lower().split(b","))
    # A hostile Connection field must not make us drop the framing or the address of the message.
    dropped = (dropped - {b"content-length", b"host"}).union(drop)
    return [(key, value) for key, value in fields if key.lower() not in dropped]


def trailers_end_to_end(trailers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the trailer fields a proxy forwards: none that frame, route or authenticate a message."""
    return [(key, value) for key, value in trailers if key.lower() not in FORBIDDEN_IN_TRAILERS]


def wants_upgrade(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a request asks to switch protocols (Connection: upgrade and an Upgrade field)."""
    fields = list(headers)
    return header(fields, b"upgrade") is not None and b"upgrade" in comma_list(fields, b"connection")
