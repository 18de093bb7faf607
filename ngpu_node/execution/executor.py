"""Runs orders: admits or refuses, gives each attempt its slot, deadline and meter, and sees that each ends in one
receipt.

The one invariant: an order that was admitted ends in exactly one receipt in the ledger, whatever ends it (answer,
deadline, a bootstrap that left, a workspace that broke, this daemon stopping), and the receipt is durable before any
byte of it leaves. Where nobody is left to take it, the courier offers it (`courier`).

Routes on `/http/1.1`, all for trusted bootstraps only, but for the first:

    GET          /.well-known/libp2p/protocols            what is mounted
    any          /ngpu/v1/workspaces/{id}/ports/{port}/…  run the order in the field Ngpu-Order
    GET, DELETE  /ngpu/v1/attempts/{task id}/{attempt}    the answer of a detached attempt; cancel an attempt

A detached attempt runs in the daemon's nursery and grows a spooled answer, which the ordering stream follows like
anyone who asks later does; so the loss of that stream costs nothing and looks like nothing special.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment
from ngpu_node.errors import LedgerUnavailable
from ngpu_node.execution.admission import AdmissionState, Admitted, Asked, Refusal, judge, parse_target, take
from ngpu_node.execution.attempt import Attempt, Key
from ngpu_node.execution.meter import GpuMeter
from ngpu_node.execution.passthrough import (
    Ended,
    ExchangeSink,
    ExchangeSource,
    own_answer,
    relay,
    request_fields,
)
from ngpu_node.execution.spool import Spool, SpooledAnswer, SpooledRequest
from ngpu_node.execution.upgrade import pump
from ngpu_node.ledger import Ledger, StoredAnswer, Written
from ngpu_node.metrics import NodeMetrics
from ngpu_node.upstreams import Upstream
from ngpu_protocol.http1 import Exchange, Headers, Response, end_to_end, wants_upgrade
from ngpu_protocol.identity import Address
from ngpu_protocol.orders import ORDER_HEADER
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.wire_errors import REFUSED_HEADER, Reason, refusal_body

log = structlog.get_logger(__name__)

HTTP_PROTOCOL = "/http/1.1"
WELL_KNOWN = "/.well-known/libp2p/protocols"
MOUNTS = {"/ngpu/v1": {"path": "/ngpu/v1/"}}
ATTEMPTS = "/ngpu/v1/attempts/"

#: How long writing a receipt may take once nobody waits for it any more.
SETTLE_S = 30.0

_ORDER = ORDER_HEADER.lower().encode()
_REFUSED = REFUSED_HEADER.encode()
_JSON = (b"content-type", b"application/json")


@dataclass(slots=True)
class Clocks:
    """Where this module gets the time; tests bring their own."""

    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    monotonic_ns: Callable[[], int] = time.monotonic_ns


class Executor:
    """Executes the orders of one node.

    Attributes:
        state: what admission decides by.
        running: the attempts that have no receipt yet.
    """

    def __init__(
        self,
        state: AdmissionState[Deployment],
        *,
        ledger: Ledger,
        spool: Spool,
        metrics: NodeMetrics,
        changes: Changes,
        undelivered: Callable[[Written], None],
        suspect: Callable[[Deployment, Upstream, str], None] = lambda deployment, upstream, reason: None,
        clocks: Clocks | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            changes: told when the node becomes full or stops being so.
            undelivered: told of a receipt that could not be handed to the stream that ordered it.
            suspect: told of an upstream that could not be reached.
        """
        self.state = state
        self.running: dict[Key, Attempt] = {}
        self._ledger = ledger
        self._spool = spool
        self._metrics = metrics
        self._changes = changes
        self._undelivered = undelivered
        self._suspect = suspect
        self._clocks = clocks or Clocks()
        self._meter = GpuMeter()
        self._nursery: trio.Nursery | None = None
        self._idle = Changes()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the detached attempts, and forget orders whose time is over, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(1.0)
                self.state.seen.forget(self._clocks.wall_ms())

    async def drain(self, grace_s: float) -> None:
        """Refuse new orders, give running attempts *grace_s*, end the rest as `node_stopping`, and wait for that."""
        self.state.draining = True
        self._changes.announce()
        with trio.move_on_after(grace_s):
            await self._wait_idle()
        self.stop_all()
        with trio.move_on_after(SETTLE_S):
            await self._wait_idle()

    def stop_all(self) -> None:
        """End every running attempt now."""
        for attempt in list(self.running.values()):
            attempt.stop(Outcome.NODE_STOPPING, "this node is stopping")

    async def _wait_idle(self) -> None:
        while self.running:
            await self._idle.beyond(self._idle.count)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request (an `http1` handler); `exchange.remote.peer` is the authenticated peer."""
        request = exchange.request
        parts = parse_target(request.target)
        if parts is not None:
            await self._order(exchange, *parts)
        elif request.target.startswith(ATTEMPTS):
            await self._attempts(exchange)
        elif request.path == WELL_KNOWN and request.method in ("GET", "HEAD"):
            await exchange.respond_json(200, MOUNTS)
        else:
            await exchange.respond_json(404, {"reason": "not_found", "message": "nothing is mounted at this path"})

    async def _order(self, exchange: Exchange, workspace: str, port: int, target: str) -> None:
        request = exchange.request
        orders = [value for name, value in request.headers if name == _ORDER]
        length = request.content_length if request.content_length is not None or request.chunked else 0
        asked = Asked(request.method, workspace, port, target, length, Address(exchange.remote.peer))
        text = orders[0].decode("latin-1") if len(orders) == 1 else None
        verdict = judge(text, asked, self.state, self._clocks.wall_ms())
        upstream: Upstream | None = None
        if isinstance(verdict, Admitted):
            upstream = verdict.deployment.upstream(port)
            if upstream is None:
                verdict = Refusal(Reason.WORKSPACE_NOT_READY, f"nothing serves port {port} of workspace {workspace}")
        if isinstance(verdict, Refusal) or upstream is None:
            assert isinstance(verdict, Refusal)
            await self._refuse(exchange, verdict)
            return
        attempt = self._begin(verdict, upstream)
        exchange.max_body_bytes = self.state.max_body_bytes
        if verdict.signed.order.detach:
            await self._detached(exchange, attempt, upstream)
        else:
            await self._attached(exchange, attempt, upstream)

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        self._metrics.refused(refusal.reason)
        log.info("order_refused", reason=refusal.reason, message=refusal.message, peer=exchange.remote.peer)
        fields = [_JSON, (_REFUSED, refusal.reason.encode())]
        await exchange.respond(refusal.reason.status, fields, refusal_body(refusal.reason, refusal.message))

    # -- the life of an attempt ----------------------------------------------------------------------------------------

    def _begin(self, admitted: Admitted[Deployment], upstream: Upstream) -> Attempt:
        take(admitted, self.state)
        deployment = admitted.deployment
        holding = self._meter.start(deployment.gpus, self._clocks.monotonic_ns())
        attempt = Attempt(admitted, holding, now_ms=self._clocks.wall_ms(), now_s=trio.current_time())
        self.running[attempt.key] = attempt
        deployment.began()
        upstream.running += 1
        self.state.running += 1
        if self.state.running == self.state.slots:
            self._changes.announce()
        self._metrics.running.inc()
        return attempt

    async def _settle(
        self, attempt: Attempt, upstream: Upstream, outcome: Outcome, answer: SpooledAnswer | None = None
    ) -> Written:
        """Free what the attempt held and write its receipt. To be called once, and under a shield.

        The slot is free before the receipt leaves: whoever holds the receipt may send the next order at once.
        """
        reading = self._meter.stop(attempt.holding, self._clocks.monotonic_ns())
        attempt.deployment.ended()
        upstream.running -= 1
        self.state.running -= 1
        if self.state.running == self.state.slots - 1:
            self._changes.announce()
        self._metrics.running.dec()
        draft = attempt.draft(self.state.node, outcome, reading, ended_at_ms=self._clocks.wall_ms())
        stored: StoredAnswer | None = None
        try:
            if answer is not None:
                await answer.seal()
                stored = answer.stored(attempt)
            began_s = trio.current_time()
            written = await self._ledger.write(draft, attempt.signed, stored)
            self._metrics.ledger_seconds.observe(trio.current_time() - began_s)
        finally:
            del self.running[attempt.key]
            self._idle.announce()
        self._metrics.ended(outcome, reading.duration_ms / 1000)
        log.info(
            "attempt_ended",
            task_id=attempt.key[1],
            attempt=attempt.key[2],
            workspace=attempt.signed.order.workspace,
            bootstrap=attempt.signed.order.bootstrap,
            outcome=outcome,
            status=attempt.status,
            request_bytes=attempt.request.count,
            response_bytes=attempt.response.count,
            duration_ms=reading.duration_ms,
            sequence=written.signed.receipt.sequence,
            detail=attempt.detail,
        )
        return written

    def _outcome_of(self, attempt: Attempt, ended: Ended | None) -> Outcome:
        """Return what the receipt says, now that the attempt's scope was left without being cancelled from outside."""
        if ended is not None and attempt.stop_outcome is None:
            attempt.detail = str(ended)
            return ended.outcome
        if attempt.scope.cancelled_caught or attempt.stop_outcome is not None:
            if attempt.stop_outcome is None:
                attempt.detail = "the order's deadline passed"
            return attempt.stop_outcome or Outcome.DEADLINE
        return Outcome.COMPLETE

    def _left(self, attempt: Attempt, exchange: Exchange) -> Outcome:
        """Return what the receipt says when the stream's task was cancelled under the attempt."""
        if attempt.stop_outcome is not None:
            return attempt.stop_outcome
        if self.state.draining and not exchange.client_gone:
            attempt.detail = "this node is stopping"
            return Outcome.NODE_STOPPING
        attempt.detail = "the bootstrap's stream ended"
        return Outcome.CLIENT_GONE

    # -- attached ------------------------------------------------------------------------------------------------------

    async def _attached(self, exchange: Exchange, attempt: Attempt, upstream: Upstream) -> None:
        sink = ExchangeSink(exchange)
        source = ExchangeSource(exchange, attempt)
        switched = False
        trailers: Headers = []
        ended: Ended | None = None

        async def switch(response: Response) -> None:
            nonlocal switched
            assert response.upgraded is not None
            client = await exchange.upgrade(_switch_fields(response))
            switched = True
            await pump(attempt, client, response.upgraded)

        wants = wants_upgrade(exchange.request.headers)
        fields = request_fields(exchange.request.headers, upstream.client.authority)
        if wants:
            fields += _upgrade_fields(exchange.request.headers)
        try:
            with attempt.scope:
                try:
                    await source.prepare()
                    trailers = await relay(attempt, upstream, fields, source, sink, switch=switch if wants else None)
                    await source.drain()
                except Ended as error:
                    ended = error
        except BaseException as error:
            # The stream was cancelled under us, or a bug of ours: the receipt is owed all the same.
            if isinstance(error, Exception):
                log.exception("attempt_crashed", task_id=attempt.key[1])
                attempt.detail = f"internal error: {type(error).__name__}"
            with trio.move_on_after(SETTLE_S, shield=True):
                crashed = isinstance(error, Exception)
                outcome = Outcome.WORKSPACE_BROKE if crashed else self._left(attempt, exchange)
                self._undelivered(await self._settle(attempt, upstream, outcome))
            raise
        outcome = self._outcome_of(attempt, ended)
        if ended is not None and ended.outcome is Outcome.WORKSPACE_BROKE and not attempt.status:
            self._suspect(attempt.deployment, upstream, str(ended))
        try:
            with trio.move_on_after(SETTLE_S, shield=True) as settling:
                written = await self._settle(attempt, upstream, outcome)
            if settling.cancelled_caught:
                raise LedgerUnavailable(f"no commit within {SETTLE_S:g} s")
        except LedgerUnavailable:
            # Without a receipt nothing may look finished.
            await exchange.abort()
            return
        if switched:
            self._undelivered(written)
            return
        delivered = False
        try:
            if not sink.begun and outcome is not Outcome.COMPLETE:
                await self._answer_instead(sink, attempt, outcome)
            await sink.finish(written, trailers)
            delivered = True
        finally:
            if not delivered:
                self._undelivered(written)

    async def _answer_instead(self, sink: ExchangeSink | SpooledAnswer, attempt: Attempt, outcome: Outcome) -> None:
        bodiless = attempt.signed.order.method == "HEAD"
        head, body = own_answer(outcome, attempt.detail, bodiless=bodiless)
        await sink.begin(head, more=True)
        if not bodiless:
            await sink.send(body, more=True)

    # -- detached ------------------------------------------------------------------------------------------------------

    async def _detached(self, exchange: Exchange, attempt: Attempt, upstream: Upstream) -> None:
        fields = request_fields(exchange.request.headers, upstream.client.authority)
        answer = self._spool.new()
        body = self._spool.new_request()
        ended: Ended | None = None
        try:
            # The whole request first: once the workspace has it, nothing needs the stream any more.
            with attempt.scope:
                try:
                    async for piece in ExchangeSource(exchange, attempt):
                        await body.add(piece)
                    body.complete()
                except Ended as error:
                    ended = error
        except BaseException:
            with trio.move_on_after(SETTLE_S, shield=True):
                self._spool.release_request(body)
                await self._finish_detached(attempt, upstream, answer, self._left(attempt, exchange))
            raise
        if body.is_complete and attempt.stop_outcome is None:
            attempt.scope = trio.CancelScope(deadline=attempt.scope.deadline)
            assert self._nursery is not None
            self._nursery.start_soon(self._run_detached, attempt, upstream, fields, body, answer)
        else:
            self._spool.release_request(body)
            with trio.CancelScope(shield=True):
                await self._finish_detached(attempt, upstream, answer, self._outcome_of(attempt, ended))
        await self._follow(exchange, answer)

    async def _run_detached(
        self, attempt: Attempt, upstream: Upstream, fields: Headers, body: SpooledRequest, answer: SpooledAnswer
    ) -> None:
        ended: Ended | None = None
        outcome: Outcome | None = None
        try:
            with attempt.scope:
                try:
                    answer.trailers = await relay(attempt, upstream, fields, body, answer)
                except Ended as error:
                    ended = error
            outcome = self._outcome_of(attempt, ended)
        except Exception as error:
            log.exception("attempt_crashed", task_id=attempt.key[1])
            attempt.detail, outcome = f"internal error: {type(error).__name__}", Outcome.WORKSPACE_BROKE
        finally:
            if outcome is None:  # only this daemon's end cancels a detached attempt from outside
                attempt.detail, outcome = "this node is stopping", Outcome.NODE_STOPPING
            if ended is not None and ended.outcome is Outcome.WORKSPACE_BROKE and not attempt.status:
                self._suspect(attempt.deployment, upstream, str(ended))
            with trio.move_on_after(SETTLE_S, shield=True):
                self._spool.release_request(body)
                await self._finish_detached(attempt, upstream, answer, outcome)

    async def _finish_detached(
        self, attempt: Attempt, upstream: Upstream, answer: SpooledAnswer, outcome: Outcome
    ) -> None:
        try:
            if outcome is not Outcome.COMPLETE and not answer.begun:
                await self._answer_instead(answer, attempt, outcome)
            written = await self._settle(attempt, upstream, outcome, answer)
            answer.finish(written)
            if not answer.followers:
                self._undelivered(written)
        except LedgerUnavailable:
            log.error("receipt_not_written", task_id=attempt.key[1], attempt=attempt.key[2])
        finally:
            if answer.written is None:
                answer.fail()
            self._spool.release(answer)

    async def _follow(self, exchange: Exchange, answer: SpooledAnswer) -> None:
        """Send a detached attempt's answer as it grows, or as it was."""
        sink = ExchangeSink(exchange)
        answer.followers += 1
        try:
            head = await answer.head()
            offset = 0
            await sink.begin(head, more=True)
            while data := await answer.read(offset):
                offset += len(data)
                await sink.send(data, more=answer.written is not None and offset == answer.size)
            assert answer.written is not None
            await sink.finish(answer.written, answer.trailers)
        except RuntimeError:
            await exchange.abort()
        finally:
            answer.followers -= 1

    # -- what is asked about attempts ----------------------------------------------------------------------------------

    async def _attempts(self, exchange: Exchange) -> None:
        request = exchange.request
        service = self.state.trust.service_of(Address(exchange.remote.peer))
        if service is None:
            refusal = Refusal(Reason.UNKNOWN_BOOTSTRAP, "only bootstraps this node's owner trusts may ask for attempts")
            await self._refuse(exchange, refusal)
            return
        task_id, _, number = request.path[len(ATTEMPTS) :].partition("/")
        if request.method not in ("GET", "DELETE") or not number.isascii() or not number.isdigit() or len(number) > 10:
            message = "ask GET or DELETE /ngpu/v1/attempts/{task id}/{attempt}"
            await exchange.respond_json(400, {"reason": "malformed_request", "message": message})
            return
        key: Key = (service, task_id, int(number))
        session = self.state.session.hex()
        running = self.running.get(key)
        if request.method == "DELETE" and running is not None:
            running.stop(Outcome.CANCELLED, "the bootstrap cancelled it")
            await exchange.respond_json(202, {"state": "cancelling", "session": session})
            return
        if running is not None:
            await exchange.respond_json(202, {"state": "running", "session": session})
            return
        answer = await self._spool.find(key)
        if answer is None:
            message = "no attempt of that number runs here, and no answer of it is kept"
            await exchange.respond_json(404, {"reason": "unknown_attempt", "message": message, "session": session})
            return
        await self._follow(exchange, answer)


def _upgrade_fields(headers: Headers) -> Headers:
    return [(b"connection", b"upgrade"), *((name, value) for name, value in headers if name == b"upgrade")]


def _switch_fields(response: Response) -> Headers:
    upgrade = [(name, value) for name, value in response.headers if name == b"upgrade"]
    ours = [(n, v) for n, v in end_to_end(response.headers) if not n.startswith(b"ngpu-") and n != b"content-length"]
    return ours + upgrade
