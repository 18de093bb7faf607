"""Receipts that were not acknowledged are offered again, on `/ngpu/receipts/1.0.0`, until they are.

Most receipts leave as trailers and their acknowledgements come back here by themselves. Offered are: at once,
receipts no stream could take (a client that left, an upgraded connection); at connect, everything owed; from then on,
what has been owed for `OFFER_AFTER_S`. All of it is idempotent, so a receipt offered twice costs bytes and nothing
else. At most `WINDOW` offers are under way.

A receipt owed to a bootstrap that has been away for `SIBLING_AFTER_S` is offered to others of its service, which
share its store and may acknowledge for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.errors import BootstrapMisbehaved
from ngpu_node.ledger import Ledger, Owed, Written
from ngpu_node.metrics import NodeMetrics
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_protocol.acknowledgements import SignedAcknowledgement, VerdictKind
from ngpu_protocol.control import MAX_MESSAGE_BYTES, Ack, Gap, Head, Offer, decode_receipts, encode_message
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.gap_claims import check_gap_claim, claimed_gap
from ngpu_protocol.identity import Address
from ngpu_protocol.observations import SignedObservation
from ngpu_protocol.p2p import receive_frame, send_frame
from ngpu_protocol.receipts import ReceiptLink
from ngpu_protocol.stand_ins import SignedStandIn

log = structlog.get_logger(__name__)

OFFER_AFTER_S = 30.0
SIBLING_AFTER_S = 60.0
WINDOW = 64
MAX_GAPS = 16

Place = tuple[Address, int]


class Courier:
    """What all links share: the ledger, and which receipts want to leave at once."""

    def __init__(
        self,
        ledger: Ledger,
        trust: Trust,
        *,
        node: Address,
        chain_id: int,
        metrics: NodeMetrics,
        away_s: Callable[[Address], float],
        offer_after_s: float = OFFER_AFTER_S,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Put the parts together.

        Args:
            away_s: for how long there has been no connection to a bootstrap; 0 while there is one.
        """
        self._ledger = ledger
        self._trust = trust
        self._node = node
        self._chain_id = chain_id
        self._metrics = metrics
        self._away_s = away_s
        self._offer_after_s = offer_after_s
        self._clock_ms = clock_ms
        # what is in the ledger already: every acknowledgement of a sibling brings it again
        self._stand_ins: dict[tuple[Address, Address], bytes] = {}
        self._urgent: dict[Address, set[int]] = {b.address: set() for b in trust}
        self._wake = Changes()

    def undelivered(self, written: Written) -> None:
        """Offer *written* as soon as a stream to its bootstrap is there. A restart offers everything owed anyway."""
        receipt = written.signed.receipt
        urgent = self._urgent.get(receipt.bootstrap)
        # Bounded: what does not fit is offered with everything else that is owed for long enough.
        if urgent is not None and len(urgent) < 10_000:
            urgent.add(receipt.sequence)
            self._wake.announce()

    async def serve(self, bootstrap: TrustedBootstrap, stream: trio.abc.Stream) -> None:
        """Offer and take acknowledgements on *stream* until it ends.

        Raises:
            BootstrapMisbehaved: what came is no message of the protocol.
            trio.BrokenResourceError: the connection was lost.
        """
        session = _Session(self, bootstrap, stream)
        await session.run()

    def _siblings_away(self, bootstrap: TrustedBootstrap) -> list[Address]:
        """Return whose receipts a stream to *bootstrap* carries besides its own."""
        siblings = [a for a in self._trust.members(bootstrap.service) if a != bootstrap.address]
        return [a for a in siblings if self._away_s(a) >= SIBLING_AFTER_S]


