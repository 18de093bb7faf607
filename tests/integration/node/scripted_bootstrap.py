"""A bootstrap whose every word the test decides, on a real libp2p host on loopback, and a node's daemon to talk to."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.drain import Drain
from ngpu_daemon.notify import Notifier
from ngpu_node.config import NodeSettings
from ngpu_node.daemon import Node
from ngpu_protocol.acknowledgements import Acknowledgement, sign_acknowledgement
from ngpu_protocol.control import (
    CONTROL_PROTOCOL,
    MAX_MESSAGE_BYTES,
    RECEIPTS_PROTOCOL,
    Ack,
    Desired,
    Head,
    Heartbeat,
    Hello,
    Message,
    Offer,
    Welcome,
    decode_control,
    decode_receipts,
    encode_message,
)
from ngpu_protocol.http1 import Client, Headers
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import SignedOrder, TaskOrder, sign_order
from ngpu_protocol.p2p import Host, P2PStream, open_host, receive_frame, send_frame
from ngpu_protocol.receipts import FIRST_PREVIOUS, SignedReceipt
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.integration.node.rig import Answer, eventually, judged
from tests.unit.node.builders import BOOTSTRAP, CHAIN_ID, NODE, task_id

_numbers = itertools.count(5000)


class ScriptedBootstrap:
    """One bootstrap. What nodes said is in its lists; what it says comes from the test."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.host: Host
        self.hellos: list[Hello] = []
        self.heartbeats: list[Heartbeat] = []
        self.byes: list[str] = []
        self.offers: list[tuple[SignedOrder, SignedReceipt]] = []
        self.control: P2PStream | None = None
        self.receipts: P2PStream | None = None
        self.welcome: dict[str, Any] = {}
        self.answer: Message | None = None
        self.head: Head | None = None
        self.acknowledges = True
        self.streams: dict[str, Client] = {}

    @property
    def multiaddr(self) -> str:
        return next(address for address in self.host.addresses if address.startswith("/ip4/127.0.0.1/"))

    # -- what the protocols say ----------------------------------------------------------------------------------------

    async def on_control(self, stream: P2PStream) -> None:
        frame = await receive_frame(stream, MAX_MESSAGE_BYTES)
        assert frame is not None
        hello = decode_control(frame)
        assert isinstance(hello, Hello)
        assert hello.node == stream.remote_address
        self.hellos.append(hello)
        values: dict[str, Any] = {"network": hello.network, "version": 1, "service": "acme", "now_ms": wall_ms()}
        answer = self.answer or Welcome(**{**values, **self.welcome})
        await send_frame(stream, encode_message(answer))
        if self.answer is not None:
            return
        self.control = stream
        while (frame := await receive_frame(stream, MAX_MESSAGE_BYTES)) is not None:
            message = decode_control(frame)
            if isinstance(message, Heartbeat):
                self.heartbeats.append(message)
            else:
                self.byes.append(str(message))

    async def on_receipts(self, stream: P2PStream) -> None:
        self.receipts = stream
        head = self.head or Head(sequence=0, hash=FIRST_PREVIOUS)
        await send_frame(stream, encode_message(head))
        while (frame := await receive_frame(stream, MAX_MESSAGE_BYTES)) is not None:
            message = decode_receipts(frame)
            assert isinstance(message, Offer)
            receipt = SignedReceipt.from_bytes(message.receipt)
            self.offers.append((SignedOrder.from_bytes(message.order), receipt))
            if self.acknowledges:
                await self.acknowledge(receipt)

    async def acknowledge(self, receipt: SignedReceipt, verdict: str = "verified", **changes: Any) -> None:
        """Send an acknowledgement, true or with *changes*."""
        link = receipt.link(CHAIN_ID)
        values: dict[str, Any] = {
            "receipt_hash": link.hash,
            "node": receipt.receipt.node,
            "bootstrap": self.account.address,
            "sequence": link.sequence,
            "verdict": verdict,
            "reason": "",
            "at_ms": wall_ms(),
        }
        signed = sign_acknowledgement(Acknowledgement(**{**values, **changes}), self.account, CHAIN_ID)
        await self.say_on_receipts(Ack(acknowledgement=signed.wire))

    async def say_on_receipts(self, message: Message) -> None:
        await eventually(lambda: self.receipts is not None)
        assert self.receipts is not None
        await send_frame(self.receipts, encode_message(message))

    async def wish(self, *specs: WorkspaceSpec, as_of_ms: int = 0) -> None:
        """Tell the node what is wanted."""
        await eventually(lambda: self.control is not None)
        assert self.control is not None
        await send_frame(self.control, encode_message(Desired(deployments=specs, as_of_ms=as_of_ms)))

    # -- what it orders ------------------------------------------------------------------------------------------------

    def order(self, account: Account | None = None, **changes: Any) -> SignedOrder:
        signer = account or self.account
        hello = self.hellos[-1]
        values: dict[str, Any] = {
            "task_id": task_id(next(_numbers)),
            "attempt": 1,
            "bootstrap": signer.address,
            "node": hello.node,
            "session": hello.session,
            "workspace": "7",
            "revision": 1,
            "port": 8080,
            "method": "POST",
            "target": "/echo",
            "detach": False,
            "issued_at_ms": wall_ms(),
            "deadline_ms": wall_ms() + 20_000,
        }
        return sign_order(TaskOrder(**{**values, **changes}), signer, CHAIN_ID)

    def client(self, node: Account = NODE) -> Client:
        """Return the pooled client over streams of the connection the node made last."""
        name = f"{node.peer_id} {len(self.hellos)}"
        if name not in self.streams:

            async def open_one() -> trio.abc.Stream:
                return await self.host.open_stream(node.peer_id, "/http/1.1", timeout_s=30)

            self.streams[name] = Client(open_one, authority="node", max_connections=64)
        return self.streams[name]

    async def send(
        self, signed: SignedOrder, body: bytes = b"", headers: Headers | None = None, node: Account = NODE
    ) -> Answer:
        """Send an order with its request and judge what comes back."""
        order = signed.order
        target = f"/ngpu/v1/workspaces/{order.workspace}/ports/{order.port}{order.target}"
        fields = [(b"ngpu-order", signed.encode().encode()), *(headers or [])]
        sent_at = wall_ms()
        async with self.client(node).request(order.method, target, fields, body) as response:
            content = b"".join([piece async for piece in response.body()])
            found = [*response.headers, *response.trailers]
        return judged(signed, sent_at, response.status, found, body, content)

    async def ask(self, body: bytes = b"", **changes: Any) -> Answer:
        return await self.send(self.order(**changes), body)

    async def until_ready(self, workspace: str = "7") -> None:
        """Wait until the node says that it serves *workspace*."""

        def ready() -> bool:
            states = self.heartbeats[-1].deployments if self.heartbeats else ()
            return any(state.workspace == workspace and state.state == "ready" for state in states)

        await eventually(ready)


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def a_bootstrap(account: Account = BOOTSTRAP, port: int = 0) -> AsyncIterator[ScriptedBootstrap]:
    """Run a bootstrap for the duration of the context."""
    bootstrap = ScriptedBootstrap(account)
    handlers = {CONTROL_PROTOCOL: bootstrap.on_control, RECEIPTS_PROTOCOL: bootstrap.on_receipts}
    listen = [f"/ip4/127.0.0.1/tcp/{port}"]
    async with open_host(account, listen=listen, network=network_named("local"), handlers=handlers) as host:
        bootstrap.host = host
        yield bootstrap


