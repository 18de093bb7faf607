"""What a peer says about itself in the DHT: one signed, sequenced, expiring record at ``/ngpu/node/<nodeAddr>``.

The value is ``signature | payload``: 65 bytes, then the record as one msgpack map. The signature is over ::

    keccak(19 "NGPU node record:" | chainId as 32 bytes | keccak(payload))

that is, over the payload's bytes as they are and not over fields. So a field that a later version adds is covered by
the signature, survives every peer that does not know it, and needs no agreement on an encoding. The domain begins with
0x19, so it is no transaction, and differs from EIP-712's ``19 01``; the chain id keeps networks apart.

Rules (`check_record`), each with a reason a refusal can name: the value is at most 8 KiB; it decodes; it is of this
network; the key names its node; the node signed it; it has not expired, does not live longer than an hour, and is not
from the future. Of two that hold, the higher sequence is better (`better`): a withdrawn record is simply one more.

A validator that holds none accepts an old record that has not expired. That bounds a replay to the record's
lifetime, 10 minutes by default; it cannot be prevented without memory of every peer that ever was.

Pure. Decoding raises nothing but `MalformedError`, checking nothing but `RecordRefused`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgpack  # type: ignore[import-untyped]
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from ngpu_protocol.errors import AddressError, MalformedError, ProtocolError, SignatureError
from ngpu_protocol.identity import Account, Address, address_bytes, address_of_peer_id, keccak, parse_address, recover
from ngpu_protocol.networks import Network
from ngpu_protocol.prices import MAX_MODELS
from ngpu_protocol.typed_data import MAX_NUMBER, unpack_map
from ngpu_protocol.workspaces import describe_errors

__all__ = [
    "DEFAULT_LIFETIME_MS",
    "MAX_RECORD_BYTES",
    "WELL",
    "MigSlice",
    "NodeRecord",
    "RecordGpu",
    "RecordModel",
    "RecordPrice",
    "RecordRefused",
    "RecordRule",
    "Role",
    "SignedNodeRecord",
    "better",
    "check_record",
    "dial_addresses",
    "node_of_key",
    "record_key",
    "sign_node_record",
]

RECORD_VERSION = 1
MAX_RECORD_BYTES = 8 * 1024
DEFAULT_LIFETIME_MS = 10 * 60 * 1000
MAX_LIFETIME_MS = 60 * 60 * 1000
CLOCK_TOLERANCE_MS = 2 * 60 * 1000
"""How far ahead the clock of a record's node may be."""

WELL = "ok"
"""The health of a GPU that may be used."""

MAX_ADDRESSES = 16
MAX_GPUS = 64
MAX_SERVED = 256
"""Workspaces, and models, a record may list."""

_WHAT = "node record"
_SIGNATURE_BYTES = 65
_DOMAIN = b"\x19NGPU node record:"
_KEY_PREFIX = "/ngpu/node/"
_CIRCUIT = "/p2p-circuit"


class Role(StrEnum):
    """What a peer does on the network; an unknown word is a later version's."""

    NODE = "node"
    BOOTSTRAP = "bootstrap"


class RecordRule(StrEnum):
    """Why a record is not accepted."""

    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    FOREIGN_KEY = "foreign_key"
    """Not a key of node records at all."""
    WRONG_NETWORK = "wrong_network"
    WRONG_OWNER = "wrong_owner"
    """The key belongs to another node."""
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    LIVES_TOO_LONG = "lives_too_long"
    FROM_THE_FUTURE = "from_the_future"
    STALE = "stale"
    """One with the same or a higher sequence is known."""


class RecordRefused(ProtocolError):
    """A value is not an acceptable record for its key now.

    Attributes:
        rule: the rule it breaks.
    """

    def __init__(self, rule: RecordRule, detail: str) -> None:
        super().__init__(f"record refused, {rule}: {detail}")
        self.rule = rule


def _address(value: object) -> object:
    if isinstance(value, bytes | str):
        try:
            return parse_address(value)
        except AddressError as error:
            raise ValueError(str(error)) from None
    return value


Text = Annotated[str, Field(strict=True, max_length=256)]
Word = Annotated[str, Field(strict=True, max_length=64)]
Number = Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER)]
Id32 = Annotated[bytes, Field(strict=True, min_length=32, max_length=32)]
NodeAddress = Annotated[Address, BeforeValidator(_address), PlainSerializer(address_bytes, return_type=bytes)]


class _Part(BaseModel):
    """A map whose unknown keys are kept, and go out again with it."""

    model_config = ConfigDict(frozen=True, extra="allow")


class MigSlice(_Part):
    """Makes a device a slice of another: its profile, such as ``1g.10gb``, and the public id of the whole card."""

    profile: Word = ""
    parent: Id32


