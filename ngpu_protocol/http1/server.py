"""The server's half: one connection's requests in order, each handed to a handler as an `Exchange`.

What a connection costs: one nursery and one timekeeper for all its life, nothing per request. The handler runs in the
connection's own task, and a small exchange is one read and one write.

Three things can wait at once (the handler, the client's next bytes, the clock), so:

- The timekeeper wakes a few times a second while requests run and sleeps while the connection is idle. It compares a serial
  number that every step increments, so the hot path neither sets timers nor reads the clock.
- When a handler has been busy for a whole tick and nobody reads, the timekeeper has a lookout read on the handler's behalf: end
  of stream or reset means that the client is gone, and cancels the connection. Bytes are kept for whoever reads next. Short
  requests never pay for a lookout.
- Cancelling the connection's scope is the one way in which a handler learns that the client left.

The answer is never made to look complete when it is not: a handler that fails after its head, or sends less than it announced,
ends in a reset.
"""

import json
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import structlog
import trio

from ngpu_protocol.http1.bodies import ChunkedDecoder, Decoder, LengthDecoder, encode_chunk, encode_last_chunk
from ngpu_protocol.http1.draining import Draining
from ngpu_protocol.http1.errors import ClientGoneError, LimitError, MalformedError, MisuseError, RemoteError
from ngpu_protocol.http1.headers import FORBIDDEN_IN_TRAILERS, Headers, wants_upgrade
from ngpu_protocol.http1.heads import (
    HEAD_END,
    Request,
    check_partial_head,
    encode_fields,
    encode_status_line,
    parse_request_head,
)
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.streams import SwitchedStream, abort_stream, close_stream, linger_and_close

_log = structlog.get_logger("ngpu.http1")

_READ_BYTES = 65536
_TICK_S = 0.3
_LOOKOUT_BYTES = 256 * 1024  # what a lookout may gather for a handler that does not read
_DRAIN_BYTES = 256 * 1024  # an unread request body up to this is read and dropped to keep the connection
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Remote:
    """Who is at the other end: an IP address and port, or the account address of an authenticated peer."""

    host: str = ""
    port: int = 0
    peer: str = ""


