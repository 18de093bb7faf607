"""Answers of declared calls on their way to the client: as the transparent form passes them, with two things more.

`ModelSink`: a stream of events that its server breaks off is not only cut. Where the last event was whole, one more
follows that says what happened, in the dialect of the caller, whose client raises it as an error of its own; then the
connection is cut all the same, so that a part never looks whole.

`RewritingSink`: a JSON answer is held until its receipt is verified, then sent with URLs in the place of file paths.
What the receipt covers are the server's own bytes. An answer of another type, or too long to hold, passes as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import trio

from ngpu_bootstrap.dispatch.dispatcher import Result
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.front.proxy import ProxySink
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.http1 import Exchange, Headers, HttpError, header

EVENT_STREAM = b"text/event-stream"
HELD_BYTES = 16 * 1024 * 1024
SHORT_BYTES = 4096

ErrorDocument = Callable[[Refusal], bytes]
Rewrite = Callable[[bytes, Result], bytes]


async def rewritten(body: bytes, rewrite: Callable[[], bytes]) -> bytes:
    """Return what *rewrite* makes of *body*: where that may take long, while others go on."""
    return rewrite() if len(body) <= SHORT_BYTES else await trio.to_thread.run_sync(rewrite)


class ModelSink(ProxySink):
    """Passes one answer on, and says so where a stream of events breaks.

    Attributes:
        status: of the answer; 0 before its head.
    """

    __slots__ = ("_events", "_tail", "_words", "status")

    def __init__(self, exchange: Exchange, task_id: str, words: ErrorDocument) -> None:
        super().__init__(exchange, task_id)
        self._words = words
        self._events = False
        self._tail = b"\n\n"
        self.status = 0

    async def begin(self, status: int, reason: bytes, headers: Headers, length: int | None, *, more: bool) -> None:
        self.status = status
        self._events = length is None and (header(headers, b"content-type") or b"").startswith(EVENT_STREAM)
        await super().begin(status, reason, headers, length, more=more)

    async def take(self, data: bytes, *, more: bool) -> None:
        if self._events and data:
            self._tail = (self._tail + data)[-2:] if len(data) < 2 else data[-2:]
        await super().take(data, more=more)

    async def finish(self, result: Result) -> None:
        broken = (
            result.ending.state is not TaskState.FINISHED or result.attempt is None or result.attempt.receipt is None
        )
        if self._events and broken and self.reached_client and self._tail == b"\n\n":
            event = self._words(result.ending.refusal())
            with contextlib.suppress(HttpError):
                await self._exchange.send(b"data: %b\n\n" % event)
        await super().finish(result)


class RewritingSink(ModelSink):
    """Holds a JSON answer back and sends it rewritten.

    Args:
        rewrite: from the body, and what became of the task, to the body that is sent.
    """

    __slots__ = ("_head", "_held", "_rewrite")

    def __init__(self, exchange: Exchange, task_id: str, words: ErrorDocument, rewrite: Rewrite) -> None:
        super().__init__(exchange, task_id, words)
        self._rewrite = rewrite
        self._held: bytearray | None = None
        self._head: tuple[int, bytes, Headers, int | None] | None = None

    async def begin(self, status: int, reason: bytes, headers: Headers, length: int | None, *, more: bool) -> None:
        media = (header(headers, b"content-type") or b"").partition(b";")[0].strip().lower()
        encoded = header(headers, b"content-encoding")
        is_json = media == b"application/json" or media.endswith(b"+json")
        if not is_json or encoded or (length or 0) > HELD_BYTES or self._exchange.request.method == "HEAD":
            self._held = self._head = None  # an attempt before this one may have left its part
            await super().begin(status, reason, headers, length, more=more)
            return
        self.status = status
        self._held, self._head = bytearray(), (status, reason, headers, length)

    async def take(self, data: bytes, *, more: bool) -> None:
        if self._held is None:
            await super().take(data, more=more)
            return
        self._held += data
        if len(self._held) > HELD_BYTES:
            await self._let_go(more=more)

    async def finish(self, result: Result) -> None:
        if self._held is not None and self._head is not None and result.ending.state is TaskState.FINISHED:
            status, reason, headers, length = self._head
            body = bytes(self._held)
            changed = await rewritten(body, partial(self._rewrite, body, result))
            self._held = None
            if changed != body and length is not None:
                length = len(changed)
            await super().begin(status, reason, headers, length, more=True)
            if changed:
                await super().take(changed, more=True)
        await super().finish(result)

    async def _let_go(self, *, more: bool) -> None:
        assert self._head is not None
        assert self._held is not None
        status, reason, headers, length = self._head
        data, self._held = bytes(self._held), None
        await super().begin(status, reason, headers, length, more=True)
        await super().take(data, more=more)
