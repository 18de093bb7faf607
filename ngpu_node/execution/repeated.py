"""An order whose request is made again and again, until its answer says that the workspace's job is over.

Workspaces that run jobs by themselves answer a submission at once and work on with no request open. What they do then
would be in no receipt, and their slot would look free. So a bootstrap may send, with the question for a job, what in
the answer is final (`Ngpu-Until`, see `ngpu_protocol.job_answers`): the question is asked here, over loopback, at the
declared interval, and only the last answer goes back, under the one order and receipt that lasted all the time.

An answer that cannot be read, or any status but success, goes back at once: what it means is the bootstrap's business.
"""

from __future__ import annotations

import math

import trio

from ngpu_node.execution.attempt import Attempt
from ngpu_node.execution.passthrough import AnswerHead, Ended, Sink, Source, answer_fields, own_trailers, relay
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.http1 import (
    Headers,
    IncompleteError,
    LimitError,
    MaybeSentError,
    NotSentError,
    Response,
    header,
)
from ngpu_protocol.http1 import MalformedError as BrokenAnswer
from ngpu_protocol.job_answers import MAX_ANSWER_BYTES, UNTIL_HEADER, JobState, PollUntil
from ngpu_protocol.receipts import Outcome

_UNTIL = UNTIL_HEADER.lower().encode()
# A kept connection may be closing just as a question goes out, and a workspace may be busy for a moment.
BEARABLE = 3


def until_in(headers: Headers) -> PollUntil | None:
    """Return what a request says of being repeated; None when it says nothing, or nothing that this version knows."""
    text = header(headers, _UNTIL)
    if text is None:
        return None
    try:
        return PollUntil.decode(text)
    except MalformedError:
        return None


async def relay_until(attempt: Attempt, fields: Headers, source: Source, sink: Sink, until: PollUntil) -> Headers:
    """Ask the attempt's upstream until the answer is final, give that answer to *sink*, return its trailers.

    A request whose body is too long to be kept is made once.

    Raises:
        Ended: the workspace could not be asked, or did not answer in time, several times in a row, or it broke off.
    """
    if source.whole is None:
        return await relay(attempt, fields, source, sink)
    order = attempt.signed.order
    hold_until_s = trio.current_time() + until.hold_ms / 1000
    ask_s = math.inf if until.ask_ms is None else until.ask_ms / 1000
    failures = 0
    while True:
        is_last = trio.current_time() + until.interval_ms / 1000 > hold_until_s
        why: Exception | str = ""
        try:
            with trio.move_on_after(ask_s) as patience:
                async with attempt.upstream.client.request(
                    order.method, attempt.target, fields, source.whole
                ) as response:
                    trailers = await _final(attempt, response, sink, until, patience, is_last=is_last)
                failures = 0
                if trailers is not None:
                    return trailers
            if patience.cancelled_caught:
                why = f"not within {ask_s:g} s"
        except (NotSentError, MaybeSentError) as error:
            why = error
        except (IncompleteError, BrokenAnswer, LimitError) as error:
            raise Ended(Outcome.WORKSPACE_BROKE, f"the workspace's answer is broken: {error}") from error
        if why:
            failures += 1
            if failures >= BEARABLE or is_last:
                raise Ended(Outcome.WORKSPACE_BROKE, f"the workspace did not answer: {why}")
        await trio.sleep(until.interval_ms / 1000)


async def _final(
    attempt: Attempt, response: Response, sink: Sink, until: PollUntil, patience: trio.CancelScope, *, is_last: bool
) -> Headers | None:
    """Pass an answer on if it is final, or the *last* there is time for; None: it says that the job goes on.

    Args:
        patience: with the question; what is being passed on is no longer bound by it.
    """
    data = await response.receive()
    while not response.ended and len(data) <= MAX_ANSWER_BYTES:
        data += await response.receive()
    whole = response.ended
    if whole and not is_last:
        read = until.signs.read(response.status, data, until.job_id)
        if read.means is JobState.PENDING:
            return None
    patience.deadline = math.inf
    bodiless = attempt.signed.order.method == "HEAD" or response.status in (204, 304)
    head = AnswerHead(response.status, response.reason, answer_fields(response.headers), bodiless)
    attempt.status = response.status
    attempt.response.add(data)
    await sink.begin(head, more=True)
    if data:
        await sink.send(data, more=whole)
    while not response.ended:
        data = await response.receive()
        attempt.response.add(data)
        if data:
            await sink.send(data, more=response.ended)
    return [] if bodiless else own_trailers(response.trailers)
