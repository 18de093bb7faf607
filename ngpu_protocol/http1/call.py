"""One request on one connection, and its answer.

What decides retries is what may have reached the other side, so failures say it: `NotSentError` while no complete head
can have left, `MaybeSentError` from then until the first byte of an answer, `IncompleteError` after it.

A body of up to 64 KiB goes out with its head in one write. A longer or a streamed one is sent by a task of its own, so
that an answer that begins, or ends, before the body does is seen, and a peer that echoes cannot deadlock with us. A
failure to send is not the end: the peer may have said why before it closed, so the answer is read first.
"""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, NoReturn, Protocol

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
    IncompleteError,
    LimitError,
    MalformedError,
    MaybeSentError,
    MisuseError,
    NotSentError,
    blame_server,
)
from ngpu_protocol.http1.headers import Headers, wants_upgrade
from ngpu_protocol.http1.heads import (
    HEAD_END,
    ResponseHead,
    check_partial_head,
    encode_fields,
    encode_request_line,
    parse_response_head,
)
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.response import Response
from ngpu_protocol.http1.streams import SwitchedStream, abort_stream, close_stream
from ngpu_protocol.http1.tcp_stream import NothingSentError

Body = bytes | AsyncIterable[bytes]

_READ_BYTES = 65536
_ONE_WRITE_BYTES = 65536
_MAX_INFORMATIONAL = 16
_LAST_WRITE_S = 0.1
_SOURCE_CLOSE_S = 2.0
_METHODS_WITH_BODY = frozenset(("POST", "PUT", "PATCH"))
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class Link:
    """One connection of a client, with what was received beyond the last answer on it."""

    __slots__ = ("rest", "stream")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.rest = b""

    def is_usable(self) -> bool:
        """Return whether the kept connection looks alive: an idle one with something to read was closed, or babbles."""
        transport: Any = self.stream
        while isinstance(transport, trio.SSLStream):
            transport = transport.transport_stream
        if isinstance(transport, trio.SocketStream):
            return not transport.socket.is_readable()
        is_readable: Callable[[], bool] | None = getattr(transport, "is_readable", None)
        return is_readable is None or not is_readable()


class Links(Protocol):
    """Where a call gets its connection, and gives it back exactly once."""

    authority: bytes
    limits: Limits

    async def acquire(self) -> Link:
        """Return a connection ready for a request."""

    def release(self, link: Link) -> None:
        """Take back a connection that can carry another request."""

    def forget(self, link: Link) -> None:
        """Take note that the connection was closed."""

    @property
    def closed(self) -> bool:
        """Whether connections are no longer kept."""


