"""What a restart decides: the table of the module, what nodes say when asked, and that it never runs anything twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.tasks.recovery import (
    COLLECT_GRACE_MS,
    Collect,
    Collected,
    Decision,
    End,
    KeepAsking,
    Requeue,
    Unfinished,
    after_asking,
    decide,
)
from ngpu_bootstrap.tasks.states import TaskState as S
from ngpu_protocol.identity import parse_address

NODE = parse_address("0x" + "22" * 20)
SESSION = b"s" * 32
SYNC = Unfinished("t", "POST", detach=False, deadline_at_ms=1000)
ASYNC = replace(SYNC, detach=True, request_kept=True)
KEYED = replace(SYNC, idempotency_key="k", request_kept=True)


def sent(task: Unfinished) -> Unfinished:
    return replace(task, attempts=1, node=NODE, under_way=True, session=SESSION)


@pytest.mark.parametrize(
    ("task", "decision"),
    [
        (ASYNC, Requeue()),
        (KEYED, Requeue()),
        (SYNC, End(S.FAILED, "bootstrap_lost")),
        (replace(SYNC, method="GET"), End(S.FAILED, "bootstrap_lost")),
        (replace(KEYED, request_kept=False), End(S.FAILED, "bootstrap_lost")),
        (sent(ASYNC), Collect(NODE, 1, SESSION, 1000 + COLLECT_GRACE_MS)),
        (sent(SYNC), End(S.FAILED, "bootstrap_lost", ends_attempt=True)),
        (sent(KEYED), Requeue(ends_attempt=True)),
        # refused before the crash, not placed again yet
        (replace(sent(ASYNC), under_way=False), Requeue()),
    ],
)
def test_the_table(task: Unfinished, decision: Decision) -> None:
    assert decide(task, now_ms=0) == decision


@pytest.mark.parametrize("task", [SYNC, ASYNC, KEYED, sent(SYNC), sent(KEYED)])
def test_past_the_deadline_nothing_runs_again(task: Unfinished) -> None:
    assert decide(task, now_ms=1000) == End(S.EXPIRED, "deadline", task.under_way)


def test_past_the_deadline_a_detached_answer_is_still_collected() -> None:
    assert isinstance(decide(sent(ASYNC), now_ms=5000), Collect)


@pytest.mark.parametrize(
    ("task", "said", "now_ms", "decision"),
    [
        (ASYNC, "running", 0, KeepAsking()),
        (ASYNC, "unreachable", 1500, KeepAsking()),
        (ASYNC, "unreachable", 1000 + COLLECT_GRACE_MS, End(S.EXPIRED, "deadline", True)),
        (ASYNC, "unknown", 0, Requeue(ends_attempt=True)),
        (ASYNC, "unknown", 1000, End(S.EXPIRED, "deadline", True)),
        (ASYNC, "unknown_since_restart", 0, End(S.FAILED, "node_lost", True)),
        (replace(ASYNC, method="PUT"), "unknown_since_restart", 0, Requeue(ends_attempt=True)),
        (replace(ASYNC, idempotency_key="k"), "unknown_since_restart", 0, Requeue(ends_attempt=True)),
    ],
)
def test_what_the_node_says_decides(task: Unfinished, said: str, now_ms: int, decision: Decision) -> None:
    assert after_asking(sent(task), Collected(said), now_ms=now_ms, attempt_cap=3) == decision


def test_the_attempt_cap_holds_for_collected_tasks() -> None:
    decision = after_asking(sent(ASYNC), Collected.UNKNOWN, now_ms=0, attempt_cap=1)
    assert decision == End(S.FAILED, "attempt_cap", True)


def test_an_answer_is_not_a_decision() -> None:
    with pytest.raises(ValueError, match="stored"):
        after_asking(sent(ASYNC), Collected.ANSWERED, now_ms=0, attempt_cap=3)


unfinished = st.builds(
    Unfinished,
    st.just("t"),
    st.sampled_from(["GET", "POST"]),
    detach=st.booleans(),
    deadline_at_ms=st.just(1000),
    idempotency_key=st.sampled_from([None, "k"]),
    request_kept=st.booleans(),
    attempts=st.integers(1, 3),
    node=st.just(NODE),
    under_way=st.booleans(),
    session=st.just(SESSION),
)


@given(unfinished, st.integers(0, 2000))
def test_an_attempt_that_may_have_acted_is_never_just_run_again(task: Unfinished, now_ms: int) -> None:
    decision = decide(task, now_ms=now_ms)
    if isinstance(decision, Requeue) and task.under_way:
        assert task.idempotency_key is not None
    if isinstance(decision, Requeue | End):
        assert decision.ends_attempt == task.under_way
    if isinstance(decision, Requeue):
        assert now_ms < task.deadline_at_ms
    if isinstance(decision, Collect):
        assert task.detach


@given(
    unfinished.filter(lambda task: task.under_way),
    st.sampled_from([c for c in Collected if c is not Collected.ANSWERED]),
    st.integers(0, 10**6),
)
def test_asking_ends_in_the_end(task: Unfinished, said: Collected, now_ms: int) -> None:
    decision = after_asking(task, said, now_ms=now_ms, attempt_cap=3)
    if now_ms >= task.deadline_at_ms + COLLECT_GRACE_MS:
        assert isinstance(decision, End)
    if isinstance(decision, Requeue):
        assert task.attempts < 3
        assert said is Collected.UNKNOWN or task.method == "GET" or task.idempotency_key is not None
