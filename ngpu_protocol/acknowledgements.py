"""Acknowledgements: a bootstrap's signed word on what it thinks of one receipt, which the node keeps as its proof.

Owns the record and its wire form. The verdict itself is found in `verification`. Until a node holds the
acknowledgement of a receipt it offers that receipt again.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.typed_data import SignedType, from_text, to_text

MAX_ACKNOWLEDGEMENT_CHARS = 4096


class VerdictKind(StrEnum):
    """What a bootstrap thinks of a receipt."""

    VERIFIED = "verified"
    """Every rule holds: paid as it says."""
    SKEW = "skew"
    """All is right but the node's clock: paid on the bootstrap's own duration."""
    DISPUTED = "disputed"
    """A rule is broken: stored with both values, not paid."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """The answer to one receipt.

    Attributes:
        receipt_hash: the receipt's digest, 32 bytes.
        node: whose receipt it is.
        bootstrap: who judged, and signs.
        sequence: the receipt's.
        verdict: a `VerdictKind`, or a later version's word.
        reason: the name of the rule that was broken, empty when verified; with `skew` also what is paid
            (`skew_reason`).
        at_ms: UTC milliseconds by the bootstrap's clock.
    """

    receipt_hash: bytes
    node: Address
    bootstrap: Address
    sequence: int
    verdict: str
    reason: str
    at_ms: int

    def struct_hash(self) -> bytes:
        """Return EIP-712's hashStruct of the acknowledgement, without the network."""
        return ACKNOWLEDGEMENT_TYPE.struct_hash(self)

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs."""
        return ACKNOWLEDGEMENT_TYPE.digest(self, chain_id)


ACKNOWLEDGEMENT_TYPE = SignedType(
    "Acknowledgement(bytes32 receiptHash,address node,address bootstrap,uint64 sequence,string verdict,string reason,"
    "uint64 atMs)",
    Acknowledgement,
    what="acknowledgement",
    max_bytes=MAX_ACKNOWLEDGEMENT_CHARS * 3 // 4,
)


def skew_reason(rule: str, own_ms: int | None) -> str:
    """Return the reason of a `skew`: the rule, and how long the attempt took by the bootstrap's own monotonic clock.

    Args:
        own_ms: None where the bootstrap did not see both ends of it.
    """
    return rule if own_ms is None else f"{rule} {own_ms}"


def own_duration_ms(reason: str) -> int | None:
    """Return the milliseconds in a reason that `skew_reason` made, None where there are none."""
    _, _, text = reason.partition(" ")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


@dataclass(frozen=True, slots=True)
class SignedAcknowledgement:
    """An acknowledgement and the bootstrap's signature.

    Attributes:
        acknowledgement: the acknowledgement.
        signature: 65 bytes; decoding does not judge them, `signer` does.
        wire: the msgpack map as it was made or received.
    """

    acknowledgement: Acknowledgement
    signature: bytes
    wire: bytes = field(compare=False, repr=False)

    def encode(self) -> str:
        """Return the map as base64url text."""
        return to_text(self.wire)

    @classmethod
    def decode(cls, text: str | bytes, max_bytes: int = MAX_ACKNOWLEDGEMENT_CHARS) -> SignedAcknowledgement:
        """Return the acknowledgement in a text of at most *max_bytes* characters.

        Raises:
            MalformedError: whatever else *text* is.
        """
        return cls.from_bytes(from_text(text, what="acknowledgement", max_bytes=max_bytes))

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedAcknowledgement:
        """Return the acknowledgement in a msgpack map.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        acknowledgement, signature = ACKNOWLEDGEMENT_TYPE.unpack(wire)
        return cls(acknowledgement, signature, wire)

    def signer(self, chain_id: int) -> Address:
        """Return who signed; the caller compares it with `Acknowledgement.bootstrap`.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.acknowledgement.digest(chain_id), self.signature)


def sign_acknowledgement(acknowledgement: Acknowledgement, account: Account, chain_id: int) -> SignedAcknowledgement:
    """Return *acknowledgement* signed by *account* for one network.

    Raises:
        ValueError: if the account is not the acknowledgement's bootstrap, or a field is out of range.
    """
    if account.address != acknowledgement.bootstrap:
        raise ValueError(f"{account.address} cannot sign an acknowledgement of {acknowledgement.bootstrap}")
    signature = account.sign(acknowledgement.digest(chain_id))
    return SignedAcknowledgement(acknowledgement, signature, ACKNOWLEDGEMENT_TYPE.pack(acknowledgement, signature))