class RecordGpu(_Part):
    """A GPU as its node offers it.

    Attributes:
        id: `identity.gpu_id`: the UUID itself stays on the node.
        model: its canonical name (`gpu_models`).
        name: as NVML spells it.
        memory_bytes: in total.
        compute_capability: such as ``8.9``; empty when not known.
        health: ``ok``, or one word for what is wrong with it.
        mig: set for a slice.
        shares_free: how many more workspaces may be given it; None when the node does not say.
    """

    id: Id32
    model: Word
    name: Text = ""
    memory_bytes: Number
    compute_capability: Word = ""
    health: Word = WELL
    mig: MigSlice | None = None
    shares_free: Number | None = None


class RecordModel(_Part):
    """A registered model server's model."""

    project: Text
    model: Text
    type: Text = ""
    copies: Number = 1


class RecordPrice(_Part):
    """What a second of a GPU model costs, as decimal text (`prices`)."""

    model: Word
    per_second: Word


class NodeRecord(_Part):
    """What a peer says about itself. Keys on the wire are the names here; fields at their default are left out.

    Attributes:
        version: of this format; a higher one only adds fields.
        network: the network's name.
        node: the peer's address.
        peer_id: its PeerId; it names *node*.
        sequence: grows with every record the node signs.
        issued_at_ms: UTC by the node's clock.
        expires_at_ms: after this nobody keeps or believes it.
        withdrawn: the node has stopped; nothing else here counts.
        roles: of `Role`.
        addresses: multiaddrs, direct and relayed, each without ``/p2p/<own id>`` at the end or with it.
        gpus: what it offers.
        driver: NVIDIA driver version.
        cuda: highest CUDA version the driver supports.
        slots: tasks it runs at once.
        slots_free: of these, at *issued_at_ms*.
        cpus: logical processors.
        memory_bytes: RAM.
        disk_free_bytes: where workspaces live.
        workspaces: public ids of those that are ready.
        models: served by registered model servers.
        region: the owner's word for where it is, such as ``eu-central``.
        terms: the owner's terms, or where to read them.
        currency: in which *prices* are.
        prices: what the owner asks for a second of each model.
        software: name and version.
    """

    version: Annotated[int, Field(strict=True, ge=1, le=2**31)] = RECORD_VERSION
    network: Word
    node: NodeAddress
    peer_id: Word
    sequence: Number
    issued_at_ms: Number
    expires_at_ms: Number
    withdrawn: Annotated[bool, Field(strict=True)] = False
    roles: Annotated[tuple[Word, ...], Field(max_length=8)] = ()
    addresses: Annotated[tuple[Text, ...], Field(max_length=MAX_ADDRESSES)] = ()
    gpus: Annotated[tuple[RecordGpu, ...], Field(max_length=MAX_GPUS)] = ()
    driver: Word = ""
    cuda: Word = ""
    slots: Number = 0
    slots_free: Number = 0
    cpus: Number = 0
    memory_bytes: Number = 0
    disk_free_bytes: Number = 0
    workspaces: Annotated[tuple[Word, ...], Field(max_length=MAX_SERVED)] = ()
    models: Annotated[tuple[RecordModel, ...], Field(max_length=MAX_SERVED)] = ()
    region: Word = ""
    terms: Text = ""
    currency: Word = ""
    prices: Annotated[tuple[RecordPrice, ...], Field(max_length=MAX_MODELS)] = ()
    software: Word = ""

    def encode(self) -> bytes:
        """Return the payload: what is signed."""
        known = NodeRecord.model_fields
        wire = {
            name: value
            for name, value in self.model_dump().items()
            if name not in known or value != known[name].default or name == "version"
        }
        return msgpack.packb(_plain(wire))  # type: ignore[no-any-return]

    @staticmethod
    def decode(payload: bytes) -> NodeRecord:
        """Return the record in *payload*.

        Raises:
            MalformedError: whatever else the bytes are.
        """
        wire = unpack_map(payload, what=_WHAT, max_bytes=MAX_RECORD_BYTES, max_items=MAX_SERVED)
        try:
            record = NodeRecord.model_validate(wire)
        except ValidationError as error:
            raise MalformedError(_WHAT, describe_errors(error)) from None
        except (UnicodeEncodeError, RecursionError):
            raise MalformedError(_WHAT, "not what a record holds") from None
        try:
            owner = address_of_peer_id(record.peer_id)
        except AddressError:
            owner = None
        if owner != record.node:
            raise MalformedError(_WHAT, "peer_id is not that of node")
        return record


