"""A request to the workspace and its answer back, both as streams, unchanged but for the hop between (design: step 6).

What changes on the way: hop-by-hop fields and every `Ngpu-*` field are taken out, in both directions, so that a
workspace can neither read the order nor forge a refusal or a receipt. The answer goes out chunked whatever its
framing was, because only a chunked message can carry the receipt behind it; the length it announced rides in
`Ngpu-Content-Length`. An answer without a body (to HEAD, 204, 304) carries the receipt as a field of its head, which
therefore waits for the receipt.

The hot path is a small request with a small answer: one write to a kept connection, one read, and nothing sent until
the receipt is durable, so that head, body and trailer leave in one write. Anything longer flows piece by piece; a
sink that does not take more holds back the workspace, and the other way round.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import trio

from ngpu_node.errors import NodeError
from ngpu_node.execution.attempt import Attempt
from ngpu_node.ledger import Written
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.http1 import (
    Exchange,
    Headers,
    IncompleteError,
    LimitError,
    MalformedError,
    MaybeSentError,
    NotSentError,
    Response,
    end_to_end,
    header,
    trailers_end_to_end,
)
from ngpu_protocol.receipts import RECEIPT_HEADER, Outcome
from ngpu_protocol.wire_errors import CONTENT_LENGTH_HEADER, ERROR_HEADER, refusal_body

#: A request body up to this size is gathered and sent with its head.
WHOLE_REQUEST_BYTES = 64 * 1024
#: An answer up to this size may wait `GATHER_S` for its last byte, to leave in one write with its receipt.
WHOLE_ANSWER_BYTES = 32 * 1024
GATHER_S = 0.003

_RECEIPT = RECEIPT_HEADER.encode()
_TRAILER_FIELD = (b"trailer", _RECEIPT)
_ERROR = ERROR_HEADER.encode()
_LENGTH = CONTENT_LENGTH_HEADER.encode()
_OURS = b"ngpu-"
_JSON = (b"content-type", b"application/json")
_SAFE_TWICE = frozenset({"GET", "HEAD", "OPTIONS"})

#: What the node answers in the workspace's place; 200 to 299 never appear here.
STATUS_OF: dict[Outcome, int] = {
    Outcome.WORKSPACE_BROKE: 502,
    Outcome.DEADLINE: 504,
    Outcome.LIMIT: 413,
    Outcome.CANCELLED: 503,
    Outcome.NODE_STOPPING: 503,
    Outcome.CLIENT_GONE: 503,
}


class Ended(NodeError):
    """The attempt came to an end that is not a complete answer; *outcome* says which."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The head of an answer as it goes out, but for what carries the receipt.

    Attributes:
        bodiless: no body may follow: the receipt must be in the head.
    """

    status: int
    reason: bytes
    fields: Headers
    bodiless: bool


class Sink(Protocol):
    """Where an answer goes: to the bootstrap's stream, or to the spool."""

    async def begin(self, head: AnswerHead, *, more: bool) -> None:
        """Take the head; with *more* the caller is about to send."""

    async def send(self, data: bytes, *, more: bool = False) -> None:
        """Take the next bytes; waits while they cannot be taken."""


class Source(Protocol):
    """Where a request's body comes from: iterating gives it piece by piece, each piece once.

    Attributes:
        whole: the body, where it is short and here already; it is then not iterated over.
        trailers: what follows the body, once that is complete.
    """

    whole: bytes | None

    @property
    def trailers(self) -> Headers: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class ExchangeSink:
    """An answer on its way to whoever asked, over HTTP; `begun` once it has a head, sent or waiting for the receipt."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._waiting: AnswerHead | None = None
        self.begun = False

    async def begin(self, head: AnswerHead, *, more: bool) -> None:
        self.begun = True
        if head.bodiless:
            self._waiting = head
            return
        fields = [*head.fields, _TRAILER_FIELD]
        await self._exchange.send_head(head.status, fields, reason=head.reason, more=more)

    async def send(self, data: bytes, *, more: bool = False) -> None:
        if self._waiting is None:
            await self._exchange.send(data, more=more)

    async def finish(self, written: Written, trailers: Headers) -> None:
        """Send the receipt behind the answer, or with the head that waited for it."""
        receipt = (_RECEIPT, written.signed.encode().encode())
        if self._waiting is not None:
            head = self._waiting
            await self._exchange.send_head(head.status, [*head.fields, receipt], reason=head.reason, more=True)
            await self._exchange.end()
        else:
            await self._exchange.end([*trailers, receipt])


class ExchangeSource:
    """A request's body as it arrives over HTTP, counted into the attempt."""

    def __init__(self, exchange: Exchange, attempt: Attempt) -> None:
        self._exchange = exchange
        self._attempt = attempt
        self.whole: bytes | None = None

    async def prepare(self) -> None:
        """Gather a body that is short, so that it can leave in one write.

        Raises:
            Ended: it is larger than the node takes, or its framing broke.
        """
        length = self._exchange.request.content_length
        if length is None and not self._exchange.request.chunked:
            self.whole = b""
        elif (length is not None and length <= WHOLE_REQUEST_BYTES) or self._exchange.body_complete:
            pieces = [piece async for piece in self]
            self.whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def trailers(self) -> Headers:
        return own_trailers(self._exchange.trailers) if self._exchange.trailers else []

    def __aiter__(self) -> ExchangeSource:
        return self

    async def __anext__(self) -> bytes:
        try:
            data = await self._exchange.receive()
        except LimitError as error:
            raise Ended(Outcome.LIMIT, str(error)) from error
        except MalformedError as error:
            raise Ended(Outcome.CLIENT_GONE, f"the request's framing broke: {error}") from error
        if not data:
            raise StopAsyncIteration
        self._attempt.request.add(data)
        return data

    async def drain(self) -> None:
        """Receive what the workspace did not wait for: both sides must have counted the same request."""
        if self.whole is None:
            async for _ in self:
                pass