class Call:
    """One request in progress: the asynchronous context manager that `Client.request` returns.

    Attributes:
        request_complete: The whole request was handed to the connection.
    """

    __slots__ = (
        "_body",
        "_body_error",
        "_chunked",
        "_continue_timeout_s",
        "_expect",
        "_head",
        "_keep_alive",
        "_last_write",
        "_length",
        "_link",
        "_links",
        "_manager",
        "_method",
        "_nursery",
        "_response",
        "_send_failed",
        "_trailers",
        "_upgrade",
        "request_complete",
    )

    def __init__(
        self,
        links: Links,
        method: str,
        target: str,
        headers: Headers,
        body: Body,
        *,
        expect_continue: bool,
        continue_timeout_s: float,
        trailers: Headers,
    ) -> None:
        self._links = links
        self._method = method
        self._body = bytes(body) if isinstance(body, bytearray | memoryview) else body
        self._trailers = trailers
        self._continue_timeout_s = continue_timeout_s
        self._link: Link | None = None
        self._manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._response: Response | None = None
        self._body_error: Exception | None = None
        self._send_failed = False
        self._last_write: trio.Event | None = None
        self._keep_alive = True
        self._upgrade = False
        self._length: int | None = None
        self._chunked = False
        self._expect = expect_continue and (not isinstance(self._body, bytes) or bool(body))
        self.request_complete = False
        self._head = self._encode_head(target, headers)

    def _encode_head(self, target: str, headers: Headers) -> bytes:
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
            elif name == b"upgrade":
                self._upgrade = wants_upgrade(headers)
            fields.append(pair)
        if not has_host:
            fields.insert(0, (b"host", self._links.authority))
        body = self._body
        if not isinstance(body, bytes):
            self._chunked = self._length is None or bool(self._trailers)
        else:
            if self._length is not None and self._length != len(body):
                raise MisuseError(f"Content-Length says {self._length}, the body has {len(body)} bytes")
            self._chunked = bool(self._trailers)
            if body or self._method in _METHODS_WITH_BODY:
                self._length = len(body)
        if self._chunked:
            self._length = None
            fields.append((b"transfer-encoding", b"chunked"))
        elif self._length is not None:
            fields.append((b"content-length", b"%d" % self._length))
        if self._expect:
            fields.append((b"expect", b"100-continue"))
        return b"%b%b\r\n" % (encode_request_line(self._method, target), encode_fields(fields))

    # The context

    async def __aenter__(self) -> Response:
        """Send the request and return its answer once the head of that has come."""
        self._link = await self._links.acquire()
        try:
            response = self._response = await self._begin()
        except BaseException as error:
            await self._finish()
            if self._body_error is not None:
                raise self._body_error from None
            blame_server(error)
            raise
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the connection if both messages on it are complete and nothing else came; else reset it."""
        response, self._response = self._response, None
        assert response is not None
        both = False
        try:
            if self._last_write is not None and response.ended and error is None:
                # The peer had the whole request before our sender's last write returned: that moment keeps the
                # connection.
                with trio.move_on_after(_LAST_WRITE_S):
                    await self._last_write.wait()
            both = response.ended and self.request_complete
        finally:
            await self._finish(ended=both, reusable=both and response.upgraded is None)
        if error is None and self._body_error is not None:
            raise self._body_error

    async def _finish(self, *, ended: bool = False, reusable: bool = False) -> None:
        """End the sender, and give the connection back or close it: in order if *ended*."""
        link, self._link = self._link, None
        if link is None:
            return
        keep = reusable and self._keep_alive and not link.rest and not self._links.closed
        try:
            if not keep:
                await (close_stream(link.stream) if ended else abort_stream(link.stream))
        finally:
            try:
                if self._nursery is not None:
                    self._nursery.cancel_scope.cancel()
                    manager, self._manager, self._nursery = self._manager, None, None
                    await manager.__aexit__(None, None, None)
            finally:
                if keep:
                    self._links.release(link)
                else:
                    self._links.forget(link)

    # Sending

    async def _begin(self) -> Response:
        body = self._body
        unsent = self._head
        if self._expect:
            await self._send(unsent, with_head=True)
            unsent = b""
            with trio.move_on_after(self._continue_timeout_s):
                head = await self._read_head(stop_at_continue=True)
                if head is not None:
                    return self._answer(head)
        if isinstance(body, bytes) and len(body) <= _ONE_WRITE_BYTES:
            with_head = bool(unsent)
            if self._chunked:
                unsent = b"%b%b%b" % (unsent, encode_chunk(body), encode_last_chunk(self._trailers))
            elif body:
                unsent += body
            await self._send(unsent, with_head=with_head)
            self.request_complete = not self._send_failed
        else:
            if unsent:
                await self._send(unsent, with_head=True)
            # Entered and left by hand, since the context of this nursery is the caller's `async with`. Its one task
            # never raises, and the caller's own exceptions do not pass through it.
            self._manager = trio.open_nursery()
            self._nursery = await self._manager.__aenter__()
            assert self._link is not None
            self._nursery.start_soon(self._send_body, self._link.stream)
        head = await self._read_head()
        assert head is not None
        return self._answer(head)

    async def _send(self, data: bytes, *, with_head: bool) -> None:
        assert self._link is not None
        try:
            await self._link.stream.send_all(data)
        except (trio.ClosedResourceError, NothingSentError) as error:
            if with_head:
                raise NotSentError("the connection was closed before the request went out") from error
            self._send_failed = True
        except trio.BrokenResourceError:
            self._send_failed = True

    async def _send_body(self, stream: trio.abc.Stream) -> None:
        """Send a long or streamed body; what its source raises is kept for whoever waits for the answer."""
        pieces = _slices(self._body) if isinstance(self._body, bytes) else self._body
        try:
            left = self._length
            async for piece in pieces:
                if left is not None:
                    left -= len(piece)
                    if left < 0:
                        raise MisuseError(f"the body is longer than its Content-Length of {self._length}")
                    if left == 0:
                        self._last_write = trio.Event()
                if piece:
                    await stream.send_all(encode_chunk(piece) if self._chunked else piece)
            if left:
                raise MisuseError(f"the body is {left} bytes shorter than its Content-Length")
            if self._chunked:
                self._last_write = trio.Event()
                trailers: Headers = self._trailers or getattr(pieces, "trailers", [])
                await stream.send_all(encode_last_chunk(trailers))
            self.request_complete = True
        except _BROKEN:
            self._send_failed = True
        except Exception as error:
            self._body_error = error
            await abort_stream(stream)  # whoever reads the answer wakes, and finds the error
        finally:
            if self._last_write is not None:
                self._last_write.set()
            aclose: Callable[[], Awaitable[None]] | None = getattr(pieces, "aclose", None)
            if aclose is not None:  # a generator left in its middle would be finished by the garbage collector
                with trio.move_on_after(_SOURCE_CLOSE_S, shield=True):
                    try:
                        await aclose()
                    except Exception as error:  # in the nursery it would cancel the caller's own block
                        self._body_error = self._body_error or error

    # Receiving

    async def _read(self) -> bytes:
        if self._link is None:
            raise MisuseError("the request's context has ended")
        return bytes(await self._link.stream.receive_some(_READ_BYTES))

    async def _read_head(self, *, stop_at_continue: bool = False) -> ResponseHead | None:
        """Return the final head (or that of a 101), or None for 100 Continue if *stop_at_continue*."""
        link = self._link
        assert link is not None
        limits = self._links.limits
        for _ in range(_MAX_INFORMATIONAL):
            checked = 0
            while (end := link.rest.find(HEAD_END, checked - 3 if checked > 3 else 0)) < 0:
                if link.rest:
                    check_partial_head(link.rest, checked, limits)
                    checked = len(link.rest)
                try:
                    arrived = await self._read()
                except _BROKEN as error:
                    self._no_answer(error)
                if not arrived:
                    self._no_answer(None)
                link.rest = link.rest + arrived if link.rest else arrived
            if end > limits.max_head_bytes:
                raise LimitError(f"head over {limits.max_head_bytes} bytes")
            head = parse_response_head(link.rest[:end], limits)
            link.rest = link.rest[end + 4 :]
            if head.status >= 200:
                return head
            if head.status == 101:
                if not self._upgrade:
                    raise MalformedError("101 without being asked")
                return head
            if head.status == 100 and stop_at_continue:
                return None
        raise MalformedError("too many interim answers")

    def _no_answer(self, cause: Exception | None) -> NoReturn:
        assert self._link is not None
        if self._body_error is not None:
            raise self._body_error
        if self._link.rest:
            raise IncompleteError("the answer ended inside its head") from cause
        raise MaybeSentError("the connection ended before an answer came") from cause

    def _answer(self, head: ResponseHead) -> Response:
        link = self._link
        assert link is not None
        if not head.keep_alive:
            self._keep_alive = False
        decoder: Decoder | None = None
        if head.status == 101:
            response = Response(self, head, None)
            response.upgraded = SwitchedStream(link.stream, link.rest)
            link.rest = b""
            return response
        if self._method != "HEAD" and head.status != 204 and head.status != 304:
            if head.chunked:
                decoder = ChunkedDecoder(self._links.limits)
            elif head.content_length is None:
                decoder = CloseDecoder()
                self._keep_alive = False
            elif head.content_length:
                decoder = LengthDecoder(head.content_length)
        response = Response(self, head, decoder)
        if link.rest and decoder is not None:
            rest, link.rest = link.rest, b""
            response.make_ready(rest)
        return response

    def keep_rest(self, rest: bytes) -> None:
        """Keep bytes beyond the answer; a connection with any is not used again."""
        if self._link is not None:
            self._link.rest = rest

    async def read_body(self, decoder: Decoder) -> bytes:
        """Return the next bytes of the body, b"" if it ends with its connection and that ended in order."""
        try:
            data = await self._read()
        except _BROKEN as error:
            if self._body_error is not None:
                raise self._body_error from None
            raise IncompleteError("the connection broke inside the answer's body") from error
        if not data:
            decoder.eof()
        return data


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _ONE_WRITE_BYTES):
        yield body[start : start + _ONE_WRITE_BYTES]
