"""Observations: what a bootstrap says it saw of an attempt whose receipt it disputes, signed.

An acknowledgement names the rule that was broken. An observation adds what the rule was judged by, so that the node
can hold the bootstrap to it, and a third party can judge again: with the order, the receipt and this, `verification`
must come to the same rule and the same two values (`dispute_file`). It is the bootstrap's word against the node's:
both have signed, and neither can say later that it said something else.

`seen` is a JSON object in its one form (keys in order, no spaces) with those of these keys that are known::

    requestHash requestBytes status responseHash responseBytes sentAtMs endedAtMs      as in `Observed`
    previous        {"sequence", "hash"}: the link the chain was judged by
    offeredGpus     names of the GPUs the node had offered, where that was judged
    mostGpus        how many the workspace holds on a node, where that was judged
    other           {"sequence", "hash"}: a receipt of the same order that was on file already
    toleranceMs     for the clocks

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, Final

from ngpu_protocol import frozen
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.receipts import ReceiptLink
from ngpu_protocol.typed_data import MAX_NUMBER, SignedType, bytes32
from ngpu_protocol.verification import DEFAULT_TOLERANCE_MS, Observed

MAX_OBSERVATION_BYTES: Final = 48 * 1024
_MAX_GPUS: Final = 256
_WHAT: Final = "observation"

_NUMBERS: Final = {
    "requestBytes": "request_bytes",
    "status": "status",
    "responseBytes": "response_bytes",
    "sentAtMs": "sent_at_ms",
    "endedAtMs": "ended_at_ms",
}
_HASHES: Final = {"requestHash": "request_hash", "responseHash": "response_hash"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a receipt was judged by, beside the order.

    Attributes:
        seen: what the bootstrap saw of the attempt.
        previous: the link the chain was judged by; None where it was not.
        offered_gpus: names of the GPUs the node had offered; None where that is not known.
        tolerance_ms: for the clocks.
        other: a receipt of the same order that was on file already; None where there was none.
        most_gpus: how many the workspace holds on a node; None where that is not known.
    """

    seen: Observed
    previous: ReceiptLink | None = None
    offered_gpus: tuple[bytes, ...] | None = None
    tolerance_ms: int = DEFAULT_TOLERANCE_MS
    other: ReceiptLink | None = None
    most_gpus: int | None = None

    def to_text(self) -> str:
        """Return the evidence in its one form."""
        document: dict[str, Any] = {"toleranceMs": self.tolerance_ms}
        for key, name in (_NUMBERS | _HASHES).items():
            value = getattr(self.seen, name)
            if value is not None:
                document[key] = "0x" + value.hex() if isinstance(value, bytes) else value
        for key, link in (("previous", self.previous), ("other", self.other)):
            if link is not None:
                document[key] = {"hash": "0x" + link.hash.hex(), "sequence": link.sequence}
        if self.offered_gpus is not None:
            document["offeredGpus"] = ["0x" + gpu.hex() for gpu in self.offered_gpus]
        if self.most_gpus is not None:
            document["mostGpus"] = self.most_gpus
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    @classmethod
    def of_text(cls, text: str) -> Evidence:
        """Return the evidence in *text*; unknown keys are ignored.

        Raises:
            MalformedError: it is none.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise MalformedError(_WHAT, "what was seen is not JSON") from None
        if not isinstance(document, dict):
            raise MalformedError(_WHAT, "what was seen must be an object")
        values: dict[str, Any] = {name: _number(document, key) for key, name in _NUMBERS.items()}
        values |= {name: _hash(document.get(key)) for key, name in _HASHES.items()}
        previous, offered, other = (document.get(key) for key in ("previous", "offeredGpus", "other"))
        return cls(
            seen=Observed(**values),
            previous=None if previous is None else _link(previous, "previous"),
            offered_gpus=None if offered is None else _gpus(offered),
            tolerance_ms=_number(document, "toleranceMs") or 0,
            other=None if other is None else _link(other, "other"),
            most_gpus=_number(document, "mostGpus"),
        )


def _number(document: dict[str, Any], key: str) -> int | None:
    value = document.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_NUMBER):
        raise MalformedError(_WHAT, f"{key} must be a number")
    return value


def _hash(value: object) -> bytes | None:
    return None if value is None else bytes32(value, _WHAT)


def _link(value: object, key: str) -> ReceiptLink:
    if not isinstance(value, dict):
        raise MalformedError(_WHAT, f"{key} must be an object")
    sequence, hash = _number(value, "sequence"), _hash(value.get("hash"))
    if sequence is None or hash is None:
        raise MalformedError(_WHAT, f"{key} must have sequence and hash")
    return ReceiptLink(sequence, hash)


def _gpus(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > _MAX_GPUS:
        raise MalformedError(_WHAT, f"offeredGpus must be a list of at most {_MAX_GPUS} names")
    return tuple(gpu for gpu in map(_hash, value) if gpu is not None)


def listed_gpus(offered: Container[bytes] | None, rule: str) -> tuple[bytes, ...] | None:
    """Return the GPUs to state in the evidence of a dispute about *rule*; None where they play no part."""
    if rule != "gpus" or not isinstance(offered, Iterable):
        return None
    return tuple(sorted(offered)[:_MAX_GPUS])


# -- signed ------------------------------------------------------------------------------------------------------------


@frozen.dataclass(frozen=True, slots=True)
class Observation:
    """What a bootstrap saw of a receipt's attempt.

    Attributes:
        receipt_hash: the receipt's digest, 32 bytes.
        node: whose receipt it is.
        bootstrap: who judged, and signs.
        rule: the first rule broken.
        expected: what the rule wanted.
        actual: what the receipt says.
        seen: `Evidence.to_text`.
        at_ms: UTC milliseconds by the bootstrap's clock.
    """

    receipt_hash: bytes
    node: Address
    bootstrap: Address
    rule: str
    expected: str
    actual: str
    seen: str
    at_ms: int

    def struct_hash(self) -> bytes:
        """Return EIP-712's hashStruct, without the network."""
        return OBSERVATION_TYPE.struct_hash(self)

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs."""
        return OBSERVATION_TYPE.digest(self, chain_id)


OBSERVATION_TYPE = SignedType(
    "Observation(bytes32 receiptHash,address node,address bootstrap,string rule,string expected,string actual,"
    "string seen,uint64 atMs)",
    Observation,
    what=_WHAT,
    max_bytes=MAX_OBSERVATION_BYTES,
)


@frozen.dataclass(frozen=True, slots=True)
class SignedObservation:
    """An observation, its signature, and the msgpack map of both."""

    observation: Observation
    signature: bytes
    wire: bytes

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedObservation:
        """Return the observation in a msgpack map; nothing but its form is judged.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        record, signature = OBSERVATION_TYPE.unpack(wire)
        return cls(record, signature, wire)

    @classmethod
    def from_json(cls, document: object) -> SignedObservation:
        """Return the observation in a JSON object.

        Raises:
            MalformedError: whatever else *document* is.
        """
        record, signature = OBSERVATION_TYPE.from_json(document)
        return cls(record, signature, OBSERVATION_TYPE.pack(record, signature))

    def signer(self, chain_id: int) -> Address:
        """Return who signed.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.observation.digest(chain_id), self.signature)


def sign_observation(observation: Observation, account: Account, chain_id: int) -> SignedObservation:
    """Return *observation* signed by its bootstrap.

    Raises:
        ValueError: *account* is not the observation's bootstrap.
    """
    if account.address != observation.bootstrap:
        raise ValueError(f"{account.address} cannot sign an observation of {observation.bootstrap}")
    signature = account.sign(observation.digest(chain_id))
    return SignedObservation(observation, signature, OBSERVATION_TYPE.pack(observation, signature))
