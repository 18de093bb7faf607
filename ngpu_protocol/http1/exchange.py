"""One request and its answer, as a handler sees them.

What is sent follows HTTP's rules whatever the handler does: the framing is chosen here, field names and values cannot
break out of their lines, HEAD, 204 and 304 have no body, and an answer that is shorter than announced is never
completed.
"""

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Protocol

from ngpu_protocol.http1.bodies import ChunkedDecoder, Decoder, LengthDecoder, encode_chunk, encode_last_chunk
from ngpu_protocol.http1.errors import LimitError, MisuseError
from ngpu_protocol.http1.headers import FORBIDDEN_IN_TRAILERS, Headers, header, wants_upgrade
from ngpu_protocol.http1.heads import Request, encode_fields, encode_status_line
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.streams import SwitchedStream

# An unread request body up to this is read and dropped to keep the connection; above it the connection ends.
DROPPED_BODY_BYTES = 256 * 1024
_HELD_BYTES = 64 * 1024
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Remote:
    """Who is at the other end: an IP address and port, or the account address of an authenticated peer."""

    host: str = ""
    port: int = 0
    peer: str = ""


class Wire(Protocol):
    """What an exchange needs of its connection."""

    limits: Limits
    remote: Remote
    date: bool
    closing: bool

    async def read_body(self) -> bytes:
        """Return the next bytes, at least one."""

    async def write(self, data: bytes) -> None:
        """Send *data*."""

    async def abort(self) -> None:
        """Cut the connection."""

    def keep_rest(self, rest: bytes) -> None:
        """Keep bytes that came after the body, for the next request."""

    def switch(self) -> SwitchedStream:
        """Hand the connection out."""


