"""The client's half: requests over a pool of kept connections.

What decides retries is what may have reached the other side, so failures say it: `NotSentError` while no complete
head can have left, `MaybeSentError` from then until the first byte of an answer, `IncompleteError` after it. This
module itself never sends a request twice.

A connection goes back to the pool only when both messages on it are complete and nothing else came; one whose request
was cancelled, refused before its body, or cut short is reset.

A body of up to 64 KiB goes out with its head in one write. A longer or a streamed one is sent by a task of its own,
so that an answer that begins (or ends) before the body does is seen, and two streams through the same host cannot
starve each other.
"""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import trio

from ngpu_protocol.http1.bodies import (
    ChunkedDecoder,
    CloseDecoder,
    Decoder,
    LengthDecoder,
    encode_chunk,
    encode_last_chunk,
)
from ngpu_protocol.http1.errors import (
    HttpError,
    IncompleteError,
    LimitError,
    MalformedError,
    MaybeSentError,
    MisuseError,
    NotSentError,
    RemoteError,
)
from ngpu_protocol.http1.headers import Headers
from ngpu_protocol.http1.heads import (
    HEAD_END,
    ResponseHead,
    check_partial_head,
    encode_fields,
    encode_request_line,
    parse_response_head,
)
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.pool import Pool
from ngpu_protocol.http1.streams import SwitchedStream, abort_stream, close_stream

_READ_BYTES = 65536
_ONE_WRITE_BYTES = 65536
_MAX_INFORMATIONAL = 16
_METHODS_WITH_BODY = frozenset(("POST", "PUT", "PATCH"))
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)

Body = bytes | AsyncIterable[bytes]


class _Link:
    """One connection of a client's pool."""

    __slots__ = ("rest", "stream", "used")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.rest = b""
        self.used = False


def _is_usable(link: _Link) -> bool:
    """Whether a kept connection looks alive: an idle one that has something to read was closed, or babbles."""
    transport: Any = link.stream
    while isinstance(transport, trio.SSLStream):
        transport = transport.transport_stream
    if isinstance(transport, trio.SocketStream):
        return not transport.socket.is_readable()
    is_readable = getattr(transport, "is_readable", None)
    return is_readable is None or not is_readable()


