"""The retry rule: a table of the cases the design names, and properties over all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.tasks.retry import IDEMPOTENT_METHODS, RetryDecision, RetryReason, may_retry, pause_s
from ngpu_protocol.wire_errors import Reason


def decide(**changes: object) -> RetryDecision:
    given_values: dict[str, object] = {
        "method": "POST",
        "idempotency_key": None,
        "bytes_sent": True,
        "bytes_to_client": False,
        "refused": "",
        "upgrade": False,
        "attempts": 1,
        "cap": 3,
        "deadline_at_ms": 1000,
        "now_ms": 0,
    }
    given_values.update(changes)
    return may_retry(given_values.pop("method"), given_values.pop("idempotency_key"), **given_values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "allowed", "reason"),
    [
        ({"refused": "no_free_slot"}, True, "refused"),
        ({"refused": "a_word_of_a_later_version"}, True, "refused"),
        ({"refused": "draining", "upgrade": True}, True, "refused"),
        ({"bytes_sent": False}, True, "not_sent"),
        ({"method": "GET"}, True, "idempotent"),
        ({"method": "PUT"}, True, "idempotent"),
        ({"idempotency_key": "k"}, True, "idempotent"),
        ({}, False, "not_idempotent"),
        ({"method": "PATCH"}, False, "not_idempotent"),
        # an earlier copy of this order was admitted: the workspace may have acted
        ({"refused": "order_replayed"}, False, "not_idempotent"),
        ({"refused": "order_replayed", "method": "GET"}, True, "idempotent"),
        ({"method": "GET", "upgrade": True}, False, "upgraded"),
        ({"method": "GET", "bytes_to_client": True}, False, "answer_started"),
        ({"idempotency_key": "k", "bytes_to_client": True}, False, "answer_started"),
        ({"refused": "draining", "now_ms": 1000}, False, "deadline"),
        ({"bytes_sent": False, "attempts": 3}, False, "attempt_cap"),
    ],
)
def test_the_rule_case_by_case(changes: dict[str, object], allowed: bool, reason: str) -> None:
    assert decide(**changes) == RetryDecision(allowed, RetryReason(reason))


@given(
    method=st.sampled_from(["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "POST", "PATCH", "BREW"]),
    key=st.none() | st.text(max_size=3),
    sent=st.booleans(),
    to_client=st.booleans(),
    refused=st.sampled_from(["", *Reason, "future"]),
    upgrade=st.booleans(),
    attempts=st.integers(0, 5),
    cap=st.integers(1, 5),
    now_ms=st.integers(0, 20),
)
def test_a_workspace_that_may_have_acted_is_asked_again_only_for_what_may_be_repeated(
    method: str,
    key: str | None,
    sent: bool,
    to_client: bool,
    refused: str,
    upgrade: bool,
    attempts: int,
    cap: int,
    now_ms: int,
) -> None:
    decision = may_retry(
        method,
        key,
        bytes_sent=sent,
        bytes_to_client=to_client,
        refused=refused,
        upgrade=upgrade,
        attempts=attempts,
        cap=cap,
        deadline_at_ms=10,
        now_ms=now_ms,
    )
    if decision:
        assert attempts < cap
        assert now_ms < 10
        assert not to_client
        untouched = not sent if not refused else refused != "order_replayed"
        assert untouched or ((key is not None or method in IDEMPOTENT_METHODS) and not upgrade)
    assert bool(decision) == decision.allowed


def test_nodes_that_were_full_after_all_are_asked_at_once_at_first_and_then_ever_more_slowly() -> None:
    pauses = [pause_s(full) for full in range(30)]
    assert pauses[:5] == [0.0] * 5
    assert pauses[5:8] == [0.05, 0.1, 0.2]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 1.0
