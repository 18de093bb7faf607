"""WebSocket frames (RFC 6455) for a server: enough for a text chat, strict where the standard is.

`FrameReader` turns bytes into messages and holds no socket; `frame` makes the bytes of one message.
"""

import base64
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
MAX_MESSAGE_BYTES = 256 * 1024
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3


class WebSocketError(Exception):
    """The peer broke the protocol; *code* is the close code to answer with (RFC 6455, 7.4.1)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message or control frame: *opcode* is TEXT, BINARY, CLOSE, PING or PONG."""

    opcode: int
    payload: bytes


def accept_value(key: str) -> str:
    """Return the ``Sec-WebSocket-Accept`` value for a client's key."""
    return base64.b64encode(hashlib.sha1(key.encode("latin-1") + _GUID, usedforsecurity=False).digest()).decode()


def frame(opcode: int, payload: bytes) -> bytes:
    """Return one unmasked, unfragmented frame."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame; the reason is cut to what a control frame may hold."""
    return frame(CLOSE, struct.pack("!H", code) + reason.encode()[:123])


class FrameReader:
    """Collects a client's frames into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._opcode = 0
        self._size = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield every message that *data* completes.

        Raises:
            WebSocketError: unmasked, oversize or otherwise wrong frames; nothing more may be fed after it.
        """
        self._buffer += data
        while (part := self._take_frame()) is not None:
            final, opcode, payload = part
            if opcode >= CLOSE:
                yield Message(opcode, payload)
                continue
            if (opcode == CONTINUATION) != bool(self._parts):
                raise WebSocketError(1002, "a continuation without a beginning, or a new message inside another")
            if opcode != CONTINUATION:
                self._opcode = opcode
            self._parts.append(payload)
            self._size += len(payload)
            if self._size > MAX_MESSAGE_BYTES:
                raise WebSocketError(1009, "message too big")
            if final:
                message = Message(self._opcode, b"".join(self._parts))
                self._parts, self._size = [], 0
                yield message

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, second = buffer[0], buffer[1]
        opcode = first & 0x0F
        size, start = second & 0x7F, 2
        if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise WebSocketError(1002, "reserved bits or opcode")
        if not second & 0x80:
            raise WebSocketError(1002, "a client's frame must be masked")
        if opcode >= CLOSE and (size > 125 or not first & 0x80):
            raise WebSocketError(1002, "a control frame is fragmented or too long")
        if size == 126:
            if len(buffer) < 4:
                return None
            size, start = struct.unpack_from("!H", buffer, 2)[0], 4
        elif size == 127:
            if len(buffer) < 10:
                return None
            size, start = struct.unpack_from("!Q", buffer, 2)[0], 10
        if size > MAX_MESSAGE_BYTES:
            raise WebSocketError(1009, "message too big")
        if len(buffer) < start + 4 + size:
            return None
        mask = bytes(buffer[start : start + 4])
        masked = bytes(buffer[start + 4 : start + 4 + size])
        del buffer[: start + 4 + size]
        return bool(first & 0x80), opcode, _unmask(masked, mask)


def _unmask(data: bytes, mask: bytes) -> bytes:
    """XOR with the repeated mask as one big integer: a loop over bytes is a hundred times slower."""
    if not data:
        return data
    repeated = (mask * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(data), "big")