class Response:
    """An answer whose head has come.

    Attributes:
        status: 200 to 999, or 101 with `upgraded`.
        reason: The phrase of the status line.
        headers: Fields in order, names in lower case.
        http_version: "1.1" or "1.0".
        trailers: The trailer fields, complete once `ended`.
        upgraded: The raw connection after 101, valid inside the request's context.
        ended: The whole body has arrived (the last of it may still wait to be received).
        received_bytes: Content bytes returned so far.
    """

    __slots__ = (
        "_call",
        "_decoder",
        "_ready",
        "ended",
        "headers",
        "http_version",
        "reason",
        "received_bytes",
        "status",
        "trailers",
        "upgraded",
    )

    def __init__(self, call: "Call", head: ResponseHead) -> None:
        self._call = call
        self.status = head.status
        self.reason = head.reason
        self.headers = head.headers
        self.http_version = head.http_version
        self.trailers: Headers = []
        self.upgraded: SwitchedStream | None = None
        self.received_bytes = 0
        self._ready = b""
        self._decoder: Decoder | None = None
        self.ended = True

    @property
    def buffered(self) -> bool:
        """Whether `receive` would return without waiting: a proxy holds its own head back for these bytes."""
        return bool(self._ready) or self.ended

    @property
    def body_sent(self) -> bool:
        """Whether the whole request went out; False when the answer refused a body that waited for 100 Continue."""
        return self._call.request_complete

    async def receive(self) -> bytes:
        """Return the next bytes of the body, b"" once it is complete.

        Raises:
            IncompleteError: The connection ended before the body did.
            MalformedError: The body's framing is broken.
        """
        data = self._ready
        if data:
            self._ready = b""
        else:
            decoder = self._decoder
            if decoder is None or decoder.done:
                return b""
            while not data:
                data = self._take(await self._call.read_body(decoder))
                if decoder.done:
                    break
        self.received_bytes += len(data)
        return data

    def body(self) -> "Response":
        """Return the body as an asynchronous iterable of its pieces."""
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data = await self.receive()
        if not data:
            raise StopAsyncIteration
        return data

    async def read(self, max_bytes: int) -> bytes:
        """Return the whole body.

        Raises:
            LimitError: It is over *max_bytes*.
        """
        pieces = []
        total = 0
        while data := await self.receive():
            total += len(data)
            if total > max_bytes:
                raise LimitError(f"answer over {max_bytes} bytes", status=502, reason="answer_too_large")
            pieces.append(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take(self, arrived: bytes) -> bytes:
        decoder = self._decoder
        assert decoder is not None
        content = decoder.feed(arrived) if arrived else b""
        if decoder.done:
            self.ended = True
            self.trailers = decoder.trailers
            self._call.link_rest(decoder.rest)
        return content


class Call:
    """One request in progress: the asynchronous context manager that `Client.request` returns."""

    __slots__ = (
        "_body",
        "_body_error",
        "_chunked",
        "_client",
        "_continue_timeout_s",
        "_expect",
        "_head",
        "_keep_alive",
        "_length",
        "_link",
        "_manager",
        "_method",
        "_nursery",
        "_response",
        "_send_failed",
        "_trailers",
        "request_complete",
    )

    def __init__(
        self,
        client: "Client",
        method: str,
        target: str,
        headers: Headers,
        body: Body,
        *,
        expect_continue: bool,
        continue_timeout_s: float,
        trailers: Headers,
    ) -> None:
        self._client = client
        self._method = method
        self._body = body
        self._trailers = trailers
        self._continue_timeout_s = continue_timeout_s
        self._link: _Link | None = None
        self._manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._response: Response | None = None
        self._body_error: BaseException | None = None
        self._send_failed = False
        self.request_complete = False
        self._keep_alive = True
        self._length: int | None = None
        self._chunked = False
        self._expect = expect_continue and (not isinstance(body, bytes) or bool(body))
        self._head = self._encode_head(method, target, headers)

    def _encode_head(self, method: str, target: str, headers: Headers) -> bytes:
        fields: Headers = []
        has_host = False
        for pair in headers:
            name = pair[0].lower()
            if name == b"content-length":
                if not pair[1].isdigit() or self._length is not None:
                    raise MisuseError("Content-Length is no number, or given twice")
                self._length = int(pair[1])
                continue
            if name == b"transfer-encoding" or name == b"expect":
                continue
            if name == b"host":
                has_host = True
            elif name == b"connection" and b"close" in pair[1].lower():
                self._keep_alive = False
            fields.append(pair)
        if not has_host:
            fields.insert(0, (b"host", self._client.authority))
        body = self._body
        if isinstance(body, bytes):
            if self._length is not None and self._length != len(body):
                raise MisuseError(f"Content-Length says {self._length}, the body has {len(body)} bytes")
            self._chunked = bool(self._trailers)
            if body or self._length is not None or method in _METHODS_WITH_BODY:
                self._length = len(body)
        else:
            self._chunked = self._length is None or bool(self._trailers)
        if self._chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        elif self._length is not None:
            fields.append((b"content-length", b"%d" % self._length))
        if self._expect:
            fields.append((b"expect", b"100-continue"))
        return b"%b%b\r\n" % (encode_request_line(method, target), encode_fields(fields))

    # Context

    async def __aenter__(self) -> Response:
        client = self._client
        self._link = await client._acquire()
        try:
            response = await self._begin()
        except BaseException:
            await self._finish(reusable=False)
            if self._body_error is not None:
                raise self._body_error from None
            raise
        self._response = response
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        response = self._response
        link = self._link
        assert response is not None
        assert link is not None
        reusable = (
            response.ended
            and self.request_complete
            and self._keep_alive
            and response.upgraded is None
            and not link.rest
            and not isinstance(response._decoder, CloseDecoder)
        )
        await self._finish(reusable=reusable, orderly=response.ended and self.request_complete)
        if error is None and self._body_error is not None:
            raise self._body_error

    async def _finish(self, *, reusable: bool, orderly: bool = False) -> None:
        link, self._link = self._link, None
        if link is not None:
            if reusable and self._nursery is None:
                self._client._release(link)
                return
            if not reusable:
                try:
                    await (close_stream(link.stream) if orderly else abort_stream(link.stream))
                finally:
                    self._client._forget()
                link = None
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            manager, self._manager, self._nursery = self._manager, None, None
            try:
                await manager.__aexit__(None, None, None)
            finally:
                if link is not None:
                    self._client._release(link)

    # Sending

    async def _begin(self) -> Response:
        body = self._body
        if self._expect:
            await self._send(self._head, head=True)
            with trio.move_on_after(self._continue_timeout_s):
                head = await self._read_head(stop_at_continue=True)
                if head is not None:
                    return self._respond(head)
            first = b""
        else:
            first = self._head
        if isinstance(body, bytes) and len(body) <= _ONE_WRITE_BYTES:
            data = first + self._encoded_whole(body) if body or self._chunked else first
            if data:
                await self._send(data, head=bool(first))
            self.request_complete = not self._send_failed
        else:
            if first:
                await self._send(first, head=True)
            self._manager = trio.open_nursery()
            self._nursery = await self._manager.__aenter__()
            self._nursery.start_soon(self._send_body)
        head = await self._read_head()
        assert head is not None
        return self._respond(head)

    def _encoded_whole(self, body: bytes) -> bytes:
        return encode_chunk(body) + encode_last_chunk(self._trailers) if self._chunked else body

    async def _send(self, data: bytes, *, head: bool) -> None:
        """Send *data*; a failure is only noted where an answer may explain it."""
        link = self._link
        assert link is not None
        sent_before = getattr(link.stream, "sent_bytes", None)
        try:
            await link.stream.send_all(data)
        except _BROKEN as error:
            sent = None if sent_before is None else getattr(link.stream, "sent_bytes", 0) - sent_before
            if head and (isinstance(error, trio.ClosedResourceError) or (sent is not None and sent < len(self._head))):
                raise NotSentError("the connection broke before the request went out") from error
            self._send_failed = True

    async def _send_body(self) -> None:
        link = self._link
        if link is None:
            return  # the whole answer was there before this task first ran
        try:
            left = self._length
            async for piece in _pieces(self._body):
                if self._chunked:
                    piece = encode_chunk(piece)
                elif left is not None:
                    left -= len(piece)
                    if left < 0:
                        raise MisuseError("the body is longer than its Content-Length")
                if piece:
                    await link.stream.send_all(piece)
            if self._chunked:
                await link.stream.send_all(encode_last_chunk(self._trailers))
            elif left:
                raise MisuseError(f"the body is {left} bytes shorter than its Content-Length")
            self.request_complete = True
        except _BROKEN:
            self._send_failed = True
        except Exception as error:
            self._body_error = error
            await abort_stream(link.stream)  # the reader of the answer wakes, and finds the error

    # Receiving

    async def _read(self) -> bytes:
        link = self._link
        if link is None:
            raise MisuseError("the request's context has ended")
        return bytes(await link.stream.receive_some(_READ_BYTES))

    async def _read_head(self, *, stop_at_continue: bool = False) -> ResponseHead | None:
        """Return the final head (or 101), None for 100 Continue if *stop_at_continue*."""
        link = self._link
        assert link is not None
        limits = self._client.limits
        informational = 0
        while True:
            checked = 0
            while (end := link.rest.find(HEAD_END, max(0, checked - 3))) < 0:
                if link.rest:
                    try:
                        check_partial_head(link.rest, checked, limits)
                    except RemoteError as error:
                        raise type(error)(str(error), status=502, reason="malformed_answer") from None
                    checked = len(link.rest)
                try:
                    arrived = await self._read()
                except _BROKEN as error:
                    self._no_answer(error)
                if not arrived:
                    self._no_answer(None)
                link.rest += arrived
            if end > limits.max_head_bytes:
                raise LimitError("answer's head too large", status=502, reason="malformed_answer")
            head = parse_response_head(link.rest[:end], limits)
            link.rest = link.rest[end + 4 :]
            if head.status >= 200 or head.status == 101:
                return head
            if head.status == 100 and stop_at_continue:
                return None
            informational += 1
            if informational > _MAX_INFORMATIONAL:
                raise MalformedError("too many interim answers", status=502, reason="malformed_answer")

    def _no_answer(self, cause: Exception | None) -> None:
        link = self._link
        assert link is not None
        if self._body_error is not None:
            raise self._body_error
        if link.rest:
            raise IncompleteError("the answer ended inside its head") from cause
        raise MaybeSentError("the connection ended before an answer came") from cause

    def _respond(self, head: ResponseHead) -> Response:
        link = self._link
        assert link is not None
        response = Response(self, head)
        if not head.keep_alive:
            self._keep_alive = False
        status = head.status
        if status == 101:
            response.upgraded = SwitchedStream(link.stream, link.rest)
            link.rest = b""
            return response
        if self._method == "HEAD" or status == 204 or status == 304 or (head.content_length == 0 and not head.chunked):
            return response
        if head.chunked:
            response._decoder = ChunkedDecoder(self._client.limits)
        elif head.content_length is not None:
            response._decoder = LengthDecoder(head.content_length)
        else:
            response._decoder = CloseDecoder()
        response.ended = False
        if link.rest:
            rest, link.rest = link.rest, b""
            response._ready = response._take(rest)
        return response

    def link_rest(self, rest: bytes) -> None:
        if self._link is not None:
            self._link.rest = rest

    async def read_body(self, decoder: Decoder) -> bytes:
        try:
            data = await self._read()
        except _BROKEN as error:
            if self._body_error is not None:
                raise self._body_error from None
            raise IncompleteError("the connection broke inside the answer's body") from error
        if not data:
            decoder.eof()
        return data


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        view = memoryview(body)
        for start in range(0, len(body), _ONE_WRITE_BYTES):
            yield bytes(view[start : start + _ONE_WRITE_BYTES])
    else:
        async for piece in body:
            yield piece


class Client:
    """Requests to one place over a bounded pool of kept connections.

    Args:
        open: Makes a new connection. What it raises becomes the cause of a `NotSentError`.
        authority: The Host field of requests that bring none.
        max_connections: Connections at once; further requests wait in order.
        max_idle_s: A connection idle for longer is closed, not used. Below the server's own limit, so that a request
            rarely meets a connection being closed.
        acquire_timeout_s: How long a request waits for a connection.
        open_timeout_s: How long opening one may take.
        limits: Bounds of the answers' heads and trailers.
    """

    def __init__(
        self,
        open: Callable[[], Awaitable[trio.abc.Stream]],
        *,
        authority: str = "localhost",
        max_connections: int = 64,
        max_idle_s: float = 30.0,
        acquire_timeout_s: float = 10.0,
        open_timeout_s: float = 10.0,
        limits: Limits | None = None,
    ) -> None:
        self._open = open
        self.authority = authority.encode("ascii")
        self.limits = limits or Limits()
        self._acquire_timeout_s = acquire_timeout_s
        self._open_timeout_s = open_timeout_s
        self._closed = False
        self.pool: Pool[_Link] = Pool(max_connections=max_connections, max_idle_s=max_idle_s, is_usable=_is_usable)

    def request(
        self,
        method: str,
        target: str,
        headers: Headers | None = None,
        body: Body = b"",
        *,
        expect_continue: bool = False,
        continue_timeout_s: float = 5.0,
        trailers: Headers | None = None,
    ) -> Call:
        """Return a context manager that sends the request and yields its `Response`.

        Leaving the context before the body was received whole resets the connection, which tells the server to stop.

        Args:
            method: Any token but CONNECT.
            target: `/path?query`, already encoded.
            headers: Fields in order; Host and the framing are added. Connection and Upgrade go out as given.
            body: Bytes, or an asynchronous iterable of them (chunked unless *headers* give its Content-Length).
            expect_continue: Send the body only when the server asks for it.
            continue_timeout_s: Send it anyway after this time (RFC 9110 section 10.1.1).
            trailers: Sent after the body, which is then chunked.

        Raises:
            MisuseError: At once, when these cannot be a request.
            NotSentError, PoolTimeoutError, MaybeSentError, IncompleteError, MalformedError: On entering; see `errors`.
        """
        if self._closed:
            raise MisuseError("the client is closed")
        return Call(
            self,
            method,
            target,
            headers or [],
            body,
            expect_continue=expect_continue,
            continue_timeout_s=continue_timeout_s,
            trailers=trailers or [],
        )

    async def sweep(self) -> None:
        """Close connections idle for too long; each request does so too, so only clients at rest need it called."""
        for link in self.pool.dropped():
            await close_stream(link.stream)

    async def aclose(self) -> None:
        """Close all idle connections; those in use close when their requests end. New requests are refused."""
        self._closed = True
        self.pool.max_idle_s = -1.0
        for link in self.pool.clear():
            await close_stream(link.stream)

    async def _acquire(self) -> _Link:
        link, granted = self.pool.take()
        if link is not None:
            link.used = True
            return link
        await self.sweep_after(granted)
        if not granted:
            link = await self.pool.wait(self._acquire_timeout_s)
            if link is not None:
                if _is_usable(link):
                    return link
                await close_stream(link.stream)
        return await self._connect()

    async def sweep_after(self, granted: bool) -> None:
        try:
            await self.sweep()
        except BaseException:
            if granted:
                self.pool.forget()
            raise

    async def _connect(self) -> _Link:
        try:
            with trio.fail_after(self._open_timeout_s):
                return _Link(await self._open())
        except BaseException as error:
            self.pool.forget()
            if not isinstance(error, Exception) or isinstance(error, NotSentError):
                raise
            raise NotSentError(f"no connection: {error or type(error).__name__}") from error

    def _release(self, link: _Link) -> None:
        self.pool.release(link)

    def _forget(self) -> None:
        self.pool.forget()


__all__ = ["Body", "Call", "Client", "HttpError", "Response"]
