"""The daemon's own Unix socket, and how commands reach it.

`ngpu-bootstrap workspace add` must work whether the daemon runs or not. While it runs the command speaks to it over
`admin.sock` in the data directory, where whoever may open the file is the operator; while it does not, the command
takes the directory's lock and works on the store itself (`commands`). So there is never a second writer.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import trio

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.errors import OperatorError
from ngpu_protocol.http1 import Handler, Limits, Remote, serve_stream

TIMEOUT_S = 30.0
_LIMITS = Limits(max_body_bytes=1024 * 1024, max_connections=32)


class AdminSocketError(OperatorError):
    """The running daemon cannot be asked, or refused what was asked."""


async def serve_admin_socket(
    directory: DataDirectory, handler: Handler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve *handler* on the directory's socket until cancelled. The caller holds the directory's lock.

    Raises:
        AdminSocketError: the path is too long for a socket.
    """
    path = directory.admin_socket
    path.unlink(missing_ok=True)  # of a daemon that was killed: the lock says that it is gone
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            await listening.bind(str(path))
        except OSError as error:
            raise AdminSocketError(
                f"cannot listen on {path}: {error.strerror or error}: use a shorter data_dir"
            ) from None
        os.chmod(path, 0o600)
        listening.listen(16)

        async def serve(stream: trio.SocketStream) -> None:
            await serve_stream(stream, handler, limits=_LIMITS, remote=Remote(host="local"))

        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(listening)])
                task_status.started()
        finally:
            path.unlink(missing_ok=True)


def daemon_is_running(directory: DataDirectory) -> bool:
    """Return whether a daemon answers on the directory's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(directory.admin_socket))
        except OSError:
            return False
    return True


def ask_daemon(path: Path, method: str, target: str, document: Any = None) -> Any:
    """Return the JSON that the running daemon answers to a call of its API.

    Raises:
        AdminSocketError: it refused, with its own words; or it cannot be reached.
    """
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=TIMEOUT_S) as client:
            response = client.request(method, f"http://bootstrap{target}", json=document)
    except httpx.HTTPError as error:
        raise AdminSocketError(f"the running daemon does not answer on {path}: {error}") from None
    try:
        answer = response.json()
    except ValueError:
        raise AdminSocketError(f"the running daemon answered {response.status_code} without JSON") from None
    # `/ready` says with 503 that it is not: that is its answer
    if response.status_code >= 400 and "ready" not in answer:
        raise AdminSocketError(str(answer.get("message", f"the running daemon answered {response.status_code}")))
    return answer


def follow_daemon(path: Path, target: str) -> Iterator[tuple[str, str]]:
    """Yield the server-sent events of the running daemon, name and data, until it ends them.

    Raises:
        AdminSocketError: as `ask_daemon`.
    """
    headers = {"Accept": "text/event-stream"}
    try:
        with (
            httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=TIMEOUT_S) as client,
            client.stream("GET", f"http://bootstrap{target}", headers=headers) as response,
        ):
            if response.status_code != 200:
                answer = json.loads(response.read() or b"{}")
                message = answer.get("message", f"the running daemon answered {response.status_code}")
                raise AdminSocketError(str(message))
            event = ""
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    yield event, value
    except httpx.HTTPError as error:
        raise AdminSocketError(f"the running daemon went away: {error}") from None
