"""A client that waits on its connection hears its place in the queue: interim answers, `102 Processing`.

For clients that ask for it (`Ngpu-Queue-Updates`, any value), since old ones may not know that an answer can have
more than one head; libraries that read HTTP/1.1 as RFC 9110 has it pass over those they do not expect (section 15.2).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from ngpu_protocol.http1 import Exchange, header

TELL_S = 5.0
"""How long an interim answer may take to leave: it is a hundred bytes, and nothing went before it."""

TellPlace = Callable[[int], Awaitable[None]]


def place_teller(exchange: Exchange, task_id: str) -> TellPlace | None:
    """Return what tells the client how many calls wait before its own; None when it did not ask."""
    if header(exchange.request.headers, b"ngpu-queue-updates") is None:
        return None

    async def tell(before: int) -> None:
        fields = [(b"ngpu-task-id", task_id.encode("ascii")), (b"ngpu-queue-position", b"%d" % before)]
        # whole or not at all: a part of it would be taken for the beginning of the answer
        with trio.move_on_after(TELL_S, shield=True) as limit:
            await exchange.send_informational(102, fields)
        if limit.cancelled_caught:
            await exchange.abort()

    return tell
