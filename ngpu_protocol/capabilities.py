"""Under which DHT keys a peer announces what it offers, and under which others look for it.

A capability is a kind and a value: ``gpu RTX4090``, ``workspace 1001``, ``model acme/llama``, ``region eu-central``,
``role bootstrap``. Its *pages* are the keys of one hour (the *epoch*): a front page, where everybody announces, and 16
shards, one for each first nibble of a nodeAddr. Peers keep a bounded number of providers for a key, the first to come.
So whoever looks asks the front page alone while it is not full, one lookup for anything rare; and when it is full,
the shards, which hold 16 times as much.

Epochs make the dead disappear: a provider record outlives its node at the peers that keep it (the libraries' own
keep it for a day or two), but nobody asks for last hour's key. Announcers cover the next epoch before it begins
(`epochs_to_announce`), so nobody has to look at two.

A key is a sha2-256 multihash, so that any libp2p peer can use it as a CID. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names
from ngpu_protocol.identity import Address
from ngpu_protocol.networks import Network
from ngpu_protocol.node_records import WELL, NodeRecord

__all__ = [
    "EPOCH_MS",
    "SHARDS",
    "Capability",
    "CapabilityKind",
    "capabilities_of",
    "capability_key",
    "epoch_at",
    "epochs_to_announce",
    "shard_of",
]

EPOCH_MS = 60 * 60 * 1000
EARLY_MS = 10 * 60 * 1000
"""How long before an epoch begins it is announced in, which also forgives clocks that differ."""

SHARDS = "0123456789abcdef"
MAX_VALUE_CHARS = 640

_MULTIHASH_SHA2_256 = b"\x12\x20"


class CapabilityKind(StrEnum):
    """What can be looked for."""

    GPU = "gpu"
    """A canonical GPU model (`gpu_models`)."""
    WORKSPACE = "workspace"
    """A workspace's public id, ready there."""
    MODEL = "model"
    """``project/model`` of a registered model server."""
    REGION = "region"
    """The owner's word for where the node is."""
    ROLE = "role"
    """``node`` or ``bootstrap`` (`node_records.Role`)."""


@dataclass(frozen=True, slots=True, order=True)
class Capability:
    """One thing to be found by; *value* is spelled canonically by `capability`."""

    kind: CapabilityKind
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Capability:
        """Return what ``kind:value`` says, in any spelling people use.

        Raises:
            ValueError: the kind is unknown or the value empty.
        """
        kind, _, value = text.partition(":")
        try:
            known = CapabilityKind(kind.strip().lower())
        except ValueError:
            kinds = ", ".join(CapabilityKind)
            raise ValueError(f"{text!r}: expected kind:value with a kind of {kinds}") from None
        return cls.of(known, value)

    @classmethod
    def of(cls, kind: CapabilityKind, value: str) -> Capability:
        """Return the capability with *value* in its canonical spelling.

        Raises:
            ValueError: nothing is left of the value, or it is too long.
        """
        value = value.strip()
        if kind is CapabilityKind.GPU:
            value = canonical_gpu_model(value)
        elif kind in (CapabilityKind.REGION, CapabilityKind.ROLE):
            value = value.lower()
        if not value or len(value) > MAX_VALUE_CHARS:
            raise ValueError(f"a {kind} is 1 to {MAX_VALUE_CHARS} characters")
        return cls(kind, value)

    def offered_by(self, record: NodeRecord) -> bool:
        """Whether *record* says that its peer offers this now."""
        return self in capabilities_of(record)


def capabilities_of(record: NodeRecord) -> frozenset[Capability]:
    """Return everything the peer of *record* can be found by; nothing for a withdrawn record. A GPU that is not well
    stands in the record, and nobody finds the peer by it.
    """
    if record.withdrawn:
        return frozenset()
    well = [gpu for gpu in record.gpus if gpu.health == WELL]
    named: list[tuple[CapabilityKind, Iterable[str]]] = [
        (CapabilityKind.GPU, (name for gpu in well for name in gpu_model_names(gpu.model, gpu.memory_bytes))),
        (CapabilityKind.WORKSPACE, record.workspaces),
        (CapabilityKind.MODEL, (f"{model.project}/{model.model}" for model in record.models)),
        (CapabilityKind.REGION, (record.region,)),
        (CapabilityKind.ROLE, record.roles),
    ]
    found = set()
    for kind, values in named:
        for value in values:
            if value.strip():
                found.add(Capability.of(kind, value) if kind is not CapabilityKind.GPU else Capability(kind, value))
    return frozenset(found)


def epoch_at(now_ms: int) -> int:
    """Return the number of the hour *now_ms* lies in."""
    return now_ms // EPOCH_MS


def epochs_to_announce(now_ms: int) -> tuple[int, ...]:
    """Return the epochs a peer announces itself in at *now_ms*: this one, and the next when it is near."""
    return tuple(dict.fromkeys((epoch_at(now_ms), epoch_at(now_ms + EARLY_MS))))


def shard_of(node: Address) -> str:
    """Return the shard of a node: the first nibble of its address."""
    return node[2].lower()


def capability_key(capability: Capability, network: Network, epoch: int, shard: str = "") -> bytes:
    """Return the 34-byte key of one page.

    Args:
        shard: one of `SHARDS`, or empty for the front page.
    """
    # The value, which may hold anything, comes last, so that no two names are spelled alike.
    name = f"ngpu capability 1\n{network.name}\n{capability.kind}\n{shard}\n{epoch}\n{capability.value}"
    return _MULTIHASH_SHA2_256 + hashlib.sha256(name.encode()).digest()
