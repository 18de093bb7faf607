"""An attempt that outlives the stream that ordered it (design: One task, `detach`).

The request is received whole before the workspace gets any of it: half a request of a bootstrap that died must not
run. Then the attempt runs in the daemon's nursery and grows a spooled answer, which the ordering stream follows like
anyone who asks later does; so the loss of that stream costs nothing and looks like nothing special.
"""

from __future__ import annotations

import structlog
import trio

from ngpu_node.errors import LedgerUnavailable
from ngpu_node.execution.attempt import Attempt, Key
from ngpu_node.execution.attempts import SETTLE_S, Attempts, answer_instead
from ngpu_node.execution.passthrough import Ended, ExchangeSink, ExchangeSource, relay, request_fields
from ngpu_node.execution.spool import AnswerLost, Spool, SpooledAnswer, SpooledRequest
from ngpu_protocol.http1 import Exchange, Headers
from ngpu_protocol.receipts import Outcome

log = structlog.get_logger(__name__)


class DetachedAttempts:
    """Runs detached attempts, and gives their answers to whoever may ask."""

    def __init__(self, attempts: Attempts, spool: Spool) -> None:
        self._attempts = attempts
        self._spool = spool
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the attempts until cancelled; those that run then end as `node_stopping`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def order(self, attempt: Attempt, exchange: Exchange) -> None:
        """Run *attempt*, which has begun, for the request of *exchange*, and answer that for as long as it is there."""
        fields = request_fields(exchange.request.headers, attempt.upstream.client.authority)
        answer = self._spool.new()
        body = self._spool.new_request()
        ended: Ended | None = None
        try:
            with attempt.scope:
                try:
                    source = ExchangeSource(exchange, attempt)
                    async for piece in source:
                        await body.add(piece)
                    body.trailers = source.trailers
                    body.complete()
                except Ended as error:
                    ended = error
        except BaseException as error:
            if isinstance(error, Exception):
                outcome = self._attempts.outcome_of_crash(attempt, error)
            else:
                outcome = self._attempts.outcome_when_left(attempt, client_gone=exchange.client_gone)
            with trio.move_on_after(SETTLE_S, shield=True):
                await self._finish(attempt, body, answer, outcome)
            raise
        if body.is_complete and attempt.stop_outcome is None:
            attempt.scope = trio.CancelScope(deadline=attempt.scope.deadline)
            assert self._nursery is not None
            self._nursery.start_soon(self._run, attempt, fields, body, answer)
        else:
            outcome = attempt.stop_outcome or self._attempts.outcome(attempt, ended)
            with trio.CancelScope(shield=True):
                await self._finish(attempt, body, answer, outcome)
        await self.follow(exchange, answer)

    async def _run(self, attempt: Attempt, fields: Headers, body: SpooledRequest, answer: SpooledAnswer) -> None:
        ended: Ended | None = None
        outcome: Outcome | None = None
        try:
            with attempt.scope:
                try:
                    answer.trailers = await relay(attempt, fields, body, answer)
                except Ended as error:
                    ended = error
            outcome = self._attempts.outcome(attempt, ended)
        except Exception as error:
            outcome = self._attempts.outcome_of_crash(attempt, error)
        finally:
            if outcome is None:  # only this daemon's end cancels a detached attempt from outside
                attempt.detail, outcome = "this node is stopping", Outcome.NODE_STOPPING
            with trio.move_on_after(SETTLE_S, shield=True):
                await self._finish(attempt, body, answer, outcome)

    async def _finish(self, attempt: Attempt, body: SpooledRequest, answer: SpooledAnswer, outcome: Outcome) -> None:
        try:
            self._spool.release_request(body)
            if outcome is not Outcome.COMPLETE and not answer.begun:
                await answer_instead(answer, attempt, outcome)
            written = await self._attempts.settle(attempt, outcome, answer)
            answer.finish(written)
            if not answer.followers:
                self._attempts.undelivered(written)
        except LedgerUnavailable:
            log.error("receipt_not_written", task_id=attempt.key[1], attempt=attempt.key[2])
        finally:
            if answer.written is None:
                answer.fail()
            self._spool.release(answer)

    async def find(self, key: Key) -> SpooledAnswer | None:
        """Return the answer of a finished attempt; None when there is none (any more)."""
        return await self._spool.find(key)

    async def follow(self, exchange: Exchange, answer: SpooledAnswer) -> None:
        """Send an answer as it grows, or as it was."""
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
        except AnswerLost:
            await exchange.abort()
        finally:
            answer.followers -= 1
