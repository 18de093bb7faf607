"""One attempt: a signed order and its request go to a node, the answer comes back, both as streams, hashed on the way.

Owns the conversation of one request on one stream and the account of it: what was sent, what came, how it ended. It
decides nothing: retries, verdicts and records are the dispatcher's. Backpressure runs the whole length, since every
piece is written before the next is read; cancelling the attempt resets the stream, which tells the node to stop.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import trio

from ngpu_bootstrap.dispatch.calls import Call
from ngpu_bootstrap.errors import BootstrapError
from ngpu_bootstrap.kill_points import reached
from ngpu_bootstrap.tasks.recovery import Collected
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.http1 import (
    Client,
    Headers,
    MaybeSentError,
    MisuseError,
    NotSentError,
    RemoteError,
    Response,
    SwitchedStream,
    header,
)
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipts import SignedReceipt
from ngpu_protocol.verification import Observed
from ngpu_protocol.wire_errors import MAX_REFUSAL_BYTES, parse_refusal

EXPECT_CONTINUE_BYTES = 64 * 1024
# How long past the order's deadline the node's own answer (504 with a receipt) may take to arrive.
DEADLINE_GRACE_S = 2.0
# How long the other side of a switched connection may go on after one side has ended.
GOODBYE_S = 12.0

_ORDER = b"ngpu-order"
_RECEIPT = b"ngpu-receipt"
_REFUSED = b"ngpu-refused"
_ERROR = b"ngpu-error"
_LENGTH = b"ngpu-content-length"
_PUMP_BYTES = 65536


class How(StrEnum):
    """How an attempt ended, as this bootstrap saw it."""

    ANSWERED = "answered"
    """The node's answer came whole; the receipt, if there is one, says what it is worth."""
    REPLACED = "replaced"
    """The node answered in the workspace's place: it could not be reached, broke, or was too slow."""
    SWITCHED = "switched"
    """The connection changed protocol (101) and ended; the receipt comes on its own way."""
    REFUSED = "refused"
    """The node did not admit the order: nothing reached the workspace."""
    NOT_SENT = "not_sent"
    """The request cannot have reached the node."""
    LOST = "lost"
    """The connection ended after the request may have arrived and before the answer was whole."""
    DEADLINE = "deadline"
    """The order's deadline passed and the node said nothing."""
    CANCELLED = "cancelled"
    """The task was cancelled here, and its node did not end it in time."""
    OVERSIZE = "oversize"
    """The answer is larger than this bootstrap keeps."""
    GONE = "gone"
    """The client left, or the task was cancelled here."""


class Sink(Protocol):
    """Where the workspace's answer goes, piece by piece, as it comes.

    Attributes:
        reached_client: whether any byte of an answer has gone to the client: then no other attempt may follow.
    """

    reached_client: bool

    async def begin(self, status: int, reason: bytes, headers: Headers, length: int | None, *, more: bool) -> None:
        """Take the head. *length* is what the workspace announced; *more*: the next piece is at hand."""

    async def take(self, data: bytes, *, more: bool) -> None:
        """Take a piece of the body; waits while it cannot go on."""

    async def switch(self, headers: Headers) -> SwitchedStream:
        """Send 101 to the client and return its connection."""


class AnswerTooLarge(BootstrapError):
    """Raised by a sink that keeps answers, when this one is over its bound."""


