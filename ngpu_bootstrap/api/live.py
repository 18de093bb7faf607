"""Answers that go on: events of a workspace's deployments, and its containers' logs from the node.

Both end when their client leaves, when the daemon drains, or at a bound of their own, so that none outlives its use.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import trio
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from ngpu_bootstrap.errors import NotServed, Refusal
from ngpu_bootstrap.registry.nodes import NodeSession
from ngpu_protocol.http1 import HttpError

EVENT_STREAM = "text/event-stream"
LOOK_EVERY_S = 0.5
# Proxies cut a connection on which nothing comes; a comment is something, and no event.
COMMENT_EVERY_S = 15.0
# A client that follows longer comes again.
LONGEST_S = 3600.0
STREAMS_PER_WORKSPACE = 16
LOG_LINES_MAX = 10_000
LOG_BYTES_MAX = 16 * 1024 * 1024
NODE_ANSWERS_S = 10.0


class Live:
    """Counts and ends the open streams.

    Args:
        draining: whether the daemon is about to stop.
    """

    def __init__(self, draining: Callable[[], bool]) -> None:
        self._draining = draining
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def _counted(self, workspace: str) -> Iterator[None]:
        if self._open[workspace] >= STREAMS_PER_WORKSPACE:
            raise NotServed(
                429, "too_many_streams", f"{STREAMS_PER_WORKSPACE} streams of this workspace are open", retry_after_s=5
            )
        self._open[workspace] += 1
        try:
            yield
        finally:
            self._open[workspace] -= 1
            if not self._open[workspace]:
                del self._open[workspace]

    def events(self, workspace: str, look: Callable[[], BaseModel | None]) -> StreamingResponse:
        """Return an event `deployments` with what *look* sees, now and at each change; `removed` when it sees nothing.

        Raises:
            NotServed: too many streams of the workspace are open.
        """
        place = AsyncExitStack()
        place.enter_context(self._counted(workspace))

        async def pieces() -> AsyncIterator[bytes]:
            before, quiet_s, end_s = b"", 0.0, trio.current_time() + LONGEST_S
            while not self._draining() and trio.current_time() < end_s:
                seen = look()
                if seen is None:
                    yield b"event: removed\ndata: {}\n\n"
                    return
                now = seen.model_dump_json().encode()
                if now != before:
                    before, quiet_s = now, 0.0
                    yield b"event: deployments\ndata: " + now + b"\n\n"
                elif quiet_s >= COMMENT_EVERY_S:
                    quiet_s = 0.0
                    yield b": still here\n\n"
                await trio.sleep(LOOK_EVERY_S)
                quiet_s += LOOK_EVERY_S

        return _Stream(place, pieces(), EVENT_STREAM)

    def follow(
        self,
        workspace: str,
        look: Callable[[], Awaitable[tuple[bool, dict[str, dict[str, Any]]]]],
        changed: Callable[[], Awaitable[None]],
    ) -> StreamingResponse:
        """Return an event for each thing *look* sees, now and whenever it is another; `end` once *look* says so.

        Args:
            look: returns whether that was all, and what is seen by the name of its event.
            changed: returns when another look is worth it, within a second or so.

        Raises:
            NotServed: too many streams of the workspace are open.
        """
        place = AsyncExitStack()
        place.enter_context(self._counted(workspace))

        async def pieces() -> AsyncIterator[bytes]:
            before: dict[str, dict[str, Any]] = {}
            number, spoke_s, end_s = 0, trio.current_time(), trio.current_time() + LONGEST_S
            while not self._draining() and trio.current_time() < end_s:
                over, seen = await look()
                for name, document in seen.items():
                    if before.get(name) != document:
                        number += 1
                        spoke_s = trio.current_time()
                        data = json.dumps(document, separators=(",", ":"))
                        yield f"id: {number}\nevent: {name}\ndata: {data}\n\n".encode()
                before = seen
                if over:
                    yield b"event: end\ndata: {}\n\n"
                    return
                if trio.current_time() - spoke_s >= COMMENT_EVERY_S:
                    spoke_s = trio.current_time()
                    yield b": still here\n\n"
                await changed()

        return _Stream(place, pieces(), EVENT_STREAM)

    async def logs(self, workspace: str, session: NodeSession, *, tail: int, follow: bool) -> StreamingResponse:
        """Return the last lines a workspace's container wrote on a node, and with *follow* those to come.

        Raises:
            Refusal: the node says it has none, or does not answer.
            NotServed: too many streams of the workspace are open.
        """
        target = f"/ngpu/v1/workspaces/{workspace}/logs?tail={tail}&follow={int(follow)}"
        async with AsyncExitStack() as opening:
            opening.enter_context(self._counted(workspace))
            try:
                with trio.fail_after(NODE_ANSWERS_S):
                    response = await opening.enter_async_context(session.requests.request("GET", target))
                if response.status != 200:
                    said = await response.read(64 * 1024)
                    raise _refused_by_node(response.status, said)
            except (HttpError, trio.TooSlowError) as error:  # also one that its node no longer takes
                raise Refusal(502, "node_silent", f"node {session.node} did not answer: {error or 'timeout'}") from None
            place = opening.pop_all()

        async def pieces() -> AsyncIterator[bytes]:
            sent, end_s = 0, trio.current_time() + LONGEST_S
            while not self._draining() and trio.current_time() < end_s:
                piece: bytes | None = None
                with contextlib.suppress(HttpError), trio.move_on_after(LOOK_EVERY_S) as patience:
                    piece = await response.receive()
                if patience.cancelled_caught:
                    continue
                if not piece:  # its end, or the node's
                    return
                sent += len(piece)
                yield piece
                if sent > (math.inf if follow else LOG_BYTES_MAX):
                    return

        return _Stream(place, pieces(), "text/plain; charset=utf-8")


class _Stream(StreamingResponse):
    """An answer that goes on, and gives its place back however it ends.

    A client may leave before the first piece: then *pieces* never begins, and could give nothing back.
    """

    def __init__(self, place: AsyncExitStack, pieces: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(pieces, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._place:
            await super().__call__(scope, receive, send)


def _refused_by_node(status: int, said: bytes) -> Refusal:
    document: Any = None
    with contextlib.suppress(ValueError):
        document = json.loads(said)
    words = document if isinstance(document, dict) else {}
    message = str(words.get("message", f"the node answered {status}"))[:512]
    reason = str(words.get("reason", "no_logs"))[:64]
    return Refusal(404 if status == 404 else 502, reason, message)
