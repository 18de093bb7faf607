"""HTTP/1.1 on asyncio, as much of it as a workspace needs.

Owns the connection: reading heads and bodies (``Content-Length`` or chunked), ``Expect: 100-continue``, keep-alive and
pipelining, writing answers with backpressure, upgrades. What a path means is the application's: for each request the
connection asks it for a `BodySink` and feeds that the body as it arrives.

Invariants: one request is answered at a time and in order; an answer that could not be finished ends with the
connection closed, never with a clean end; reading stops while the peer does not take what was written.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Protocol
from urllib.parse import parse_qsl, unquote

MAX_HEAD_BYTES = 32 * 1024
MAX_PIPELINED_BYTES = 64 * 1024
_REASONS = {
    100: "Continue", 101: "Switching Protocols", 200: "OK", 204: "No Content", 400: "Bad Request", 404: "Not Found",
    405: "Method Not Allowed", 411: "Length Required", 413: "Content Too Large", 426: "Upgrade Required",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
}  # fmt: skip


class Request:
    """A request's head. Header names are lower-case; of a repeated header the last value is kept."""

    __slots__ = ("headers", "method", "path", "raw_query", "target", "version")

    def __init__(self, method: str, target: str, version: str, headers: dict[str, str]) -> None:
        self.method = method
        self.target = target
        path, _, self.raw_query = target.partition("?")
        self.path = unquote(path) if "%" in path else path
        self.version = version
        self.headers = headers

    @property
    def query(self) -> dict[str, str]:
        """The query's fields, decoded; of a repeated one the last."""
        return dict(parse_qsl(self.raw_query, keep_blank_values=True))


class BodySink(Protocol):
    """Takes one request's body and answers on the connection it was made for."""

    def feed(self, data: bytes) -> None:
        """Take the next part of the body."""

    def end(self) -> None:
        """The body is complete: answer now, or start a task that will."""


class RawReceiver(Protocol):
    """Takes the bytes of an upgraded connection."""

    def feed(self, data: bytes) -> None:
        """Take what the peer sent."""

    def lost(self) -> None:
        """The connection is gone."""


SinkFactory = Callable[["Connection", Request], BodySink]


class BadRequest(Exception):
    """The peer broke HTTP: answered with *status*, then the connection is closed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class OpenConnections(set["Connection"]):
    """The server's open connections; each adds and removes itself."""

    def __init__(self) -> None:
        super().__init__()
        self._none_left = asyncio.Event()

    def discard(self, connection: object) -> None:
        super().discard(connection)
        if not self:
            self._none_left.set()

    async def emptied(self) -> None:
        """Return once no connection is open."""
        while self:
            self._none_left.clear()
            await self._none_left.wait()


