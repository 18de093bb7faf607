"""Does something answer HTTP there? The one question behind readiness and health.

A TCP connection proves nothing: docker's proxy accepts one before the workspace listens, and a hung server keeps its
socket. So a probe is a whole request, on a connection of its own, and any answer below 500 counts: a server that says
404 or 401 to `/` serves.
"""

from __future__ import annotations

import re
import socket

import trio

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: |\r?\n)")
_MAX_BYTES = 8192


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
        return f"no HTTP answer on port {port} within {timeout_s:g} s"
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
        while (match := _STATUS_LINE.match(answer)) is None:
            data = await connection.recv(1024)
            if not data or len(answer) > _MAX_BYTES:
                return f"no HTTP answer on port {port}: what listens there speaks something else"
            answer += data
    status = int(match[1])
    return None if status < 500 else f"port {port} answers {status}"


def _host_field(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
