"""The wrapped form both ways: what a workspace gets, and how its answer goes back as a string."""

from __future__ import annotations

import base64
import json

import pytest

from ngpu_bootstrap.errors import BadRequest, NotServed
from ngpu_bootstrap.front import answers
from ngpu_bootstrap.front.bodies import unwrap

JSON = b"application/json"
TASK = "20261120_18_24_28_00000000000000000001"


def decoded(answer: answers.Answer) -> dict[str, object]:
    document = json.loads(answer.body)
    assert isinstance(document, dict)
    assert dict(answer.headers)[b"content-length"] == b"%d" % len(answer.body)
    return document


def test_data_that_is_json_text_goes_on_as_json() -> None:
    body = json.dumps({"btc_address": "bc1p", "data": '{"a": 1}'}).encode()
    found = unwrap(body, JSON)
    assert (found.body, found.content_type, found.btc_address) == (b'{"a": 1}', JSON, "bc1p")


def test_data_that_is_other_text_goes_on_as_text() -> None:
    found = unwrap('{"data": "h\u00e9llo"}'.encode(), b"application/json; charset=utf-8")
    assert (found.body, found.content_type) == ("h\u00e9llo".encode(), b"text/plain; charset=utf-8")


@pytest.mark.parametrize(
    "document",
    [{"data": 1}, {"data": {"x": 1}}, {"btc_address": "bc1"}, {"data": "x", "text": "y"}, [1], "x", {}],
)
def test_any_other_body_passes_whole(document: object) -> None:
    body = json.dumps(document).encode()
    found = unwrap(body, JSON)
    assert (found.body, found.content_type) == (body, None)


def test_a_body_of_another_type_passes_whole() -> None:
    assert unwrap(b"\x00\xff", b"application/octet-stream").body == b"\x00\xff"
    assert unwrap(b'{"data": "x"}', b"text/plain").body == b'{"data": "x"}'


@pytest.mark.parametrize("address", ["bc1\0", "bc1\ud800", "bc1\n", "b" * 129, 1, ["bc1"]])
def test_an_address_that_no_database_keeps_is_a_bad_request(address: object) -> None:
    with pytest.raises(BadRequest) as refused:
        unwrap(json.dumps({"btc_address": address, "data": "x"}).encode(), JSON)
    assert refused.value.reason == "bad_btc_address"


def test_curls_default_type_is_read_as_json_when_it_starts_like_it() -> None:
    assert unwrap(b'{"data": "x"}', b"application/x-www-form-urlencoded").body == b"x"
    assert unwrap(b"a=1&b=2", b"application/x-www-form-urlencoded").body == b"a=1&b=2"
    assert unwrap(b'{"data": "x"}', None).body == b"x"


@pytest.mark.parametrize("body", [b"{", b'{"a": }', b"\xff\xfe", b"[" * 100_000, b'{"data": "\\ud800"}', b"nope"])
def test_malformed_json_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        unwrap(body, JSON)
    assert refused.value.reason == "malformed_json"


@pytest.mark.parametrize("address", [1, ["x"], "b" * 129])
def test_a_btc_address_must_be_a_short_text(address: object) -> None:
    with pytest.raises(BadRequest):
        unwrap(json.dumps({"btc_address": address, "data": "x"}).encode(), JSON)


def test_an_empty_body_passes() -> None:
    assert unwrap(b"", JSON).body == b""


def test_a_synchronous_answer_carries_the_text_and_every_spelling_of_the_id() -> None:
    answer = answers.completed(TASK, answers.WorkspaceAnswer(200, b'{"x":1}', "application/json"))
    assert answer.status == 200
    assert decoded(answer) == {
        "result_code": 200,
        "msg": "success",
        "data": '{"x":1}',
        "taskID": TASK,
        "taskId": TASK,
        "task_id": TASK,
    }


def test_a_workspaces_own_error_is_the_result_code_and_the_status() -> None:
    answer = answers.completed(TASK, answers.WorkspaceAnswer(422, b"no", "text/plain"))
    document = decoded(answer)
    assert (answer.status, document["result_code"], document["data"]) == (422, 422, "no")


def test_created_is_success() -> None:
    assert decoded(answers.completed(TASK, answers.WorkspaceAnswer(201, b"", "")))["result_code"] == 200


def test_bytes_that_are_no_text_go_back_as_base64() -> None:
    png = b"\x89PNG\x00\xff"
    document = decoded(answers.polled(TASK, 3, answers.WorkspaceAnswer(200, png, "image/png")))
    assert base64.b64decode(str(document["data"])) == png
    assert (document["encoding"], document["content_type"], document["result_size"]) == ("base64", "image/png", 1)


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (b"\xe9", "text/plain; charset=ISO-8859-1", "\u00e9"),
        (b"\xe9", "text/plain", None),
        (b"abc", "", "abc"),
        (b"a\0c", "", None),
        (b"{}", "application/problem+json", "{}"),
        (b"abc", "application/octet-stream", None),
        (b"abc", "text/plain; charset=rot13", "abc"),
    ],
)
def test_what_counts_as_text(body: bytes, content_type: str, text: str | None) -> None:
    assert answers.text_of(body, content_type) == text


def test_a_pending_poll_has_code_100_and_no_result() -> None:
    answer = answers.pending(TASK, 1, "dispatched")
    document = decoded(answer)
    assert (answer.status, document["result_code"], document["result_size"]) == (200, 100, 0)


def test_a_failed_poll_ends_the_polling() -> None:
    document = decoded(answers.polled_failure(TASK, 4, 502, "node_lost", "gone"))
    assert (document["result_code"], document["result_size"], document["reason"]) == (502, 1, "node_lost")


def test_refusals_have_the_documents_shape_on_user_and_ours_elsewhere() -> None:
    refusal = NotServed(429, "queue_full", "later", retry_after_s=3)
    documented = answers.refusal_answer(refusal, documented=True)
    assert decoded(documented) == {"result_code": 429, "msg": "later", "reason": "queue_full"}
    assert (b"retry-after", b"3") in documented.headers
    assert decoded(answers.refusal_answer(refusal, documented=False)) == {"reason": "queue_full", "message": "later"}
