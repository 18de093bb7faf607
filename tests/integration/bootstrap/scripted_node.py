"""A node that does what a test tells it: real keys, real libp2p, real signatures, and any behaviour on top.

It greets, reports one ready deployment of each workspace it is told to run, and answers orders with a script. The
receipts it signs are right unless the script changes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from ngpu_protocol import control
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.http1 import Exchange, Headers, Remote, header, serve_stream
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.p2p import Host, P2PStream, open_host, receive_frame, send_frame
from ngpu_protocol.receipts import FIRST_PREVIOUS, SignedReceipt, TaskReceipt, sign_receipt
from ngpu_protocol.workspaces import WorkspaceSpec

NETWORK = network_named("local")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Asked:
    """An order as it came, and how to answer it."""

    node: ScriptedNode
    exchange: Exchange
    signed: SignedOrder
    started_ms: int
    body: bytes = b""

    async def read(self) -> bytes:
        self.body = await self.exchange.receive_all(1 << 30)
        return self.body

    def receipt(
        self, status: int, answer: bytes, *, outcome: str = "complete", change: dict[str, object] | None = None
    ) -> SignedReceipt:
        """Sign the next receipt of the chain for this order."""
        ended_ms = now_ms()
        receipt = TaskReceipt(
            order_hash=self.signed.order.digest(NETWORK.chain_id),
            node=self.node.account.address,
            bootstrap=self.signed.order.bootstrap,
            sequence=self.node.sequence + 1,
            previous=self.node.head,
            image_digest=bytes(32),
            request_hash=hashlib.sha256(self.body).digest(),
            request_bytes=len(self.body),
            status=status,
            response_hash=hashlib.sha256(answer).digest(),
            response_bytes=len(answer),
            outcome=outcome,
            started_at_ms=self.started_ms,
            ended_at_ms=ended_ms,
            duration_ms=ended_ms - self.started_ms,
            gpus=(),
            reserved_gpu_ms=0,
            busy_gpu_ms=0,
            meter="none",
        )
        signed = sign_receipt(replace(receipt, **(change or {})), self.node.account, NETWORK.chain_id)  # type: ignore[arg-type]
        self.node.sequence = signed.receipt.sequence
        self.node.head = signed.receipt.digest(NETWORK.chain_id)
        return signed

    async def answer(
        self,
        status: int,
        body: bytes,
        headers: Headers | None = None,
        *,
        outcome: str = "complete",
        change: dict[str, object] | None = None,
    ) -> None:
        """Answer as a node does: chunked, the announced length beside it, the receipt as a trailer."""
        fields = list(headers or [(b"content-type", b"text/plain")])
        receipt = self.receipt(status, body, outcome=outcome, change=change)
        trailer = [(b"ngpu-receipt", receipt.encode().encode())]
        if status in (204, 304) or self.exchange.request.method == "HEAD":
            await self.exchange.respond(status, [*fields, *trailer])
            return
        await self.exchange.send_head(status, fields, more=True)
        await self.exchange.send(body, more=True)
        await self.exchange.end(trailer)

    async def refuse(self, status: int, reason: str) -> None:
        await self.exchange.respond(
            status, [(b"ngpu-refused", reason.encode())], b'{"reason": "%b", "message": "scripted"}' % reason.encode()
        )


Script = Callable[[Asked], Awaitable[None]]
Deploy = Callable[[WorkspaceSpec], control.DeploymentState]


def ready(spec: WorkspaceSpec, digest: bytes = bytes(32)) -> control.DeploymentState:
    """The usual fate of a workspace: it is ready at once."""
    return control.DeploymentState(spec.id, spec.revision, "ready", slots_free=spec.concurrency, image_digest=digest)


async def echo(asked: Asked) -> None:
    """The usual behaviour: answer with the request's body."""
    body = await asked.read()
    length = (b"ngpu-content-length", b"%d" % len(body))
    await asked.answer(200, body, [(b"content-type", b"application/octet-stream"), length])


