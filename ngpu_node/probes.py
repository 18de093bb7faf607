"""Does something answer HTTP there? The one question behind readiness and health.

A TCP connection proves nothing: docker's proxy accepts one before the workspace listens, and a hung server keeps its
socket. So a probe is a whole request, on a connection of its own, and any answer below 500 counts whose head could be
passed on: a server that says 404 or 401 to `/` serves.
"""

from __future__ import annotations

import socket

import trio

from ngpu_protocol.http1 import HttpError, Limits
from ngpu_protocol.http1.heads import HEAD_END, parse_response_head

_LIMITS = Limits()


class Silence(str):
    """A problem: nothing answered in time. It may hang, or only be busy."""

    __slots__ = ()


async def probe(host: str, port: int, path: str = "/", *, timeout_s: float = 3.0) -> str | None:
    """Ask for *path* and return None when it was answered, else why it does not count, in words for the owner.

    Args:
        host: an IP address; names are not resolved here.
        path: with its query, printable ASCII.
    """
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {_host_field(host, port)}\r\nUser-Agent: ngpu-node probe\r\n"
        "Accept: */*\r\nConnection: close\r\n\r\n"
    )
    try:
        with trio.fail_after(timeout_s):
            return await _ask(host, port, request.encode("ascii"))
    except trio.TooSlowError:
        return Silence(f"no HTTP answer on port {port} within {timeout_s:g} s")
    except ConnectionRefusedError:
        return f"nothing listens on port {port}"
    except OSError as error:
        return f"no HTTP answer on port {port}: {error.strerror or type(error).__name__}"


async def _ask(host: str, port: int, request: bytes) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_STREAM) as connection:
        await connection.connect((host, port))
        sent = 0
        while sent < len(request):
            sent += await connection.send(request[sent:])
        answer = b""
        while (end := answer.find(HEAD_END)) < 0:
            data = await connection.recv(4096)
            if not data or len(answer) > _LIMITS.max_head_bytes:
                return f"no HTTP answer on port {port}: what listens there speaks something else"
            answer += data
    try:
        status = parse_response_head(answer[:end], _LIMITS).status
    except HttpError as error:
        return f"no HTTP answer on port {port} that could be passed on: {error}"
    return None if status < 500 else f"port {port} answers {status}"


def _host_field(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
