"""A workspace with one behaviour a path, and a memory of what was done to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import trio

from ngpu_protocol.http1 import Exchange

PIECE = bytes(range(256)) * 256


@dataclass
class Workspace:
    """Serves as an `http1` handler.

    Attributes:
        calls: method and target of every call, in order.
        left: set when a call's connection ended before its answer did.
        gate: what /gate and /slow wait for.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    left: trio.Event = field(default_factory=trio.Event)
    gate: trio.Event = field(default_factory=trio.Event)
    begun: trio.Event = field(default_factory=trio.Event)

    def forget(self) -> None:
        """Be as new."""
        self.calls, self.bodies = [], []
        self.left, self.gate, self.begun = trio.Event(), trio.Event(), trio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        request = exchange.request
        path = request.path
        if path == "/":
            await exchange.respond(200, [], b"ready")
            return
        self.calls.append((request.method, request.target))
        name = path.strip("/").partition("/")[0]
        await getattr(self, f"do_{name}", self.do_missing)(exchange)

    async def do_missing(self, exchange: Exchange) -> None:
        await exchange.respond(404, [(b"content-type", b"text/plain")], b"no such page")

    async def do_echo(self, exchange: Exchange) -> None:
        body = await exchange.receive_all(1 << 30)
        self.bodies.append(body)
        kind = next((value for name, value in exchange.request.headers if name == b"content-type"), b"text/plain")
        await exchange.respond(200, [(b"content-type", kind), (b"x-own", b"1"), (b"x-own", b"2")], body)

    async def do_fields(self, exchange: Exchange) -> None:
        lines = [b"%b: %b" % pair for pair in exchange.request.headers]
        await exchange.respond(200, [(b"content-type", b"text/plain")], b"\n".join(lines))

    async def do_trailers(self, exchange: Exchange) -> None:
        size = len(await exchange.receive_all(1 << 30))
        lines = [b"%b: %b" % pair for pair in exchange.trailers]
        await exchange.respond(200, [(b"content-type", b"text/plain")], b"\n".join([b"%d" % size, *lines]))

    async def do_events(self, exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        await exchange.send(b"data: 1\n\n")
        await self.gate.wait()
        await exchange.send(b"data: 2\n\n")
        await exchange.end()

    async def do_slow(self, exchange: Exchange) -> None:
        body = await exchange.receive_all(1 << 20)
        self.bodies.append(body)
        self.begun.set()
        await self.gate.wait()
        await exchange.respond(200, [(b"content-type", b"application/json")], body or b"{}")

    async def do_hang(self, exchange: Exchange) -> None:
        self.begun.set()
        await exchange.send_head(200, [])
        await exchange.send(b"first")
        try:
            await trio.sleep_forever()
        finally:
            self.left.set()

    async def do_silent(self, exchange: Exchange) -> None:
        self.begun.set()
        try:
            await trio.sleep_forever()
        finally:
            self.left.set()

    async def do_break(self, exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-length", b"1000")])
        await exchange.send(b"half")
        await trio.sleep(0.2)  # a reset overtakes what was sent before it
        await exchange.abort()

    async def do_drop(self, exchange: Exchange) -> None:
        await exchange.abort()

    async def do_status(self, exchange: Exchange) -> None:
        status = int(exchange.request.path.rpartition("/")[2])
        await exchange.respond(
            status, [(b"content-type", b"text/plain"), (b"etag", b'"e"')], b"" if status in (204, 304) else b"said"
        )

    async def do_big(self, exchange: Exchange) -> None:
        size = int(exchange.request.path.rpartition("/")[2])
        await exchange.send_head(200, [(b"content-length", b"%d" % size)])
        left = size
        while left:
            piece = PIECE[:left]
            left -= len(piece)
            await exchange.send(piece)
        await exchange.end()

    async def do_swallow(self, exchange: Exchange) -> None:
        digest = hashlib.sha256()
        count = 0
        exchange.max_body_bytes = None
        while data := await exchange.receive():
            digest.update(data)
            count += len(data)
        await exchange.respond_json(200, {"bytes": count, "sha256": digest.hexdigest()})

    async def do_chat(self, exchange: Exchange) -> None:
        stream = await exchange.upgrade([(b"sec-websocket-accept", b"x")])
        while data := await stream.receive_some(65536):
            await stream.send_all(data.upper())
        await stream.send_all(b"bye")
        await stream.send_eof()
