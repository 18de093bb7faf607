"""The server's half: one connection's requests, in order, each handed to a handler as an `Exchange`.

What a connection costs is one nursery and one timekeeper for all its life, and nothing per request: the handler runs
in the connection's own task, and a small exchange is one read and one write.

Three things can be waited for at once (the handler, the client's next bytes, the clock), so:

- The timekeeper wakes a few times a second while requests run and sleeps while the connection is idle. It compares a
  serial number that every step changes, so the hot path neither sets timers nor reads the clock.
- When a handler has been busy for a tick and does not read, a lookout reads on its behalf: the end of the stream
  means that the client is gone. Bytes it meets are kept for whoever reads next. Short requests never pay for a lookout.
- Cancelling the connection's scope is how a handler learns that the client left.

An answer that is not complete never looks complete: a handler that fails after its head went out, or sends less than it
announced, ends in a reset.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import structlog
import trio

from ngpu_protocol.http1.draining import Draining
from ngpu_protocol.http1.errors import ClientGoneError, HttpError, LimitError, MisuseError, RemoteError
from ngpu_protocol.http1.exchange import DROPPED_BODY_BYTES, Exchange, Handler, Remote
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
_WRITE_BYTES = 256 * 1024
# Twice this, at most, passes before a busy handler gets its lookout; see the promise of one second in `serve_stream`.
_TICK_S = 0.3
_GATHERED_BYTES = 256 * 1024
_REFUSAL_S = 1.0
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)

# What is said of a request that no handler sees, as JSON values; `serve_tcp` lets its user say it otherwise.
Describe = Callable[[RemoteError], Mapping[str, Any]]


def describe(error: RemoteError) -> Mapping[str, Any]:
    """Return the fields of our own answers to requests that break the rules."""
    return {"reason": error.reason, "message": str(error)}


class ServerConnection:
    """One connection: reads requests, calls the handler, keeps time. See the module's docstring.

    Attributes:
        idle_since_s: When the last request ended, while none runs and that is at least a tick ago; else None.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        handler: Handler,
        *,
        limits: Limits,
        remote: Remote,
        half_close: bool = False,
        date: bool = False,
        closing: bool = False,
        describe: Describe = describe,
    ) -> None:
        self._describe = describe
        self.limits = limits
        self.remote = remote
        self.date = date
        self.closing = closing
        self.idle_since_s: float | None = None
        self._stream = stream
        self._handler = handler
        self._half_close = half_close
        self._scope = trio.CancelScope()
        self._exchange: Exchange | None = None
        self._rest = b""
        self._ending: Literal["abort", "close", "linger"] = "abort"
        # For the timekeeper: what goes on, and a number that changes with every step of it.
        self._phase: Literal["idle", "head", "handler", "switched"] = "idle"
        self._serial = 0
        self._reading = False
        self._writing = False
        self._parked: trio.Event | None = None
        # What the lookout found: bytes for the next reader, the end of the stream, whether that was no proper end.
        self._watching = False
        self._gathered = b""
        self._eof = False
        self._broken = False
        self._watched: trio.Event | None = None

    async def run(self) -> None:
        """Serve until the connection ends, and close it."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._keep_time, nursery)
                await self._serve()
                nursery.cancel_scope.cancel()
        finally:
            if self._broken:
                await abort_stream(self._stream)
            elif self._ending == "linger":
                await linger_and_close(self._stream)
            elif self._ending == "close" or self._phase == "idle":
                await close_stream(self._stream)
            else:
                await abort_stream(self._stream)

    def drain(self) -> None:
        """Close after the request that runs, or now if none does."""
        self.closing = True
        if self._phase == "idle":
            self._scope.cancel()

    # Requests

    async def _serve(self) -> None:
        """Answer requests until the connection cannot carry another; `_ending` says how to close it then."""
        while True:
            try:
                request = await self._next_request()
            except RemoteError as error:
                self._start("handler")  # a refusal that the client does not read must not be timed out by another
                await self.write(_refusal(error, self._describe))
                self._ending = "linger"
                return
            if request is None:
                self._ending = "close"
                return
            exchange = self._exchange = Exchange(self, request)
            try:
                if self._rest and not exchange.body_complete:
                    rest, self._rest = self._rest, b""
                    exchange.make_ready(rest)
                await self._handler(exchange)
                if not exchange.ended and not exchange.aborted:
                    raise MisuseError("the handler returned without completing its answer")
            except Exception as error:
                await self._answer_for(exchange, error)
            self._exchange = None
            if not exchange.ended:
                return
            if exchange.switched:
                self._ending = "close"
                return
            if exchange.must_close or self.closing or not await self._drop_body(exchange):
                self._ending = "close" if exchange.body_complete and not self._rest else "linger"
                return

    async def _next_request(self) -> Request | None:
        """Return the next request, None when the client has no more or the server is draining."""
        self._phase = "idle"
        self._serial += 1
        data = self._rest
        checked = 0
        while True:
            if data.startswith(b"\r\n") and not checked:
                data = data[2:]  # RFC 9112 section 2.2: an empty line before a request line is ignored
            end = data.find(HEAD_END, checked - 3 if checked > 3 else 0)
            if end >= 0:
                break
            if data and data != b"\r":
                check_partial_head(data, checked, self.limits)
                checked = len(data)
                if self._phase == "idle":
                    self._start("head")
            elif self.closing:
                return None
            arrived = await self._read()
            if not arrived or self._scope.cancel_called:
                return None
            data = data + arrived if data else arrived
        if end > self.limits.max_head_bytes:
            raise LimitError(
                f"request line and headers over {self.limits.max_head_bytes} bytes: send fewer or shorter ones",
                status=431,
                reason="head_too_large",
            )
        self._start("handler")
        self._rest = data[end + 4 :]
        return parse_request_head(data[:end], self.limits)

    def _start(self, phase: Literal["head", "handler"]) -> None:
        self._phase = phase
        self._serial += 1
        if self._parked is not None:
            self._parked.set()
            self._parked = None

    async def _answer_for(self, exchange: Exchange, error: Exception) -> None:
        """Answer in place of a handler that raised, if nothing of an answer is out yet."""
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # a handler with a nursery of its own
        if isinstance(error, ClientGoneError):
            return
        remote_fault = isinstance(error, RemoteError)
        if not remote_fault:
            _log.error("handler_failed", method=exchange.request.method, path=exchange.request.path, exc_info=error)
        if exchange.ended or exchange.aborted or not exchange.begin_anew():
            return
        status, reason, message = 500, "internal_error", "the server failed to answer this request"
        if isinstance(error, RemoteError):
            status, reason, message = error.status, error.reason, str(error)
        exchange.must_close = not exchange.body_complete
        try:
            await exchange.respond_json(status, {"reason": reason, "message": message})
        except HttpError:
            return

    async def _drop_body(self, exchange: Exchange) -> bool:
        """Read what the handler left of the request's body; returns whether the connection can go on."""
        if exchange.body_complete:
            return True
        left = DROPPED_BODY_BYTES if exchange.body_can_be_dropped else 0
        try:
            while left > 0 and not exchange.body_complete:
                arrived = await self.read_body()
                left -= len(arrived)
                exchange.decode(arrived)
        except RemoteError:
            return False
        return exchange.body_complete

    # Bytes

    async def read_body(self) -> bytes:
        """Return the next bytes of a body; a client that ends in the middle of one is gone."""
        self._reading = True
        self._serial += 1
        try:
            data = await self._read()
        finally:
            self._reading = False
            self._serial += 1
        if not data:
            await self._gone()
        return data

    async def write(self, data: bytes) -> None:
        """Send *data*; cancels the handler when the client is gone."""
        self._writing = True
        self._serial += 1
        try:
            if len(data) <= _WRITE_BYTES:
                await self._stream.send_all(data)
            else:
                for start in range(0, len(data), _WRITE_BYTES):  # each of them progress, for a client that is slow
                    await self._stream.send_all(memoryview(data)[start : start + _WRITE_BYTES])
                    self._serial += 1
        except _BROKEN:
            await self._gone()
        finally:
            self._writing = False
            self._serial += 1

    async def abort(self) -> None:
        """Cut the connection."""
        self._broken = True
        await abort_stream(self._stream)

    def keep_rest(self, rest: bytes) -> None:
        """Keep bytes that came after a body, for the next request."""
        self._rest = rest

    def switch(self) -> SwitchedStream:
        """Hand the connection out as raw bytes."""
        self._phase = "switched"
        rest, self._rest = self._rest, b""
        return SwitchedStream(self._stream, rest, self._read_switched)

    async def _read(self) -> bytes:
        """Return the next bytes, b"" at the end of the stream or when it broke (then `_broken`)."""
        if self._watching and not self._gathered:
            self._watched = trio.Event()
            await self._watched.wait()
        if self._gathered:
            data, self._gathered = self._gathered, b""
            return data
        if self._eof:
            return b""
        try:
            data = bytes(await self._stream.receive_some(_READ_BYTES))
        except _BROKEN:
            self._broken = True
            data = b""
        self._eof = not data
        return data

    async def _read_switched(self) -> bytes:
        data = await self._read()
        if not data and self._broken:
            raise trio.BrokenResourceError("the client's connection broke")
        return data

    async def _gone(self) -> None:
        """Cancel the handler because the client left; where a shield keeps that out, tell it by an exception."""
        self._leave()
        await trio.lowlevel.checkpoint()
        raise ClientGoneError("the client closed the connection")

    def _leave(self) -> None:
        self._broken = True
        if self._exchange is not None and not self._exchange.ended:
            self._exchange.client_gone = True
        self._scope.cancel()

    # Time

    async def _keep_time(self, nursery: trio.Nursery) -> None:
        limits = self.limits
        tick_s = min(_TICK_S, limits.head_timeout_s / 4, limits.idle_timeout_s / 4, limits.stall_timeout_s / 4)
        serial = self._serial
        since_s = trio.current_time()
        while True:
            await trio.sleep(tick_s)
            now_s = trio.current_time()
            if self._serial != serial:
                serial, since_s = self._serial, now_s
                continue
            quiet_s = now_s - since_s
            if self._phase == "idle":
                if quiet_s >= limits.idle_timeout_s:
                    self._scope.cancel()
                    return
                await self._park(since_s)
            elif self._phase == "head":
                if quiet_s >= limits.head_timeout_s:
                    await self._time_out("request head")
            elif self._phase == "handler":
                if (self._reading or self._writing) and quiet_s >= limits.stall_timeout_s:
                    await self._stalled()
                elif not self._reading and not self._watching:
                    self._look_out(nursery)

    async def _park(self, since_s: float) -> None:
        """Sleep through an idle time: until a request starts or the time is up."""
        parked = self._parked = trio.Event()
        self.idle_since_s = since_s
        with trio.move_on_at(since_s + self.limits.idle_timeout_s):
            await parked.wait()
        self._parked = None
        self.idle_since_s = None

    async def _time_out(self, what: str) -> None:
        """Answer 408 and end the connection. The serving task waits for bytes and writes nothing meanwhile."""
        error = LimitError(f"timed out waiting for the {what}", status=408, reason="request_timeout")
        self._ending = "linger"
        with trio.move_on_after(_REFUSAL_S, shield=True):
            try:
                await self._stream.send_all(_refusal(error, self._describe))
            except _BROKEN:
                self._broken = True
        self._scope.cancel()

    async def _stalled(self) -> None:
        exchange = self._exchange
        if self._reading and not self._writing and exchange is not None and exchange.begin_anew():
            exchange.client_gone = True
            await self._time_out("request body")
        else:
            self._leave()

    def _look_out(self, nursery: trio.Nursery) -> None:
        """Start a lookout, unless there is nothing left to see."""
        exchange = self._exchange
        if exchange is not None and not exchange.ended and not self._eof and len(self._gathered) < _GATHERED_BYTES:
            self._watching = True
            nursery.start_soon(self._watch, exchange)

    async def _watch(self, exchange: Exchange) -> None:
        """Read once while the handler is busy."""
        try:
            data = bytes(await self._stream.receive_some(_READ_BYTES))
            self._gathered += data
            self._eof = not data
        except _BROKEN:
            self._eof = self._broken = True
        finally:
            self._watching = False
            if self._watched is not None:
                self._watched.set()
                self._watched = None
        allowed = self._half_close and exchange.body_complete and not self._broken
        if self._eof and not allowed and exchange is self._exchange and not exchange.ended:
            self._leave()


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
    """Serve HTTP/1.1 on *stream* until the connection ends, and close it.

    Never raises for what the client or the handler does. Cancelling it cuts the connection if a request is running.

    Args:
        stream: Any byte stream; owned from here on.
        handler: Called for each request in turn. It is cancelled when the client leaves before the answer is complete
            (within a second, or at its next `send`). What it raises becomes a 500, or a cut connection once an answer
            was begun; a `RemoteError` becomes that error's own status.
        limits: What the connection may cost.
        remote: Who is at the other end, for the handler.
        half_close: The end of the client's bytes says only that no more requests come. Right for libp2p streams, which
            close each direction by itself; on TCP it means that the client is gone.
        date: Add a Date field to answers that have none.
        draining: Ends the connection in good order when it starts.
    """
    connection = ServerConnection(
        stream,
        handler,
        limits=limits or Limits(),
        remote=remote or Remote(),
        half_close=half_close,
        date=date,
        closing=draining is not None and draining.active,
    )
    if draining is None:
        await connection.run()
    else:
        with draining.connection(connection.drain):
            await connection.run()


def _refusal(error: RemoteError, describe: Describe) -> bytes:
    """Return the whole answer to a request that cannot be handed to a handler."""
    body = json.dumps(describe(error)).encode()
    fields = encode_fields(
        [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
    )
    return b"%b%b\r\n%b" % (encode_status_line(error.status), fields, body)