def _plain(value: Any) -> Any:
    """Return *value* with enumerations as their words, as msgpack wants them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class SignedNodeRecord:
    """A record with its proof.

    Attributes:
        payload: the bytes that were signed, fields unknown here included.
        signature: 65 bytes by the record's node.
    """

    record: NodeRecord
    payload: bytes
    signature: bytes

    def encode(self) -> bytes:
        """Return the value as it is stored and sent."""
        return self.signature + self.payload

    @staticmethod
    def decode(value: bytes) -> SignedNodeRecord:
        """Return what *value* holds; the signature is not judged.

        Raises:
            MalformedError: it is no record.
        """
        if len(value) > MAX_RECORD_BYTES:
            raise MalformedError(_WHAT, f"{len(value)} bytes, of which {MAX_RECORD_BYTES} are allowed")
        payload = value[_SIGNATURE_BYTES:]
        return SignedNodeRecord(NodeRecord.decode(payload), payload, value[:_SIGNATURE_BYTES])


def record_digest(payload: bytes, chain_id: int) -> bytes:
    """Return the 32 bytes that are signed."""
    return keccak(_DOMAIN + chain_id.to_bytes(32, "big") + keccak(payload))


def sign_node_record(record: NodeRecord, account: Account, network: Network) -> SignedNodeRecord:
    """Return *record* signed.

    Raises:
        ValueError: it is another node's or network's, or too large: drop entries until it fits.
    """
    if record.node != account.address or record.network != network.name:
        raise ValueError("a record is signed by its own node, for its own network")
    payload = record.encode()
    if len(payload) + _SIGNATURE_BYTES > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(payload) + _SIGNATURE_BYTES} bytes, of which {MAX_RECORD_BYTES} fit")
    return SignedNodeRecord(record, payload, account.sign(record_digest(payload, network.chain_id)))


def record_key(node: Address) -> bytes:
    """Return the DHT key of *node*'s record."""
    return f"{_KEY_PREFIX}{node}".encode()


def dial_addresses(record: NodeRecord) -> list[str]:
    """Return the multiaddrs to dial the peer of *record* at, direct before relayed, each with its PeerId at the end."""
    own_end = f"/p2p/{record.peer_id}"
    whole = [text if text.endswith(own_end) else text + own_end for text in record.addresses]
    return sorted(dict.fromkeys(whole), key=lambda text: _CIRCUIT in text)


def node_of_key(key: bytes) -> Address | None:
    """Return whose record belongs at *key*; None for every other key, other spellings of an address included."""
    try:
        text = key.decode("ascii")
        node = parse_address(text.removeprefix(_KEY_PREFIX))
    except (UnicodeDecodeError, AddressError):
        return None
    return node if text == f"{_KEY_PREFIX}{node}" else None


def check_record(key: bytes, value: bytes, *, network: Network, now_ms: int) -> SignedNodeRecord:
    """Return the record in *value*, having found it acceptable for *key* at *now_ms*.

    Cheap rules come first and the signature last, so that rubbish costs little.

    Raises:
        RecordRefused: with the first rule it breaks.
    """
    owner = node_of_key(key)
    if owner is None:
        raise RecordRefused(RecordRule.FOREIGN_KEY, "not the key of a node's record")
    if len(value) > MAX_RECORD_BYTES:
        raise RecordRefused(RecordRule.OVERSIZE, f"{len(value)} bytes, of which {MAX_RECORD_BYTES} are allowed")
    try:
        signed = SignedNodeRecord.decode(value)
    except MalformedError as error:
        raise RecordRefused(RecordRule.MALFORMED, error.detail) from None
    record = signed.record
    if record.network != network.name:
        raise RecordRefused(RecordRule.WRONG_NETWORK, f"of network {record.network}, this is {network.name}")
    if record.node != owner:
        raise RecordRefused(RecordRule.WRONG_OWNER, f"{record.node} at the key of {owner}")
    if record.expires_at_ms <= now_ms:
        raise RecordRefused(RecordRule.EXPIRED, f"since {(now_ms - record.expires_at_ms) // 1000} s")
    if record.expires_at_ms - record.issued_at_ms > MAX_LIFETIME_MS:
        raise RecordRefused(RecordRule.LIVES_TOO_LONG, f"more than {MAX_LIFETIME_MS // 60_000} minutes")
    if record.issued_at_ms > now_ms + CLOCK_TOLERANCE_MS:
        raise RecordRefused(RecordRule.FROM_THE_FUTURE, "its node's clock, or this one, is wrong")
    try:
        signer = recover(record_digest(signed.payload, network.chain_id), signed.signature)
    except SignatureError as error:
        raise RecordRefused(RecordRule.BAD_SIGNATURE, str(error)) from None
    if signer != owner:
        raise RecordRefused(RecordRule.BAD_SIGNATURE, "not signed by its node")
    return signed


def better(new: SignedNodeRecord, known: SignedNodeRecord) -> bool:
    """Whether *new* replaces *known*: a higher sequence does, the same one never."""
    return new.record.sequence > known.record.sequence