Handler = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request and its answer.

    The handler owns it until it returns. Only one task may use the receiving side at a time, and one the sending side; the two
    may be different tasks.

    Attributes:
        request: The head of the request.
        remote: Who sent it.
        trailers: The request's trailer fields, complete once `receive` returned b"".
        max_body_bytes: The bound `receive` holds the body to; a handler may set another before its first `receive`.
        received_bytes: Content bytes `receive` has returned.
        client_gone: The client left before the answer was complete: why the handler was cancelled.
    """

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_close",
        "_connection",
        "_decoder",
        "_expects_continue",
        "_held",
        "_length",
        "_ready",
        "_sent_head",
        "client_gone",
        "ended",
        "max_body_bytes",
        "received_bytes",
        "remote",
        "request",
        "trailers",
    )

    def __init__(self, connection: "_Connection", request: Request) -> None:
        self._connection = connection
        self.request = request
        self.remote = connection.remote
        self.trailers: Headers = []
        self.max_body_bytes = connection.limits.max_body_bytes
        self.received_bytes = 0
        self.client_gone = False
        self.ended = False
        self._sent_head = False
        self._held = b""
        self._chunked = False
        self._bodiless = False
        self._length: int | None = None
        self._close = False
        self._ready = b""
        self._expects_continue = request.expects_continue
        self._decoder: Decoder | None = None
        if request.chunked:
            self._decoder = ChunkedDecoder(connection.limits)
        elif request.content_length:
            self._decoder = LengthDecoder(request.content_length)

    # The request's body

    @property
    def body_complete(self) -> bool:
        """Whether the whole request body has arrived (it may still wait to be received)."""
        return self._decoder is None or self._decoder.done

    @property
    def body_ready(self) -> bool:
        """Whether `receive` has bytes to return without waiting."""
        return bool(self._ready)

    async def receive(self) -> bytes:
        """Return the next bytes of the request's body, b"" once it is complete.

        Sends 100 Continue first where the client waits for it.

        Raises:
            LimitError: The body is, or says it will be, over `max_body_bytes`. Unhandled, it becomes a 413.
            MalformedError: The body's framing is broken. Unhandled, it becomes a 400.
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
                arrived = await self._connection.read_body()
                data = self._decode(arrived)
                if decoder.done:
                    break
        self.received_bytes += len(data)
        if limit is not None and self.received_bytes > limit:
            raise LimitError(f"body over {limit} bytes")
        return data

    async def accept_body(self) -> None:
        """Send 100 Continue now, if the client waits for it; `receive` does so by itself.

        Raises:
            MisuseError: The answer was begun already, which told the client to keep its body.
        """
        if self._expects_continue:
            if self._sent_head:
                raise MisuseError("the body was refused by answering before it was received")
            self._expects_continue = False
            await self._connection.write(_CONTINUE)

    async def receive_all(self, max_bytes: int) -> bytes:
        """Return the whole request body.

        Raises:
            LimitError: It is over *max_bytes*.
        """
        if self.max_body_bytes is None or max_bytes < self.max_body_bytes:
            self.max_body_bytes = max_bytes
        data = await self.receive()
        if self.body_complete and not self._ready:
            return data
        pieces = [data]
        while data:
            data = await self.receive()
            pieces.append(data)
        return b"".join(pieces)

    def _decode(self, arrived: bytes) -> bytes:
        decoder = self._decoder
        assert decoder is not None
        content = decoder.feed(arrived)
        if decoder.done:
            self._connection.rest = decoder.rest
            self.trailers = decoder.trailers
        return content

    # The answer

    @property
    def head_sent(self) -> bool:
        """Whether an answer was begun: from here on failure can only cut it."""
        return self._sent_head

    async def send_head(self, status: int, headers: Headers, *, reason: bytes = b"", more: bool = False) -> None:
        """Begin the answer.

        The framing follows from *headers*: their Content-Length, else chunked (for an HTTP/1.0 client: until close). A
        Connection or Transfer-Encoding field in them is replaced by our own.

        Args:
            status: 200 to 599; for others see `send_informational` and `upgrade`.
            headers: Fields in order; names in any case.
            reason: The phrase; empty for the registered one.
            more: The caller has the next bytes at hand: hold the head back and send it with them, in one write.
        """
        self._held += self._encode_head(status, headers, reason)
        if not more:
            await self._flush()

    async def send(self, data: bytes, *, more: bool = False) -> None:
        """Send the next bytes of the answer's body at once, or with the next call if *more*.

        Waits while the client does not read (backpressure).
        """
        self._held += self._encode_data(data)
        if self._held and not more:
            await self._flush()

    async def end(self, trailers: Headers | None = None) -> None:
        """Complete the answer.

        Args:
            trailers: Sent where the answer is chunked, else silently dropped (HTTP/1.0, HEAD, Content-Length).

        Raises:
            MisuseError: Fewer bytes were sent than Content-Length announced; the connection is cut.
        """
        last = self._encode_end(trailers)
        if last:
            self._held += last
        self.ended = True
        if self._held:
            await self._flush()

    async def respond(
        self, status: int, headers: Headers, body: bytes = b"", *, reason: bytes = b"", trailers: Headers | None = None
    ) -> None:
        """Send a whole answer in one write. Adds Content-Length where *headers* have none, or chunks for *trailers*."""
        if trailers is None and not any(name.lower() == b"content-length" for name, _ in headers):
            headers = [*headers, (b"content-length", b"%d" % len(body))]
        head = self._encode_head(status, headers, reason)
        self._held += b"".join((head, self._encode_data(body), self._encode_end(trailers)))
        self.ended = True
        await self._flush()

    async def respond_json(self, status: int, value: Any, headers: Headers | None = None) -> None:
        """Send *value* as a whole JSON answer."""
        body = json.dumps(value, separators=(",", ":")).encode()
        await self.respond(status, [(b"content-type", b"application/json"), *(headers or [])], body)

    async def send_informational(self, status: int, headers: Headers | None = None) -> None:
        """Send an interim answer such as 103 Early Hints; left out for HTTP/1.0 clients."""
        if not 102 <= status <= 199 or self._sent_head:
            raise MisuseError(f"{status} cannot be sent as an interim answer now")
        if self.request.http_version == "1.1":
            await self._connection.write(encode_status_line(status) + encode_fields(headers or []) + b"\r\n")

    async def upgrade(self, headers: Headers | None = None) -> SwitchedStream:
        """Send 101 Switching Protocols and return the raw connection, which ends when the handler returns.

        Args:
            headers: Further fields of the answer, Upgrade among them where it is not the request's own.

        Raises:
            MisuseError: The client did not ask to switch, or a body is still to come.
        """
        if self._sent_head or not wants_upgrade(self.request.headers) or not self.body_complete:
            raise MisuseError("this request cannot switch protocols")
        fields = [(name, value) for name, value in headers or [] if name.lower() != b"connection"]
        if not any(name.lower() == b"upgrade" for name, _ in fields):
            fields.append((b"upgrade", next(v for n, v in self.request.headers if n == b"upgrade")))
        fields.append((b"connection", b"upgrade"))
        head = encode_status_line(101) + encode_fields(fields) + b"\r\n"
        self._sent_head = self.ended = self._close = True
        await self._connection.write(head)
        return self._connection.switch()

    async def abort(self) -> None:
        """Cut the connection: whatever was sent never looks complete. Returns; the handler should too."""
        self._close = True
        await self._connection.abort()

    async def _flush(self) -> None:
        data, self._held = self._held, b""
        await self._connection.write(data)

    def _encode_head(self, status: int, headers: Headers, reason: bytes) -> bytes:
        if self._sent_head:
            raise MisuseError("the answer has a head already")
        if not 200 <= status <= 999:
            raise MisuseError(f"{status} is no final status")
        request = self.request
        bodiless = status == 204 or status == 304 or request.method == "HEAD"
        length: int | None = None
        fields: Headers = []
        dated = not self._connection.date
        for pair in headers:
            name = pair[0].lower()
            if name == b"content-length":
                if not pair[1].isdigit() or length is not None:
                    raise MisuseError("Content-Length is no number, or given twice")
                length = int(pair[1])
                if status == 204:
                    continue
            elif name == b"transfer-encoding":
                continue
            elif name == b"connection":
                if b"close" in pair[1].lower():
                    self._close = True
                continue
            elif name == b"date":
                dated = True
            fields.append(pair)
        if not dated:
            fields.append((b"date", _http_date()))
        if bodiless:
            self._bodiless = True
        elif length is None:
            if request.http_version == "1.1":
                self._chunked = True
                fields.append((b"transfer-encoding", b"chunked"))
            else:
                self._close = True
        else:
            self._length = length
        if not request.keep_alive or self._connection.closing or not self._body_can_be_dropped():
            self._close = True
        if self._close:
            fields.append((b"connection", b"close"))
        head = b"%b%b\r\n" % (encode_status_line(status, reason), encode_fields(fields))
        self._sent_head = True
        return head

    def _encode_data(self, data: bytes) -> bytes:
        if not self._sent_head or self.ended:
            raise MisuseError("body bytes before the head, or after the end")
        if self._bodiless:
            return b""
        if self._chunked:
            return encode_chunk(data)
        if self._length is not None:
            if len(data) > self._length:
                raise MisuseError(f"{len(data) - self._length} bytes more than Content-Length announced")
            self._length -= len(data)
        return data

    def _encode_end(self, trailers: Headers | None) -> bytes:
        if not self._sent_head or self.ended:
            raise MisuseError("end before the head, or twice")
        if self._chunked:
            if not trailers:
                return b"0\r\n\r\n"
            for name, _ in trailers:
                if name.lower() in FORBIDDEN_IN_TRAILERS:
                    raise MisuseError(f"{name!r} cannot be a trailer")
            return encode_last_chunk(trailers)
        if self._length:
            raise MisuseError(f"{self._length} bytes fewer than Content-Length announced")
        return b""

    def _body_can_be_dropped(self) -> bool:
        """Whether what is left of the request's body is little enough to read and drop for keeping the connection."""
        decoder = self._decoder
        if decoder is None or decoder.done:
            return True
        if self._expects_continue:
            return False  # whether the client sends the body after all, nobody can tell
        return not isinstance(decoder, LengthDecoder) or decoder.remaining <= _DRAIN_BYTES


