"""Streams measured from a client: time to the first byte of an answer, and throughput of a large body each way.

Bare blocking sockets: what is measured is the path, and a client library would add its own buffering.
"""

import socket
import time
from dataclasses import dataclass
from statistics import median
from urllib.parse import urlsplit

_BLOCK = bytes(64 * 1024)
_TIMEOUT_S = 120.0


class StreamError(Exception):
    """An answer that is not the one asked for."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a system listens, what its paths begin with, and the headers it wants."""

    base_url: str
    headers: dict[str, str]


def first_byte_ms(endpoint: Endpoint, *, rounds: int) -> float:
    """Return the median time from sending a request to the first byte of its streamed body, in milliseconds.

    One keep-alive connection. The stream has a second event later, so a path that collects the body shows.
    """
    times = []
    with _connect(endpoint) as connection:
        reader = _Reader(connection)
        for _ in range(rounds):
            sent = time.perf_counter()
            connection.sendall(_head(endpoint, "GET", "/events?n=2&every_ms=40"))
            reader.head()
            reader.need(1)
            times.append((time.perf_counter() - sent) * 1000)
            reader.skip_chunked_body()
    return median(times)


def download_mb_per_s(endpoint: Endpoint, size: int) -> float:
    """Return the throughput of an answer of *size* bytes, in megabytes (10^6) per second."""
    with _connect(endpoint) as connection:
        reader = _Reader(connection)
        started = time.perf_counter()
        connection.sendall(_head(endpoint, "GET", f"/bytes?n={size}"))
        received = reader.body_size(reader.head())
        if received != size:
            raise StreamError(f"asked for {size} bytes, received {received}")
        return size / 1e6 / (time.perf_counter() - started)


def upload_mb_per_s(endpoint: Endpoint, size: int) -> float:
    """Return the throughput of a request body of *size* bytes, to the last byte of its answer."""
    with _connect(endpoint) as connection:
        started = time.perf_counter()
        connection.sendall(_head(endpoint, "POST", "/sum", f"Content-Length: {size}\r\n"))
        left = size
        while left > 0:
            left -= connection.send(_BLOCK[: min(left, len(_BLOCK))])
        reader = _Reader(connection)
        body = reader.whole_body(reader.head())
        if f'"bytes":{size}}}'.encode() not in body:
            raise StreamError(f"the workspace did not count {size} bytes: {body[:200]!r}")
        return size / 1e6 / (time.perf_counter() - started)


def _connect(endpoint: Endpoint) -> socket.socket:
    parts = urlsplit(endpoint.base_url)
    connection = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), timeout=_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _head(endpoint: Endpoint, method: str, target: str, extra: str = "") -> bytes:
    parts = urlsplit(endpoint.base_url)
    lines = "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers.items())
    return f"{method} {parts.path}{target} HTTP/1.1\r\nHost: {parts.netloc}\r\n{lines}{extra}\r\n".encode()


class _Reader:
    """Reads answers off one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def need(self, count: int) -> None:
        """Return once *count* bytes are in the buffer."""
        while len(self._buffer) < count:
            self._more()

    def head(self) -> bytes:
        """Return the next answer's head, lower-case; interim answers (100) are skipped."""
        while True:
            head = self._until(b"\r\n\r\n").lower()
            if head[9:12] == b"200":
                return head
            if not head[9:10] == b"1":
                raise StreamError(f"unexpected answer: {head[:300].decode(errors='replace')}")

    def whole_body(self, head: bytes) -> bytes:
        """Return a small body."""
        length = _length(head)
        if length is not None:
            self.need(length)
            return self._take(length)
        parts = []
        while size := int(self._until(b"\r\n").partition(b";")[0], 16):
            self.need(size + 2)
            parts.append(self._take(size + 2)[:-2])
        self._skip_trailers()
        return b"".join(parts)

    def body_size(self, head: bytes) -> int:
        """Return the size of a large body, read and thrown away."""
        length = _length(head)
        if length is not None:
            return self._discard(length)
        total = 0
        while size := int(self._until(b"\r\n").partition(b";")[0], 16):
            total += self._discard(size)
            self.need(2)
            self._take(2)
        self._skip_trailers()
        return total

    def skip_chunked_body(self) -> None:
        """Read a chunked body to its end."""
        while size := int(self._until(b"\r\n").partition(b";")[0], 16):
            self._discard(size)
            self.need(2)
            self._take(2)
        self._skip_trailers()

    def _skip_trailers(self) -> None:
        while self._until(b"\r\n") != b"":
            pass

    def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            self._more()
        return self._take(at + len(mark))[: -len(mark)]

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _discard(self, count: int) -> int:
        left = count - min(count, len(self._buffer))
        del self._buffer[:count]
        scratch = bytearray(256 * 1024)
        while left > 0:
            received = self._connection.recv_into(scratch, min(left, len(scratch)))
            if not received:
                raise StreamError(f"the connection ended {left} bytes early")
            left -= received
        return count

    def _more(self) -> None:
        data = self._connection.recv(256 * 1024)
        if not data:
            raise StreamError("the connection ended early")
        self._buffer += data


def _length(head: bytes) -> int | None:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return None
