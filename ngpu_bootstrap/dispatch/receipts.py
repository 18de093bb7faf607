"""The bootstrap's side of `/ngpu/receipts/1.0.0`: receipts that did not come with their answer, and acknowledgements.

Owns the receipts stream of every node. Most receipts arrive as a trailer and only their acknowledgement goes this
way. The others are offered here: the client left, the connection changed protocol or broke, one of the two sides was
restarted. An offer may come any number of times; each time the same acknowledgement goes back, and a node repeats an
offer until it has it. So nothing here needs to be sent twice: what a lost stream took with it is offered again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog
import trio

from ngpu_bootstrap.dispatch.gaps import GapWatch
from ngpu_bootstrap.dispatch.verdicts import GpuTerms, Judge, Judged
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.stand_ins import StandIns
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.records import FiledReceipt, Filing
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.acknowledgements import SignedAcknowledgement, VerdictKind
from ngpu_protocol.control import MAX_MESSAGE_BYTES, Ack, Head, Offer, UnknownMessage, decode_receipts, encode_message
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.identity import Address
from ngpu_protocol.networks import Network
from ngpu_protocol.orders import SignedOrder, TaskOrder
from ngpu_protocol.p2p import FrameError, P2PStream
from ngpu_protocol.p2p.frames import HEADER_BYTES, receive_frame, send_frame
from ngpu_protocol.receipts import FIRST_PREVIOUS, ReceiptLink, SignedReceipt
from ngpu_protocol.verification import Observed

log = structlog.get_logger(__name__)

# Acknowledgements are in no hurry: collecting them for this long makes one frame of the connection out of many.
COLLECT_S = 0.02
OUTBOX_LIMIT = 4096
BATCH_BYTES = 64 * 1024
OFFERS_AT_ONCE = 16
# A receipt offered while its attempt still runs here (a slow client reads on) waits for the attempt to end.
RUNNING_PATIENCE_S = 60.0
AWAITED_LIMIT = 10_000
# An order is receipted once. What more its node signs for it is disputed and kept as evidence, this often.
REPEATS_KEPT = 16
# How long after our side of an attempt was cut the node may take to notice and end it; its receipt counts until then.
NOTICE_MS = 10_000

AttemptKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Awaited:
    """What is known of an ended attempt whose receipt has not come."""

    seen: Observed
    gpus: GpuTerms


@dataclass(eq=False, slots=True)
class _Line:
    """One node's receipts stream, as far as sending goes."""

    outbox: list[bytes] = field(default_factory=list)
    filled: trio.Event = field(default_factory=trio.Event)

    def put(self, payload: bytes) -> None:
        if len(self.outbox) < OUTBOX_LIMIT:  # beyond it the node offers again, which empties the line in its own time
            self.outbox.append(payload)
            self.filled.set()