async def relay(
    attempt: Attempt,
    fields: Headers,
    source: Source,
    sink: Sink,
    *,
    switch: Callable[[Response], Awaitable[None]] | None = None,
) -> Headers:
    """Send the request to the attempt's upstream and its answer to *sink*; return the answer's trailers.

    The answer's last piece is handed over with `more` where it is known to be the last: who calls this completes the
    answer with the receipt.

    Args:
        switch: takes over when the workspace switches protocols; None where that was not asked for.

    Raises:
        Ended: the workspace was not reached, or broke off; or a limit was met.
    """
    method, target = attempt.signed.order.method, attempt.target
    body = source.whole if source.whole is not None else source
    trailers = source.trailers if source.whole is not None else None  # a streamed body brings its own at its end
    for last_try in (False, True):
        try:
            async with attempt.upstream.client.request(method, target, fields, body, trailers=trailers) as response:
                if response.status != 101:
                    return await _answer(attempt, method, response, sink)
                if switch is None:
                    raise Ended(Outcome.WORKSPACE_BROKE, "the workspace switched protocols without being asked to")
                attempt.status = 101
                await switch(response)
                return []
        except (NotSentError, MaybeSentError) as error:
            # A kept connection that the server was just closing. What was never sent can be sent again; so can what
            # means the same when done twice.
            again = isinstance(error, NotSentError) or method in _SAFE_TWICE
            if last_try or source.whole is None or not again:
                raise Ended(Outcome.WORKSPACE_BROKE, f"the workspace did not answer: {error}") from error
        except (IncompleteError, MalformedError, LimitError) as error:
            raise Ended(Outcome.WORKSPACE_BROKE, f"the workspace's answer is broken: {error}") from error
    raise AssertionError("unreachable")


async def _answer(attempt: Attempt, method: str, response: Response, sink: Sink) -> Headers:
    bodiless = method == "HEAD" or response.status in (204, 304)
    head = AnswerHead(response.status, response.reason, answer_fields(response.headers), bodiless)
    if response.ended or bodiless:
        data = await response.receive()
        attempt.status = response.status
        attempt.response.add(data)
        await sink.begin(head, more=True)
        if data:
            await sink.send(data, more=True)
        return [] if bodiless else own_trailers(response.trailers)
    gathered = await _gather(response)
    # From here on the answer counts as given: what breaks later breaks it in its middle.
    attempt.status = response.status
    attempt.response.add(gathered)
    await sink.begin(head, more=bool(gathered) or response.ended)
    if gathered or response.ended:
        await sink.send(gathered, more=response.ended)
    if not response.ended:
        while data := await response.receive():
            attempt.response.add(data)
            await sink.send(data, more=response.ended)
    return own_trailers(response.trailers)


async def _gather(response: Response) -> bytes:
    """Return what has arrived of the body, waiting a moment for the rest where it is announced and short."""
    if response.buffered:
        gathered = await response.receive()
    else:
        gathered = b""
    length = header(response.headers, b"content-length")
    if response.ended or length is None or int(length) > WHOLE_ANSWER_BYTES:
        return gathered
    with trio.move_on_after(GATHER_S):
        while not response.ended:
            gathered += await response.receive()
    return gathered


def request_fields(headers: Headers, authority: bytes) -> Headers:
    """Return the fields the workspace gets: end to end, none of ours, a Host."""
    fields = [(name, value) for name, value in end_to_end(headers, drop=_NOT_ASKED) if not name.startswith(_OURS)]
    if header(fields, b"host") is None:
        fields.insert(0, (b"host", authority))
    return fields


def answer_fields(headers: Headers) -> Headers:
    """Return the fields the bootstrap gets: end to end, none that look like ours, the length under our name."""
    fields: Headers = []
    for name, value in end_to_end(headers):
        if name == b"content-length":
            fields.append((_LENGTH, value))
        elif name != b"trailer" and not name.startswith(_OURS):
            fields.append((name, value))
    return fields


def own_trailers(trailers: Headers) -> Headers:
    """Return the trailers that pass on, either way: none that look like ours."""
    return [(name, value) for name, value in trailers_end_to_end(trailers) if not name.startswith(_OURS)]


def own_answer(outcome: Outcome, message: str, *, bodiless: bool) -> tuple[AnswerHead, bytes]:
    """Return what is answered when the workspace gave nothing: the node's own words, marked as such and not hashed."""
    fields = [_JSON, (_ERROR, outcome.encode())]
    return AnswerHead(STATUS_OF[outcome], b"", fields, bodiless), refusal_body(outcome, message)


_NOT_ASKED = (b"expect",)
