"""Who is calling: tokens of workspaces and keys of operators, found in a request, checked, and taken out of it.

A workspace token is `<id>-<secret>`: the id is public (nodes, logs and records see it), the secret is 192 random bits
and only its hash is stored. Because the secret is random and long, one SHA-256 is enough: a slow hash protects
guessable passwords and would cost every request. The hash covers the id, so that a hash copied to another row opens
nothing. An operator key is the same thing with the id `op_<name>`.

Forms accepted, because clients in the wild send all of them: `Authorization: Bearer <token>`, `Bearer ngpu_<token>`,
`ngpu_<token>`, the bare token, and the header `Ngpu-Token`, which leaves the client's own `Authorization` to the
workspace. Browsers cannot set headers on a WebSocket: the query parameter `ngpu_token` serves them.

The invariant a reader must keep: a credential leaves the request here, before anything is hashed, logged or
forwarded, and nothing below this module ever sees one. Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import field

from ngpu_bootstrap.errors import BadRequest, Unauthorized
from ngpu_protocol.frozen import dataclass

TOKEN_PREFIX = "ngpu_"
OPERATOR_PREFIX = "op_"
TOKEN_HEADER = b"ngpu-token"
TOKEN_PARAMETER = "ngpu_token"
SECRET_BYTES = 24

_TOKEN = re.compile(r"([0-9]{1,20}|op_[A-Za-z0-9_.]{1,64})-([A-Za-z0-9_-]{16,128})")
_MAX_CREDENTIAL = 512

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Token:
    """A credential as presented; not yet checked. Its text form shows the public part alone."""

    subject: str
    secret: str = field(repr=False)

    @property
    def is_operator_key(self) -> bool:
        return self.subject.startswith(OPERATOR_PREFIX)

    def __str__(self) -> str:
        return f"{self.subject}-..."


def make_token(subject: str, random: bytes) -> Token:
    """Return the credential of *subject* (a workspace id, or `op_<name>`) from `SECRET_BYTES` random bytes."""
    if len(random) < SECRET_BYTES:
        raise ValueError(f"a secret needs {SECRET_BYTES} random bytes, not {len(random)}")
    return Token(subject, random.hex())


def reveal(token: Token) -> str:
    """Return the text a client sends. Shown once, when the credential is made; never stored, never logged."""
    return f"{token.subject}-{token.secret}"


def parse_token(text: str) -> Token | None:
    """Return the credential written in *text* with or without the `ngpu_` prefix, or None when it is not one."""
    matched = _TOKEN.fullmatch(text.removeprefix(TOKEN_PREFIX))
    return Token(matched[1], matched[2]) if matched else None


def stored_hash(token: Token) -> bytes:
    """Return the 32 bytes that stand for *token* in the store."""
    return hashlib.sha256(b"ngpu credential\0" + reveal(token).encode()).digest()


def opens(token: Token, stored: bytes) -> bool:
    """Return whether *token* is the credential that *stored* stands for, in a time that tells nothing about either."""
    return hmac.compare_digest(stored_hash(token), stored)


@dataclass(frozen=True, slots=True)
class Presented:
    """A request without its credential.

    `token` is None when there was none. `headers` and `query` are what may be hashed, logged and forwarded; `query`
    is None when there was no `?`.
    """

    token: Token | None
    headers: Headers
    query: str | None


def take_credential(headers: Sequence[tuple[bytes, bytes]], query: str | None) -> Presented:
    """Return the credential of a request, and the request without it.

    `Ngpu-Token` wins over the query parameter, and both over `Authorization`: where the first two carry the
    credential, `Authorization` is the client's own and stays, unless it holds a credential of ours all the same.

    Args:
        headers: lower-case names.
        query: the raw text after `?`, not decoded.

    Raises:
        Unauthorized: something stands where a credential is expected and it is not one.
        BadRequest: a credential is given twice in the same place.
    """
    kept: Headers = []
    own: list[bytes] = []
    authorization: list[bytes] = []
    for name, value in headers:
        if name == TOKEN_HEADER:
            own.append(value)
        elif name == b"authorization":
            authorization.append(value)
            kept.append((name, value))
        else:
            kept.append((name, value))
    if len(own) > 1:
        raise BadRequest("duplicate_credential", "the header Ngpu-Token is given more than once; send it once")
    in_query: str | None = None
    if query is not None and TOKEN_PARAMETER in query:
        in_query, query = _take_parameter(query)
    if own or in_query is not None:
        if own:
            token = _required(_credential_text(own[0]), "the header Ngpu-Token")
        else:
            token = _required(in_query or "", f"the parameter {TOKEN_PARAMETER}")
        kept = [pair for pair in kept if pair[0] != b"authorization" or not _is_ours(pair[1], token)]
        return Presented(token, kept, query)
    if len(authorization) > 1:
        raise BadRequest(
            "duplicate_credential",
            "the header Authorization is given more than once; send the workspace token in Ngpu-Token and your own "
            "Authorization once",
        )
    if not authorization:
        return Presented(None, kept, query)
    token = _required(_credential_text(authorization[0]), "the header Authorization")
    return Presented(token, [pair for pair in kept if pair[0] != b"authorization"], query)


def _credential_text(value: bytes) -> str:
    text = value.decode("latin-1").strip()
    scheme, _, rest = text.partition(" ")
    return rest.strip() if rest and scheme.lower() == "bearer" else text


def _is_ours(value: bytes, presented: Token) -> bool:
    """Whether an `Authorization` beside *presented* holds that workspace's token, or an operator's key, once more."""
    token = parse_token(_credential_text(value)) if len(value) <= _MAX_CREDENTIAL else None
    return token is not None and (token.is_operator_key or token.subject == presented.subject)


def _required(text: str, where: str) -> Token:
    token = parse_token(text) if len(text) <= _MAX_CREDENTIAL else None
    if token is None:
        raise Unauthorized(
            "token_unknown",
            f"{where} does not hold a workspace token; send `Authorization: Bearer <token>` with the token that "
            "`ngpu-bootstrap workspace add` printed",
        )
    return token


def _take_parameter(query: str) -> tuple[str | None, str | None]:
    kept: list[str] = []
    found: str | None = None
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name != TOKEN_PARAMETER:
            kept.append(part)
        elif found is None:
            found = value
        else:
            raise BadRequest("duplicate_credential", f"the parameter {TOKEN_PARAMETER} is given more than once")
    return found, "&".join(kept) or None
