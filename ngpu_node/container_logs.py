"""What a workspace's container says, for its client (through the bootstrap) and for the owner.

    GET …/{workspace id}/logs?tail=200&follow=0&revision=

The last *tail* lines as plain text, at most `MAX_TAIL`, and of these what fits `containers.LOG_BYTES`; with *follow*
what comes after too, until the container or the reader ends, for `FOLLOW_S` at most. A workspace without a container
answers with the end of its last one's log, where this run of the node had one. Without *revision* the one that serves
is meant, else the newest.

Bounded: so many readers may follow one workspace, and so many all of them; the owner's own are counted apart, so that
clients cannot shut him out. One that does not read holds the engine back, not this node's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from urllib.parse import parse_qs

import trio

from ngpu_node.deployments import Deployment
from ngpu_node.engine.outlook import Log
from ngpu_node.errors import EngineFailed, EngineUnavailable
from ngpu_protocol.http1 import Exchange

DEFAULT_TAIL = 200
MAX_TAIL = 10_000
MAX_FOLLOWERS = 32
MAX_FOLLOWERS_EACH = 4
OWNERS_FOLLOWERS = 4
FOLLOW_S = 3600.0
REVISION_FIELD = b"ngpu-revision"

_OWNER = ("", "")

OpenLog = Callable[[Deployment, int, bool], AbstractAsyncContextManager[Log]]


class ContainerLogs:
    """Answers requests for logs."""

    def __init__(self, open_log: OpenLog) -> None:
        """Make it; *open_log* is given the deployment, the number of lines, and whether to follow."""
        self._open_log = open_log
        #: by service and workspace; the owner's under no name
        self._followers: Counter[tuple[str, str]] = Counter()

    async def answer(
        self, exchange: Exchange, here: Iterable[Deployment], workspace: str, *, is_owner: bool = False
    ) -> None:
        """Answer one request; *here* are the revisions of the workspace the asker may see."""
        query = parse_qs(exchange.request.target.partition("?")[2], keep_blank_values=True, max_num_fields=16)
        tail, revision = _number(query, "tail", DEFAULT_TAIL), _number(query, "revision", 0)
        follow = query.get("follow", ["0"])[-1] in ("1", "true")
        if tail is None or revision is None:
            await _refuse(exchange, 400, "malformed_request", "tail and revision are whole numbers")
            return
        deployment = _chosen(here, revision)
        if deployment is None:
            await _refuse(exchange, 404, "workspace_unknown", f"workspace {workspace} is not deployed here")
            return
        if not deployment.spec.is_image:
            await _refuse(exchange, 404, "no_logs", f"workspace {workspace} is a model server, whose log is its own")
            return
        key = _OWNER if is_owner else (deployment.service, workspace)
        if follow and (full := self._is_full(key)):
            await _refuse(exchange, 429, "too_many_readers", full)
            return
        self._followers[key] += follow
        try:
            await self._send(exchange, deployment, min(tail, MAX_TAIL), follow=follow)
        except (EngineUnavailable, EngineFailed) as error:
            if exchange.head_sent:
                await exchange.abort()
            else:
                await _refuse(exchange, 503, "engine_away", str(error))
        finally:
            self._followers[key] -= follow
            if not self._followers[key]:
                del self._followers[key]

    def _is_full(self, key: tuple[str, str]) -> str:
        """Return why one more may not follow, empty where it may."""
        if key == _OWNER:
            is_full = self._followers[key] >= OWNERS_FOLLOWERS
            return f"{OWNERS_FOLLOWERS} commands of the owner's follow logs already" if is_full else ""
        if self._followers[key] >= MAX_FOLLOWERS_EACH:
            return f"{MAX_FOLLOWERS_EACH} readers follow this workspace's log here already"
        others = self._followers.total() - self._followers[_OWNER]
        return f"{MAX_FOLLOWERS} readers follow logs here already" if others >= MAX_FOLLOWERS else ""

    async def _send(self, exchange: Exchange, deployment: Deployment, lines: int, *, follow: bool) -> None:
        async with self._open_log(deployment, lines, follow) as found:
            fields = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (REVISION_FIELD, b"%d" % deployment.spec.revision),
            ]
            await exchange.send_head(200, fields)
            if found.end:
                await exchange.send(found.end)
            if found.more is not None:
                with trio.move_on_after(FOLLOW_S):
                    async for piece in found.more:
                        await exchange.send(piece)
            await exchange.end()


def _number(query: dict[str, list[str]], name: str, default: int) -> int | None:
    text = query.get(name, [""])[-1]
    if not text:
        return default
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None


def _chosen(here: Iterable[Deployment], revision: int) -> Deployment | None:
    found = [d for d in here if not revision or d.spec.revision == revision]
    return max(found, key=lambda d: (d.is_ready, d.spec.revision), default=None)


async def _refuse(exchange: Exchange, status: int, reason: str, message: str) -> None:
    await exchange.respond_json(status, {"reason": reason, "message": message})
