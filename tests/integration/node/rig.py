"""An executor with a real ledger, between a workspace and a bootstrap that are both in this process, on loopback TCP.

The bootstrap's side is scripted by the test: `Rig.order` builds orders, `Rig.ask` sends one and judges the receipt
as a bootstrap would.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from prometheus_client import CollectorRegistry

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment
from ngpu_node.execution.admission import AdmissionState
from ngpu_node.execution.attempts import Attempts
from ngpu_node.execution.executor import Executor
from ngpu_node.execution.spool import Spool, SpoolLimits
from ngpu_node.ledger import Ledger, Written
from ngpu_node.metrics import NodeMetrics
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.http1 import (
    Client,
    Exchange,
    Handler,
    Headers,
    Limits,
    Remote,
    header,
    serve_stream,
    serve_tcp,
    tcp_opener,
)
from ngpu_protocol.http1.tcp import open_listeners
from ngpu_protocol.identity import Account
from ngpu_protocol.orders import SignedOrder, TaskOrder, sign_order
from ngpu_protocol.receipts import SignedReceipt
from ngpu_protocol.verification import Observed, Verdict, verify_receipt
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.unit.node.builders import BOOTSTRAP, CHAIN_ID, NODE, SESSION, SIBLING, task_id

GPU = b"\x99" * 32
_numbers = itertools.count(1)


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Places:
    """Deployments by service and workspace, as `Deployments` looks them up."""

    here: dict[tuple[str, str], dict[int, Deployment]] = field(default_factory=dict)

    def revisions(self, service: str, workspace: str) -> dict[int, Deployment]:
        return self.here.get((service, workspace), {})


@dataclass
class Answer:
    """What came back, and the receipt with a bootstrap's verdict on it."""

    status: int
    headers: Headers
    body: bytes
    receipt: SignedReceipt | None
    verdict: Verdict | None

    def field(self, name: str) -> str | None:
        value = header(self.headers, name.encode())
        return None if value is None else value.decode()


class Rig:
    """The executor under test and everything around it."""

    def __init__(
        self, attempts: Attempts, ledger: Ledger, deployment: Deployment, spool: Spool, client: Client
    ) -> None:
        self.attempts = attempts
        self.ledger = ledger
        self.deployment = deployment
        self.spool = spool
        self.client = client
        self.undelivered: list[Written] = []
        self.peer = BOOTSTRAP.address
        self.address = ("", 0)

    def order(self, account: Account = BOOTSTRAP, **changes: Any) -> SignedOrder:
        now = wall_ms()
        values: dict[str, Any] = {
            "task_id": task_id(next(_numbers)),
            "attempt": 1,
            "bootstrap": account.address,
            "node": NODE.address,
            "session": SESSION,
            "workspace": "7",
            "revision": 1,
            "port": 8080,
            "method": "POST",
            "target": "/echo",
            "detach": False,
            "issued_at_ms": now,
            "deadline_ms": now + 20_000,
        }
        return sign_order(TaskOrder(**{**values, **changes}), account, CHAIN_ID)

    @staticmethod
    def target(order: TaskOrder) -> str:
        return f"/ngpu/v1/workspaces/{order.workspace}/ports/{order.port}{order.target}"

    @asynccontextmanager
    async def request(self, signed: SignedOrder, headers: Headers | None = None, body: Any = b"") -> AsyncIterator[Any]:
        fields = [(b"ngpu-order", signed.encode().encode()), *(headers or [])]
        async with self.client.request(signed.order.method, self.target(signed.order), fields, body) as response:
            yield response

    async def ask(
        self,
        method: str = "POST",
        target: str = "/echo",
        body: bytes = b"",
        headers: Headers | None = None,
        **changes: Any,
    ) -> Answer:
        """Send one order with its request, take the whole answer, judge the receipt."""
        signed = self.order(method=method, target=target, **changes)
        return await self.send(signed, headers, body)

    async def send(self, signed: SignedOrder, headers: Headers | None = None, body: bytes = b"") -> Answer:
        sent_at = wall_ms()
        async with self.request(signed, headers, body) as response:
            content = b"".join([piece async for piece in response.body()])
            fields = [*response.headers, *response.trailers]
        return judged(signed, sent_at, response.status, fields, body, content)

    async def settled(self) -> None:
        """Wait until no attempt runs."""
        await eventually(lambda: not self.attempts.running)

    async def receipts(self) -> list[SignedReceipt]:
        found = await self.ledger.between(BOOTSTRAP.address, 1, 10**6, limit=1000)
        return [SignedReceipt.from_bytes(one.signed_receipt) for one in found]


