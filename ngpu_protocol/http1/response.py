"""An answer as the caller of a request sees it."""

from collections.abc import AsyncIterator
from typing import Protocol

from ngpu_protocol.http1.bodies import Decoder
from ngpu_protocol.http1.errors import LimitError, RemoteError, blame_server
from ngpu_protocol.http1.headers import Headers
from ngpu_protocol.http1.heads import ResponseHead
from ngpu_protocol.http1.streams import SwitchedStream


class Source(Protocol):
    """What an answer needs of the call it belongs to."""

    request_complete: bool

    async def read_body(self, decoder: Decoder) -> bytes:
        """Return the next bytes, b"" if the body ends with its connection and that ended in order."""

    def keep_rest(self, rest: bytes) -> None:
        """Keep bytes beyond the answer."""


class Response:
    """An answer whose head has come.

    Attributes:
        status: 200 or above; or 101, with `upgraded`.
        reason: The phrase of the status line.
        headers: Fields in order, names in lower case.
        http_version: "1.1" or "1.0".
        trailers: The trailer fields, complete once `ended`.
        upgraded: The raw connection after 101, valid inside the request's context.
        ended: The whole body has arrived (the last of it may still wait to be received).
        received_bytes: Content bytes returned so far.
    """

    __slots__ = (
        "_decoder",
        "_ready",
        "_source",
        "ended",
        "headers",
        "http_version",
        "reason",
        "received_bytes",
        "status",
        "trailers",
        "upgraded",
    )

    def __init__(self, source: Source, head: ResponseHead, decoder: Decoder | None) -> None:
        self._source = source
        self._decoder = decoder
        self._ready = b""
        self.status = head.status
        self.reason = head.reason
        self.headers = head.headers
        self.http_version = head.http_version
        self.trailers: Headers = []
        self.upgraded: SwitchedStream | None = None
        self.ended = decoder is None or decoder.done
        self.received_bytes = 0

    @property
    def buffered(self) -> bool:
        """Whether `receive` would return without waiting: then a proxy holds its own head back for these bytes."""
        return bool(self._ready) or self.ended

    @property
    def body_sent(self) -> bool:
        """Whether the whole request went out; False while it still does, and when the answer refused its body."""
        return self._source.request_complete

    async def receive(self) -> bytes:
        """Return the next bytes of the body, b"" once it is complete. Cancelling a wait loses nothing.

        Raises:
            IncompleteError: The connection ended before the body did.
            MalformedError: The body's framing is broken.
        """
        data = self._ready
        if data:
            self._ready = b""
        else:
            decoder = self._decoder
            if decoder is None:
                return b""
            while not data and not decoder.done:
                data = self.take(await self._source.read_body(decoder))
        self.received_bytes += len(data)
        return data

    def body(self) -> AsyncIterator[bytes]:
        """Return the body as an asynchronous iterator of its pieces."""
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

    def take(self, arrived: bytes) -> bytes:
        """Return the content in *arrived* (b"" when the connection ended in order)."""
        decoder = self._decoder
        assert decoder is not None
        try:
            content = decoder.feed(arrived) if arrived else b""
        except RemoteError as error:
            blame_server(error)
            raise
        if decoder.done:
            self.ended = True
            self.trailers = decoder.trailers
            self._source.keep_rest(decoder.rest)
        return content

    def make_ready(self, arrived: bytes) -> None:
        """Keep the content in *arrived*, which came with the head, for `receive`."""
        self._ready = self.take(arrived)
