"""A connection that switched protocols (WebSocket): raw bytes both ways under one order.

There is no message left to carry a receipt, so it goes over the receipts protocol. It covers what was passed after the
101: as request what went to the workspace, as answer what came from it. Complete means that a side ended its bytes in
order; the other is then given a moment for its goodbye.
"""

from __future__ import annotations

import trio

from ngpu_node.execution.attempt import Attempt, Passed
from ngpu_node.execution.passthrough import Ended
from ngpu_protocol.http1 import SwitchedStream
from ngpu_protocol.receipts import Outcome

#: After one side ended, how long the other may take to end too.
GOODBYE_S = 10.0

_CHUNK_BYTES = 65536
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


async def pump(attempt: Attempt, client: SwitchedStream, workspace: SwitchedStream) -> None:
    """Pass bytes both ways until both sides ended, or one did and the other did not follow in time.

    Raises:
        Ended: one side broke; which one is the outcome.
    """
    broken: list[Outcome] = []
    scope = trio.CancelScope()

    async def copy(
        source: SwitchedStream, target: SwitchedStream, passed: Passed, source_is: Outcome, target_is: Outcome
    ) -> None:
        side = source_is
        try:
            while data := await source.receive_some(_CHUNK_BYTES):
                passed.add(data)
                side = target_is
                await target.send_all(data)
                side = source_is
            side = target_is
            await target.send_eof()
        except _BROKEN:
            broken.append(side)
            scope.cancel()
        scope.deadline = min(scope.deadline, trio.current_time() + GOODBYE_S)

    with scope:
        async with trio.open_nursery() as nursery:
            gone, broke = Outcome.CLIENT_GONE, Outcome.WORKSPACE_BROKE
            nursery.start_soon(copy, client, workspace, attempt.request, gone, broke)
            nursery.start_soon(copy, workspace, client, attempt.response, broke, gone)
    if broken:
        # After an orderly end on one side, a reset on the other is how many servers say goodbye.
        raise Ended(broken[0], f"the connection broke: {broken[0]}")