class _Session:
    """One receipts stream."""

    def __init__(self, courier: Courier, bootstrap: TrustedBootstrap, stream: trio.abc.Stream) -> None:
        self._courier = courier
        self._bootstrap = bootstrap
        self._stream = stream
        self._offered_at: dict[Place, float] = {}
        self._gaps: list[tuple[int, int]] = []  # first and last number
        self._progress = Changes()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._offer_for_ever)
            await self._receive()
            nursery.cancel_scope.cancel()

    # -- what comes ----------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while (frame := await receive_frame(self._stream, MAX_MESSAGE_BYTES)) is not None:
            try:
                message = decode_receipts(frame)
            except MalformedError as error:
                raise BootstrapMisbehaved(f"on the receipts stream: {error}") from error
            if isinstance(message, Ack):
                self._acknowledge(message)
            elif isinstance(message, Gap):
                self._gap(message)
            elif isinstance(message, Head):
                await self._adopt(message)

    def _acknowledge(self, message: Ack) -> None:
        courier = self._courier
        try:
            signed = SignedAcknowledgement.from_bytes(message.acknowledgement)
            ack = signed.acknowledgement
            if ack.node != courier._node:
                raise MalformedError("acknowledgement", f"it is for {ack.node}")
            if signed.signer(courier._chain_id) != ack.bootstrap:
                raise MalformedError("acknowledgement", f"{ack.bootstrap} did not sign it")
        except (MalformedError, SignatureError) as error:
            log.info("acknowledgement_refused", bootstrap=self._bootstrap.address, reason=str(error))
            return
        if not courier._trust.same_service(ack.bootstrap, self._bootstrap.address):
            log.info("acknowledgement_refused", bootstrap=self._bootstrap.address, reason=f"signed by {ack.bootstrap}")
            return
        among = courier._trust.members(self._bootstrap.service)
        if message.stand_in:
            self._keep_stand_in(message.stand_in, ack.bootstrap)
        courier._ledger.acknowledge(signed, among, courier._clock_ms(), self._observed(message, signed))
        courier._metrics.acknowledged(ack.verdict)
        if ack.verdict != VerdictKind.VERIFIED:
            log.warning(
                "receipt_not_verified",
                bootstrap=ack.bootstrap,
                sequence=ack.sequence,
                verdict=ack.verdict,
                reason=ack.reason,
            )
        if self._offered_at:
            for address in among:
                self._offered_at.pop((address, ack.sequence), None)
            self._progress.announce()

    def _observed(self, message: Ack, acknowledgement: SignedAcknowledgement) -> bytes:
        """Return the observation that came with a dispute; empty where it is none by the one who judged."""
        if not message.observation:
            return b""
        ack = acknowledgement.acknowledgement
        try:
            signed = SignedObservation.from_bytes(message.observation)
            said = signed.observation
            if (said.receipt_hash, said.bootstrap) != (ack.receipt_hash, ack.bootstrap):
                raise MalformedError("observation", "of another receipt, or of another bootstrap")
            if signed.signer(self._courier._chain_id) != ack.bootstrap:
                raise MalformedError("observation", f"{ack.bootstrap} did not sign it")
        except (MalformedError, SignatureError) as error:
            log.info("observation_refused", bootstrap=self._bootstrap.address, reason=str(error))
            return b""
        return message.observation

    def _keep_stand_in(self, wire: bytes, acknowledged_by: Address) -> None:
        """Keep the word that came with a sibling's acknowledgement: others need it to believe that one."""
        courier = self._courier
        try:
            signed = SignedStandIn.from_bytes(wire)
            orderer = signed.stand_in.bootstrap
            if not signed.says(orderer, acknowledged_by, courier._chain_id):
                raise MalformedError("stand-in", f"not {orderer}'s word for {acknowledged_by}")
            if not courier._trust.same_service(orderer, acknowledged_by):
                raise MalformedError("stand-in", f"{orderer} is of another service")
        except MalformedError as error:
            log.info("stand_in_refused", bootstrap=self._bootstrap.address, reason=str(error))
            return
        if courier._stand_ins.get((orderer, acknowledged_by)) != wire:
            courier._stand_ins[orderer, acknowledged_by] = wire
            courier._ledger.remember_stand_in(signed)

    def _gap(self, message: Gap) -> None:
        if message.to_sequence < message.from_sequence:
            raise BootstrapMisbehaved(f"a gap from {message.from_sequence} to {message.to_sequence}")
        if message.claim:
            self._keep_claim(message.claim)
        self._send_again(message.from_sequence, message.to_sequence)

    def _send_again(self, first: int, last: int) -> None:
        if (first, last) not in self._gaps and len(self._gaps) < MAX_GAPS:
            self._gaps.append((first, last))
            self._courier._wake.announce()

    def _keep_claim(self, wire: bytes) -> None:
        """Keep the bootstrap's word that it was not given receipts of ours: the owner's side of the evidence."""
        courier, bootstrap = self._courier, self._bootstrap.address
        try:
            signed = check_gap_claim(wire, node=courier._node, bootstrap=bootstrap, chain_id=courier._chain_id)
            gap = claimed_gap(signed.observation)
        except MalformedError as error:
            log.info("gap_claim_refused", bootstrap=bootstrap, reason=str(error))
            return
        log.warning("receipts_claimed_withheld", bootstrap=bootstrap, first=gap.from_sequence, last=gap.to_sequence)
        courier._ledger.remember_gap_claim(bootstrap, gap, wire, courier._clock_ms())

    async def _adopt(self, message: Head) -> None:
        """Go on from the bootstrap's last link, or have it go on from ours.

        What it once acknowledged and holds no more (its backup was restored) nothing else would ever bring back: what
        is owed is offered anyway, and a gap it sees only once there is a receipt beyond.
        """
        bootstrap, theirs = self._bootstrap.address, ReceiptLink(message.sequence, message.hash)
        try:
            higher = await self._courier._ledger.adopt_head(bootstrap, theirs)
        except ValueError as error:
            raise BootstrapMisbehaved(str(error)) from error
        if theirs.sequence < higher.sequence:
            self._send_again(theirs.sequence + 1, higher.sequence)

    # -- what goes -----------------------------------------------------------------------------------------------------

    async def _offer_for_ever(self) -> None:
        courier = self._courier
        # At connect everything is due: a trailer that was lost with the last connection leaves no other trace.
        written_before_ms = courier._clock_ms() + 1
        next_round_s = trio.current_time()
        while True:
            seen = courier._wake.count
            await self._offer_urgent()
            await self._fill_gaps()
            if trio.current_time() >= next_round_s:
                await self._offer_owed(self._bootstrap.address, written_before_ms)
                for address in courier._siblings_away(self._bootstrap):
                    await self._offer_some(address, written_before_ms)
                next_round_s = trio.current_time() + courier._offer_after_s / 2
            with trio.move_on_at(next_round_s):
                await courier._wake.beyond(seen)
            written_before_ms = courier._clock_ms() - int(courier._offer_after_s * 1000)

    async def _offer_urgent(self) -> None:
        address = self._bootstrap.address
        urgent = self._courier._urgent[address]
        while urgent:
            sequence = min(urgent)
            for owed in await self._courier._ledger.between(address, sequence, sequence):
                await self._offer(owed)
            urgent.discard(sequence)

    async def _fill_gaps(self) -> None:
        while self._gaps:
            gap = first, last = self._gaps[0]
            while page := await self._courier._ledger.between(self._bootstrap.address, first, last):
                for owed in page:
                    if (owed.bootstrap, owed.sequence) not in self._offered_at:  # else it is on its way
                        await self._make_room()
                        await self._offer(owed)
                first = page[-1].sequence + 1
            self._gaps.remove(gap)

    async def _offer_owed(self, address: Address, written_before_ms: int) -> None:
        after = 0
        ledger = self._courier._ledger
        while page := await ledger.owed(address, written_before_ms=written_before_ms, after_sequence=after):
            after = page[-1].sequence
            for owed in page:
                offered_at = self._offered_at.get((address, owed.sequence))
                if offered_at is None or trio.current_time() - offered_at >= self._courier._offer_after_s:
                    await self._make_room()
                    await self._offer(owed)

    async def _offer_some(self, address: Address, written_before_ms: int) -> None:
        """Offer a sibling's oldest receipts as far as there is room: they must not hold up this bootstrap's own."""
        room = WINDOW - len(self._offered_at)
        if room > 0:
            for owed in await self._courier._ledger.owed(address, written_before_ms=written_before_ms, limit=room):
                await self._offer(owed)

    async def _offer(self, owed: Owed) -> None:
        self._offered_at[owed.bootstrap, owed.sequence] = trio.current_time()
        await send_frame(self._stream, encode_message(Offer(order=owed.signed_order, receipt=owed.signed_receipt)))
        self._courier._metrics.offers += 1

    async def _make_room(self) -> None:
        """Wait until fewer than `WINDOW` offers are unanswered; one that stays so for long no longer counts."""
        while len(self._offered_at) >= WINDOW:
            oldest = min(self._offered_at, key=lambda place: self._offered_at[place])
            due = self._offered_at[oldest] + self._courier._offer_after_s
            seen = self._progress.count
            with trio.move_on_at(due) as waiting:
                await self._progress.beyond(seen)
            if waiting.cancelled_caught:
                self._offered_at.pop(oldest, None)
