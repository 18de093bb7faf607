"""Credentials: every accepted form, what is taken out of a request, and what never passes."""

from __future__ import annotations

import pytest

from ngpu_bootstrap.credentials import make_token, opens, parse_token, reveal, stored_hash, take_credential
from ngpu_bootstrap.errors import BadRequest, Unauthorized

TOKEN = make_token("367614711220405248", bytes(range(24)))
TEXT = reveal(TOKEN)


@pytest.mark.parametrize(
    "authorization",
    [f"Bearer {TEXT}", f"Bearer ngpu_{TEXT}", f"ngpu_{TEXT}", TEXT, f"bearer  {TEXT}", f"BEARER ngpu_{TEXT} "],
)
def test_every_form_clients_send_is_accepted_and_taken_out(authorization: str) -> None:
    headers = [(b"host", b"x"), (b"authorization", authorization.encode()), (b"accept", b"*/*")]
    presented = take_credential(headers, "a=1")
    assert presented.token == TOKEN
    assert presented.headers == [(b"host", b"x"), (b"accept", b"*/*")]
    assert presented.query == "a=1"


@pytest.mark.parametrize("value", [TEXT, f"ngpu_{TEXT}", f"Bearer {TEXT}"])
def test_ngpu_token_leaves_the_clients_own_authorization(value: str) -> None:
    presented = take_credential([(b"authorization", b"Bearer sk-own"), (b"ngpu-token", value.encode())], None)
    assert presented.token == TOKEN
    assert presented.headers == [(b"authorization", b"Bearer sk-own")]


@pytest.mark.parametrize(
    ("query", "left"),
    [
        (f"ngpu_token={TEXT}", None),
        (f"a=1&ngpu_token={TEXT}&b=%2F", "a=1&b=%2F"),
        (f"ngpu_token=ngpu_{TEXT}&a", "a"),
    ],
)
def test_the_query_parameter_is_taken_out_and_the_rest_is_untouched(query: str, left: str | None) -> None:
    presented = take_credential([(b"authorization", b"Basic b3du")], query)
    assert presented.token == TOKEN
    assert presented.query == left
    assert presented.headers == [(b"authorization", b"Basic b3du")]


@pytest.mark.parametrize("value", [TEXT, f"Bearer ngpu_{TEXT}", "Bearer op_admin-" + "s" * 32])
def test_a_credential_of_ours_sent_twice_goes_to_no_workspace(value: str) -> None:
    fields = [(b"authorization", value.encode()), (b"ngpu-token", TEXT.encode())]
    assert take_credential(fields, None).headers == []
    assert take_credential(fields[:1], f"ngpu_token={TEXT}").headers == []


def test_a_request_without_a_credential_is_left_as_it_is() -> None:
    presented = take_credential([(b"host", b"x")], "ngpu_tokens=1")
    assert presented.token is None
    assert presented.query == "ngpu_tokens=1"


@pytest.mark.parametrize(
    "authorization",
    [b"Basic dXNlcjpwYXNz", b"Bearer", b"", b"Bearer 12-short", b"Bearer x-" + b"a" * 40, b"Bearer 1-" + b"a" * 600],
)
def test_what_is_no_token_is_unknown(authorization: bytes) -> None:
    with pytest.raises(Unauthorized) as refused:
        take_credential([(b"authorization", authorization)], None)
    assert refused.value.status == 401
    assert refused.value.reason == "token_unknown"


@pytest.mark.parametrize("name", [b"authorization", b"ngpu-token"])
def test_a_credential_given_twice_is_refused(name: bytes) -> None:
    with pytest.raises(BadRequest):
        take_credential([(name, TEXT.encode()), (name, TEXT.encode())], None)


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(BadRequest):
        take_credential([], f"ngpu_token={TEXT}&ngpu_token={TEXT}")


def test_only_the_very_token_opens() -> None:
    stored = stored_hash(TOKEN)
    assert opens(TOKEN, stored)
    assert not opens(make_token(TOKEN.subject, bytes(24)), stored)
    assert not opens(make_token("1", bytes(range(24))), stored)


def test_the_secret_shows_nowhere_by_accident() -> None:
    assert TOKEN.secret not in repr(TOKEN)
    assert TOKEN.secret not in str(TOKEN)
    assert TOKEN.secret not in f"{TOKEN}"


def test_operator_keys_are_told_from_workspace_tokens() -> None:
    key = make_token("op_alice", bytes(24))
    assert key.is_operator_key
    assert parse_token(reveal(key)) == key
    assert not TOKEN.is_operator_key
