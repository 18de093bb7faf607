"""How a workspace's answers about a job are read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.job_answers import (
    MAX_ID_CHARS,
    JobState,
    PollUntil,
    Signs,
    at_pointer,
    first_of,
    job_id_in,
)

# RFC 6901, section 5
DOCUMENT = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, 'k"l': 6, " ": 7, "m~n": 8}


@pytest.mark.parametrize(
    ("pointer", "found"),
    [
        ("", DOCUMENT),
        ("/foo", ["bar", "baz"]),
        ("/foo/0", "bar"),
        ("/", 0),
        ("/a~1b", 1),
        ("/c%d", 2),
        ("/m~0n", 8),
        ("/foo/2", None),
        ("/foo/-", None),
        ("/foo/00", None),
        ("/foo/bar", None),
        ("/nothing/there", None),
    ],
)
def test_pointers_lead_where_the_rfc_says(pointer: str, found: object) -> None:
    assert at_pointer(DOCUMENT, pointer) == found


def test_an_id_in_a_pointer_is_one_member_whatever_it_holds() -> None:
    document = {"a/b~1": {"status": "done"}}
    assert at_pointer(document, "/{id}/status", "a/b~1") == "done"


def test_the_first_pointer_that_leads_to_something_counts() -> None:
    assert first_of({"b": 2, "c": 3}, ("/a", "/b", "/c")) == 2
    assert first_of({}, ("/a",)) is None


SIGNS = Signs.model_validate(
    {
        "state": ["/0/status", "/state"],
        "done": ["succeeded", "done", True],
        "failed": ["failed", 1],
        "error": ["/0/error", "/error_msg"],
        "result": ["/0/result", "/images"],
        "progress": ["/progress"],
    }
)


@pytest.mark.parametrize(
    ("answer", "means"),
    [
        ([{"status": "succeeded", "result": "/a.png"}], JobState.DONE),
        ([{"status": "pending"}], JobState.PENDING),
        ([{"status": "failed", "error": "no memory"}], JobState.FAILED),
        ({"state": "done", "images": []}, JobState.DONE),
        ({"state": "pending"}, JobState.PENDING),
        ({"state": True}, JobState.DONE),
        ({"state": 1}, JobState.FAILED),  # true and 1 are two values in JSON
        ({"state": False}, JobState.PENDING),
        ({"state": {}}, JobState.UNREADABLE),
        ({"status": "succeeded"}, JobState.UNREADABLE),
        ([], JobState.UNREADABLE),
        (None, JobState.UNREADABLE),
    ],
)
def test_the_state_decides(answer: object, means: JobState) -> None:
    assert SIGNS.read(200, json.dumps(answer).encode(), "7").means is means


def test_error_progress_and_result_are_read() -> None:
    failed = SIGNS.read(200, b'[{"status":"failed","error":{"code":3}}]', "7")
    assert failed.error == '{"code": 3}'
    assert SIGNS.read(200, b'{"state":"running","progress":55}', "7").progress == 0.55
    assert SIGNS.read(200, b'{"state":"running","progress":0.5}', "7").progress == 0.5
    assert SIGNS.read(200, b'{"state":"running","progress":true}', "7").progress is None
    # the vendor's example has an error_msg beside the result of a job that is done
    assert SIGNS.read(200, b'{"state":"done","error_msg":"Intern error","images":[1]}', "7").error == ""
    assert SIGNS.read(200, b'{"state":"done","error_msg":"Intern error","images":[1]}', "7").result == [1]


def test_a_status_of_failure_says_nothing_of_the_job() -> None:
    assert SIGNS.read(503, b'{"state":"done"}', "7").means is JobState.UNREADABLE


@given(st.binary(max_size=200), st.integers(0, 999), st.text(max_size=20))
def test_no_answer_is_too_odd_to_be_read(body: bytes, status: int, job_id: str) -> None:
    read = SIGNS.read(status, body, job_id)
    assert isinstance(read.means, JobState)
    read.error.encode()


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"job_id": "a-1"}, "a-1"),
        ({"info": {"task_id": "x"}}, "x"),
        ({"job_id": 12}, "12"),
        ({"job_id": True}, None),
        ({"job_id": ""}, None),
        ({"job_id": "a\nb"}, None),
        ({"job_id": "a" * (MAX_ID_CHARS + 1)}, None),
        ({"job_id": 1.5}, None),
        ({}, None),
        (None, None),
    ],
)
def test_ids_are_text_or_whole_numbers(document: object, found: str | None) -> None:
    assert job_id_in(document, ("/job_id", "/info/task_id")) == found


def test_what_a_node_is_told_comes_back_from_its_header() -> None:
    until = PollUntil(signs=SIGNS, job_id="~/ä", interval_ms=1000, hold_ms=60_000)
    assert PollUntil.decode(until.encode()) == until
    assert b"=" not in until.encode()


@pytest.mark.parametrize("text", [b"", b"!!", b"e30", b"x" * 9000, PollUntil.__name__.encode()])
def test_what_cannot_be_understood_is_malformed(text: bytes) -> None:
    with pytest.raises(MalformedError):
        PollUntil.decode(text)


def test_a_later_version_may_say_more() -> None:
    import base64

    later = json.dumps(
        {"signs": {"state": ["/s"], "done": ["d"]}, "job_id": "1", "interval_ms": 100, "hold_ms": 5, "new": 1}
    )
    assert PollUntil.decode(base64.urlsafe_b64encode(later.encode())).job_id == "1"