class ReceiptDesk:
    """Handles every node's receipts stream.

    Attributes:
        siblings: the other bootstraps of this database. What one of them ordered is judged here when a node offers it,
            which it does once that one has been away for a while.

    Args:
        own: this bootstrap's address.
        stand_ins: whose word there is for acknowledgements of siblings' orders.
        gaps: asks for what is missing.
    """

    def __init__(
        self,
        *,
        own: Address,
        network: Network,
        judge: Judge,
        stand_ins: StandIns,
        gaps: GapWatch,
        standings: Standings,
        store: Store,
        metrics: Metrics,
        now_ms: Callable[[], int],
    ) -> None:
        self.siblings: frozenset[str] = frozenset()
        self._own = own
        self._chain_id = network.chain_id
        self._judge = judge
        self._stand_ins = stand_ins
        self._gaps = gaps
        self._standings = standings
        self._store = store
        self._metrics = metrics
        self._now_ms = now_ms
        self._lines: dict[Address, _Line] = {}
        # an event only for those whose receipt came early, and is waited with
        self._running: dict[AttemptKey, trio.Event | None] = {}
        self._awaited: OrderedDict[AttemptKey, Awaited] = OrderedDict()

    # -- told by the dispatcher

    def attempt_began(self, order: TaskOrder) -> None:
        """Note that an attempt runs here: an early offer of its receipt waits until it ended."""
        self._running[order.task_id, order.attempt] = None

    def attempt_ended(self, order: TaskOrder, awaited: Awaited | None) -> None:
        """Note that an attempt ended here; with *awaited* its receipt is still to come, and will be judged by that."""
        key = (order.task_id, order.attempt)
        if awaited is not None:
            self._awaited[key] = awaited
            if len(self._awaited) > AWAITED_LIMIT:
                self._awaited.popitem(last=False)
        ended = self._running.pop(key, None)
        if ended is not None:
            ended.set()

    def acknowledge(self, node: Address, bootstrap: Address, acknowledgement: bytes, observation: bytes = b"") -> None:
        """Send an acknowledgement, if the node listens now; if not, it will ask by offering the receipt again.

        Args:
            bootstrap: whose order it was: a sibling's word for this bootstrap goes with it.
            observation: what was seen of a disputed receipt.
        """
        line = self._lines.get(node)
        if line is not None:
            word = b"" if bootstrap == self._own else self._word(bootstrap, self._own)
            line.put(encode_message(Ack(acknowledgement, observation, word)))

    def acknowledge_judged(self, judged: Judged) -> None:
        """Send the acknowledgement of a receipt that was judged here."""
        record = judged.record
        self.acknowledge(record.node, record.bootstrap, record.acknowledgement, record.observation)

    def note_breaks(self, filed: FiledReceipt, judged: Judged) -> None:
        """Lower the standing of a node whose chain is seen to be broken by the arrival of a receipt.

        Once, however many links break with it; and not for the receipt's own link where its verdict says so already.
        """
        own = judged.record.sequence if judged.verdict.rule == "chain" else 0
        if any(link.sequence != own for link in filed.broken):
            self._standings.disputed(judged.record.node, rule="chain", task_id=judged.record.task_id)

    def _word(self, bootstrap: Address, acknowledged_by: Address) -> bytes:
        word = self._stand_ins.word(bootstrap, acknowledged_by)
        return b"" if word is None else word.wire

    # -- the protocol

    async def handle(self, stream: P2PStream) -> None:
        """Serve one receipts stream until it ends."""
        node = stream.remote_address
        line = _Line()
        try:
            head = await self._store.chain_top(node) or ReceiptLink(0, FIRST_PREVIOUS)
            await send_frame(stream, encode_message(Head(head.sequence, head.hash)))
            self._lines[node] = line
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, stream, line)
                nursery.start_soon(self._gaps.run, node, lambda gap: line.put(encode_message(gap)))
                await self._listen(stream, node, line)
                nursery.cancel_scope.cancel()
        except* (MalformedError, FrameError) as group:
            for error in group.exceptions:
                log.info("node_misbehaved", node=node, reason=str(error))
            await stream.reset()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.reset()
        except* StoreError as group:
            log.error("receipts_not_stored", node=node, reason=str(group.exceptions[0]))
            await stream.reset()
        finally:
            if self._lines.get(node) is line:
                del self._lines[node]
        await stream.aclose()

    async def _listen(self, stream: P2PStream, node: Address, line: _Line) -> None:
        places = trio.Semaphore(OFFERS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            while (frame := await receive_frame(stream, MAX_MESSAGE_BYTES)) is not None:
                message = decode_receipts(frame)
                if isinstance(message, Offer):
                    await places.acquire()
                    nursery.start_soon(self._take_offer, message, node, line, places)
                elif not isinstance(message, UnknownMessage):
                    raise MalformedError("receipts stream", f"a {type(message).__name__} is not for a node to send")

    async def _take_offer(self, offer: Offer, node: Address, line: _Line, places: trio.Semaphore) -> None:
        try:
            order = SignedOrder.from_bytes(offer.order)
            receipt = SignedReceipt.from_bytes(offer.receipt)
            if order.order.node != node or not self._is_ours(order):
                log.info("offer_not_ours", node=node, bootstrap=order.order.bootstrap, task_id=order.order.task_id[:64])
                return
            answer = await self._file(order, receipt)
            if answer is not None:
                line.put(encode_message(answer))
        finally:
            places.release()

    def _is_ours(self, order: SignedOrder) -> bool:
        bootstrap = order.order.bootstrap
        if bootstrap != self._own and bootstrap not in self.siblings:
            return False
        try:
            return order.signer(self._chain_id) == bootstrap
        except SignatureError:
            return False

    async def _file(self, signed: SignedOrder, receipt: SignedReceipt) -> Ack | None:
        """Judge and store an offered receipt; return what to answer, None for nothing now."""
        order = signed.order
        key = (order.task_id, order.attempt)
        if key in self._running:
            running = self._running[key] = self._running[key] or trio.Event()
            with trio.move_on_after(RUNNING_PATIENCE_S) as patience:
                await running.wait()
            if patience.cancelled_caught:
                return None
        filed = [record.receipt for record in await self._store.receipts(order.task_id, order.attempt)]
        for one in filed:
            if one.raw == receipt.wire:
                return await self._as_before(order, one.acknowledgement)
        if len(filed) >= REPEATS_KEPT:
            log.info("offer_not_kept", node=order.node, task_id=order.task_id, filed=len(filed))
            return None
        awaited = self._awaited.get(key)
        if awaited is None and not filed and await self._is_open(order):
            return None  # its receipt may be on the way with its answer, here or at a sibling; it will be offered again
        judged = self._judge.judge(
            receipt,
            order,
            self._seen(order, awaited),
            gpus=await self._gpu_terms(order, awaited),
        )
        if filed:
            judged = self._judge.repeated(judged, ReceiptLink(filed[0].sequence, filed[0].hash))
        outcome = await self._store.late_receipt(replace(judged.record, order=signed.wire))
        if outcome.filing is Filing.REPEATED:  # another one was faster
            judged = self._judge.repeated(judged, ReceiptLink(outcome.first_sequence, outcome.first_hash))
            outcome = await self._store.late_receipt(replace(judged.record, order=signed.wire))
        if judged.record.authentic:  # what is not signed by the node must not cost what was seen of it
            self._awaited.pop(key, None)
        if outcome.filing is Filing.EQUIVOCATION:
            judged = self._judge.contradicted(judged, outcome.first_hash)
        log.info(
            "receipt_filed",
            task_id=order.task_id,
            attempt=order.attempt,
            node=order.node,
            sequence=receipt.receipt.sequence,
            outcome=judged.record.outcome,
            verdict=judged.verdict.kind.value,
            rule=judged.verdict.rule,
        )
        if outcome.filing is Filing.DUPLICATE:
            return await self._as_before(order, outcome.acknowledgement)
        self.note_breaks(outcome, judged)
        self._metrics.judged(judged.verdict.kind.value, judged.verdict.rule)
        self._standings.judged(order.node, judged.verdict.kind, rule=judged.verdict.rule, task_id=order.task_id)
        return Ack(judged.acknowledgement.wire, judged.record.observation, self._word(order.bootstrap, self._own))

    async def _is_open(self, order: TaskOrder) -> bool:
        """Whether the attempt is on file as one that has not ended."""
        attempts = await self._store.attempts(order.task_id)
        return any(one.attempt == order.attempt and one.ended_at_ms is None for one in attempts)

    async def _as_before(self, order: TaskOrder, acknowledgement: bytes) -> Ack | None:
        """Return what was answered when the receipt was filed."""
        if not acknowledgement:
            return None
        ack = SignedAcknowledgement.from_bytes(acknowledgement).acknowledgement
        observation = b""
        if ack.verdict == VerdictKind.DISPUTED:
            observation = await self._store.observation(order.bootstrap, order.node, ack.receipt_hash)
        return Ack(acknowledgement, observation, self._word(order.bootstrap, ack.bootstrap))

    def _seen(self, order: TaskOrder, awaited: Awaited | None) -> Observed:
        """Return what was seen of an attempt whose receipt came on its own way: when it ended, only the node saw."""
        # whatever happened to us meanwhile: the order let it run until its deadline and no longer
        end_ms = min(self._now_ms(), order.deadline_ms + NOTICE_MS)
        if awaited is None:
            return Observed(None, None, None, None, None, order.issued_at_ms, end_ms)
        seen = awaited.seen
        if order.detach or seen.ended_at_ms is None:
            return replace(seen, ended_at_ms=end_ms)
        return replace(seen, ended_at_ms=min(end_ms, seen.ended_at_ms + NOTICE_MS))

    async def _gpu_terms(self, order: TaskOrder, awaited: Awaited | None) -> GpuTerms:
        """Return which GPUs the receipt of *order* may name: as was known when it ended, else by what is on file.

        Where the session was not on file when it was ordered, the names are not judged (what was offered before may
        be missing): how many they may be still is, and a name that nobody knows has no price.
        """
        offered, most = (None, None) if awaited is None else (awaited.gpus.offered, awaited.gpus.most)
        if offered is None:
            since_ms = order.issued_at_ms
            offered = await self._store.session_gpus(order.node, order.session, order.bootstrap, since_ms) or None
        if most is None:
            spec = await self._store.workspace_spec(order.workspace, order.revision)
            most = None if spec is None else spec.get("gpu_count", 0)
        return GpuTerms(offered, most)

    async def _send(self, stream: P2PStream, line: _Line) -> None:
        while True:
            await line.filled.wait()
            await trio.sleep(COLLECT_S)
            line.filled = trio.Event()
            payloads, line.outbox = line.outbox, []
            frames = b"".join(len(payload).to_bytes(HEADER_BYTES, "big") + payload for payload in payloads)
            for start in range(0, len(frames), BATCH_BYTES):
                await stream.send_all(frames[start : start + BATCH_BYTES])
