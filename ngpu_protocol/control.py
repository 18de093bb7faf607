"""The messages of ``/ngpu/control/1.0.0`` and ``/ngpu/receipts/1.0.0``.

Each message is one msgpack map with its word under ``type``, in a frame of a 4-byte big-endian length (at most
`MAX_MESSAGE_BYTES`; framing is done by `p2p`). Keys are the field names below; hashes are 32 raw bytes, addresses 20.
Unknown keys are ignored and an unknown ``type`` decodes to `UnknownMessage`, which the receiver skips: a later
version may have said it.

Control, on a stream the node opens after it dialled the bootstrap::

    node                                bootstrap
    Hello                  ->
                           <-           Welcome | Refused (then both close)
    Heartbeat              ->           at once on a change, else every heartbeat_s
                           <-           Desired: the node's whole list of workspaces, at each change
    Bye                    <->          before an orderly close

Receipts, on a second stream the node opens::

                           <-           Head: the last link of the chain the bootstrap holds
    Offer                  ->           each receipt not acknowledged yet, oldest first; all may be repeated
                           <-           Ack
                           <-           Gap: receipts of these numbers are missing; the node offers them

Decoding raises nothing but `MalformedError`.
"""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgpack  # type: ignore[import-untyped]
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, address_bytes, parse_address
from ngpu_protocol.sealing import MAX_SEALED_BYTES
from ngpu_protocol.typed_data import MAX_NUMBER, ZERO32, unpack_map
from ngpu_protocol.workspaces import WorkspaceSpec, describe_errors

CONTROL_PROTOCOL = "/ngpu/control/1.0.0"
RECEIPTS_PROTOCOL = "/ngpu/receipts/1.0.0"

PROTOCOL_VERSION_LOW = 1
PROTOCOL_VERSION_HIGH = 1

MAX_MESSAGE_BYTES = 1024 * 1024
MAX_ITEMS = 1024
"""Items any list or map inside a message may have."""

DEFAULT_HEARTBEAT_S = 2.0
SILENCE_LIMIT_S = 5.0
"""A node not heard of for this long is left out of scheduling."""


class DeploymentPhase(StrEnum):
    """Where a deployment stands on its node."""

    QUEUED = "queued"
    """Wanted, nothing done yet."""
    PULLING = "pulling"
    """Its image is on the way."""
    STARTING = "starting"
    """Started, not answering yet."""
    READY = "ready"
    """Answers; takes tasks."""
    UNHEALTHY = "unhealthy"
    """Answered before, does not now; takes no tasks."""
    FAILED = "failed"
    """Given up, for the reason in the detail."""
    STOPPING = "stopping"
    """No longer wanted; its last tasks are ending."""
    GONE = "gone"
    """Removed."""


def _address(value: object) -> object:
    # 20 bytes from the wire; in our own code an Address already is one, so its checksum text passes as it is.
    if isinstance(value, bytes | str):
        try:
            return parse_address(value)
        except AddressError as error:
            raise ValueError(str(error)) from None
    return value


def _without_nul(text: str) -> str:
    """No database keeps NUL in a text, and no peer's words may keep anything else from being stored."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text


Hash32 = Annotated[bytes, Field(strict=True, min_length=32, max_length=32)]
Number = Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER)]
Text = Annotated[str, Field(strict=True), AfterValidator(_without_nul)]
Flag = Annotated[bool, Field(strict=True)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=3600, allow_inf_nan=False)]
NodeAddress = Annotated[Address, BeforeValidator(_address)]
Packed = Annotated[bytes, Field(strict=True, max_length=64 * 1024)]
Sealed = Annotated[bytes, Field(strict=True, max_length=MAX_SEALED_BYTES)]
Percent = Annotated[int, Field(strict=True, ge=0, le=100)]
Amount = Annotated[float, Field(strict=True, ge=0, le=1_000_000, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class GpuOffer:
    """A GPU as its node offers it.

    Attributes:
        id: `identity.gpu_id` of it.
        model: as NVML spells it.
        memory_bytes: in total.
        shares: deployments its owner lets hold it at once.
    """

    id: Hash32
    model: Text
    memory_bytes: Number
    shares: Annotated[int, Field(strict=True, ge=1, le=64)] = 1


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Hello:
    """The node's first message.

    Attributes:
        network: the network's name; must be the bootstrap's.
        version_low: lowest protocol version the node speaks.
        version_high: highest protocol version the node speaks.
        session: 32 random bytes of this run of the daemon, to be copied into every order.
        node: the node's address; must be the stream's authenticated remote.
        software: name and version, for people.
        now_ms: UTC milliseconds by the node's clock.
        gpus: what it offers.
        slots: tasks it runs at once, over all workspaces.
        prices: its price list for this session, as the msgpack map of its signed form (`prices.PriceList`); empty
            for none.
    """

    network: Text
    version_low: Number
    version_high: Number
    session: Hash32
    node: NodeAddress
    software: Text
    now_ms: Number
    gpus: tuple[GpuOffer, ...] = ()
    slots: Number = 1
    prices: Packed = b""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Welcome:
    """The bootstrap's answer to a node it will talk to.

    Attributes:
        network: the network's name.
        version: the protocol version chosen.
        service: name of the operator's group of bootstraps this one belongs to.
        now_ms: UTC milliseconds by the bootstrap's clock.
        head_sequence: number of the last receipt it holds from this node, 0 for none.
        head_hash: that receipt's hash, zero for none; the node's chain continues from the higher of the two heads.
        heartbeat_s: how often to send a heartbeat when nothing changes.
        admitted: whether it will send work; False while an operator's approval is outstanding.
    """

    network: Text
    version: Number
    service: Text
    now_ms: Number
    head_sequence: Number = 0
    head_hash: Hash32 = ZERO32
    heartbeat_s: Seconds = DEFAULT_HEARTBEAT_S
    admitted: Flag = True


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Refused:
    """The bootstrap's answer to a node it will not talk to: a stable word and a sentence."""

    reason: Text
    message: Text = ""