class Exchange:
    """One request and its answer.

    The handler owns it until it returns. One task at a time may use the receiving side and one the sending side; they
    may be different tasks.

    Attributes:
        request: The head of the request.
        remote: Who sent it.
        trailers: The request's trailer fields, complete once `body_complete`.
        max_body_bytes: What `receive` holds the body to; a handler may set another bound before its first `receive`.
        received_bytes: Content bytes `receive` has returned.
        client_gone: The client left, or stalled beyond its limit, before the answer was complete: why the handler was
            cancelled. When it is False in a cancelled handler, the server itself is ending.
        ended: The whole answer was handed to the connection.
        must_close: The connection ends after this exchange.
    """

    __slots__ = (
        "_begun",
        "_bodiless",
        "_chunked",
        "_decoder",
        "_expects_continue",
        "_held",
        "_length",
        "_ready",
        "_wire",
        "aborted",
        "client_gone",
        "ended",
        "head_sent",
        "max_body_bytes",
        "must_close",
        "received_bytes",
        "remote",
        "request",
        "switched",
        "trailers",
    )

    def __init__(self, wire: Wire, request: Request) -> None:
        self._wire = wire
        self.request = request
        self.remote = wire.remote
        self.trailers: Headers = []
        self.max_body_bytes = wire.limits.max_body_bytes
        self.received_bytes = 0
        self.client_gone = False
        self.aborted = False
        self.switched = False
        self._ready = b""
        self._expects_continue = request.expects_continue
        self._decoder: Decoder | None = None
        if request.chunked:
            self._decoder = ChunkedDecoder(wire.limits)
        elif request.content_length:
            self._decoder = LengthDecoder(request.content_length)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.ended = False
        self.head_sent = False
        self.must_close = False
        self._begun = False
        self._held = b""
        self._chunked = False
        self._bodiless = False
        self._length: int | None = None

    # The request's body

    @property
    def body_complete(self) -> bool:
        """Whether the whole request body has arrived (the last of it may still wait to be received)."""
        return self._decoder is None or self._decoder.done

    @property
    def body_ready(self) -> bool:
        """Whether `receive` has bytes to return without waiting."""
        return bool(self._ready)

    async def receive(self) -> bytes:
        """Return the next bytes of the request's body, b"" once it is complete.

        Sends 100 Continue first where the client waits for it.

        Raises:
            LimitError: The body is, or says that it will be, over `max_body_bytes`. Unhandled, it becomes a 413.
            MalformedError: The body's framing is broken. Unhandled, it becomes a 400.
            MisuseError: The client waits for 100 Continue, and the answer was begun instead.
        """
        limit = self.max_body_bytes
        if limit is not None and (self.request.content_length or 0) > limit:
            raise LimitError(f"body over {limit} bytes")
        data = self._ready
        if data:
            self._ready = b""
        else:
            decoder = self._decoder
            if decoder is None or decoder.done:
                return b""
            if self._expects_continue:
                await self.accept_body()
            while not data:
                data = self.decode(await self._wire.read_body())
                if decoder.done:
                    break
        self.received_bytes += len(data)
        if limit is not None and self.received_bytes > limit:
            raise LimitError(f"body over {limit} bytes")
        return data

    async def receive_all(self, max_bytes: int) -> bytes:
        """Return the whole request body.

        Raises:
            LimitError: It is over *max_bytes*.
        """
        if self.max_body_bytes is None or max_bytes < self.max_body_bytes:
            self.max_body_bytes = max_bytes
        data = await self.receive()
        if not data or (self.body_complete and not self._ready):
            return data
        pieces = [data]
        while data := await self.receive():
            pieces.append(data)
        return b"".join(pieces)

    async def accept_body(self) -> None:
        """Send 100 Continue now if the client waits for it; `receive` does so by itself.

        Raises:
            MisuseError: The answer was begun already, which told the client to keep its body.
        """
        if self._expects_continue:
            if self._begun:
                raise MisuseError("the body was refused by answering before it was received")
            self._expects_continue = False
            await self._wire.write(_CONTINUE)

    def decode(self, arrived: bytes) -> bytes:
        """Return the content in *arrived* (for the connection, which may have body bytes before the handler asks)."""
        decoder = self._decoder
        assert decoder is not None
        content = decoder.feed(arrived)
        if decoder.done:
            self._wire.keep_rest(decoder.rest)
            self.trailers = decoder.trailers
        return content

    def make_ready(self, arrived: bytes) -> None:
        """Keep the content in *arrived*, which came with the head, for `receive`."""
        self._ready = self.decode(arrived)
        self._expects_continue = False  # it did not wait

    @property
    def body_can_be_dropped(self) -> bool:
        """Whether what is left of the request's body is little enough to read and drop."""
        decoder = self._decoder
        if decoder is None or decoder.done:
            return True
        if self._expects_continue:
            return False  # nobody can tell whether the client sends it after all (RFC 9110 section 10.1.1)
        return not isinstance(decoder, LengthDecoder) or decoder.remaining <= DROPPED_BODY_BYTES

    # The answer

    async def send_head(self, status: int, headers: Headers, *, reason: bytes = b"", more: bool = False) -> None:
        """Begin the answer.

        The framing follows from *headers*: their Content-Length, else chunked (for an HTTP/1.0 client: until close). A
        Connection or Transfer-Encoding field in them is replaced by our own; `Connection: close` is honoured.

        Args:
            status: A final status, 200 or above. For others see `send_informational` and `upgrade`.
            headers: Fields in order, names in any case.
            reason: The phrase; empty for the registered one.
            more: The caller has the next bytes at hand: hold the head back and send it with them, in one write.
        """
        self._held += self._encode_head(status, headers, reason)
        if not more:
            await self._flush()

    async def send(self, data: bytes, *, more: bool = False) -> None:
        """Send the next bytes of the answer's body at once, or together with the next call's if *more*.

        Waits while the client does not read (backpressure).
        """
        self._held += self._encode_data(data)
        if self._held and (not more or len(self._held) > _HELD_BYTES):
            await self._flush()

    async def end(self, trailers: Headers | None = None) -> None:
        """Complete the answer.

        Args:
            trailers: Sent where the answer is chunked, else dropped (Content-Length, HEAD and 304, HTTP/1.0).

        Raises:
            MisuseError: Fewer bytes were sent than Content-Length announced. The answer is then cut, not completed.
        """
        self._held += self._encode_end(trailers)
        if self._held:
            await self._flush()
        self.ended = True

    async def respond(
        self, status: int, headers: Headers, body: bytes = b"", *, reason: bytes = b"", trailers: Headers | None = None
    ) -> None:
        """Send a whole answer in one write.

        Args:
            status: A final status.
            headers: Fields in order; Content-Length is added where it is missing and may be.
            body: The content; left out where the request or the status forbid it.
            reason: The phrase; empty for the registered one.
            trailers: Makes the answer chunked. For HTTP/1.0 clients and bodiless answers they are dropped.
        """
        if self._begun:
            raise MisuseError("the answer has a head already")
        if trailers is None and status != 204 and status != 304:
            for name, _ in headers:
                if name == b"content-length" or name.lower() == b"content-length":
                    break
            else:
                headers = [*headers, (b"content-length", b"%d" % len(body))]
        try:
            if not self.body_can_be_dropped:
                self.must_close = True
            head = self._encode_head(status, headers, reason)
            self._held = b"%b%b%b" % (head, self._encode_data(body), self._encode_end(trailers))
        except MisuseError:
            self._begin_anew()  # nothing of it went out, so a proper refusal still can
            raise
        await self._flush()
        self.ended = True

    async def respond_json(self, status: int, value: Any, headers: Headers | None = None) -> None:
        """Send *value* as a whole JSON answer."""
        body = json.dumps(value, separators=(",", ":")).encode()
        await self.respond(status, [(b"content-type", b"application/json"), *(headers or [])], body)

    async def send_informational(self, status: int, headers: Headers | None = None) -> None:
        """Send an interim answer such as 103 Early Hints; left out for HTTP/1.0 clients."""
        if not 102 <= status <= 199 or self._begun:
            raise MisuseError(f"{status} cannot be sent as an interim answer now")
        if self.request.http_version == "1.1":
            await self._wire.write(b"%b%b\r\n" % (encode_status_line(status), encode_fields(headers or [])))

    async def upgrade(self, headers: Headers | None = None) -> SwitchedStream:
        """Send 101 Switching Protocols and return the raw connection, which ends when the handler returns.

        Args:
            headers: Further fields of the answer, Upgrade among them where it is not to repeat the request's.

        Raises:
            MisuseError: The client did not ask to switch, or its body is still to come.
        """
        asked = self.request.http_version == "1.1" and wants_upgrade(self.request.headers)  # RFC 9110 section 7.8
        if self._begun or not asked or not self.body_complete:
            raise MisuseError("this request cannot switch protocols")
        fields = [(name, value) for name, value in headers or [] if name.lower() != b"connection"]
        if header(fields, b"upgrade") is None:
            fields.append((b"upgrade", header(self.request.headers, b"upgrade") or b""))
        fields.append((b"connection", b"upgrade"))
        head = b"%b%b\r\n" % (encode_status_line(101), encode_fields(fields))
        self._begun = self.head_sent = True
        await self._wire.write(head)
        self.ended = self.switched = True
        return self._wire.switch()

    async def abort(self) -> None:
        """Cut the connection, so that what was sent never looks complete. The handler should return then."""
        self.aborted = True
        await self._wire.abort()

    def begin_anew(self) -> bool:
        """Forget an answer of which nothing was sent yet; returns False when something was."""
        if self.head_sent:
            return False
        self._begin_anew()
        return True

    async def _flush(self) -> None:
        data, self._held = self._held, b""
        self.head_sent = True
        await self._wire.write(data)

    def _encode_head(self, status: int, headers: Headers, reason: bytes) -> bytes:
        if self._begun:
            raise MisuseError("the answer has a head already")
        if not 200 <= status <= 999:
            raise MisuseError(f"{status} is no final status")
        request = self.request
        length: int | None = None
        dated = not self._wire.date
        fields: Headers = []
        for pair in headers:
            name = pair[0].lower()
            if name == b"content-length":
                if not pair[1].isdigit() or length is not None:
                    raise MisuseError("Content-Length is no number, or given twice")
                length = int(pair[1])
                if status == 204:
                    continue  # RFC 9110 section 8.6
            elif name == b"transfer-encoding":
                continue
            elif name == b"connection":
                if b"close" in pair[1].lower():
                    self.must_close = True
                continue
            elif name == b"date":
                dated = True
            fields.append(pair)
        if not dated:
            fields.append((b"date", _http_date()))
        if status == 204 or status == 304 or request.method == "HEAD":
            self._bodiless = True
        elif length is not None:
            self._length = length
        elif request.http_version == "1.1":
            self._chunked = True
            fields.append((b"transfer-encoding", b"chunked"))
        else:
            self.must_close = True
        if not request.keep_alive or self._wire.closing or self._expects_continue:
            self.must_close = True
        if self.must_close:
            fields.append((b"connection", b"close"))
        head = b"%b%b\r\n" % (encode_status_line(status, reason), encode_fields(fields))
        self._begun = True
        return head

    def _encode_data(self, data: bytes) -> bytes:
        if not self._begun or self.ended:
            raise MisuseError("body bytes before the head, or after the end")
        if self._chunked:
            return encode_chunk(data)
        if self._bodiless:
            return b""
        if self._length is not None:
            if len(data) > self._length:
                raise MisuseError(f"{len(data) - self._length} bytes more than Content-Length announced")
            self._length -= len(data)
        return data

    def _encode_end(self, trailers: Headers | None) -> bytes:
        if not self._begun or self.ended:
            raise MisuseError("end before the head, or twice")
        for name, _ in trailers or ():
            if name.lower() in FORBIDDEN_IN_TRAILERS:
                raise MisuseError(f"{name!a} cannot be a trailer")
        if self._chunked:
            return encode_last_chunk(trailers or [])
        if self._length:
            raise MisuseError(f"{self._length} bytes fewer than Content-Length announced")
        return b""


Handler = Callable[[Exchange], Awaitable[None]]


_date_second = 0
_date_value = b""


def _http_date() -> bytes:
    """Return the value of Date, formatted once a second."""
    global _date_second, _date_value
    second = int(time.time())
    if second != _date_second:
        _date_value = formatdate(second, usegmt=True).encode("ascii")
        _date_second = second
    return _date_value