@dataclass(slots=True)
class Attempt:
    """The account of one attempt; filled in while it runs, complete when `run` returned or was cancelled.

    Attributes:
        status: the workspace's status; None before the head, 0 when the node answered in its place.
        reason: the node's word for a refusal, or ours for what went wrong.
        failed: for people, what went wrong.
        cancel_asked: the client wants it to end: no other attempt follows.
        shown_running: it was noted that the node runs it.
        received_bytes: of the answer, so far.
    """

    call: Call
    signed: SignedOrder
    number: int
    how: How = How.GONE
    status: int | None = None
    reason: str = ""
    failed: str = ""
    receipt: SignedReceipt | None = None
    sent_at_ms: int = 0
    ended_at_ms: int = 0
    first_byte_s: float | None = None
    trailers: Headers = field(default_factory=list)
    content_type: str = ""
    cancel_asked: bool = False
    shown_running: bool = False
    received_bytes: int = 0
    _scope: trio.CancelScope | None = None
    _started_s: float = 0.0
    _request_whole: bool = False
    _response_hash: bytes | None = None
    _response_bytes: int | None = None
    _switched_hash: bytes | None = None
    _switched_bytes: int = 0

    def observed(self) -> Observed:
        """Return what this bootstrap saw of the attempt, for judging its receipt.

        What was cut is not judged: of an answer that we stopped reading, the node may rightly say more.
        """
        request_hash: bytes | None = None
        request_bytes: int | None = None
        if self.how is How.SWITCHED:
            request_hash, request_bytes = self._switched_hash, self._switched_bytes
        elif self._request_whole:
            request_hash, request_bytes = self.call.body.sent()
        return Observed(
            request_hash=request_hash,
            request_bytes=request_bytes,
            status=self.status,
            response_hash=self._response_hash,
            response_bytes=self._response_bytes,
            sent_at_ms=self.sent_at_ms,
            ended_at_ms=self.ended_at_ms,
        )

    async def run(self, requests: Client, sink: Sink, now_ms: int) -> None:
        """Send the order with its request over *requests*, pass the answer to *sink*, and note how it ended.

        Never raises for what the node or the network does: `how` says it. Cancelled, the stream is reset, and whether
        the workspace acted is unknown.

        Raises:
            ClientFault: the client broke off or broke the rules while its body was being read.
        """
        self.sent_at_ms = now_ms
        self._started_s = time.monotonic()
        remaining_s = (self.signed.order.deadline_ms - now_ms) / 1000 + DEADLINE_GRACE_S
        try:
            with trio.move_on_after(max(0.0, remaining_s)) as scope:
                self._scope = scope
                await self._run(requests, sink)
            if scope.cancelled_caught and self.cancel_asked:
                self.how, self.reason, self.failed = How.CANCELLED, "cancelled", ""
            elif scope.cancelled_caught:
                self.how, self.reason, self.failed = How.DEADLINE, "deadline", "the node did not answer in time"
        finally:
            self.ended_at_ms = self.sent_at_ms + int((time.monotonic() - self._started_s) * 1000) + 1

    def cut(self) -> None:
        """Reset the stream of a cancelled attempt whose node does not end it."""
        if self._scope is not None:
            self._scope.cancel()

    @property
    def elapsed_s(self) -> float:
        """Return for how long it has been running."""
        return time.monotonic() - self._started_s

    async def _run(self, requests: Client, sink: Sink) -> None:
        call, order = self.call, self.signed.order
        body = await call.body.prepare()
        expects = not isinstance(body, bytes) or len(body) > EXPECT_CONTINUE_BYTES
        try:
            request = requests.request(
                call.method,
                f"/ngpu/v1/workspaces/{order.workspace}/ports/{order.port}{order.target}",
                [*call.headers, (_ORDER, self.signed.encode().encode("ascii"))],
                body,
                expect_continue=expects,
            )
        except MisuseError as error:  # the node left after it was chosen
            self.how, self.reason, self.failed = How.NOT_SENT, "node_unreachable", str(error)
            return
        try:
            async with request as response:
                self.first_byte_s = time.monotonic() - self._started_s
                reached("order.answering")
                try:
                    await self._read(response, sink)
                finally:
                    self._request_whole = response.body_sent
        except NotSentError as error:
            self.how, self.reason, self.failed = How.NOT_SENT, "node_unreachable", str(error)
        except (MaybeSentError, RemoteError, MisuseError) as error:
            # misuse: the node's answer cannot be passed on as it is, such as one longer than it announced
            self.how, self.reason, self.failed = How.LOST, "connection_lost", str(error)
        except AnswerTooLarge as error:
            self.how, self.reason, self.failed = How.OVERSIZE, "answer_too_large", str(error)

    async def is_running(self, requests: Client) -> bool:
        """Ask the node whether it runs this order now."""
        order = self.signed.order
        try:
            target = f"/ngpu/v1/attempts/{order.task_id}/{order.attempt}"
            async with requests.request("GET", target) as response:
                return response.status == 202
        except (NotSentError, MaybeSentError, RemoteError, MisuseError):
            return False

    async def stop(self, requests: Client) -> None:
        """Tell the node to end this order; its receipt will say `cancelled`. Without effect where it does not run."""
        order = self.signed.order
        try:
            async with requests.request("DELETE", f"/ngpu/v1/attempts/{order.task_id}/{order.attempt}") as response:
                await response.read(MAX_REFUSAL_BYTES)
        except (NotSentError, MaybeSentError, RemoteError, MisuseError):
            return

    async def collect(
        self, requests: Client, sink: Sink, now_ms: Callable[[], int], *, stop: bool = False
    ) -> Collected:
        """Ask the node for the answer to a detached order sent before, pass it to *sink*, and note how it ended.

        Args:
            stop: have the node end the order if it runs.

        Returns:
            What the node said. ANSWERED: the account is complete.
        """
        order = self.signed.order
        self.receipt = None
        try:
            target = f"/ngpu/v1/attempts/{order.task_id}/{order.attempt}"
            async with requests.request("DELETE" if stop else "GET", target) as response:
                if _is_of_node(response):
                    return _said(response.status, await response.read(MAX_REFUSAL_BYTES), order.session)
                await self._read(response, sink)
        except (NotSentError, MaybeSentError, RemoteError, MisuseError) as error:
            self.failed = str(error)
            return Collected.UNREACHABLE
        except AnswerTooLarge as error:
            self.how, self.reason, self.failed = How.OVERSIZE, "answer_too_large", str(error)
        # A node that has an answer had the whole request; after a restart what that was is read from the store.
        await self.call.body.prepare()
        self._request_whole = True
        self.ended_at_ms = now_ms() + 1
        return Collected.ANSWERED

    async def _read(self, response: Response, sink: Sink) -> None:
        headers = response.headers
        refused = header(headers, _REFUSED)
        if refused is not None:
            self.how, self.reason = How.REFUSED, refused.decode("latin-1")[:64]
            self.failed = await _refusal_text(response)
            return
        if response.upgraded is not None:
            await self._pump(response.upgraded, await sink.switch(_passed_on(headers)))
            return
        replaced = header(headers, _ERROR)
        if replaced is not None:
            self.status, self.reason = 0, replaced.decode("latin-1")[:64]
            self.failed = await _refusal_text(response)
            self._response_hash, self._response_bytes = hashlib.sha256().digest(), 0
            self.how = How.REPLACED
            self._take_receipt(response)
            return
        self.status = response.status
        self.content_type = (header(headers, b"content-type") or b"").decode("latin-1")
        length = _number(header(headers, _LENGTH))
        await sink.begin(response.status, response.reason, _passed_on(headers), length, more=response.buffered)
        digest = hashlib.sha256()
        received = 0
        while data := await response.receive():
            digest.update(data)
            self.received_bytes = received = received + len(data)
            await sink.take(data, more=response.ended)
        self._response_hash, self._response_bytes = digest.digest(), received
        self.how = How.ANSWERED
        self._take_receipt(response)

    def _take_receipt(self, response: Response) -> None:
        text = header(response.trailers, _RECEIPT) or header(response.headers, _RECEIPT)
        self.trailers = [pair for pair in response.trailers if not pair[0].startswith(b"ngpu-")]
        if text is None:
            return
        try:
            self.receipt = SignedReceipt.decode(text)
        except MalformedError as error:
            self.failed = f"the receipt cannot be read: {error}"

    async def _pump(self, node: SwitchedStream, client: SwitchedStream) -> None:
        """Pass raw bytes both ways until both sides have ended, or one of them broke."""
        self.status, self.how = 101, How.SWITCHED
        up, down = hashlib.sha256(), hashlib.sha256()
        counts = [0, 0]

        async def copy(source: SwitchedStream, target: SwitchedStream, digest: hashlib._Hash, index: int) -> None:
            while data := await source.receive_some(_PUMP_BYTES):
                digest.update(data)
                counts[index] += len(data)
                await target.send_all(data)
            await target.send_eof()
            # One side has said all it will: the other has a moment for its goodbye.
            nursery.cancel_scope.deadline = trio.current_time() + GOODBYE_S

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, client, node, up, 0)
                nursery.start_soon(copy, node, client, down, 1)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            self.reason = "connection_lost"
        finally:
            self._switched_hash, self._switched_bytes = up.digest(), counts[0]
            self._response_hash, self._response_bytes = down.digest(), counts[1]


def _is_of_node(response: Response) -> bool:
    """Return whether an answer to a collection is the node's own word: a kept answer is chunked, or has its receipt."""
    headers = response.headers
    return header(headers, b"transfer-encoding") is None and header(headers, _RECEIPT) is None


def _said(status: int, body: bytes, session: bytes) -> Collected:
    if status == 202:
        return Collected.RUNNING
    if status != 404:
        return Collected.UNREACHABLE
    try:
        document = json.loads(body)
        same = bytes.fromhex(document["session"].removeprefix("0x")) == session
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    return Collected.UNKNOWN if same else Collected.UNKNOWN_SINCE_RESTART


async def _refusal_text(response: Response) -> str:
    try:
        return parse_refusal(await response.read(MAX_REFUSAL_BYTES)).message
    except (MalformedError, RemoteError):
        return ""


def _passed_on(headers: Headers) -> Headers:
    """Return the fields of an answer that are the workspace's own; framing is this hop's."""
    return [
        pair
        for pair in headers
        if not pair[0].startswith(b"ngpu-")
        and pair[0] not in (b"transfer-encoding", b"connection", b"keep-alive", b"trailer")
    ]


def _number(text: bytes | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and len(text) <= 19 else None