def settings(data_dir: Path, *bootstraps: ScriptedBootstrap | str, **changes: Any) -> NodeSettings:
    """Return a node's settings; *bootstraps* share one service."""
    multiaddrs = [one if isinstance(one, str) else one.multiaddr for one in bootstraps]
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "network": "local",
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "model_listen": "127.0.0.1:0",
        "engine": "none",
        "drain_s": 5,
        "bootstraps": [{"multiaddrs": [one], "service": "acme"} for one in multiaddrs],
    }
    return NodeSettings(**{**values, **changes})


class RunningNode:
    """A daemon in this process."""

    def __init__(self, node: Node, drain: Drain, data_dir: Path) -> None:
        self.node = node
        self.drain = drain
        self.data_dir = data_dir
        self.ended = trio.Event()


@asynccontextmanager
async def a_node(chosen: NodeSettings, account: Account = NODE) -> AsyncIterator[RunningNode]:
    """Run a node's daemon for the duration of the context; it is drained at the end."""
    directory = DataDirectory(chosen.data_dir)
    directory.prepare()
    drain = Drain()
    running = RunningNode(Node(chosen, account, directory, drain=drain, notifier=Notifier()), drain, chosen.data_dir)

    async def run() -> None:
        await running.node.run()
        running.ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await eventually(lambda: (chosen.data_dir / "node.json").exists())
        yield running
        if not drain.requested.is_set():
            drain.request("the test ends")
        drain.immediate.set()
        with trio.fail_after(60):
            await running.ended.wait()
