"""The credential of a profile's call, found where the profile says it stands, and taken out of the request.

Owns headers and queries; what stands in a body is found by `model_of_body` and `form_bodies`, and judged here. The
rule a reader must keep is that of `ngpu_bootstrap.credentials`: whichever place counted, all of them are emptied
before anything is hashed, logged or forwarded, and what a document wants in a body is the workspace's public id from
then on. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

from ngpu_bootstrap.credentials import TOKEN_HEADER, TOKEN_PARAMETER, Token, parse_token
from ngpu_bootstrap.errors import BadRequest, Unauthorized
from ngpu_bootstrap.profiles.declaration import Credential
from ngpu_protocol.http1 import Headers

MAX_CREDENTIAL_BYTES = 512
_OWN = (
    Credential.model_validate({"in": "header", "name": TOKEN_HEADER.decode(), "scheme": "optional"}),
    Credential.model_validate({"in": "query", "name": TOKEN_PARAMETER}),
)


@dataclass(frozen=True, slots=True)
class Emptied:
    """A request without the credentials in its headers and query.

    Attributes:
        found: text by place, the most important first; not checked, and only where something stood.
    """

    headers: Headers
    query: str | None
    found: list[tuple[Credential, str]] = field(repr=False)


def take_credentials(places: Sequence[Credential], headers: Headers, query: str | None) -> Emptied:
    """Return headers and query without whatever stands where *places* say, and what stood there.

    Where our own header or parameter has the credential, a header of *places* that holds something else is the
    client's own and stays for the workspace.

    Raises:
        BadRequest: one place holds two.
    """
    found: list[tuple[Credential, str]] = []
    for place in (*_OWN, *places):
        if place.where == "header":
            name = (place.name or "").lower().encode("ascii")
            texts = [_without_scheme(value, place) for key, value in headers if key == name]
            if place not in _OWN and found and found[0][0] in _OWN and not any(parse_token(text) for text in texts):
                continue
            headers = [pair for pair in headers if pair[0] != name]
        elif place.where == "query" and query:
            texts, query = _taken_from(query, place.name or "")
        else:
            continue
        if len(texts) > 1:
            raise BadRequest("duplicate_credential", f"the {place} holds a credential more than once; send it once")
        if texts and texts[0]:
            found.append((place, texts[0]))
    return Emptied(headers, query, found)


def token_of(
    places: Sequence[Credential], outside: Emptied, inside: Mapping[Credential, str]
) -> tuple[Token | None, str]:
    """Return the credential that counts and the place it stood in; None and an empty text where there was none.

    Args:
        inside: what stood in the body; empty texts count as nothing.

    Raises:
        Unauthorized: something stands there and is no token.
    """
    by_place = dict(outside.found) | {place: text for place, text in inside.items() if text}
    for place in (*_OWN, *places):
        text = by_place.get(place)
        if text is None:
            continue
        token = parse_token(text) if len(text) <= MAX_CREDENTIAL_BYTES else None
        if token is None:
            raise Unauthorized(
                "token_unknown",
                f"the {place} does not hold a workspace token; send the token that `ngpu-bootstrap workspace add` "
                "printed",
            )
        return token, str(place)
    return None, ""


def missing(places: Sequence[Credential]) -> Unauthorized:
    """Return the refusal of a call without a credential, which says where one may stand."""
    where = ", ".join(str(place) for place in places) or "header Ngpu-Token"
    return Unauthorized("token_missing", f"this call needs a workspace token: send it as {where}")


def _without_scheme(value: bytes, place: Credential) -> str:
    text = value.decode("latin-1").strip()
    scheme, _, rest = text.partition(" ")
    has_scheme = bool(rest.strip()) and scheme.lower() == "bearer"
    if place.scheme == "none":
        return text
    if place.scheme == "required" and text and not has_scheme:
        raise Unauthorized("token_unknown", f"the {place} must be `Bearer <token>`")
    return rest.strip() if has_scheme else text


def _taken_from(query: str, name: str) -> tuple[list[str], str | None]:
    kept: list[str] = []
    taken: list[str] = []
    for part in query.split("&"):
        raw, _, value = part.partition("=")
        if unquote_plus(raw) == name:
            taken.append(unquote_plus(value))
        else:
            kept.append(part)
    return taken, "&".join(kept) or None
