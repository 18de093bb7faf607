"""A sink that has where a call's key leads kept before the first byte of the answer goes to the client.

A client that has its answer may come again at once, at a sibling too: what it says then must find the node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ngpu_bootstrap.dispatch.attempt import Sink
from ngpu_protocol.http1 import Headers, SwitchedStream

# A call that failed has left nothing on its node that a later one would need.
FIRST_FAILURE = 400


class KeepingSink:
    """Passes an answer on to *sink*, and calls *keep* before its head."""

    __slots__ = ("_keep", "_sink")

    def __init__(self, sink: Sink, keep: Callable[[], Awaitable[None]]) -> None:
        self._sink = sink
        self._keep = keep

    @property
    def reached_client(self) -> bool:
        return self._sink.reached_client

    @reached_client.setter
    def reached_client(self, reached: bool) -> None:
        self._sink.reached_client = reached

    async def begin(self, status: int, reason: bytes, headers: Headers, length: int | None, *, more: bool) -> None:
        if status < FIRST_FAILURE:
            await self._keep()
        await self._sink.begin(status, reason, headers, length, more=more)

    async def take(self, data: bytes, *, more: bool) -> None:
        await self._sink.take(data, more=more)

    async def switch(self, headers: Headers) -> SwitchedStream:
        await self._keep()
        return await self._sink.switch(headers)
