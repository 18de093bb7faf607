"""An attempt whose answer goes to the stream that ordered it, and nowhere else: the hot path.

The attempt lives and dies with the stream. When the bootstrap leaves, the connection to the workspace is cut within a
second and the receipt says so; when the workspace breaks off, the answer is ended in order with a receipt that says
so, and it is the bootstrap that lets its client's connection break.
"""

from __future__ import annotations

import trio

from ngpu_node.errors import LedgerUnavailable
from ngpu_node.execution.attempt import Attempt
from ngpu_node.execution.attempts import SETTLE_S, Attempts, answer_instead
from ngpu_node.execution.passthrough import Ended, ExchangeSink, ExchangeSource, relay, request_fields
from ngpu_node.execution.repeated import relay_until, until_in
from ngpu_node.execution.upgrade import pump
from ngpu_node.ledger import Written
from ngpu_protocol.http1 import Exchange, Headers, Response, end_to_end, wants_upgrade
from ngpu_protocol.receipts import Outcome


async def run_attached(attempts: Attempts, attempt: Attempt, exchange: Exchange) -> None:
    """Run *attempt*, which has begun, for the request of *exchange*, and answer it."""
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
    until = until_in(exchange.request.headers)
    fields = request_fields(exchange.request.headers, attempt.upstream.client.authority)
    if wants:
        fields += _upgrade_fields(exchange.request.headers)
    try:
        with attempt.scope:
            try:
                await source.prepare()
                if until is not None:
                    with attempts.admitting_beside(attempt):
                        trailers = await relay_until(attempt, fields, source, sink, until)
                else:
                    trailers = await relay(attempt, fields, source, sink, switch=switch if wants else None)
                await source.drain()
            except Ended as error:
                ended = error
    except BaseException as error:
        # The stream's task was cancelled, or we made a mistake: the receipt is owed all the same.
        if isinstance(error, Exception):
            outcome = attempts.outcome_of_crash(attempt, error)
        else:
            outcome = attempts.outcome_when_left(attempt, client_gone=exchange.client_gone)
        with trio.move_on_after(SETTLE_S, shield=True):
            attempts.undelivered(await attempts.settle(attempt, outcome))
        raise
    outcome = attempts.outcome(attempt, ended)
    written = await _settled(attempts, attempt, outcome)
    if written is None:
        await exchange.abort()
        return
    delivered = False
    try:
        if not switched:
            if not sink.begun and outcome is not Outcome.COMPLETE:
                await answer_instead(sink, attempt, outcome)
            await sink.finish(written, trailers)
            delivered = True
    finally:
        if not delivered:
            attempts.undelivered(written)


async def _settled(attempts: Attempts, attempt: Attempt, outcome: Outcome) -> Written | None:
    """Return the receipt; None when there will be none, so that nothing may look finished."""
    try:
        return await attempts.settle(attempt, outcome)
    except LedgerUnavailable:
        return None


def _upgrade_fields(headers: Headers) -> Headers:
    return [(b"connection", b"upgrade"), *((name, value) for name, value in headers if name == b"upgrade")]


def _switch_fields(response: Response) -> Headers:
    upgrade = [(name, value) for name, value in response.headers if name == b"upgrade"]
    ours = [(n, v) for n, v in end_to_end(response.headers) if not n.startswith(b"ngpu-") and n != b"content-length"]
    return ours + upgrade
