"""Capability keys: spelled one way, apart by network, hour and shard."""

from __future__ import annotations

import json
import os

import pytest

from ngpu_protocol.capabilities import (
    EPOCH_MS,
    SHARDS,
    Capability,
    CapabilityKind,
    capability_key,
    epoch_at,
    epochs_to_announce,
    shard_of,
)
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from tests.vectors import generate


def test_people_spell_a_capability_as_they_like() -> None:
    assert Capability.parse("GPU:NVIDIA GeForce RTX 4090") == Capability.parse("gpu: rtx4090")
    assert Capability.parse("region: EU-Central").value == "eu-central"
    assert Capability.parse("model:acme/llama:7b").value == "acme/llama:7b"


@pytest.mark.parametrize("text", ["", "gpu", "gpu:", "gpu:--", "colour:red", "workspace:" + "9" * 641])
def test_what_is_no_capability_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|characters"):
        Capability.parse(text)


def test_keys_differ_by_everything_that_matters() -> None:
    gpu = Capability(CapabilityKind.GPU, "T4")
    keys = {
        capability_key(capability, network_named(network), epoch, shard)
        for capability in (gpu, Capability(CapabilityKind.WORKSPACE, "T4"), Capability(CapabilityKind.GPU, "T4G"))
        for network in ("local", "test")
        for epoch in (1, 2)
        for shard in ("", *SHARDS)
    }
    assert len(keys) == 3 * 2 * 2 * 17
    assert all(len(key) == 34 and key.startswith(b"\x12\x20") for key in keys)


def test_the_next_epoch_is_announced_before_it_begins() -> None:
    start = 1000 * EPOCH_MS
    assert epoch_at(start) == 1000
    assert epochs_to_announce(start) == (1000,)
    assert epochs_to_announce(start + EPOCH_MS - 10 * 60_000) == (1000, 1001)
    assert epochs_to_announce(start + EPOCH_MS) == (1001,)


def test_nodes_spread_over_the_shards() -> None:
    counts = dict.fromkeys(SHARDS, 0)
    for _ in range(320):
        counts[shard_of(Account.from_key(os.urandom(32)).address)] += 1
    assert min(counts.values()) >= 4


def test_stored_keys_are_made_again() -> None:
    for vector in json.loads((generate.FOLDER / "capabilities.json").read_text()):
        key = capability_key(
            Capability.parse(vector["capability"]), network_named(vector["network"]), vector["epoch"], vector["shard"]
        )
        assert "0x" + key.hex() == vector["key"]
