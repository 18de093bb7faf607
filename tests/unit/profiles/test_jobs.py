"""The life of a job as a machine of values."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from ngpu_bootstrap.profiles.declaration import Profile, problems_between
from ngpu_bootstrap.profiles.job_declaration import AskedJob, JobDeclaration, SubmittedJob
from ngpu_bootstrap.profiles.jobs import (
    BEARABLE,
    Fetch,
    Job,
    Over,
    Phase,
    Poll,
    Rest,
    Submit,
    ends_at_ms,
    fetched,
    missed,
    next_step,
    polled,
    result_target,
    submitted,
)
from ngpu_protocol.job_terms import JobTerms

TABLE: dict[str, Any] = {
    "id": ["/job_id"],
    "poll": {"target": "/api/status?ids={id}"},
    "state": ["/0/status"],
    "done": ["succeeded"],
    "failed": ["failed"],
    "error": ["/0/error"],
    "result": ["/0/result"],
    "fetch": True,
    "hold": False,
}
DECLARED = JobTerms.model_validate(TABLE)
NODE = "0x" + "11" * 20
T0 = 1_000_000


def answer(status: str, **more: object) -> bytes:
    return json.dumps([{"status": status, **more}]).encode()


def running(declared: JobTerms = DECLARED) -> Job:
    return submitted(Job(since_ms=T0), declared, 200, b'{"job_id":"j1"}', NODE, T0)


def test_a_job_goes_from_submission_to_its_file_on_a_virtual_clock() -> None:
    job, now = Job(since_ms=T0), T0
    assert next_step(job, DECLARED, now) == Submit()
    job = submitted(job, DECLARED, 200, b'{"job_id":"j1"}', NODE, now)
    assert (job.phase, job.key, job.node) == (Phase.POLLING, "j1", NODE)
    polls = 0
    while (step := next_step(job, DECLARED, now)) != Over():
        if isinstance(step, Rest):
            assert step.until_ms - now == 1000, "the document asks for a poll every second"
            now = step.until_ms
        elif isinstance(step, Poll):
            polls += 1
            said = answer("succeeded", result="/images/j1.png") if polls == 4 else answer("processing")
            job = polled(job, DECLARED, 200, said, now)
        elif isinstance(step, Fetch):
            assert step.target == "/images/j1.png"
            job = fetched(job, DECLARED, 200, now)
    assert job.phase is Phase.DONE
    assert (polls, now - T0) == (4, 4000)


def test_what_a_question_repeats_of_its_submission_is_short_and_left_out_where_it_is_missing() -> None:
    body = {"id": "{id}", "token": "{request:/token}", "deep": [{"user": "{request:/of/0}"}], "plain": "{request}"}
    declared = JobTerms.model_validate({**TABLE, "poll": {"method": "POST", "target": "/q", "body": body}})
    assert declared.repeats_request
    assert not DECLARED.repeats_request
    assert DECLARED.for_request({"token": "x"}) is DECLARED
    for request, expected in (
        ({"token": "7", "of": ["u"]}, {"token": "7", "deep": [{"user": "u"}]}),
        ({"token": 7, "of": {}}, {"token": 7, "deep": [{}]}),
        ({"token": "x" * 300, "of": [None]}, {"deep": [{}]}),
        ({"token": {"a": 1}}, {"deep": [{}]}),
        (None, {"deep": [{}]}),
        ("text", {"deep": [{}]}),
    ):
        asked = declared.for_request(request).poll.body_of("j1")
        assert json.loads(asked) == {"id": "j1", "plain": "{request}", **expected}
    bad = {"id": "{id}", "token": "{request:token}"}
    with pytest.raises(ValidationError, match="JSON pointer"):
        JobTerms.model_validate({**TABLE, "poll": {"method": "POST", "target": "/q", "body": bad}})


def test_a_question_that_lasted_for_an_interval_is_followed_by_the_next_at_once() -> None:
    after = polled(running(), DECLARED, 200, answer("processing"), T0 + 60_000, asked_at_ms=T0)
    assert next_step(after, DECLARED, T0 + 60_000) == Poll()
    after = polled(running(), DECLARED, 200, answer("processing"), T0 + 10, asked_at_ms=T0)
    assert next_step(after, DECLARED, T0 + 10) == Rest(T0 + 1000)


def test_a_job_that_never_ends_is_given_up_after_five_minutes() -> None:
    job, now = running(), T0
    while (step := next_step(job, DECLARED, now)) != Over():
        if isinstance(step, Rest):
            now = step.until_ms
        else:
            job = polled(job, DECLARED, 200, answer("processing"), now)
    assert job.phase is Phase.TIMED_OUT
    assert now - T0 == 300_000
    assert job.failure is not None
    assert (job.failure.status, job.failure.reason) == (504, "job_timed_out")
    assert "300 s" in job.failure.message
    assert "processing" in job.failure.message


def test_the_last_question_is_asked_when_the_time_is_over_and_may_still_bring_the_end() -> None:
    job = running()
    late = ends_at_ms(job, DECLARED) + 5
    assert next_step(job, DECLARED, late) == Poll(last=True)
    done = polled(job, DECLARED, 200, answer("succeeded", result="/x"), late)
    assert done.phase is Phase.FETCHING


def test_the_workspaces_own_refusal_is_passed_on() -> None:
    job = submitted(Job(since_ms=T0), DECLARED, 422, b'{"detail":"no"}', NODE, T0)
    assert job.phase is Phase.FAILED
    assert job.failure is not None
    assert (job.failure.status, job.failure.passed_on) == (422, True)


def test_an_answer_without_an_id_is_no_job() -> None:
    job = submitted(Job(since_ms=T0), DECLARED, 200, b'{"id":"j1"}', NODE, T0)
    assert job.failure is not None
    assert job.failure.reason == "job_id_missing"
    assert "/job_id" in job.failure.message


def test_the_workspaces_words_for_a_failure_reach_the_client() -> None:
    job = polled(running(), DECLARED, 200, answer("failed", error="out of memory"), T0)
    assert job.phase is Phase.FAILED
    assert job.failure is not None
    assert job.failure.message.endswith("out of memory")


def test_a_workspace_that_knows_no_such_job_lost_it() -> None:
    job = polled(running(), DECLARED, 404, b"", T0)
    assert job.phase is Phase.LOST
    assert job.failure is not None
    assert job.failure.reason == "job_unknown_there"
    assert "submit it again" in job.failure.message


def test_a_node_is_given_its_time_and_then_the_job_is_lost() -> None:
    job, now = running(), T0
    job = missed(job, DECLARED, "it is not connected", now)
    assert job.phase is Phase.POLLING
    job = missed(job, DECLARED, "it is not connected", now + 29_999)
    assert job.phase is Phase.POLLING
    back = polled(job, DECLARED, 200, answer("processing"), now + 29_999)
    assert back.away_since_ms is None
    there = missed(job, DECLARED, "it is not ready", now + 30_000, node_stayed=True)
    assert there.failure is not None
    assert (there.phase, there.failure.reason) == (Phase.LOST, "job_workspace_gone")
    assert "submit it again" in there.failure.message
    job = missed(job, DECLARED, "it is not connected", now + 30_000)
    assert job.phase is Phase.LOST
    assert job.failure is not None
    assert job.failure.reason == "job_node_gone"
    assert NODE in job.failure.message
    assert "submit it again" in job.failure.message


def test_answers_that_cannot_be_read_are_borne_for_a_while() -> None:
    job = running()
    for number in range(1, BEARABLE):
        job = polled(job, DECLARED, 502, b"<html>", T0 + number)
        assert job.phase is Phase.POLLING
    assert polled(job, DECLARED, 200, answer("processing"), T0).unread == 0
    assert polled(job, DECLARED, 502, b"<html>", T0).phase is Phase.FAILED
    assert polled(running(), DECLARED, 403, b"{}", T0).phase is Phase.FAILED, "4xx will not become better"


def test_a_result_that_cannot_be_fetched_is_asked_for_again_and_then_given_up() -> None:
    job = polled(running(), DECLARED, 200, answer("succeeded", result="x.png"), T0)
    assert job.result == "/x.png"
    assert fetched(job, DECLARED, 503, T0).phase is Phase.FETCHING
    assert fetched(job, DECLARED, 404, T0).phase is Phase.FAILED
    for _ in range(BEARABLE):
        job = fetched(job, DECLARED, 503, T0)
    assert job.failure is not None
    assert job.failure.reason == "job_result_missing"


@pytest.mark.parametrize(
    ("result", "target"),
    [
        ("/api/image/1.png", "/api/image/1.png"),
        ("img.png?x=1", "/img.png?x=1"),
        ("http://127.0.0.1:8000/img.png", "/img.png"),
        ("http://localhost/a?b=c", "/a?b=c"),
    ],
)
def test_results_are_files_of_the_workspace(result: str, target: str) -> None:
    assert result_target(result) == target


@pytest.mark.parametrize(
    "result",
    [
        None,
        "",
        5,
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/a",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "//example.org/a",
        "/a/../../etc/passwd",
        "/%2e%2e/secret",
        "/a b",
        "/a#b",
        "/a\r\nx: y",
    ],
)
def test_nothing_else_is_fetched_whatever_a_workspace_says(result: object) -> None:
    with pytest.raises(ValueError, match=r"^it is |climbs|holds"):
        result_target(result)
    job = polled(running(), DECLARED, 200, json.dumps([{"status": "succeeded", "result": result}]).encode(), T0)
    assert job.phase is Phase.FAILED


events = st.one_of(
    st.tuples(
        st.just("poll"),
        st.sampled_from([200, 404, 429, 500, 503]),
        st.sampled_from(
            [answer("processing"), answer("succeeded", result="/x"), answer("succeeded"), answer("failed"), b"", b"[]"]
        ),
    ),
    st.tuples(st.just("miss"), st.just(0), st.just(b"")),
    st.tuples(st.just("fetch"), st.sampled_from([200, 404, 500]), st.just(b"")),
)


@given(st.lists(st.tuples(events, st.integers(0, 20_000)), max_size=60))
def test_whatever_happens_a_job_ends_once_for_good_and_never_later_than_declared(
    course: list[tuple[tuple[str, int, bytes], int]],
) -> None:
    job, now = running(), T0
    for (kind, status, body), passed_ms in course:
        now += passed_ms
        step = next_step(job, DECLARED, now)
        if job.phase.is_final:
            assert step == Over()
            break
        if kind == "miss":
            job = missed(job, DECLARED, "away", now)
        elif isinstance(step, Fetch):
            job = fetched(job, DECLARED, status, now)
        else:
            job = polled(job, DECLARED, status, body, now)
        assert (job.failure is not None) == (job.phase in (Phase.FAILED, Phase.LOST, Phase.TIMED_OUT))
        if now >= ends_at_ms(job, DECLARED):
            assert job.phase.is_final or job.phase is Phase.FETCHING
        assert job.node == NODE
        assert job.key == "j1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poll": {"target": "/status"}}, "nothing in target and body names the job"),
        ({"poll": {"target": "status?id={id}"}}, "must begin with one /"),
        ({"id": []}, "at least 1 item"),
        ({"result": []}, "fetch needs result"),
        ({"state": ["status"]}, "JSON pointer"),
        ({"key": {"in": "json", "pointer": "/task_id"}}, "Extra inputs"),
        ({"of": "draw", "key": {"in": "json", "pointer": "/task_id"}}, "Extra inputs"),
        ({"polling": 1}, "Extra inputs"),
    ],
)
def test_declarations_that_make_no_sense_say_why(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(JobDeclaration).validate_python({**TABLE, **change})


def test_a_table_either_submits_or_asks() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(JobDeclaration)
    assert isinstance(adapter.validate_python({**TABLE, "name": "draw"}), SubmittedJob)
    asks = adapter.validate_python({"of": "draw", "key": {"in": "json", "pointer": "/task_id"}})
    assert isinstance(asks, AskedJob)
    assert not asks.ends


def test_a_call_about_a_job_is_made_of_its_id() -> None:
    ask = JobTerms.model_validate(
        {**TABLE, "poll": {"method": "POST", "target": "/r/{id}", "body": {"task_id": "{id}", "more": ["{id}"]}}}
    ).poll
    assert ask is not None
    assert ask.target_of("a/b ?") == "/r/a%2Fb%20%3F"
    assert json.loads(ask.body_of('"x')) == {"task_id": '"x', "more": ['"x']}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"path": "/b", "mode": "job", "job": TABLE}, "two routes submit jobs named job"),
        (
            {"path": "/b", "mode": "job", "job": {"of": "draw", "key": {"in": "query", "name": "id"}}},
            "no route submits such: job",
        ),
    ],
)
def test_a_profile_knows_the_jobs_its_routes_speak_of(second: dict[str, Any], words: str) -> None:
    routes = [{"path": "/a", "mode": "job", "job": TABLE}, second]
    (said,) = problems_between(Profile.model_validate({"name": "p", "routes": routes}))
    assert words in said