class Connection(asyncio.Protocol):
    """One client connection.

    Args:
        open_sink: the application: called with each request's head.
        connections: the server's; this one adds and removes itself.
    """

    def __init__(self, open_sink: SinkFactory, connections: OpenConnections) -> None:
        self._open_sink = open_sink
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._request: Request | None = None
        self._sink: BodySink | None = None
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._chunked = False
        self._chunk_state = "size"
        self._body_ended = False
        self._answered = False
        self._chunked_answer = False
        self._keep_alive = True
        self._draining = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._reading_paused = False
        self._task: asyncio.Task[None] | None = None
        self._receiver: RawReceiver | None = None

    # --- what asyncio calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        self._writable.set()
        if self._task is not None:
            self._task.cancel()
        if self._receiver is not None:
            self._receiver.lost()

    def pause_writing(self) -> None:
        self._writable.clear()
        self._update_reading()

    def resume_writing(self) -> None:
        self._writable.set()
        self._update_reading()

    def data_received(self, data: bytes) -> None:
        if self._receiver is not None:
            self._receiver.feed(data)
            return
        self._buffer += data
        self._advance()

    # --- reading ------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Take as much of the buffer as the state allows."""
        try:
            while self._transport is not None and self._receiver is None:
                if self._request is None:
                    if not self._buffer or not self._read_head():
                        break
                elif not self._body_ended:
                    if not self._read_body():
                        break
                else:
                    break  # the answer is still being made; what follows is the next request
        except BadRequest as error:
            self._keep_alive = False
            self._request = self._request or Request("GET", "/", "HTTP/1.1", {})
            self._body_ended = True
            if not self._answered:
                self.respond(error.status, str(error).encode(), "text/plain; charset=utf-8")
            elif self._transport is not None:
                self._transport.abort()
        self._update_reading()

    def _update_reading(self) -> None:
        if self._transport is None:
            return
        busy = self._request is not None and self._body_ended and len(self._buffer) > MAX_PIPELINED_BYTES
        pause = busy or not self._writable.is_set()
        if pause != self._reading_paused:
            self._reading_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _read_head(self) -> bool:
        buffer = self._buffer
        while buffer[:2] == b"\r\n":  # RFC 9112, 2.2: empty lines before a request line are skipped
            del buffer[:2]
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > MAX_HEAD_BYTES:
                raise BadRequest(431, "the request's head is larger than 32 KiB")
            return False
        head = bytes(buffer[:end]).decode("latin-1")
        del buffer[: end + 4]
        first, _, rest = head.partition("\r\n")
        parts = first.split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            raise BadRequest(400, "malformed request line")
        headers: dict[str, str] = {}
        if rest:
            for line in rest.split("\r\n"):
                name, colon, value = line.partition(":")
                if not colon or not name or name[-1] in " \t" or name[0] in " \t":
                    raise BadRequest(400, "malformed header line")
                headers[name.lower()] = value.strip(" \t")
        request = Request(parts[0], parts[1], parts[2], headers)
        connection = headers.get("connection", "").lower()
        self._keep_alive = not self._draining and (
            "close" not in connection if parts[2] != "HTTP/1.0" else "keep-alive" in connection
        )
        self._begin_body(request)
        return True

    def _begin_body(self, request: Request) -> None:
        coding = request.headers.get("transfer-encoding", "").lower()
        length = request.headers.get("content-length")
        self._request = request
        self._answered = self._body_ended = self._chunked_answer = False
        self._chunked = bool(coding)
        self._chunk_state = "size"
        if coding:
            if coding != "chunked" or length is not None:
                raise BadRequest(501, "only Transfer-Encoding: chunked, and without Content-Length, is understood")
            self._left = 0
        else:
            if length is not None and not (length.isascii() and length.isdigit()):
                raise BadRequest(400, "Content-Length is not a number")
            self._left = int(length or 0)
        self._sink = self._open_sink(self, request)
        expects = request.headers.get("expect", "").lower() == "100-continue"
        if expects and (self._left or self._chunked) and not self._answered and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._left and not self._chunked:
            self._end_body()

    def _read_body(self) -> bool:
        """Feed the sink from the buffer; False when more bytes are needed."""
        if not self._chunked:
            if not self._buffer:
                return False
            self._feed()
            if not self._left:
                self._end_body()
            return True
        if self._chunk_state == "data":
            if not self._buffer:
                return False
            self._feed()
            if not self._left:
                self._chunk_state = "after data"
            return True
        line_end = self._buffer.find(b"\r\n")
        if line_end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BadRequest(400, "a chunk's size line has no end")
            return False
        line = bytes(self._buffer[:line_end])
        del self._buffer[: line_end + 2]
        if self._chunk_state == "after data":
            if line:
                raise BadRequest(400, "a chunk is longer than its size says")
            self._chunk_state = "size"
        elif self._chunk_state == "size":
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise BadRequest(400, "a chunk's size is not a hexadecimal number") from None
            self._chunk_state = "data" if self._left else "trailers"
        elif not line:  # trailers end with an empty line; their content means nothing here
            self._end_body()
        return True

    def _feed(self) -> None:
        if len(self._buffer) <= self._left:
            data = bytes(self._buffer)
            self._buffer.clear()
        else:
            data = bytes(self._buffer[: self._left])
            del self._buffer[: self._left]
        self._left -= len(data)
        if self._sink is not None:
            self._sink.feed(data)

    def _end_body(self) -> None:
        self._body_ended = True
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.end()

    # --- answering ----------------------------------------------------------------------------------------------

    def respond(self, status: int, body: bytes, content_type: str, extra: str = "") -> None:
        """Send a whole answer. *extra* is further header lines, each ending in CRLF."""
        assert self._request is not None
        if not self._body_ended:
            self._keep_alive = False  # answered before the body was read: its rest would be taken for a request
        head = self._head(status, f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{extra}")
        self._answered = True
        if self._transport is not None:
            self._transport.write(head if self._request.method == "HEAD" else head + body)
        if self._body_ended and self._sink is None:
            self._next_request()
        elif not self._keep_alive and self._transport is not None:
            self._transport.close()

    def start_answer(self, status: int, content_type: str, *, length: int | None) -> None:
        """Send the head of an answer whose body follows with `write`; *length* None sends it chunked."""
        self._answered = True
        self._chunked_answer = length is None and self._request is not None and self._request.version == "HTTP/1.1"
        if length is None and not self._chunked_answer:
            self._keep_alive = False  # HTTP/1.0 has no chunks: the end of the connection ends the body
        framing = f"Content-Length: {length}\r\n" if length is not None else ""
        if self._chunked_answer:
            framing = "Transfer-Encoding: chunked\r\n"
        if self._transport is not None:
            extra = "Cache-Control: no-cache\r\n" if content_type == "text/event-stream" else ""
            self._transport.write(self._head(status, f"Content-Type: {content_type}\r\n{framing}{extra}"))

    def write(self, data: bytes) -> None:
        """Send a part of the body begun with `start_answer`."""
        if self._transport is None or not data:
            return
        if self._request is not None and self._request.method == "HEAD":
            return
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked_answer else data)

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        await self._writable.wait()

    def finish(self) -> None:
        """End the body begun with `start_answer`."""
        if self._transport is not None and self._chunked_answer and self._request and self._request.method != "HEAD":
            self._transport.write(b"0\r\n\r\n")
        self._next_request()

    def run(self, answer: AsyncGenerator[None]) -> None:
        """Run *answer* as this request's task; it is cancelled when the client goes away.

        Each step of the iterator is one write: between steps the connection waits until the peer reads on. The last
        thing it does is `respond` or `finish`.
        """

        async def steps() -> None:
            try:
                async for _ in answer:
                    await self.drain()
            except Exception:
                if self._transport is not None:
                    self._transport.abort()
                raise
            finally:
                await answer.aclose()

        self._task = asyncio.get_running_loop().create_task(steps())

    def upgrade(self, extra: str, receiver: RawReceiver) -> None:
        """Answer 101 with *extra* header lines; from now on *receiver* gets the bytes."""
        if self._transport is None:
            return
        self._transport.write(f"HTTP/1.1 101 Switching Protocols\r\n{extra}\r\n".encode("latin-1"))
        self._answered = True
        self._receiver = receiver
        rest, self._buffer = bytes(self._buffer), bytearray()
        if rest:
            receiver.feed(rest)

    def write_raw(self, data: bytes) -> None:
        """Send bytes on an upgraded connection."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """Close once everything written has gone out."""
        if self._transport is not None:
            self._transport.close()

    def stop_accepting(self) -> bool:
        """Serve no further request here; True if the connection was idle and is closed now."""
        self._draining = True
        self._keep_alive = False
        idle = self._request is None and self._receiver is None
        if idle:
            self.close()
        return idle

    def _head(self, status: int, lines: str) -> bytes:
        ending = "" if self._keep_alive else "Connection: close\r\n"
        return f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n{lines}{ending}\r\n".encode("latin-1")

    def _next_request(self) -> None:
        self._request = None
        self._task = None
        self._answered = False
        if not self._keep_alive:
            self.close()
            return
        if self._buffer:
            # From the loop, not from here: a client that pipelines thousands of requests must not deepen the stack.
            asyncio.get_running_loop().call_soon(self._advance)
        self._update_reading()
