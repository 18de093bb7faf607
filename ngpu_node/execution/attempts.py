"""The attempts that run: each gets its slot, deadline and meter when it begins, and ends in one receipt.

The invariant: an order that was admitted ends in exactly one receipt in the ledger, whatever ends it (answer,
deadline, a bootstrap that left, a workspace that broke, this daemon stopping), and the receipt is durable before any
byte of it leaves. Where nobody is left to take it, the courier offers it (`courier`).

How a request runs is `attached`'s and `detached`'s business; both begin and settle here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment
from ngpu_node.execution.admission import AdmissionState, Admitted, Held, take
from ngpu_node.execution.attempt import Attempt, Key
from ngpu_node.execution.meter import BusySource, GpuMeter
from ngpu_node.execution.passthrough import Ended, Sink, own_answer
from ngpu_node.execution.spool import SpooledAnswer
from ngpu_node.ledger import Ledger, StoredAnswer, Written
from ngpu_node.metrics import NodeMetrics
from ngpu_node.upstreams import Upstream
from ngpu_protocol.identity import Address
from ngpu_protocol.receipts import Outcome

log = structlog.get_logger(__name__)

#: How long writing a receipt may take before it is given up.
SETTLE_S = 30.0


@dataclass(slots=True)
class Clocks:
    """Where the time comes from; tests bring their own."""

    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    monotonic_ns: Callable[[], int] = time.monotonic_ns


class Attempts:
    """The running attempts of one node.

    Attributes:
        state: what admission decides by; its counts are kept here.
        running: the attempts that have no receipt yet.
        undelivered: told of a receipt that could not be handed to the stream that ordered it.
    """

    def __init__(
        self,
        state: AdmissionState[Deployment],
        *,
        ledger: Ledger,
        metrics: NodeMetrics,
        changes: Changes,
        undelivered: Callable[[Written], None],
        suspect: Callable[[Deployment, Upstream, str], None] = lambda deployment, upstream, reason: None,
        clocks: Clocks | None = None,
        busy: BusySource | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            changes: told when the node becomes full or stops being so.
            suspect: told of an upstream that gave no answer.
            busy: measures how busy GPUs are; None where nobody does.
        """
        self.state = state
        self.running: dict[Key, Attempt] = {}
        self.undelivered = undelivered
        self.clocks = clocks or Clocks()
        self._ledger = ledger
        self._metrics = metrics
        self._changes = changes
        self._suspect = suspect
        self._meter = GpuMeter(busy)
        self._idle = Changes()

    def running_of(self, bootstrap: Address) -> Counter[Deployment]:
        """Return how many attempts *bootstrap* ordered run on each deployment."""
        return Counter(one.deployment for one in self.running.values() if one.signed.order.bootstrap == bootstrap)

    async def drain(self, grace_s: float) -> None:
        """Refuse new orders, give running attempts *grace_s*, end the rest as `node_stopping`, and wait for that."""
        self.state.draining = True
        self._changes.announce()
        with trio.move_on_after(grace_s):
            await self._wait_idle()
        self.stop_all()
        with trio.move_on_after(SETTLE_S):
            await self._wait_idle()

    def stop_all(self) -> None:
        """End every running attempt now."""
        for attempt in list(self.running.values()):
            attempt.stop(Outcome.NODE_STOPPING, "this node is stopping")

    def break_off(self, deployment: Deployment, reason: str, outcome: Outcome = Outcome.WORKSPACE_BROKE) -> None:
        """End every running attempt of *deployment*: its workspace is gone, or has to go."""
        for attempt in list(self.running.values()):
            if attempt.deployment is deployment:
                attempt.stop(outcome, reason)

    def give_up_settling(self) -> None:
        """End the settling of attempts that has lasted longer than `SETTLE_S`; to be called now and then."""
        self._ledger.give_up(SETTLE_S)

    async def _wait_idle(self) -> None:
        while self.running:
            await self._idle.beyond(self._idle.count)

    def begin(self, admitted: Admitted[Deployment], upstream: Upstream, target: str) -> Attempt:
        """Take the slot and start the clocks of an attempt that asks *upstream* for *target*; it must be settled."""
        take(admitted, self.state)
        deployment = admitted.deployment
        holding = self._meter.start(deployment.gpus, self.clocks.monotonic_ns(), deployment)
        attempt = Attempt(admitted, upstream, target, holding, now_ms=self.clocks.wall_ms(), now_s=trio.current_time())
        self.running[attempt.key] = attempt
        attempt.beside = self.state.held.get((admitted.service, admitted.beside)) if admitted.beside else None
        if attempt.beside is not None:
            attempt.beside.beside += 1
        deployment.began()
        upstream.running += 1
        self.state.running += 1
        if self.state.running == self.state.slots:
            self._changes.announce()
        self._metrics.running += 1
        return attempt

    @contextmanager
    def admitting_beside(self, attempt: Attempt) -> Iterator[None]:
        """Let orders about the task of *attempt* run beside it meanwhile, in its slot."""
        key = attempt.key[:2]
        held = Held(attempt.deployment)
        self.state.held[key] = held
        try:
            yield
        finally:
            if self.state.held.get(key) is held:
                del self.state.held[key]

    async def settle(self, attempt: Attempt, outcome: Outcome, answer: SpooledAnswer | None = None) -> Written:
        """Free what the attempt held, write its receipt and return it. Once for each attempt.

        Not cut short by cancellation; with an *answer*, only under a shield.

        The slot is free before the receipt leaves: whoever holds the receipt may send the next order at once.

        Raises:
            LedgerUnavailable: there is no receipt, so nothing may look finished.
        """
        await self._meter.look_before_stop(attempt.holding)
        reading = self._meter.stop(attempt.holding, self.clocks.monotonic_ns())
        attempt.deployment.ended()
        if attempt.beside is not None:
            attempt.beside.beside -= 1
        attempt.upstream.running -= 1
        self.state.running -= 1
        if self.state.running == self.state.slots - 1:
            self._changes.announce()
        self._metrics.running -= 1
        draft = attempt.draft(self.state.node, outcome, reading, ended_at_ms=self.clocks.wall_ms())
        stored: StoredAnswer | None = None
        try:
            if answer is not None:
                await answer.seal()
                stored = answer.stored(attempt)
            began_s = trio.current_time()
            written = await self._ledger.write(draft, attempt.signed, stored)
            self._metrics.ledger_seconds.observe(trio.current_time() - began_s)
        finally:
            del self.running[attempt.key]
            self._idle.announce()
        self._metrics.ended(outcome, reading.duration_ms / 1000)
        log.info(
            "attempt_ended",
            task_id=attempt.key[1],
            attempt=attempt.key[2],
            workspace=attempt.signed.order.workspace,
            bootstrap=attempt.signed.order.bootstrap,
            outcome=outcome.value,
            status=attempt.status,
            request_bytes=attempt.request.count,
            response_bytes=attempt.response.count,
            duration_ms=reading.duration_ms,
            sequence=written.signed.receipt.sequence,
            detail=attempt.detail,
        )
        return written

    # -- how an attempt ended ------------------------------------------------------------------------------------------

    def outcome(self, attempt: Attempt, ended: Ended | None) -> Outcome:
        """Return what the receipt says, now that the attempt's scope was left without a cancellation from outside.

        Args:
            ended: what broke the work off, None where the answer is whole or the scope was cancelled.
        """
        if attempt.scope.cancelled_caught:
            if attempt.stop_outcome is None:
                attempt.detail = "the order's deadline passed"
            return attempt.stop_outcome or Outcome.DEADLINE
        if ended is None:
            return Outcome.COMPLETE
        attempt.detail = str(ended)
        if ended.outcome is Outcome.WORKSPACE_BROKE and not attempt.status:
            self._suspect(attempt.deployment, attempt.upstream, str(ended))
        return ended.outcome

    def outcome_when_left(self, attempt: Attempt, *, client_gone: bool) -> Outcome:
        """Return what the receipt says when the task of the ordering stream was cancelled under the attempt."""
        if attempt.stop_outcome is not None:
            return attempt.stop_outcome
        if self.state.draining and not client_gone:
            attempt.detail = "this node is stopping"
            return Outcome.NODE_STOPPING
        attempt.detail = "the bootstrap's stream ended"
        return Outcome.CLIENT_GONE

    def outcome_of_crash(self, attempt: Attempt, error: Exception) -> Outcome:
        """Return what the receipt says after a mistake of ours, and log that."""
        log.error("attempt_crashed", task_id=attempt.key[1], exc_info=error)
        attempt.detail = f"internal error: {type(error).__name__}"
        return Outcome.WORKSPACE_BROKE


async def answer_instead(sink: Sink, attempt: Attempt, outcome: Outcome) -> None:
    """Give *sink* the node's own answer, for an attempt whose workspace gave none."""
    bodiless = attempt.signed.order.method == "HEAD"
    head, body = own_answer(outcome, attempt.detail, bodiless=bodiless)
    await sink.begin(head, more=True)
    if not bodiless:
        await sink.send(body, more=True)