LAST_WORDS = "; it last said: "
"""Comes before a container's last words in the detail of its deployment."""


def without_last_words(detail: str) -> str:
    """Return *detail* as it may go into a daemon's log: what a client's program says may be about its users."""
    return detail.partition(LAST_WORDS)[0]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class DeploymentState:
    """How one workspace fares on the node.

    Attributes:
        workspace: its id.
        revision: which revision runs.
        state: a `DeploymentPhase`, or a later version's word.
        detail: a sentence for people, empty when all is well.
        slots_free: tasks it could take now.
        image_digest: SHA-256 of the image that runs; zero when there is none.
        gpus: ids of the GPUs it holds.
        progress: of getting the image, in percent; 100 only once its digest is confirmed.
        bytes_done: of the image, here so far.
        bytes_total: of the image; 0 while unknown.
        seconds_left: until the image is here, by the rate so far; None while unknown.
        reason: a stable word for the cause of a state that is not as it should be, such as `image_missing`; empty
            when all is well.
        yours: attempts of the bootstrap this is told to that run on it; None from an older node.
    """

    workspace: Text
    revision: Number
    state: Text
    detail: Text = ""
    slots_free: Number = 0
    image_digest: Hash32 = ZERO32
    gpus: tuple[Hash32, ...] = ()
    progress: Percent = 0
    bytes_done: Number = 0
    bytes_total: Number = 0
    seconds_left: Number | None = None
    reason: Text = ""
    yours: Number | None = None


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class ServiceOffer:
    """A model server registered with the node: *copies* of project/model answer."""

    project: Text
    model: Text
    type: Text = ""
    copies: Number = 1


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class HostOffer:
    """What a node's machine has for workspaces, as its owner limits it, and what the owner takes.

    Attributes:
        engine: whether it runs images at all; False while the engine does not answer.
        cpus: in total, for all workspaces; 0 when unknown.
        memory_bytes: in total, for all workspaces; 0 when unknown.
        disk_free_bytes: what images may still take, beyond the owner's reserve; None when unknown.
        max_image_bytes: the largest image taken; None for any.
        registries: hosts of the registries images may come from (`docker.io` is Docker Hub's); empty for any.
        tar_images: whether images come from URLs too.
        egress: whether workspaces may reach the outside.
        gpu_runtime: whether the engine can give GPUs to containers.
        area: where the node is, in the owner's word.
    """

    engine: Flag
    cpus: Amount = 0.0
    memory_bytes: Number = 0
    disk_free_bytes: Number | None = None
    max_image_bytes: Number | None = None
    registries: tuple[Text, ...] = ()
    tar_images: Flag = True
    egress: Flag = True
    gpu_runtime: Flag = True
    area: Text = ""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Heartbeat:
    """What changes fast on a node, whole each time.

    Attributes:
        at_ms: UTC milliseconds by the node's clock.
        slots_free: tasks the node could take now, over all workspaces.
        draining: whether it refuses new orders.
        deployments: every deployment it has.
        services: every registered model server that is healthy.
        gpus: what it offers now, without devices that are sick; None from a node that only says so in its hello.
        host: what its machine has for workspaces; None from an older node.
        yours: attempts of the bootstrap this is told to that run there, over all workspaces; None from an older node.
    """

    at_ms: Number
    slots_free: Number
    draining: Flag = False
    deployments: tuple[DeploymentState, ...] = ()
    services: tuple[ServiceOffer, ...] = ()
    gpus: tuple[GpuOffer, ...] | None = None
    host: HostOffer | None = None
    yours: Number | None = None


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Desired:
    """Every workspace the bootstrap wants on this node; what is not in the list shall stop.

    Attributes:
        deployments: at most one revision of each workspace. A revision other than the one that runs replaces it: the
            node starts the new one and keeps the old one serving until the new one is ready, where both fit.
        sealed: by workspace id, the secrets of the deployments that have any, sealed to this node's key with the id
            and the revision (`ngpu_protocol.sealing`). The same secrets may look different each time.
        as_of_ms: which of two bootstraps on one database knew more: the greater, by the database's own clock. 0 from a
            bootstrap that is alone, or an older one.
    """

    deployments: tuple[WorkspaceSpec, ...] = ()
    sealed: dict[Text, Sealed] = field(default_factory=dict)
    as_of_ms: Number = 0


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Bye:
    """The sender is about to close the stream on purpose."""

    reason: Text = ""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Offer:
    """A receipt and the order it answers, each as the msgpack map of its signed form (`SignedOrder.wire`)."""

    order: Packed
    receipt: Packed


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Ack:
    """An acknowledgement, as the msgpack map of its signed form.

    Attributes:
        observation: of a disputed receipt, what the bootstrap saw, signed likewise (`observations.Observation`); empty
            where there is none.
        stand_in: of a receipt that a sibling's order brought about, that one's word for the bootstrap that acknowledges
            (`stand_ins.StandIn`); empty where there is none.
    """

    acknowledgement: Packed
    observation: Packed = b""
    stand_in: Packed = b""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Gap:
    """The bootstrap misses the receipts numbered *from_sequence* to *to_sequence*, both included.

    Attributes:
        claim: once it disputes them, its signed word for that (`gap_claims`); empty before.
    """

    from_sequence: Number
    to_sequence: Number
    claim: Packed = b""


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class Head:
    """The last link of the chain the bootstrap holds: 0 and zero for none."""

    sequence: Number
    hash: Hash32


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="ignore"))
class UnknownMessage:
    """A message of a type this version does not know; to be skipped."""

    type: Text


