"""Admission, ground by ground: each order below differs from a good one in a single thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.execution import admission
from ngpu_node.execution.admission import (
    AdmissionState,
    Admitted,
    Asked,
    Held,
    Refusal,
    SeenOrders,
    judge,
    parse_target,
    take,
)
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_protocol.job_answers import MAX_BESIDE
from ngpu_protocol.orders import SignedOrder, sign_order
from ngpu_protocol.wire_errors import Reason
from tests.unit.node.builders import (
    BOOTSTRAP,
    CHAIN_ID,
    NODE,
    NOW_MS,
    SESSION,
    SIBLING,
    STRANGER,
    an_order,
    signed_order,
)


@dataclass
class Place:
    is_ready: bool = True
    detail: str = "pulling the image"
    ports: frozenset[int] = frozenset({8080})
    concurrency: int = 4
    running: int = 0


@dataclass
class Places:
    here: dict[tuple[str, str], dict[int, Place]] = field(default_factory=lambda: {("acme", "7"): {1: Place()}})

    def revisions(self, service: str, workspace: str) -> Mapping[int, Place]:
        return self.here.get((service, workspace), {})


TRUST = Trust(
    [
        TrustedBootstrap(BOOTSTRAP.address, ("/ip4/127.0.0.1/tcp/1",), "acme"),
        TrustedBootstrap(SIBLING.address, ("/ip4/127.0.0.1/tcp/2",), "acme"),
    ]
)


def a_state(**changes: Any) -> AdmissionState[Place]:
    state: AdmissionState[Place] = AdmissionState(
        node=NODE.address,
        session=SESSION,
        chain_id=CHAIN_ID,
        trust=TRUST,
        deployments=Places(),
        slots=8,
        max_body_bytes=1000,
    )
    return dataclasses.replace(state, **changes)


def asked(**changes: Any) -> Asked:
    request = Asked("POST", "7", 8080, "/echo?x=1", 10, BOOTSTRAP.address)
    return dataclasses.replace(request, **changes)


def reason_of(
    order: SignedOrder | str | None,
    *,
    request: Asked | None = None,
    state: AdmissionState[Place] | None = None,
    now_ms: int = NOW_MS,
) -> Reason | None:
    text = order.encode() if isinstance(order, SignedOrder) else order
    verdict = judge(text, request or asked(), state or a_state(), now_ms)
    if isinstance(verdict, Refusal):
        assert verdict.message
        return verdict.reason
    return None


def with_place(**changes: Any) -> AdmissionState[Place]:
    return a_state(deployments=Places({("acme", "7"): {1: Place(**changes)}}))


@pytest.mark.parametrize("full", ["deployment", "node"])
def test_an_order_about_a_task_that_holds_a_slot_needs_none_of_its_own(full: str) -> None:
    place = Place(running=4 if full == "deployment" else 1)
    state = a_state(deployments=Places({("acme", "7"): {1: place}}), running=8 if full == "node" else 4)
    order = signed_order()
    assert reason_of(order, state=state) is Reason.NO_FREE_SLOT
    assert reason_of(order, request=asked(beside="t"), state=state) is Reason.NO_FREE_SLOT, "nothing is held"
    state.held["acme", "t"] = Held(place)
    admitted = judge(order.encode(), asked(beside="t"), state, NOW_MS)
    assert isinstance(admitted, Admitted)
    assert admitted.beside == "t"
    assert reason_of(order, request=asked(beside="u"), state=state) is Reason.NO_FREE_SLOT
    state.held["acme", "t"].beside = MAX_BESIDE
    assert reason_of(order, request=asked(beside="t"), state=state) is Reason.NO_FREE_SLOT
    state.held["acme", "t"] = Held(Place())
    assert reason_of(order, request=asked(beside="t"), state=state) is Reason.NO_FREE_SLOT, "another deployment's"
    state.held["acme", "t"], state.draining = Held(place), True
    assert reason_of(order, request=asked(beside="t"), state=state) is Reason.DRAINING, "all else is judged as ever"


def test_a_good_order_is_admitted_with_what_running_it_needs() -> None:
    order = signed_order()
    admitted = judge(order.encode(), asked(), a_state(), NOW_MS)
    assert isinstance(admitted, Admitted)
    assert admitted.order_hash == order.order.digest(CHAIN_ID)
    assert (admitted.service, admitted.left_ms) == ("acme", 60_000)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (None, Reason.MALFORMED_ORDER),
        ("", Reason.MALFORMED_ORDER),
        ("!!!", Reason.MALFORMED_ORDER),
        ("A" * 100_000, Reason.MALFORMED_ORDER),
        (signed_order(task_id="x" * 200), Reason.MALFORMED_ORDER),
        (signed_order(deadline_ms=NOW_MS + admission.MAX_ORDER_LIFE_MS + 1), Reason.MALFORMED_ORDER),
        (signed_order(STRANGER), Reason.UNKNOWN_BOOTSTRAP),
        (dataclasses.replace(signed_order(), signature=b"\0" * 65), Reason.MALFORMED_ORDER),
        (signed_order(node=STRANGER.address), Reason.WRONG_NODE),
        (signed_order(session=bytes(32)), Reason.WRONG_SESSION),
        (signed_order(deadline_ms=NOW_MS), Reason.DEADLINE_PASSED),
        (signed_order(method="GET"), Reason.ORDER_MISMATCH),
        (signed_order(target="/echo?x=2"), Reason.ORDER_MISMATCH),
        (signed_order(port=8081), Reason.ORDER_MISMATCH),
        (signed_order(workspace="8"), Reason.ORDER_MISMATCH),
        (signed_order(revision=2), Reason.ORDER_MISMATCH),
    ],
)
def test_an_order_wrong_in_one_thing_is_refused_for_that(order: SignedOrder | str | None, reason: Reason) -> None:
    if isinstance(order, SignedOrder) and order.signature == b"\0" * 65:
        order = "gA"  # an empty msgpack map: decodes, and holds nothing
    assert reason_of(order) is reason


def test_an_order_changed_after_signing_is_refused() -> None:
    order = an_order(target="/echo?x=2")
    forged = sign_order(dataclasses.replace(order, bootstrap=STRANGER.address), STRANGER, CHAIN_ID)
    wire = forged.wire.replace(bytes.fromhex(STRANGER.address[2:]), bytes.fromhex(BOOTSTRAP.address[2:]))
    assert reason_of(SignedOrder.from_bytes(wire), request=asked(target="/echo?x=2")) is Reason.BAD_SIGNATURE


def test_an_order_of_another_network_is_refused() -> None:
    assert reason_of(sign_order(an_order(), BOOTSTRAP, CHAIN_ID + 1)) is Reason.BAD_SIGNATURE


def test_a_stranger_may_not_bring_a_trusted_bootstraps_order_but_a_sibling_may() -> None:
    assert reason_of(signed_order(), request=asked(peer=STRANGER.address)) is Reason.UNKNOWN_BOOTSTRAP
    assert reason_of(signed_order(), request=asked(peer=SIBLING.address)) is None


def test_an_order_past_its_deadline_on_the_bootstraps_clock_is_refused_and_one_in_time_is_not() -> None:
    ahead = a_state(clock_offset_ms={BOOTSTRAP.address: 120_000})
    assert reason_of(signed_order(), state=ahead) is Reason.DEADLINE_PASSED
    assert reason_of(signed_order(deadline_ms=NOW_MS + 150_000), state=ahead) is None


def test_second_use_of_an_order_is_refused_by_whichever_bootstrap_brings_it() -> None:
    state = a_state()
    admitted = judge(signed_order().encode(), asked(), state, NOW_MS)
    assert isinstance(admitted, Admitted)
    take(admitted, state)
    assert reason_of(signed_order(), state=state) is Reason.ORDER_REPLAYED
    assert reason_of(signed_order(issued_at_ms=NOW_MS), state=state) is Reason.ORDER_REPLAYED
    assert reason_of(signed_order(SIBLING), request=asked(peer=SIBLING.address), state=state) is Reason.ORDER_REPLAYED
    assert reason_of(signed_order(attempt=2), state=state) is None


def test_a_refused_order_may_be_brought_again() -> None:
    state = with_place(is_ready=False)
    assert reason_of(signed_order(), state=state) is Reason.WORKSPACE_NOT_READY
    state.deployments.revisions("acme", "7")[1].is_ready = True
    assert reason_of(signed_order(), state=state) is None


def test_an_unknown_workspace_is_refused_and_so_is_one_of_another_service() -> None:
    assert reason_of(signed_order(workspace="8"), request=asked(workspace="8")) is Reason.WORKSPACE_UNKNOWN
    elsewhere = a_state(deployments=Places({("other", "7"): {1: Place()}}))
    assert reason_of(signed_order(), state=elsewhere) is Reason.WORKSPACE_UNKNOWN


def test_a_port_the_workspace_does_not_declare_is_refused() -> None:
    assert reason_of(signed_order(port=22), request=asked(port=22)) is Reason.ORDER_MISMATCH


def test_load_and_state_each_have_their_reason() -> None:
    order = signed_order()
    assert reason_of(order, state=with_place(is_ready=False)) is Reason.WORKSPACE_NOT_READY
    assert reason_of(order, state=with_place(running=4)) is Reason.NO_FREE_SLOT
    assert reason_of(order, state=a_state(running=8)) is Reason.NO_FREE_SLOT
    assert reason_of(order, state=a_state(seen=SeenOrders(limit=0))) is Reason.NO_FREE_SLOT
    assert reason_of(order, state=a_state(draining=True)) is Reason.DRAINING
    assert reason_of(order, request=asked(content_length=1001)) is Reason.BODY_TOO_LARGE
    assert reason_of(order, request=asked(content_length=None)) is None


def test_a_busy_or_draining_node_still_says_what_is_wrong_with_the_order() -> None:
    busy = a_state(running=8, draining=True)
    assert reason_of(signed_order(node=STRANGER.address), state=busy) is Reason.WRONG_NODE
    assert reason_of(signed_order(STRANGER), state=busy) is Reason.UNKNOWN_BOOTSTRAP


def test_seen_orders_are_forgotten_when_their_deadline_refuses_them_and_not_before() -> None:
    seen = SeenOrders()
    seen.add(("acme", "t", 1), NOW_MS)
    seen.add(("acme", "t", 2), NOW_MS + 10_000)
    seen.forget(NOW_MS + admission.CLOCK_TOLERANCE_MS)
    assert ("acme", "t", 1) in seen
    seen.forget(NOW_MS + admission.CLOCK_TOLERANCE_MS + 2_000)
    assert ("acme", "t", 1) not in seen
    assert ("acme", "t", 2) in seen
    seen.forget(NOW_MS + 60_000)
    assert len(seen) == 0


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("/ngpu/v1/workspaces/7/ports/8080/echo?x=1", ("7", 8080, "/echo?x=1")),
        ("/ngpu/v1/workspaces/7/ports/1/", ("7", 1, "/")),
        ("/ngpu/v1/workspaces/7/ports/8080//a//b", ("7", 8080, "//a//b")),
        ("/ngpu/v1/workspaces/7/ports/8080/a/ports/9/b", ("7", 8080, "/a/ports/9/b")),
        ("/ngpu/v1/workspaces/7/ports/8080", None),
        ("/ngpu/v1/workspaces/7/ports/08080/", None),
        ("/ngpu/v1/workspaces/7/ports/0/", None),
        ("/ngpu/v1/workspaces/7/ports/65536/", None),
        ("/ngpu/v1/workspaces/7/ports/999999999999/", None),
        ("/ngpu/v1/workspaces/7/ports/٣/", None),
        ("/ngpu/v1/workspaces/7/ports/-1/", None),
        ("/ngpu/v1/workspaces//ports/80/", None),
        ("/ngpu/v1/workspaces/7/port/80/", None),
        ("/ngpu/v2/workspaces/7/ports/80/", None),
        ("/", None),
    ],
)
def test_targets(target: str, parts: tuple[str, int, str] | None) -> None:
    assert parse_target(target) == parts


@given(st.text())
def test_any_text_for_a_target_is_taken_apart_or_refused(text: str) -> None:
    parts = parse_target("/ngpu/v1/workspaces/" + text)
    if parts is not None:
        workspace, port, target = parts
        assert text == f"{workspace}/ports/{port}{target}"


@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1"))))
def test_any_text_for_an_order_is_malformed(text: str) -> None:
    assert reason_of(text) is Reason.MALFORMED_ORDER
