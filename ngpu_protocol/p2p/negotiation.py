"""Which protocol a new stream speaks (multistream-select 1.0, libp2p connections specification).

Each line is an unsigned varint length, then that many bytes ending in a newline. The side that opened the stream
proposes; the other echoes a proposal it takes and answers ``na`` to one it does not.

The library reads byte by byte through its stream's locks and takes two round trips to open a stream; here a line costs
one read, and the greeting travels with the first proposal, so a stream opens in one.
"""

from __future__ import annotations

from collections.abc import Callable

from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["NegotiationError", "accept", "propose"]

_GREETING = "/multistream/1.0.0"
_REFUSAL = "na"
_MAX_LINE_BYTES = 1024
_MAX_PROPOSALS = 16


class NegotiationError(Exception):
    """The remote did not speak multistream-select, proposed too much, or ended the stream."""


def encode_line(text: str) -> bytes:
    """Return one line as it travels."""
    body = text.encode() + b"\n"
    size = len(body)
    if size > _MAX_LINE_BYTES:
        raise ValueError(f"a protocol name of {size} bytes")
    return (bytes((size,)) if size < 0x80 else bytes((size & 0x7F | 0x80, size >> 7))) + body


def decode_line(data: bytes) -> tuple[str, bytes] | None:
    """Split the first line off *data*: its text and the rest, or None if it is not complete yet.

    Raises:
        NegotiationError: it is no line, or longer than 1,024 bytes.
    """
    if not data:
        return None
    size, start = data[0], 1
    if size & 0x80:
        if len(data) < 2:
            return None
        size, start = size & 0x7F | data[1] << 7, 2
        if data[1] & 0x80:
            raise NegotiationError("a line too long")
    if not 0 < size <= _MAX_LINE_BYTES:
        raise NegotiationError("a line too long, or empty")
    if len(data) < start + size:
        return None
    line = data[start : start + size]
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise NegotiationError("a line that is not UTF-8") from error
    if not text.endswith("\n"):
        raise NegotiationError("a line without its newline")
    return text[:-1], data[start + size :]


class _Lines:
    """Reads lines off a stream and puts back what came after the last one."""

    def __init__(self, stream: P2PStream) -> None:
        self._stream = stream
        self._data = b""

    async def next(self) -> str:
        while (found := decode_line(self._data)) is None:
            more = await self._stream.receive_some(_MAX_LINE_BYTES)
            if not more:
                raise NegotiationError("the stream ended before a protocol was agreed")
            self._data += more
        text, self._data = found
        return text

    @property
    def pending(self) -> bool:
        """Whether (part of) another line is at hand."""
        return bool(self._data)

    def put_back(self) -> None:
        self._stream.unread(self._data)
        self._data = b""


async def propose(stream: P2PStream, protocol: str) -> bool:
    """Ask the remote for *protocol*; False if it does not speak it.

    Raises:
        NegotiationError: it answered something else.
        trio.BrokenResourceError: the stream or connection ended.
    """
    await stream.send_all(encode_line(_GREETING) + encode_line(protocol))
    lines = _Lines(stream)
    greeting = await lines.next()
    if greeting != _GREETING:
        raise NegotiationError(f"expected {_GREETING}, got {greeting!r}")
    answer = await lines.next()
    if answer not in (protocol, _REFUSAL):
        raise NegotiationError(f"asked for {protocol}, got {answer!r}")
    lines.put_back()
    stream.protocol = protocol
    return answer == protocol


async def accept(stream: P2PStream, speaks: Callable[[str], bool]) -> str:
    """Return the protocol the remote and we agree on.

    Raises:
        NegotiationError: there is none within 16 proposals, or it is not multistream-select.
        trio.BrokenResourceError: the stream or connection ended.
    """
    lines = _Lines(stream)
    greeting = await lines.next()
    if greeting != _GREETING:
        raise NegotiationError(f"expected {_GREETING}, got {greeting!r}")
    answer = encode_line(_GREETING)
    for _ in range(_MAX_PROPOSALS):
        if answer and not lines.pending:
            await stream.send_all(answer)  # the remote may be waiting for it before it proposes (again)
            answer = b""
        proposal = await lines.next()
        if speaks(proposal):
            await stream.send_all(answer + encode_line(proposal))
            lines.put_back()
            stream.protocol = proposal
            return proposal
        answer += encode_line(_REFUSAL)  # also to `ls`, which the specification has dropped
    raise NegotiationError(f"no common protocol in {_MAX_PROPOSALS} proposals")