ControlMessage = Hello | Welcome | Refused | Heartbeat | Desired | Bye
ReceiptsMessage = Offer | Ack | Gap | Head
Message = ControlMessage | ReceiptsMessage

_CONTROL: dict[str, type[Any]] = {
    "hello": Hello,
    "welcome": Welcome,
    "refused": Refused,
    "heartbeat": Heartbeat,
    "desired": Desired,
    "bye": Bye,
}
_RECEIPTS: dict[str, type[Any]] = {"offer": Offer, "ack": Ack, "gap": Gap, "head": Head}
_WORDS: dict[type[Any], str] = {kind: word for word, kind in (_CONTROL | _RECEIPTS).items()}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {word: TypeAdapter(kind) for word, kind in (_CONTROL | _RECEIPTS).items()}
_ADDRESS_FIELDS = frozenset({"node"})


# what rarely goes along: left out, a message is what it was before there was any
_IDLE_WHEN_EMPTY = ("observation", "stand_in", "claim")


def encode_message(message: Message) -> bytes:
    """Return the msgpack map of *message*, to be framed.

    Raises:
        ValueError: if it would be larger than `MAX_MESSAGE_BYTES`.
    """
    # there is one acknowledgement for each task: spelled out, 0.6 us and not 2.9
    wire = (
        {"type": "ack", "acknowledgement": message.acknowledgement}
        if type(message) is Ack and not message.observation and not message.stand_in
        else {"type": _WORDS[type(message)], **_to_wire(message)}
    )
    for name in _IDLE_WHEN_EMPTY:
        if wire.get(name) == b"":
            del wire[name]
    data: bytes = msgpack.packb(wire)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a {wire['type']} message of {len(data)} bytes, of which {MAX_MESSAGE_BYTES} are allowed")
    return data


def _to_wire(value: Any) -> Any:
    if is_dataclass(value):
        return {
            field.name: address_bytes(getattr(value, field.name))
            if field.name in _ADDRESS_FIELDS
            else _to_wire(getattr(value, field.name))
            for field in fields(value)
        }
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, tuple):
        return [_to_wire(item) for item in value]
    return value


def decode_control(data: bytes) -> ControlMessage | UnknownMessage:
    """Return the message in one frame of the control stream.

    Raises:
        MalformedError: whatever else *data* is.
    """
    return _decode(data, _CONTROL)  # type: ignore[no-any-return]


def decode_receipts(data: bytes) -> ReceiptsMessage | UnknownMessage:
    """Return the message in one frame of the receipts stream.

    Raises:
        MalformedError: whatever else *data* is.
    """
    return _decode(data, _RECEIPTS)  # type: ignore[no-any-return]


def _decode(data: bytes, known: dict[str, type[Any]]) -> Any:
    wire = unpack_map(data, what="message", max_bytes=MAX_MESSAGE_BYTES, max_items=MAX_ITEMS)
    word = wire.pop("type", None)
    if not isinstance(word, str):
        raise MalformedError("message", "type must be text")
    if word not in known:
        return UnknownMessage(word[:64])
    try:
        return _ADAPTERS[word].validate_python(wire, extra="ignore")
    except ValidationError as error:
        raise MalformedError(f"{word} message", describe_errors(error)) from None