class _Connection:
    """One connection: reads requests, calls the handler, keeps time. See the module's docstring."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        handler: Handler,
        limits: Limits,
        remote: Remote,
        *,
        half_close: bool,
        date: bool,
        draining: Draining | None,
    ) -> None:
        self.stream = stream
        self.handler = handler
        self.limits = limits
        self.remote = remote
        self.half_close = half_close
        self.date = date
        self.draining = draining
        self.closing = draining is not None and draining.active
        self.rest = b""
        self.scope = trio.CancelScope()
        self.exchange: Exchange | None = None
        # What the connection waits for, for the timekeeper; `serial` changes with every step.
        self.phase = "idle"
        self.serial = 0
        self.ended_how = "abort"
        self._parked: trio.Event | None = None
        # The lookout's side: bytes gathered for the next reader, and whether the end has come.
        self._watching = False
        self._gathered = b""
        self._eof = False
        self._broken = False
        self._handover: trio.Event | None = None
        self._switched = False

    # Serving

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self.scope = nursery.cancel_scope
                nursery.start_soon(self._keep_time, nursery)
                await self._serve()
                nursery.cancel_scope.cancel()
        finally:
            self.phase = "closed"
            if self.ended_how == "close":
                await close_stream(self.stream)
            elif self.ended_how == "linger":
                await linger_and_close(self.stream)
            else:
                await abort_stream(self.stream)

    async def _serve(self) -> None:
        while True:
            try:
                request = await self._next_request()
            except RemoteError as error:
                self.phase = "write"
                await self.write(_refusal(error))
                self.ended_how = "linger"
                return
            if request is None:
                return
            exchange = self.exchange = Exchange(self, request)
            try:
                if exchange._decoder is not None and self.rest:
                    rest, self.rest = self.rest, b""
                    exchange._ready = exchange._decode(rest)
                await self.handler(exchange)
                if not exchange.ended:
                    raise MisuseError("the handler returned without completing its answer")
            except Exception as error:
                if not await self._handler_failed(exchange, error):
                    return
            self.exchange = None
            if exchange._close or self.closing or not await self._drop_body(exchange):
                if self.ended_how == "abort" and not self._aborted(exchange):
                    self.ended_how = "close" if exchange.body_complete else "linger"
                return

    def _aborted(self, exchange: Exchange) -> bool:
        return self._broken or not exchange.ended

    async def _handler_failed(self, exchange: Exchange, error: Exception) -> bool:
        """Answer for a handler that raised, as far as that is possible; returns whether the connection can go on."""
        if not isinstance(error, RemoteError):
            _log.error("handler_failed", method=exchange.request.method, path=exchange.request.path, exc_info=error)
        if exchange._sent_head or self._broken:
            return exchange.ended and not self._broken and not exchange._held
        known = isinstance(error, RemoteError) and not isinstance(error, ClientGoneError)
        status, reason = (error.status, error.reason) if known else (500, "internal_error")  # type: ignore[attr-defined]
        if isinstance(error, MalformedError):
            exchange._close = True
        message = str(error) if known else "the server failed to answer this request"
        await exchange.respond_json(status, {"reason": reason, "message": message})
        return True

    async def _next_request(self) -> Request | None:
        data = self.rest
        checked = 0
        self.phase = "idle" if not data else "head"
        self.serial += 1
        while True:
            if data:
                end = data.find(HEAD_END, checked - 3 if checked > 3 else 0)
                if end >= 0:
                    break
                if data == b"\r\n" or data == b"\r":
                    pass  # RFC 9112 section 2.2: an empty line before the request line is ignored
                else:
                    check_partial_head(data, checked, self.limits)
                    checked = len(data)
                if self.phase == "idle":
                    self.phase = "head"
                    self.serial += 1
                    self._wake()
            elif self.closing:
                self.ended_how = "close"
                return None
            arrived = await self._read()
            if not arrived:
                if not data and not self._broken:
                    self.ended_how = "close"
                return None
            data = data + arrived if data else arrived
            if data.startswith(b"\r\n") and checked == 0:
                data = data[2:]
        if end > self.limits.max_head_bytes:
            raise LimitError(f"head over {self.limits.max_head_bytes} bytes", status=431, reason="head_too_large")
        self.rest = data[end + 4 :]
        self.phase = "handler"
        self.serial += 1
        if self._parked is not None:
            self._wake()
        return parse_request_head(data[:end], self.limits)

    async def _drop_body(self, exchange: Exchange) -> bool:
        """Read what the handler left of the request's body; returns whether the connection can be used again."""
        decoder = exchange._decoder
        if decoder is None or decoder.done:
            return True
        if not exchange._body_can_be_dropped():
            return False
        left = _DRAIN_BYTES
        try:
            while not decoder.done and left > 0:
                arrived = await self.read_body()
                left -= len(arrived)
                exchange._decode(arrived)
        except RemoteError:
            return False
        return decoder.done

    # Bytes

    async def _read(self) -> bytes:
        """Return the next bytes, b"" at the end or when the connection broke (then `_broken` says so)."""
        if self._watching:
            self._handover = trio.Event()
            await self._handover.wait()
        if self._gathered:
            data, self._gathered = self._gathered, b""
            return data
        if self._eof:
            return b""
        try:
            data = bytes(await self.stream.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._broken = True
            data = b""
        if not data:
            self._eof = True
        return data

    async def read_body(self) -> bytes:
        self.phase = "body"
        self.serial += 1
        data = await self._read()
        self.phase = "handler"
        self.serial += 1
        if not data:
            await self._gone()
        return data

    async def write(self, data: bytes) -> None:
        phase, self.phase = self.phase, "write"
        self.serial += 1
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._broken = True
            await self._gone()
        self.phase = phase
        self.serial += 1

    async def _gone(self) -> None:
        """The client left: cancel the handler, or tell it by an exception where a shield keeps the cancellation out."""
        self._broken = True
        if self.exchange is not None and not self.exchange.ended:
            self.exchange.client_gone = True
        self.scope.cancel()
        await trio.lowlevel.checkpoint()
        raise ClientGoneError("the client closed the connection")

    async def abort(self) -> None:
        self._broken = True
        await abort_stream(self.stream)

    def switch(self) -> SwitchedStream:
        self.ended_how = "close"
        self.phase = "switched"
        rest, self.rest = self.rest, b""
        return SwitchedStream(self.stream, rest, self._read_switched)

    async def _read_switched(self) -> bytes:
        data = await self._read()
        if not data and self._broken:
            raise trio.BrokenResourceError("the connection broke")
        return data

    def drain(self) -> None:
        """Close after the request that runs, or now if none does (called by `Draining`)."""
        self.closing = True
        if self.phase == "idle":
            self.ended_how = "close"
            self.scope.cancel()

    # Time

    def _wake(self) -> None:
        if self._parked is not None:
            self._parked.set()
            self._parked = None

    async def _keep_time(self, nursery: trio.Nursery) -> None:
        limits = self.limits
        tick_s = min(_TICK_S, limits.head_timeout_s / 4, limits.idle_timeout_s / 4, limits.stall_timeout_s / 4)
        serial = -1
        since_s = trio.current_time()
        while True:
            quiet_s = trio.current_time() - since_s
            if self.serial != serial:
                serial = self.serial
                since_s = trio.current_time()
            elif self.phase == "handler":
                self._look_out(nursery)
            elif self.phase == "idle":
                if quiet_s >= limits.idle_timeout_s:
                    self.ended_how = "close"
                    self.scope.cancel()
                    return
                # Nothing happens until bytes come or the time is up: sleep that long, whoever starts a request wakes us.
                parked = self._parked = trio.Event()
                with trio.move_on_at(since_s + limits.idle_timeout_s):
                    await parked.wait()
                self._parked = None
                continue
            elif self.phase == "head":
                if quiet_s >= limits.head_timeout_s:
                    await self._time_out("request head")
            elif self.phase in ("body", "write") and quiet_s >= limits.stall_timeout_s:
                if self.phase == "body" and self.exchange is not None and not self.exchange._sent_head:
                    await self._time_out("request body")
                self.scope.cancel()
            await trio.sleep(tick_s)

    async def _time_out(self, what: str) -> None:
        """Answer 408 and end the connection; the serving task waits for bytes and writes nothing meanwhile."""
        error = LimitError(f"timed out waiting for the {what}", status=408, reason="request_timeout")
        self.ended_how = "linger"
        with trio.move_on_after(1.0, shield=True):
            try:
                await self.stream.send_all(_refusal(error))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.ended_how = "abort"
        self.scope.cancel()

    def _look_out(self, nursery: trio.Nursery) -> None:
        exchange = self.exchange
        if self._watching or self._eof or exchange is None or exchange.ended:
            return
        if len(self._gathered) < _LOOKOUT_BYTES:
            self._watching = True
            nursery.start_soon(self._watch)

    async def _watch(self) -> None:
        """Read once while the handler is busy; see the module's docstring."""
        try:
            data = await self.stream.receive_some(_READ_BYTES)
            self._gathered += data
            self._eof = not data
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._eof = self._broken = True
        finally:
            self._watching = False
            if self._handover is not None:
                self._handover.set()
                self._handover = None
        exchange = self.exchange
        if self._eof and exchange is not None and not exchange.ended and self.phase != "switched":
            if self._broken or not self.half_close or not exchange.body_complete:
                exchange.client_gone = True
                self._broken = True
                self.scope.cancel()


async def serve_stream(
    stream: trio.abc.Stream,
    handler: Handler,
    *,
    limits: Limits | None = None,
    remote: Remote | None = None,
    half_close: bool = False,
    date: bool = False,
    draining: Draining | None = None,
) -> None:
    """Serve HTTP/1.1 on *stream* until the connection ends; closes the stream.

    Never raises for what the client or the handler does. Cancelling it cuts the connection, unless no request was running.

    Args:
        stream: Any byte stream; owned from here on.
        handler: Called for each request in turn. It is cancelled when the client leaves before the answer is complete
            (within a second, or at its next `send`). What it raises becomes a 500, or a cut connection once a head was sent.
        limits: What the connection may cost.
        remote: Who is at the other end, for the handler.
        half_close: The end of the client's bytes says only that no more requests come. Right for libp2p streams, which close
            each direction by itself; on TCP it means that the client is gone.
        date: Add a Date field to answers that have none.
        draining: Ends the connection in good order when it starts.
    """
    connection = _Connection(
        stream,
        handler,
        limits or Limits(),
        remote or Remote(),
        half_close=half_close,
        date=date,
        draining=draining,
    )
    if draining is None:
        await connection.run()
        return
    with draining.connection(connection.drain):
        await connection.run()


def _refusal(error: RemoteError) -> bytes:
    """Return the whole answer to a request that could not be handed to a handler."""
    body = json.dumps({"reason": error.reason, "message": str(error)}).encode()
    fields: Iterable[tuple[bytes, bytes]] = (
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    )
    return b"%b%b\r\n%b" % (encode_status_line(error.status), encode_fields(list(fields)), body)


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
