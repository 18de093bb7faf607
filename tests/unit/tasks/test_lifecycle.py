"""The state machine: its table, and that no order of events leaves a task without an end or with two."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.tasks.lifecycle import (
    Admitted,
    Answered,
    Begun,
    CancelAsked,
    ClientGone,
    CommitEnd,
    DeadlineReached,
    Ended,
    Event,
    Life,
    OutOfOrder,
    Place,
    StopAttempt,
    Unplaced,
    advance,
)
from ngpu_bootstrap.tasks.states import TaskState as S

NEW = Life("POST", deadline_at_ms=1000, cap=3)
SENT = replace(NEW, state=S.DISPATCHED, attempts=1, under_way=True)
RUNNING = replace(SENT, state=S.RUNNING)
LOST = Ended(1, "connection_lost", bytes_sent=True)
REFUSED = Ended(1, "no_free_slot", bytes_sent=True, refused="no_free_slot")


@pytest.mark.parametrize(
    ("life", "event", "state", "instructions"),
    [
        (NEW, Begun(1), S.DISPATCHED, ()),
        (NEW, Unplaced(), S.FAILED, (CommitEnd(S.FAILED, "no_node"),)),
        (NEW, CancelAsked(), S.CANCELLED, (CommitEnd(S.CANCELLED, "cancelled"),)),
        (NEW, DeadlineReached(), S.EXPIRED, (CommitEnd(S.EXPIRED, "deadline"),)),
        (SENT, Admitted(1), S.RUNNING, ()),
        (SENT, REFUSED, S.ACCEPTED, (Place(),)),
        (SENT, LOST, S.FAILED, (CommitEnd(S.FAILED, "connection_lost"),)),
        (replace(SENT, method="GET"), LOST, S.ACCEPTED, (Place(),)),
        (replace(SENT, cap=1), REFUSED, S.FAILED, (CommitEnd(S.FAILED, "no_free_slot"),)),
        (RUNNING, Answered(1), S.FINISHED, (CommitEnd(S.FINISHED),)),
        (SENT, Answered(1), S.FINISHED, (CommitEnd(S.FINISHED),)),
        (RUNNING, Answered(1, stands=False), S.FAILED, (CommitEnd(S.FAILED, "receipt_disputed"),)),
        (RUNNING, CancelAsked(), S.CANCELLED, (StopAttempt(1), CommitEnd(S.CANCELLED, "cancelled"))),
        (RUNNING, ClientGone(), S.CANCELLED, (StopAttempt(1), CommitEnd(S.CANCELLED, "client_gone"))),
        (replace(RUNNING, detach=True), ClientGone(), S.RUNNING, ()),
        (RUNNING, DeadlineReached(), S.EXPIRED, (StopAttempt(1), CommitEnd(S.EXPIRED, "deadline"))),
    ],
)
def test_the_table(life: Life, event: Event, state: S, instructions: tuple[object, ...]) -> None:
    after, told = advance(life, event, now_ms=0)
    assert after.state is state
    assert told == instructions


def test_an_attempt_that_ends_past_the_deadline_expires_the_task() -> None:
    after, told = advance(SENT, REFUSED, now_ms=1000)
    assert after.state is S.EXPIRED
    assert told == (CommitEnd(S.EXPIRED, "deadline"),)


def test_events_of_an_attempt_given_up_change_nothing() -> None:
    second = replace(SENT, attempts=2)
    for event in (Admitted(1), Answered(1), LOST):
        assert advance(second, event, now_ms=0) == (second, ())


def test_two_attempts_at_once_are_our_mistake() -> None:
    with pytest.raises(OutOfOrder):
        advance(SENT, Begun(2), now_ms=0)
    with pytest.raises(OutOfOrder):
        advance(replace(SENT, under_way=False), Begun(1), now_ms=0)
    with pytest.raises(OutOfOrder):
        advance(replace(SENT, state=S.FINISHED, under_way=False), Begun(2), now_ms=0)
    with pytest.raises(OutOfOrder):
        advance(SENT, Unplaced(), now_ms=0)


numbers = st.integers(1, 4)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Begun, numbers),
    st.builds(Admitted, numbers),
    st.builds(Answered, numbers, st.booleans()),
    st.builds(
        Ended,
        numbers,
        st.just("why"),
        bytes_sent=st.booleans(),
        bytes_to_client=st.booleans(),
        refused=st.sampled_from(["", "draining", "order_replayed"]),
    ),
    st.just(Unplaced()),
    st.just(CancelAsked()),
    st.just(ClientGone()),
    st.just(DeadlineReached()),
)


@given(
    life=st.builds(
        Life,
        st.sampled_from(["GET", "POST"]),
        deadline_at_ms=st.just(10),
        cap=st.integers(1, 3),
        idempotency_key=st.sampled_from([None, "k"]),
        detach=st.booleans(),
        upgrade=st.booleans(),
    ),
    script=st.lists(st.tuples(events, st.integers(0, 12)), max_size=25),
)
def test_any_script_ends_a_task_once_and_within_its_cap(life: Life, script: list[tuple[Event, int]]) -> None:
    ends = 0
    begun = 0
    for event, now_ms in script:
        try:
            after, told = advance(life, event, now_ms=now_ms)
        except OutOfOrder:
            continue
        begun += isinstance(event, Begun) and after != life
        ends += sum(isinstance(one, CommitEnd) for one in told)
        if life.state.is_final:
            assert after == life
            assert told == ()
        assert after.under_way == (after.state in (S.DISPATCHED, S.RUNNING))
        # a task placed again has attempts left
        assert Place() not in told or after.attempts < after.cap
        life = after
    assert ends == life.state.is_final
    assert begun <= life.attempts


def test_every_state_has_a_meaning_and_its_wire_number() -> None:
    assert [state.value for state in S] == list(range(7))
    assert all(state.meaning for state in S)
    assert [state.name for state in S if state.is_final] == ["FINISHED", "FAILED", "CANCELLED", "EXPIRED"]
