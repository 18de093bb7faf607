"""Refusals: reasons, statuses and their body."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.wire_errors import Reason, parse_refusal, refusal_body


def test_every_reason_has_a_client_or_server_error_status_of_its_own() -> None:
    statuses = [reason.status for reason in Reason]
    assert all(400 <= status < 600 for status in statuses)
    assert len(set(statuses)) == len(statuses)
    assert (Reason.WRONG_NODE.status, Reason.DRAINING.status) == (421, 503)


@pytest.mark.parametrize("reason", list(Reason))
def test_body_round_trips(reason: Reason) -> None:
    refusal = parse_refusal(refusal_body(reason, "deadline passed 3 s ago"))
    assert (refusal.reason, refusal.message) == (reason, "deadline passed 3 s ago")
    assert json.loads(refusal_body(reason, "x")) == {"reason": reason.value, "message": "x"}


def test_later_versions_reason_is_kept_and_long_texts_are_cut() -> None:
    refusal = parse_refusal(json.dumps({"reason": "on_holiday", "message": "m" * 2000, "until": 5}).encode())
    assert refusal.reason == "on_holiday"
    assert len(refusal.message) == 500
    assert parse_refusal(b'{"reason": "\\ud800"}').reason == "?"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"reason": 5}', b'{"reason": "x", "message": 5}', b"[" * 4000])
def test_other_bodies_are_malformed(body: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_refusal(body)


def test_large_body_is_not_parsed() -> None:
    with pytest.raises(MalformedError, match="allowed"):
        parse_refusal(refusal_body(Reason.DRAINING, "m" * 5000))


@given(st.binary(max_size=100))
def test_random_bytes_raise_nothing_but_malformed(body: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_refusal(body)