async def eventually(holds: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Wait until *holds*; what is looked at has no event of its own."""
    with trio.fail_after(timeout_s):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.005)


def judged(signed: SignedOrder, sent_at: int, status: int, fields: Headers, body: bytes, content: bytes) -> Answer:
    text = header(fields, b"ngpu-receipt")
    if text is None:
        return Answer(status, fields, content, None, None)
    receipt = SignedReceipt.decode(text)
    instead = header(fields, b"ngpu-error") is not None
    answered = b"" if instead else content
    seen = Observed(
        request_hash=hashlib.sha256(body).digest(),
        request_bytes=len(body),
        status=0 if instead else status,
        response_hash=hashlib.sha256(answered).digest(),
        response_bytes=len(answered),
        sent_at_ms=sent_at,
        ended_at_ms=wall_ms(),
    )
    verdict = verify_receipt(receipt, signed.order, seen, last=None, chain_id=CHAIN_ID, offered_gpus=[GPU])
    return Answer(status, fields, content, receipt, verdict)


@asynccontextmanager
async def a_rig(
    tmp_path: Path,
    workspace: Handler,
    *,
    concurrency: int = 8,
    max_body_bytes: int = 200_000_000,
    spool_limits: SpoolLimits | None = None,
    session: bytes = SESSION,
) -> AsyncIterator[Rig]:
    """Run everything for the duration of the context."""
    metrics = NodeMetrics(CollectorRegistry())
    changes = Changes()
    tmp_path.mkdir(exist_ok=True)  # noqa: ASYNC240
    ledger = await Ledger.open(tmp_path / "ledger.db", NODE, CHAIN_ID)
    spool = Spool(tmp_path / "spool", ledger, spool_limits or SpoolLimits())
    try:
        async with trio.open_nursery() as nursery:
            (address, *_) = await nursery.start(partial(serve_tcp, workspace, host="127.0.0.1", port=0))
            upstream = Upstream("127.0.0.1", address.port, max_connections=256)
            spec = WorkspaceSpec(id="7", name="echo", image="echo", ports=[8080], concurrency=concurrency)
            deployment = Deployment("acme", spec, phase=DeploymentPhase.READY, gpus=(GPU,))
            deployment.upstream = lambda port: upstream
            state: AdmissionState[Deployment] = AdmissionState(
                node=NODE.address,
                session=session,
                chain_id=CHAIN_ID,
                trust=Trust(
                    [
                        TrustedBootstrap(BOOTSTRAP.address, ("/ip4/127.0.0.1/tcp/1",), "acme"),
                        TrustedBootstrap(SIBLING.address, ("/ip4/127.0.0.1/tcp/2",), "acme"),
                    ]
                ),
                deployments=Places({("acme", "7"): {1: deployment}}),
                slots=64,
                max_body_bytes=max_body_bytes,
            )
            undelivered: list[Written] = []
            attempts = Attempts(state, ledger=ledger, metrics=metrics, changes=changes, undelivered=undelivered.append)
            executor = Executor(attempts, spool, metrics)
            await nursery.start(executor.run)
            rig = Rig(attempts, ledger, deployment, spool, Client(_refuse))
            rig.undelivered = undelivered
            listeners = await open_listeners("127.0.0.1", 0)
            rig.address = listeners[0].socket.getsockname()[:2]

            async def front(stream: trio.SocketStream) -> None:
                remote = Remote(peer=str(rig.peer))
                await serve_stream(stream, executor.handle, limits=Limits(max_head_bytes=65536), remote=remote)

            nursery.start_soon(trio.serve_listeners, front, listeners)
            rig.client = Client(tcp_opener(*rig.address), authority="node", max_connections=256)
            with trio.fail_after(60):
                yield rig
            await rig.client.aclose()
            await upstream.aclose()
            nursery.cancel_scope.cancel()
    finally:
        await ledger.aclose()


async def _refuse() -> trio.abc.Stream:
    raise OSError("not yet")


async def echo(exchange: Exchange) -> None:
    """The simplest workspace: the body comes back."""
    body = await exchange.receive_all(300_000_000)
    await exchange.respond(200, [(b"content-type", b"application/octet-stream")], body)
