"""The transparent form: a workspace's answer passed to the client as it comes, with the same status, fields and bytes.

Owns what the bootstrap changes on the way, which is little: framing, hop-by-hop fields, `Ngpu-Task-Id` added, the
length the workspace announced restored, the receipt as a trailer where the answer is chunked. An answer that is not
whole is never ended properly: its connection is cut.
"""

from __future__ import annotations

from ngpu_bootstrap.dispatch.attempt import How
from ngpu_bootstrap.dispatch.dispatcher import Result
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.http1 import Exchange, Headers, MisuseError, SwitchedStream, trailers_end_to_end


class ProxySink:
    """Passes one answer on to one client.

    Attributes:
        reached_client: whether any of it has gone out.
    """

    __slots__ = ("_exchange", "_task_id", "reached_client")

    def __init__(self, exchange: Exchange, task_id: str) -> None:
        self._exchange = exchange
        self._task_id = task_id.encode("ascii")
        self.reached_client = False

    async def begin(self, status: int, reason: bytes, headers: Headers, length: int | None, *, more: bool) -> None:
        fields = [pair for pair in headers if pair[0] != b"content-length" or length is None]
        if length is not None:
            fields.append((b"content-length", b"%d" % length))
        elif status not in (204, 304) and self._exchange.request.method != "HEAD":
            fields.append((b"trailer", b"Ngpu-Receipt"))
        fields.append((b"ngpu-task-id", self._task_id))
        self.reached_client = True
        await self._exchange.send_head(status, fields, reason=reason, more=more)

    async def take(self, data: bytes, *, more: bool) -> None:
        await self._exchange.send(data, more=more)

    async def switch(self, headers: Headers) -> SwitchedStream:
        self.reached_client = True
        return await self._exchange.upgrade([*headers, (b"ngpu-task-id", self._task_id)])

    async def finish(self, result: Result) -> None:
        """End the answer as *result* says: properly, or cut, or with the refusal of a client who got nothing yet.

        Raises:
            NodeFault: nothing reached the client; the caller answers.
        """
        attempt = result.attempt
        if attempt is not None and attempt.how is How.SWITCHED:
            return
        if not self.reached_client:
            raise result.ending.refusal()
        if result.ending.state is not TaskState.FINISHED or attempt is None or attempt.receipt is None:
            await self._exchange.abort()
            return
        trailers = [*trailers_end_to_end(attempt.trailers), (b"ngpu-receipt", attempt.receipt.encode().encode("ascii"))]
        try:
            await self._exchange.end(trailers)
        except MisuseError:  # fewer bytes than the workspace announced
            await self._exchange.abort()
