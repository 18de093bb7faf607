"""An ASGI application behind the same server: FastAPI for what is documented and not hot.

Covers the HTTP part of ASGI 3 (spec version 2.4): streamed bodies both ways, disconnects, trailers. Not the lifespan
protocol (a daemon's parts start in its nursery) and not WebSockets. The application runs on trio; a client that
leaves cancels it, as any handler, unless the answer is complete: then background tasks run on.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import trio

from ngpu_protocol.http1.errors import MisuseError
from ngpu_protocol.http1.exchange import Exchange
from ngpu_protocol.http1.headers import Headers

Message = MutableMapping[str, Any]
Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


class AsgiHandler:
    """A handler that passes exchanges to *app*.

    Args:
        app: The ASGI application.
        scheme: "https" where the listener speaks TLS, or a trusted proxy before it does.
        root_path: Path prefix under which the application is mounted.
    """

    def __init__(self, app: Application, *, scheme: str = "http", root_path: str = "") -> None:
        self._app = app
        self._scheme = scheme
        self._root_path = root_path

    async def __call__(self, exchange: Exchange) -> None:
        """Run the application for one exchange."""
        request = exchange.request
        raw_path, _, query = request.target.partition("?")
        scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": request.http_version,
            "method": request.method.upper(),
            "scheme": self._scheme,
            "path": unquote(raw_path),
            "raw_path": raw_path.encode("ascii"),
            "query_string": query.encode("ascii"),
            "root_path": self._root_path,
            "headers": request.headers,
            "client": (exchange.remote.host or exchange.remote.peer, exchange.remote.port),
            "server": None,
            "state": {},
            "extensions": {"http.response.trailers": {}},
        }
        cycle = _Cycle(exchange)
        await self._app(scope, cycle.receive, cycle.send)
        if not exchange.ended:
            raise MisuseError("the application returned without completing its answer")


class _Cycle:
    """The two ASGI channels of one exchange."""

    __slots__ = ("_body_done", "_ended", "_exchange", "_wants_trailers")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._body_done = False
        self._ended = trio.Event()
        self._wants_trailers = False

    async def receive(self) -> Message:
        exchange = self._exchange
        if exchange.ended:
            return {"type": "http.disconnect"}
        if self._body_done:
            # A client that leaves cancels the application: what is left to report is the end of the answer.
            await self._ended.wait()
            return {"type": "http.disconnect"}
        data = await exchange.receive()
        self._body_done = exchange.body_complete and not exchange.body_ready
        return {"type": "http.request", "body": data, "more_body": not self._body_done}

    async def send(self, message: Message) -> None:
        exchange = self._exchange
        kind = message["type"]
        if kind == "http.response.start":
            headers: Headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
            self._wants_trailers = message.get("trailers", False)
            # A known length means that the body follows at once: one write. A stream's head must not wait for its
            # first piece.
            known_length = any(name.lower() == b"content-length" for name, _ in headers)
            await exchange.send_head(message["status"], headers, more=known_length)
        elif kind == "http.response.body":
            more_body = message.get("more_body", False)
            last = not more_body and not self._wants_trailers
            await exchange.send(bytes(message.get("body", b"")), more=last)
            if last:
                await exchange.end()
                self._ended.set()
        elif kind == "http.response.trailers":
            if not message.get("more_trailers", False):
                await exchange.end(list(message.get("headers", ())))
                self._ended.set()
        else:
            raise MisuseError(f"ASGI message {kind!r} is not known here")
