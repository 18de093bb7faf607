"""Messages of libp2p's own protocols on a stream: an unsigned varint length, then a protobuf of that many bytes.

Reads exactly one message: what came behind it stays on the stream, since a relayed connection begins right there.
"""

from __future__ import annotations

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["delimited", "receive_delimited", "varint"]

_MAX_LENGTH_BYTES = 4


def varint(number: int) -> bytes:
    """Return *number*, not negative, as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def delimited(body: bytes) -> bytes:
    """Return *body* with its length before it."""
    return varint(len(body)) + body


async def receive_delimited(stream: P2PStream, *, max_bytes: int) -> bytes:
    """Return the next message's bytes. Bound it with a cancel scope.

    Raises:
        MalformedError: it is longer than *max_bytes*, or the stream ended before its end.
        trio.BrokenResourceError: the stream was reset or the connection lost.
    """
    data = b""
    while (found := _length(data, max_bytes)) is None or len(data) < sum(found):
        more = await stream.receive_some(max_bytes)
        if not more:
            raise MalformedError("message", "cut off")
        data += more
    start, length = found
    stream.unread(data[start + length :])
    return data[start : start + length]


def _length(data: bytes, max_bytes: int) -> tuple[int, int] | None:
    """Return where the message begins and how long it is, None while that is not known."""
    length = 0
    for index, byte in enumerate(data[:_MAX_LENGTH_BYTES]):
        length |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            if length > max_bytes:
                raise MalformedError("message", f"{length} bytes, of which {max_bytes} are allowed")
            return index + 1, length
    if len(data) >= _MAX_LENGTH_BYTES:
        raise MalformedError("message", "a length of more than 28 bits")
    return None
