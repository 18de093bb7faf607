"""What the owner's own commands ask the running daemon: its state, its metrics.

Served on a Unix socket in the data directory, mode 0600: who may open it is the file system's decision, so there is
no credential. The metrics alone are also served on a loopback port, where the owner configured one.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from prometheus_client import CollectorRegistry

from ngpu_daemon.metrics import CONTENT_TYPE, exposition
from ngpu_node.errors import NodeConfigurationError
from ngpu_protocol.http1 import Client, Exchange, HttpError, serve_stream

#: What an address of the Unix family can hold, less the byte that ends it.
MAX_SOCKET_PATH_BYTES = 107
ASK_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024

Status = Callable[[], Awaitable[dict[str, Any]]]


class AdminApi:
    """The handler of the admin socket and, with `metrics_only`, of the metrics port."""

    def __init__(
        self,
        registry: CollectorRegistry,
        status: Status,
        gpus: Callable[[], dict[str, Any]] = dict,
        more: Callable[[Exchange], Awaitable[bool]] | None = None,
    ) -> None:
        """Put the parts together; *more* answers what it knows, and says whether it did."""
        self._registry = registry
        self._status = status
        self._gpus = gpus
        self._more = more

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request from the owner."""
        if exchange.request.method == "GET" and exchange.request.path == "/status":
            await exchange.respond_json(200, await self._status())
        elif exchange.request.method == "GET" and exchange.request.path == "/gpus":
            await exchange.respond_json(200, self._gpus())
        elif self._more is not None and await self._more(exchange):
            return
        else:
            await self.metrics_only(exchange)

    async def metrics_only(self, exchange: Exchange) -> None:
        """Answer one request from a scraper."""
        path, method = exchange.request.path, exchange.request.method
        if path == "/metrics" and method in ("GET", "HEAD"):
            await exchange.respond(200, [(b"content-type", CONTENT_TYPE.encode())], exposition(self._registry))
        elif path == "/health" and method in ("GET", "HEAD"):
            await exchange.respond_json(200, {"status": "ok"})
        else:
            await exchange.respond_json(404, {"reason": "not_found", "message": "ask for /metrics"})


async def serve_admin_socket(
    path: Path, api: AdminApi, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve *api* on a Unix socket at *path* until cancelled; removes the socket at the end.

    A socket a dead daemon left is replaced: the caller holds the data directory's lock.

    Raises:
        NodeConfigurationError: *path* is too long for a socket, or something else stands there.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise NodeConfigurationError(
            f"{path} is too long for a Unix socket ({MAX_SOCKET_PATH_BYTES} bytes): choose a shorter data_dir"
        )
    _remove_stale(path)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # the socket must not be open to others even for a moment
    try:
        await listener.bind(os.fspath(path))
    except OSError as error:
        listener.close()
        raise NodeConfigurationError(f"cannot listen on {path}: {error.strerror}") from None
    finally:
        os.umask(before)
    listener.listen(16)

    async def serve(stream: trio.SocketStream) -> None:
        await serve_stream(stream, api.handle)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(listener)])
            task_status.started()
    finally:
        _remove_stale(path)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise NodeConfigurationError(f"{path} is not a socket: move it away")
        path.unlink()
    except FileNotFoundError:
        return


async def ask(path: Path, target: str, method: str = "GET") -> bytes:
    """Return what the daemon whose socket is at *path* answers to *target*.

    Raises:
        NodeConfigurationError: nobody answers there, or not this user.
    """
    found = b""
    with trio.move_on_after(ASK_TIMEOUT_S):
        async for piece in _answer(path, target, method):
            found += piece
            if len(found) > MAX_ANSWER_BYTES:
                raise NodeConfigurationError(f"the daemon's answer to {target} is over {MAX_ANSWER_BYTES} bytes")
        return found
    raise NodeConfigurationError(f"the daemon on {path} does not answer within {ASK_TIMEOUT_S:g} s")


async def follow(path: Path, target: str) -> AsyncIterator[bytes]:
    """Yield what the daemon answers to GET *target*, piece by piece, for as long as it does; see `ask`."""
    async for piece in _answer(path, target, "GET"):
        yield piece


async def _answer(path: Path, target: str, method: str) -> AsyncIterator[bytes]:
    async def connect() -> trio.abc.Stream:
        return await trio.open_unix_socket(os.fspath(path))

    client = Client(connect, authority="ngpu-node", max_connections=1)
    try:
        async with client.request(method, target) as response:
            if response.status != 200:
                raise NodeConfigurationError(_complaint(await response.read(MAX_ANSWER_BYTES), response.status, target))
            async for piece in response.body():
                yield piece
    except HttpError as error:
        cause = error.__cause__
        if isinstance(cause, PermissionError):
            raise NodeConfigurationError(f"{path} may only be opened by the user ngpu-node runs as") from None
        raise NodeConfigurationError(
            f"no daemon answers on {path}: is `ngpu-node run` running with this data_dir?"
        ) from None
    finally:
        await client.aclose()


def _complaint(body: bytes, status: int, target: str) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered {status} to {target}"


async def ask_status(path: Path) -> dict[str, Any]:
    """Return the daemon's state; see `ask`."""
    status: dict[str, Any] = json.loads(await ask(path, "/status"))
    return status
