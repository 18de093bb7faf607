"""Stand-ins: a bootstrap's signed word that a sibling may acknowledge receipts of its orders.

Several bootstraps of one operator stand in for each other: when one is dead, another judges what that one ordered and
acknowledges it in its own name. A node knows from its owner who belongs together. Anybody else who holds such an
acknowledgement has only a stranger's signature, unless the one that ordered said beforehand that the other counts. That
is a `StandIn`: signed while it lives, for each sibling its operator names, kept by siblings and nodes, and laid into
receipt files beside the acknowledgement it makes good. It does not end: what was acknowledged under it stays.

Pure.
"""

from __future__ import annotations

from typing import Final

from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.typed_data import SignedType

MAX_STAND_IN_BYTES: Final = 1024
_WHAT: Final = "stand-in"


@dataclass(frozen=True, slots=True)
class StandIn:
    """Who may acknowledge in whose place.

    Attributes:
        bootstrap: whose orders it is about, and who signs.
        sibling: whose acknowledgements of them count as its own.
        at_ms: when it was said, UTC milliseconds by the clock of *bootstrap*.
    """

    bootstrap: Address
    sibling: Address
    at_ms: int

    def struct_hash(self) -> bytes:
        """Return EIP-712's hashStruct, without the network."""
        return STAND_IN_TYPE.struct_hash(self)

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs."""
        return STAND_IN_TYPE.digest(self, chain_id)


STAND_IN_TYPE = SignedType(
    "StandIn(address bootstrap,address sibling,uint64 atMs)", StandIn, what=_WHAT, max_bytes=MAX_STAND_IN_BYTES
)


@dataclass(frozen=True, slots=True)
class SignedStandIn:
    """A stand-in, its signature, and the msgpack map of both."""

    stand_in: StandIn
    signature: bytes
    wire: bytes

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedStandIn:
        """Return the stand-in in a msgpack map; nothing but its form is judged.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        record, signature = STAND_IN_TYPE.unpack(wire)
        return cls(record, signature, wire)

    @classmethod
    def from_json(cls, document: object) -> SignedStandIn:
        """Return the stand-in in a JSON object.

        Raises:
            MalformedError: whatever else *document* is.
        """
        record, signature = STAND_IN_TYPE.from_json(document)
        return cls(record, signature, STAND_IN_TYPE.pack(record, signature))

    def signer(self, chain_id: int) -> Address:
        """Return who signed.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.stand_in.digest(chain_id), self.signature)

    def says(self, bootstrap: Address, sibling: Address, chain_id: int) -> bool:
        """Return whether it is *bootstrap*'s word, signed, for *sibling*."""
        if (self.stand_in.bootstrap, self.stand_in.sibling) != (bootstrap, sibling):
            return False
        try:
            return self.signer(chain_id) == bootstrap
        except SignatureError:
            return False


def sign_stand_in(stand_in: StandIn, account: Account, chain_id: int) -> SignedStandIn:
    """Return *stand_in* signed by the bootstrap whose orders it is about.

    Raises:
        ValueError: *account* is another, or it names itself.
    """
    if account.address != stand_in.bootstrap:
        raise ValueError(f"{account.address} cannot say who stands in for {stand_in.bootstrap}")
    if stand_in.sibling == stand_in.bootstrap:
        raise ValueError(f"{stand_in.bootstrap} needs nobody's word for itself")
    signature = account.sign(stand_in.digest(chain_id))
    return SignedStandIn(stand_in, signature, STAND_IN_TYPE.pack(stand_in, signature))


def checked_stand_in(wire: bytes, bootstrap: Address, sibling: Address, chain_id: int) -> SignedStandIn:
    """Return the stand-in in *wire*, which should be *bootstrap*'s word for *sibling*.

    Raises:
        MalformedError: it is not.
    """
    signed = SignedStandIn.from_bytes(wire)
    if not signed.says(bootstrap, sibling, chain_id):
        raise MalformedError(_WHAT, f"not {bootstrap}'s word for {sibling}")
    return signed
