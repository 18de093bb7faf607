"""Bodies between wire form and content: by length, chunked, or until the connection closes. Pure.

A decoder takes whatever bytes arrive and returns the content in them; `done` says that the message is complete, and
then `rest` holds the bytes that already belong to the next one. Any split of the same bytes yields the same content.

An end of the connection goes through `eof`, which is silent only where the framing makes that a proper end: nothing
cut short is ever `done`.
"""

import re

from ngpu_protocol.http1.errors import IncompleteError, LimitError, MalformedError
from ngpu_protocol.http1.headers import Headers
from ngpu_protocol.http1.heads import encode_fields, parse_trailers
from ngpu_protocol.http1.limits import Limits

# RFC 9112 section 7.1; extensions are allowed and ignored. 15 digits are more than any length we count.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_MAX_CHUNK_LINE_BYTES = 1024


class LengthDecoder:
    """A body of exactly `remaining` more bytes."""

    __slots__ = ("done", "remaining", "rest", "trailers")

    def __init__(self, length: int) -> None:
        self.remaining = length
        self.done = length == 0
        self.rest = b""
        self.trailers: Headers = []

    def feed(self, data: bytes) -> bytes:
        """Return the content in *data*; bytes beyond the body go to `rest`."""
        size = len(data)
        if size < self.remaining:
            self.remaining -= size
            return data
        self.done = True
        if size == self.remaining:
            self.remaining = 0
            return data
        content, self.rest = data[: self.remaining], data[self.remaining :]
        self.remaining = 0
        return content

    def eof(self) -> None:
        """Take note that the connection ended.

        Raises:
            IncompleteError: The body was not complete.
        """
        if not self.done:
            raise IncompleteError(f"body cut short: {self.remaining} bytes missing")


class CloseDecoder:
    """An answer's body that ends with its connection."""

    __slots__ = ("done", "rest", "trailers")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self.trailers: Headers = []

    def feed(self, data: bytes) -> bytes:
        """Return *data*, all of it content."""
        return data

    def eof(self) -> None:
        """Take note that the connection ended: the body is complete."""
        self.done = True


class ChunkedDecoder:
    """A chunked body with its trailer section (RFC 9112 section 7.1)."""

    __slots__ = ("_in_trailers", "_limits", "_pending", "_remaining", "done", "rest", "trailers")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Content bytes left in the current chunk; -1 between chunks, 0 when its closing CRLF is due.
        self._remaining = -1
        self._pending = b""
        self._in_trailers = False
        self.done = False
        self.rest = b""
        self.trailers: Headers = []

    def feed(self, data: bytes) -> bytes:
        """Return the content in *data*: that of all its chunks, joined.

        Raises:
            MalformedError: No valid chunk, or a trailer section that is none.
            LimitError: A chunk line or trailer section beyond the limits.
        """
        if self._remaining > len(data):
            self._remaining -= len(data)
            return data
        if self._pending:
            data = self._pending + data
            self._pending = b""
        content: list[bytes] = []
        at = 0
        size = len(data)
        while not self._in_trailers:
            if self._remaining > 0:
                piece = data[at : at + self._remaining]
                if piece:
                    content.append(piece)
                    at += len(piece)
                    self._remaining -= len(piece)
                if self._remaining:
                    return b"".join(content)
            if self._remaining == 0:
                if size - at < 2:
                    self._hold(data, at, b"\r\n")
                    return b"".join(content)
                if data[at : at + 2] != b"\r\n":
                    raise MalformedError("chunk is not followed by CRLF")
                at += 2
                self._remaining = -1
            end = data.find(b"\n", at)
            if end < 0:
                if size - at > _MAX_CHUNK_LINE_BYTES:
                    raise LimitError("chunk line too long", status=400, reason="malformed_request")
                self._pending = data[at:]
                return b"".join(content)
            if end - at > _MAX_CHUNK_LINE_BYTES:
                raise LimitError("chunk line too long", status=400, reason="malformed_request")
            match = _CHUNK_LINE.fullmatch(data, at, end - 1) if data[end - 1] == 13 else None
            if match is None:
                raise MalformedError("illegal chunk line")
            at = end + 1
            self._remaining = int(match[1], 16)
            if self._remaining == 0:
                self._in_trailers = True
        self._take_trailers(data, at)
        return b"".join(content)

    def _hold(self, data: bytes, at: int, expected: bytes) -> None:
        """Keep the incomplete end of *data*, refusing at once what can no longer become *expected*."""
        self._pending = data[at:]
        if not expected.startswith(self._pending):
            raise MalformedError("chunk is not followed by CRLF")

    def _take_trailers(self, data: bytes, at: int) -> None:
        if data.startswith(b"\r\n", at):
            block, after = b"", at + 2
        else:
            end = data.find(b"\r\n\r\n", at)
            if end < 0:
                if len(data) - at > self._limits.max_head_bytes:
                    raise LimitError("trailer section too long", status=431, reason="head_too_large")
                self._pending = data[at:]
                return
            if end - at > self._limits.max_head_bytes:
                raise LimitError("trailer section too long", status=431, reason="head_too_large")
            block, after = data[at : end + 2], end + 4
        self.trailers = parse_trailers(block, self._limits)
        self.rest = data[after:]
        self.done = True

    def eof(self) -> None:
        """Take note that the connection ended.

        Raises:
            IncompleteError: The last chunk or the end of the trailers had not come.
        """
        if not self.done:
            raise IncompleteError("chunked body cut short")


Decoder = LengthDecoder | ChunkedDecoder | CloseDecoder


def encode_chunk(data: bytes) -> bytes:
    """Return *data* as one chunk; b"" stays b"", since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def encode_last_chunk(trailers: Headers) -> bytes:
    """Return the end of a chunked body with its trailer section."""
    return b"0\r\n%b\r\n" % encode_fields(trailers) if trailers else b"0\r\n\r\n"
