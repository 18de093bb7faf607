"""The messages of the control and receipts streams."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ngpu_protocol import control
from ngpu_protocol.control import (
    MAX_MESSAGE_BYTES,
    Ack,
    Bye,
    DeploymentPhase,
    DeploymentState,
    Desired,
    Gap,
    GpuOffer,
    Head,
    Heartbeat,
    Hello,
    HostOffer,
    Offer,
    Refused,
    ServiceOffer,
    UnknownMessage,
    Welcome,
    decode_control,
    decode_receipts,
    encode_message,
)
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import address_bytes, gpu_id
from ngpu_protocol.orders import sign_order
from ngpu_protocol.receipts import sign_receipt
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.unit.protocol.samples import BOOTSTRAP, CHAIN_ID, NODE, a_receipt, an_order
from tests.unit.protocol.test_workspaces import FULL, MINIMAL

GPU = gpu_id(NODE.address, "GPU-0")
SPECS = (WorkspaceSpec.model_validate(FULL), WorkspaceSpec.model_validate(MINIMAL))
CONTROL: list[Any] = [
    Hello("local", 1, 1, b"s" * 32, NODE.address, "ngpu-node 0.1.0", 5, (GpuOffer(GPU, "RTX 4090", 2**34),), 8),
    Welcome("local", 1, "acme", 5, 7, b"h" * 32, 2.5, False),
    Refused("not_admitted", "ask the operator"),
    Heartbeat(
        9,
        3,
        False,
        (
            DeploymentState("1001", 2, DeploymentPhase.READY, "", 3, b"d" * 32, (GPU,)),
            DeploymentState("1002", 1, "new"),
            DeploymentState(
                "1003", 1, "pulling", progress=40, bytes_done=4, bytes_total=10, seconds_left=6, reason="x"
            ),
        ),
        (ServiceOffer("acme", "llama", "chat", 2),),
        host=HostOffer(True, 7.5, 2**34, 2**36, 2**33, ("docker.io",), False, False, True, "eu"),
    ),
    Desired(SPECS, {"1001": b"sealed"}, 1_700_000_000_000),
    Bye("draining"),
]
RECEIPTS: list[Any] = [
    Offer(sign_order(an_order(), BOOTSTRAP, CHAIN_ID).wire, sign_receipt(a_receipt(), NODE, CHAIN_ID).wire),
    Ack(b"acknowledgement"),
    Ack(b"acknowledgement", b"observation"),
    Ack(b"acknowledgement", b"", b"stand-in"),
    Gap(5, 9),
    Head(9, b"h" * 32),
]
EVERY = [*((message, decode_control) for message in CONTROL), *((message, decode_receipts) for message in RECEIPTS)]
each_message = pytest.mark.parametrize(("message", "decode"), EVERY, ids=lambda value: type(value).__name__)


@each_message
def test_message_survives_the_wire(message: Any, decode: Any) -> None:
    assert decode(encode_message(message)) == message


@each_message
def test_message_is_a_map_of_its_field_names_and_its_type(message: Any, decode: Any) -> None:
    wire = msgpack.unpackb(encode_message(message))
    assert wire["type"] == type(message).__name__.lower()
    names = [field.name for field in fields(message)]
    idle = ("observation", "stand_in", "claim")  # what rarely goes along is left out where it is empty
    names = [name for name in names if name not in idle or getattr(message, name)]
    assert list(wire) == ["type", *names]


def test_address_travels_as_twenty_bytes() -> None:
    assert msgpack.unpackb(encode_message(CONTROL[0]))["node"] == address_bytes(NODE.address)


@each_message
def test_later_versions_keys_are_ignored_at_every_depth(message: Any, decode: Any) -> None:
    def grown(value: Any) -> Any:
        if isinstance(value, dict) and "SEED" not in value:  # env is data, not fields
            return {**{key: grown(inner) for key, inner in value.items()}, "later": [1]}
        return [grown(inner) for inner in value] if isinstance(value, list) else value

    wire = msgpack.unpackb(encode_message(message))
    wire.pop("type")
    grown_wire = {
        **{key: grown(value) for key, value in wire.items()},
        "later": {},
        "type": type(message).__name__.lower(),
    }
    if isinstance(message, Desired):
        grown_wire["deployments"][1]["env"].pop("later")
        grown_wire["sealed"].pop("later")
    assert decode(msgpack.packb(grown_wire)) == message


def test_later_versions_messages_and_words_are_not_refused() -> None:
    assert decode_control(msgpack.packb({"type": "teleport", "to": 5})) == UnknownMessage("teleport")
    assert decode_receipts(encode_message(Bye("x"))) == UnknownMessage("bye")
    heartbeat = Heartbeat(1, 1, deployments=(DeploymentState("1", 1, "hibernating"),))
    assert decode_control(encode_message(heartbeat)) == heartbeat


def test_short_form_takes_the_defaults() -> None:
    welcome = decode_control(
        msgpack.packb({"type": "welcome", "network": "local", "version": 1, "service": "acme", "now_ms": 5})
    )
    assert welcome == Welcome("local", 1, "acme", 5, 0, bytes(32), control.DEFAULT_HEARTBEAT_S, True)


@each_message
def test_wrong_type_in_any_field_is_malformed(message: Any, decode: Any) -> None:
    wire = msgpack.unpackb(encode_message(message))
    wrong_values = [None, -1, 2**64 - 1, 1.5, "x", b"x", [5], [b"x"], {}, True, [{}], msgpack.ExtType(5, b"")]
    for name in wire.keys() - {"type"}:
        accepted = []
        for value in wrong_values:
            with suppress(MalformedError):
                accepted.append(getattr(decode(msgpack.packb({**wire, name: value})), name))
        assert len({repr(value) for value in accepted}) <= 1, name


@pytest.mark.parametrize("word", [None, 5, b"hello", [], {}])
def test_type_must_be_a_word(word: object) -> None:
    with pytest.raises(MalformedError):
        decode_control(msgpack.packb({"type": word}))
    with pytest.raises(MalformedError):
        decode_control(msgpack.packb({}))


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_raise_nothing_but_malformed(data: bytes) -> None:
    for decode in (decode_control, decode_receipts):
        with pytest.raises(MalformedError):
            decode(data)


@each_message
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=60)
def test_damaged_message_decodes_or_is_malformed(message: Any, decode: Any, position: int, value: int) -> None:
    damaged = bytearray(encode_message(message))
    damaged[position % len(damaged)] = value
    with suppress(MalformedError):
        decode(bytes(damaged))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\x00\x0f\x00\x00" * 200_000,
        b"\xdc\x04\x00" * 300_000,
        b"\x91" * 1_000_000,
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa4type" + b"\x91" * 1000 + b"\xc0",
    ],
)
def test_bombs_are_refused(bomb: bytes) -> None:
    with pytest.raises(MalformedError):
        decode_control(bomb)


def test_size_is_capped_both_ways() -> None:
    with pytest.raises(MalformedError, match="allowed"):
        decode_control(bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(ValueError, match="allowed"):
        encode_message(Bye("x" * MAX_MESSAGE_BYTES))


def test_our_own_mistake_is_caught_where_it_is_made() -> None:
    with pytest.raises(ValidationError):
        Head(1, b"short")
    with pytest.raises(ValidationError):
        Gap(-1, 5)


def test_environment_of_a_desired_workspace_is_not_in_an_error() -> None:
    wire = msgpack.unpackb(encode_message(Desired(SPECS)))
    wire["deployments"][0]["env"] = {"TOKEN": "s3cret\0"}
    with pytest.raises(MalformedError) as refused:
        decode_control(msgpack.packb(wire))
    assert "s3cret" not in str(refused.value)
