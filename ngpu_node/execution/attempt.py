"""One admitted attempt while it runs: what has gone through so far, and the receipt that follows from it.

No I/O. The counts and hashes here are what the receipt swears to, so they are taken in one place: each byte of the
request once, when it has come from the bootstrap; each byte of the answer once, just before it is sent on. An attempt
that is cut short has therefore never received more than the bootstrap sent, nor sent less than arrived there, which
is what the bootstrap checks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import trio

from ngpu_node.deployments import Deployment
from ngpu_node.execution.admission import Admitted, Held
from ngpu_node.execution.meter import Holding, Reading
from ngpu_node.upstreams import Upstream
from ngpu_protocol.identity import Address
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipts import FIRST_PREVIOUS, Outcome, TaskReceipt

Key = tuple[str, str, int]


@dataclass(slots=True, eq=False)
class Passed:
    """Bytes that went one way: their number and SHA-256."""

    count: int
    hash: hashlib._Hash

    @classmethod
    def nothing(cls) -> Passed:
        return cls(0, hashlib.sha256())

    def add(self, data: bytes) -> None:
        self.count += len(data)
        self.hash.update(data)


class Attempt:
    """The state of one attempt.

    Attributes:
        beside: the slot it runs in, where that is another task's.
        key: (service, task id, attempt number), how it is asked for.
        scope: cancelling it ends the work on the workspace; its deadline is the order's.
        stop_outcome: why the scope was cancelled, where that was not the deadline.
        status: the workspace's, 0 until it gave one.
        started_at_ms: by this node's clock.
        target: what the upstream is asked for: the order's, or where a model server has that call.
    """

    __slots__ = (
        "admitted",
        "beside",
        "deployment",
        "detail",
        "holding",
        "key",
        "request",
        "response",
        "scope",
        "started_at_ms",
        "status",
        "stop_outcome",
        "target",
        "upstream",
    )

    def __init__(
        self,
        admitted: Admitted[Deployment],
        upstream: Upstream,
        target: str,
        holding: Holding,
        *,
        now_ms: int,
        now_s: float,
    ) -> None:
        """Begin at *now_ms* by the wall clock, *now_s* on trio's clock."""
        order = admitted.signed.order
        self.admitted = admitted
        self.beside: Held[Deployment] | None = None
        self.deployment = admitted.deployment
        self.upstream = upstream
        self.target = target
        self.holding = holding
        self.key: Key = (admitted.service, order.task_id, order.attempt)
        self.scope = trio.CancelScope(deadline=now_s + admitted.left_ms / 1000)
        self.stop_outcome: Outcome | None = None
        self.detail = ""
        self.started_at_ms = now_ms
        self.request = Passed.nothing()
        self.response = Passed.nothing()
        self.status = 0

    @property
    def signed(self) -> SignedOrder:
        return self.admitted.signed

    def stop(self, outcome: Outcome, detail: str) -> None:
        """End the work now, with *outcome* in the receipt; the first call decides."""
        if self.stop_outcome is None:
            self.stop_outcome, self.detail = outcome, detail
            self.scope.cancel()

    def draft(self, node: Address, outcome: Outcome, reading: Reading, *, ended_at_ms: int) -> TaskReceipt:
        """Return the receipt but for its place in the chain, which the ledger gives."""
        order = self.signed.order
        return TaskReceipt(
            order_hash=self.admitted.order_hash,
            node=node,
            bootstrap=order.bootstrap,
            sequence=0,
            previous=FIRST_PREVIOUS,
            image_digest=self.deployment.image_digest,
            request_hash=self.request.hash.digest(),
            request_bytes=self.request.count,
            status=self.status,
            response_hash=self.response.hash.digest(),
            response_bytes=self.response.count,
            outcome=outcome,
            started_at_ms=self.started_at_ms,
            ended_at_ms=ended_at_ms,
            duration_ms=reading.duration_ms,
            gpus=reading.gpus,
            reserved_gpu_ms=reading.reserved_gpu_ms,
            busy_gpu_ms=reading.busy_gpu_ms,
            meter=reading.meter,
        )