@dataclass
class ScriptedNode:
    account: Account
    script: Script = echo
    slots: int = 64
    services: tuple[control.ServiceOffer, ...] = (control.ServiceOffer("demo", "echo"),)
    sequence: int = 0
    head: bytes = FIRST_PREVIOUS
    session: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    network: str = "local"
    orders: list[SignedOrder] = field(default_factory=list)
    acknowledged: list[SignedAcknowledgement] = field(default_factory=list)
    gaps: list[control.Gap] = field(default_factory=list)
    desired: tuple[control.DeploymentState, ...] = ()
    welcome: control.Welcome | control.Refused | None = None
    kept: dict[str, Script] = field(default_factory=dict)
    heard: trio.Event = field(default_factory=trio.Event)
    _control: P2PStream | None = None
    _receipts: P2PStream | None = None
    heads: list[control.Head] = field(default_factory=list)
    draining: bool = False
    deploy: Deploy = ready
    host: control.HostOffer | None = None
    gpus: tuple[control.GpuOffer, ...] = ()
    told: tuple[WorkspaceSpec, ...] = ()
    sealed: dict[str, bytes] = field(default_factory=dict)
    logs: bytes | None = None
    log_queries: list[str] = field(default_factory=list)

    async def serve(self, stream: P2PStream) -> None:
        await serve_stream(stream, self.handle, remote=Remote(peer=stream.remote_address), half_close=True)

    async def handle(self, exchange: Exchange) -> None:
        path = exchange.request.path
        if path.startswith("/ngpu/v1/attempts/"):
            script = self.kept.get(path.removeprefix("/ngpu/v1/attempts/"))
            if script is None:
                await exchange.respond_json(404, {"reason": "unknown_attempt", "session": self.session.hex()})
                return
            await script(Asked(self, exchange, self.orders[-1], now_ms()))
            return
        if path.endswith("/logs"):
            self.log_queries.append(exchange.request.target)
            if self.logs is None:
                await exchange.respond_json(404, {"reason": "no_container", "message": "nothing runs"})
                return
            await exchange.send_head(200, [(b"content-type", b"text/plain; charset=utf-8")], more=True)
            await exchange.send(self.logs)
            if "follow=1" in exchange.request.target:
                await trio.sleep_forever()
            await exchange.end([])
            return
        signed = SignedOrder.decode(header(exchange.request.headers, b"ngpu-order") or b"")
        assert signed.signer(NETWORK.chain_id) == signed.order.bootstrap
        self.orders.append(signed)
        await self.script(Asked(self, exchange, signed, now_ms()))

    def heartbeat(self) -> control.Heartbeat:
        return control.Heartbeat(
            at_ms=now_ms(),
            slots_free=self.slots,
            draining=self.draining,
            deployments=self.desired,
            services=self.services,
            gpus=self.gpus,
            host=self.host,
        )

    async def report(self) -> None:
        assert self._control is not None
        await send_frame(self._control, control.encode_message(self.heartbeat()))

    async def offer(self, order: SignedOrder, receipt: SignedReceipt) -> None:
        assert self._receipts is not None
        await send_frame(self._receipts, control.encode_message(control.Offer(order.wire, receipt.wire)))

    async def control_stream(self, stream: P2PStream) -> None:
        self._control = stream
        hello = control.Hello(
            network=self.network,
            version_low=1,
            version_high=1,
            session=self.session,
            node=self.account.address,
            software="scripted 1",
            now_ms=now_ms(),
            gpus=self.gpus,
            slots=self.slots,
        )
        await send_frame(stream, control.encode_message(hello))
        async with trio.open_nursery() as nursery:
            while (frame := await receive_frame(stream, control.MAX_MESSAGE_BYTES)) is not None:
                message = control.decode_control(frame)
                if isinstance(message, control.Welcome | control.Refused):
                    self.welcome = message
                    nursery.start_soon(self._beat)
                elif isinstance(message, control.Desired):
                    self.told, self.sealed = message.deployments, message.sealed
                    await self.redeploy()
                self.heard.set()
                self.heard = trio.Event()
            nursery.cancel_scope.cancel()

    async def redeploy(self) -> None:
        """Deploy what was told as `deploy` has it; a revision that serves stays until the one told is ready."""
        states: list[control.DeploymentState] = []
        for spec in self.told:
            state = self.deploy(spec)
            states.append(state)
            if state.state != "ready":
                states += [
                    old
                    for old in self.desired
                    if old.workspace == spec.id and old.revision != spec.revision and old.state == "ready"
                ]
        self.desired = tuple(states)
        await self.report()

    async def _beat(self) -> None:
        while True:
            await self.report()
            await trio.sleep(1.0)

    async def receipts_stream(self, stream: P2PStream) -> None:
        self._receipts = stream
        while (frame := await receive_frame(stream, control.MAX_MESSAGE_BYTES)) is not None:
            message = control.decode_receipts(frame)
            if isinstance(message, control.Ack):
                self.acknowledged.append(SignedAcknowledgement.from_bytes(message.acknowledgement))
            elif isinstance(message, control.Gap):
                self.gaps.append(message)
            elif isinstance(message, control.Head):
                self.heads.append(message)
            self.heard.set()
            self.heard = trio.Event()

    async def until(self, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
        with trio.fail_after(timeout_s):
            while not holds():
                await self.heard.wait()


def new_account() -> Account:
    return Account.from_key(secrets.token_bytes(32))


@asynccontextmanager
async def connected(node: ScriptedNode, multiaddr: str) -> AsyncIterator[tuple[ScriptedNode, Host]]:
    """Run *node* connected to the bootstrap at *multiaddr*."""
    async with (
        open_host(node.account, listen=[], network=NETWORK, handlers={"/http/1.1": node.serve}) as host,
        trio.open_nursery() as nursery,
    ):
        peer_id = await host.connect(multiaddr, timeout_s=30)
        stream = await host.open_stream(peer_id, control.CONTROL_PROTOCOL, timeout_s=30)
        nursery.start_soon(_quietly, node.control_stream, stream)
        receipts = await host.open_stream(peer_id, control.RECEIPTS_PROTOCOL, timeout_s=30)
        nursery.start_soon(_quietly, node.receipts_stream, receipts)
        await node.until(lambda: node.welcome is not None)
        yield node, host
        nursery.cancel_scope.cancel()


async def _quietly(serve: Callable[[P2PStream], Awaitable[None]], stream: P2PStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await serve(stream)
