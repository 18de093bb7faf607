"""Messages on a byte stream: a 4-byte big-endian length, then that many bytes.

A message says itself where it ends, so a connection that dies in the middle of one is never taken for its end.
"""

from __future__ import annotations

import trio

from ngpu_protocol.p2p.errors import FrameError

__all__ = ["HEADER_BYTES", "receive_frame", "send_frame"]

HEADER_BYTES = 4


async def send_frame(stream: trio.abc.SendStream, payload: bytes) -> None:
    """Send *payload* as one frame, in one write.

    Cancelled half-way, the stream is left in the middle of a frame and can only be closed.
    """
    await stream.send_all(len(payload).to_bytes(HEADER_BYTES, "big") + payload)


async def receive_frame(stream: trio.abc.ReceiveStream, max_bytes: int) -> bytes | None:
    """Return the next frame's payload, or None if the stream ended cleanly between two frames.

    Nothing beyond the frame is read, and nothing is allocated for a length above *max_bytes*. Cancelled half-way, the
    position in the stream is lost.

    Raises:
        FrameError: the frame announces more than *max_bytes*, or the stream ends inside it.
        trio.BrokenResourceError: the stream was reset or the connection lost.
    """
    header = await _receive_exactly(stream, HEADER_BYTES)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    if length > max_bytes:
        raise FrameError(f"a frame of {length} bytes, more than the {max_bytes} allowed")
    if length == 0:
        return b""
    payload = await _receive_exactly(stream, length)
    if payload is None:
        raise FrameError("the stream ended after a frame's header")
    return payload


async def _receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes | None:
    """Return *count* bytes, or None if the stream ended before the first of them."""
    data = await stream.receive_some(count)
    if len(data) == count:
        return bytes(data)
    if not data:
        return None
    gathered = bytearray(data)
    while len(gathered) < count:
        data = await stream.receive_some(count - len(gathered))
        if not data:
            raise FrameError(f"the stream ended inside a frame, {count - len(gathered)} bytes short")
        gathered += data
    return bytes(gathered)
