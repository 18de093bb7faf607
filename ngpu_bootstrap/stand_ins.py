"""What the bootstraps of one database have signed for each other: whose acknowledgements count in whose place.

Owns the words themselves (`ngpu_protocol.stand_ins`): this bootstrap's own, for each sibling that its operator names,
and those of the others, which they leave in their rows of the database (`store.leases`, `about`). As with secrets, it
takes the operator's word (`siblings`) to sign for another: a row in a database is nobody's signature.

A word is looked for only where a sibling acknowledged, so nothing is done for other receipts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
import structlog

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.leases import Sibling
from ngpu_protocol.acknowledgements import SignedAcknowledgement
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Account, Address, parse_address
from ngpu_protocol.losses import LossFile, SignedLoss
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import SignedReceipt
from ngpu_protocol.stand_ins import SignedStandIn, StandIn, checked_stand_in, sign_stand_in

log = structlog.get_logger(__name__)

ABOUT_KEY = "stand_ins"


class StandIns:
    """Whose word there is for whom, by (who ordered, who acknowledged).

    Attributes:
        about: this bootstrap's own words as its siblings read them: hexadecimal msgpack by the sibling's address.
    """

    def __init__(self, chain_id: int) -> None:
        self._chain_id = chain_id
        self._words: dict[tuple[Address, Address], SignedStandIn] = {}
        self._refused: set[tuple[Address, Address, str]] = set()
        self.about: dict[str, str] = {}

    def sign(self, account: Account, siblings: Iterable[Address], now_ms: int) -> None:
        """Say that each of *siblings* may acknowledge receipts of this bootstrap's orders."""
        for sibling in siblings:
            if sibling != account.address:
                signed = sign_stand_in(StandIn(account.address, sibling, now_ms), account, self._chain_id)
                self._words[account.address, sibling] = signed
                self.about[sibling] = signed.wire.hex()

    def met(self, siblings: Sequence[Sibling]) -> None:
        """Learn what *siblings* have signed."""
        for one in siblings:
            self.learn(one.address, one.about)

    def learn(self, bootstrap: str, about: Mapping[str, Any]) -> None:
        """Learn what *bootstrap* has signed; what is none of its words is passed over."""
        said = about.get(ABOUT_KEY)
        for sibling, wire in said.items() if isinstance(said, dict) else ():
            key = (Address(bootstrap), Address(sibling))
            known = self._words.get(key)
            if not isinstance(wire, str) or (known is not None and known.wire.hex() == wire):
                continue
            try:
                self._words[key] = checked_stand_in(
                    bytes.fromhex(wire), parse_address(bootstrap), parse_address(sibling), self._chain_id
                )
            except (ValueError, AddressError, MalformedError) as error:
                if (*key, wire) not in self._refused and len(self._refused) < 1000:
                    self._refused.add((*key, wire))
                    log.warning("stand_in_refused", bootstrap=bootstrap, sibling=sibling[:64], reason=str(error))

    def word(self, bootstrap: Address, acknowledged_by: Address) -> SignedStandIn | None:
        """Return the word of *bootstrap* for whoever acknowledged; None where it needs none, or there is none."""
        return None if bootstrap == acknowledged_by else self._words.get((bootstrap, acknowledged_by))

    def receipt_file(self, order: bytes, receipt: bytes, acknowledgement: bytes) -> ReceiptFile:
        """Return the file of a receipt as it was stored; *acknowledgement* empty for none.

        Raises:
            MalformedError: what is stored cannot be read.
        """
        signed_order = SignedOrder.from_bytes(order)
        signed_ack = SignedAcknowledgement.from_bytes(acknowledgement) if acknowledgement else None
        return ReceiptFile(
            order=signed_order,
            receipt=SignedReceipt.from_bytes(receipt),
            acknowledgement=signed_ack,
            chain_id=self._chain_id,
            stand_in=None
            if signed_ack is None
            else self.word(signed_order.order.bootstrap, signed_ack.acknowledgement.bootstrap),
        )

    def loss_file(self, order: bytes, receipt: bytes, loss: bytes) -> LossFile:
        """Return the file of a loss as it was stored; *receipt* empty for none.

        Raises:
            MalformedError: what is stored cannot be read.
        """
        signed_order, signed = SignedOrder.from_bytes(order), SignedLoss.from_bytes(loss)
        return LossFile(
            loss=signed,
            order=signed_order,
            receipt=SignedReceipt.from_bytes(receipt) if receipt else None,
            chain_id=self._chain_id,
            stand_in=self.word(signed_order.order.bootstrap, signed.loss.bootstrap),
        )


def stored_stand_ins(connection: sa.Connection, chain_id: int) -> StandIns:
    """Return the words there are in a database, for a command that reads it beside the daemon."""
    found, b = StandIns(chain_id), tables.bootstraps
    for address, about in connection.execute(sa.select(b.c.address, b.c.about)):
        document = json.loads(about)
        found.learn(address, document if isinstance(document, dict) else {})
    return found
