"""Refusals in the words of each kind of caller; credentials taken from wherever a profile lets them stand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ngpu_bootstrap.credentials import make_token, reveal
from ngpu_bootstrap.errors import BadRequest, Refusal, Unauthorized
from ngpu_bootstrap.front.profiled import enveloped
from ngpu_bootstrap.profiles.credentials import missing, take_credentials, token_of
from ngpu_bootstrap.profiles.declaration import Credential, Dialect, Envelope
from ngpu_bootstrap.profiles.dialects import refusal_in

TOKEN = make_token("367614711220405248", bytes(range(24)))
TEXT = reveal(TOKEN)
NO_MODEL = Refusal(404, "model_unknown", "no node serves it")


def place(**fields: Any) -> Credential:
    return Credential.model_validate(fields)


AUTHORIZATION = place(**{"in": "header", "name": "Authorization"})
FIELD = place(**{"in": "json", "pointer": "/token"})


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (Dialect.NGPU, {"reason": "model_unknown", "message": "no node serves it"}),
        (Dialect.CODE_MESSAGE, {"code": 404, "message": "no node serves it"}),
        (Dialect.ERROR_DETAILS, {"error": "not found", "details": "no node serves it"}),
        (Dialect.CODE_MSG_DATA, {"code": 404, "msg": "no node serves it", "data": None}),
        (Dialect.CODE_INFO_MSG, {"code": 404, "info": None, "msg": "no node serves it"}),
    ],
)
def test_a_refusal_has_the_callers_shape_and_our_reason(dialect: Dialect, expected: dict[str, Any]) -> None:
    answer = refusal_in(dialect, NO_MODEL, task_id="T")
    assert answer.status == 404
    assert json.loads(answer.body) == {**expected, "reason": "model_unknown", "task_id": "T"}
    assert (b"ngpu-task-id", b"T") in answer.headers


def test_openais_object_and_the_model_servers_members_go_together() -> None:
    error = {
        "message": "no node serves it",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert json.loads(refusal_in(Dialect.OPENAI, NO_MODEL).body)["error"] == error
    both = json.loads(refusal_in(Dialect.MODEL_SERVER, NO_MODEL).body)
    assert (both["code"], both["message"], both["error"]) == (404, "no node serves it", error)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (403, "permission_error"),
        (429, "rate_limit_error"),
        (413, "invalid_request_error"),
        (503, "server_error"),
    ],
)
def test_openais_types_follow_the_status(status: int, kind: str) -> None:
    refusal = Refusal(status, "why", "because", retry_after_s=3)
    answer = refusal_in(Dialect.OPENAI, refusal)
    assert json.loads(answer.body)["error"]["type"] == kind
    assert (b"retry-after", b"3") in answer.headers


@pytest.mark.parametrize("text", [TEXT, f"Bearer {TEXT}", f"ngpu_{TEXT}", f"bearer ngpu_{TEXT} "])
def test_a_header_is_taken_with_or_without_its_scheme(text: str) -> None:
    emptied = take_credentials([AUTHORIZATION], [(b"authorization", text.encode()), (b"a", b"b")], None)
    assert emptied.headers == [(b"a", b"b")]
    assert token_of([AUTHORIZATION], emptied, {}) == (TOKEN, "header Authorization")


def test_a_scheme_may_be_required_or_unknown() -> None:
    required = place(**{"in": "header", "name": "authorization", "scheme": "required"})
    with pytest.raises(Unauthorized, match="must be `Bearer <token>`"):
        take_credentials([required], [(b"authorization", TEXT.encode())], None)
    bare = place(**{"in": "header", "name": "authorization", "scheme": "none"})
    emptied = take_credentials([bare], [(b"authorization", f"Bearer {TEXT}".encode())], None)
    with pytest.raises(Unauthorized, match="does not hold a workspace token"):
        token_of([bare], emptied, {})


def test_the_first_place_that_holds_something_counts_and_all_are_emptied() -> None:
    key = place(**{"in": "query", "name": "key"})
    emptied = take_credentials([AUTHORIZATION, key, FIELD], [(b"authorization", b"")], f"a=1&key={TEXT}&b=%20")
    assert (emptied.headers, emptied.query) == ([], "a=1&b=%20")
    other = reveal(make_token("2", bytes(range(24))))
    assert token_of([AUTHORIZATION, key, FIELD], emptied, {FIELD: other}) == (TOKEN, "query key")
    assert token_of([FIELD], take_credentials([FIELD], [], None), {FIELD: ""}) == (None, "")


def test_our_own_header_counts_first_and_leaves_the_clients_own_authorization() -> None:
    headers = [(b"authorization", b"Bearer sk-own"), (b"ngpu-token", TEXT.encode())]
    emptied = take_credentials([AUTHORIZATION], headers, None)
    assert emptied.headers == [(b"authorization", b"Bearer sk-own")]
    assert token_of([AUTHORIZATION], emptied, {})[0] == TOKEN
    twice = take_credentials([AUTHORIZATION], [(b"authorization", TEXT.encode()), (b"ngpu-token", TEXT.encode())], None)
    assert twice.headers == []


def test_one_place_with_two_credentials_is_refused() -> None:
    with pytest.raises(BadRequest, match="more than once"):
        take_credentials([AUTHORIZATION], [(b"authorization", b"a"), (b"authorization", b"b")], None)


def test_without_any_the_refusal_names_the_places() -> None:
    assert "header Authorization, json /token" in missing([AUTHORIZATION, FIELD]).message


def test_what_was_found_is_not_in_the_text_of_the_request() -> None:
    emptied = take_credentials([AUTHORIZATION], [(b"authorization", TEXT.encode())], None)
    assert TOKEN.secret not in repr(emptied)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"a": 1.50, "big": 1e999}', b'{"code":0,"data":{"a": 1.50, "big": 1e999}}'),
        (b"\xef\xbb\xbf[1]", b'{"code":0,"data":[1]}'),
        (b'"\xc3\xa9"', b'{"code":0,"data":"\xc3\xa9"}'),
        (b"not json", None),
        (b"\xff\xfe{\x00}\x00", None),
        (b"", None),
    ],
)
def test_an_envelope_leaves_what_it_holds_as_it_came(body: bytes, expected: bytes | None) -> None:
    assert enveloped(Envelope(member="data", beside={"code": 0}), body) == expected
