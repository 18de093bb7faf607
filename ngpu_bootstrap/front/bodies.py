"""What a client's body on `/user/...` carries for the workspace: the wrapped form, or the body as it came.

The documents wrap a workspace's own request as `{"btc_address": ..., "data": "<text>"}`. A body is wrapped if and
only if it is an object with no key but those two, and `data` is a string; then the workspace gets the text of `data`,
marked as JSON where it is JSON. Any other body passes whole, with its own type: named APIs are called with the
workspace's own fields at top level. Pure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ngpu_bootstrap.errors import BadRequest

_WRAPPER_KEYS = frozenset({"btc_address", "data"})
_JSON_TYPE = b"application/json"
_TEXT_TYPE = b"text/plain; charset=utf-8"
_FORM_TYPE = "application/x-www-form-urlencoded"
MAX_ADDRESS = 128


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A body for the workspace. `content_type` None keeps the client's own header; `btc_address` is "" without one."""

    body: bytes
    content_type: bytes | None
    btc_address: str


def unwrap(body: bytes, content_type: bytes | None) -> Unwrapped:
    """Return what *body* carries for the workspace.

    A body that says it is JSON must be JSON. One that says nothing, or says it is a form because a client's default
    does (curl's `-d`), is read as JSON when it starts like it.

    Raises:
        BadRequest: `malformed_json`, or a `btc_address` that is no text.
    """
    if not claims_json(body, content_type):
        return Unwrapped(body, None, "")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRequest("malformed_json", f"the body is not valid JSON{where}; send a JSON object") from None
    if not isinstance(document, dict):
        return Unwrapped(body, None, "")
    address = document.get("btc_address", "")
    if address is None:
        address = ""
    # no control characters and no lone surrogates either: no address has them, and no database keeps them
    if not isinstance(address, str) or len(address) > MAX_ADDRESS or not address.isprintable():
        raise BadRequest("bad_btc_address", f"btc_address must be a text of at most {MAX_ADDRESS} characters")
    data = document.get("data")
    if not isinstance(data, str) or not _WRAPPER_KEYS.issuperset(document):
        return Unwrapped(body, None, address)
    try:
        carried = data.encode()
    except UnicodeEncodeError:
        raise BadRequest(
            "malformed_json", "data holds a lone surrogate, which is no text; send valid Unicode"
        ) from None
    return Unwrapped(carried, _JSON_TYPE if is_json(carried) else _TEXT_TYPE, address)


def claims_json(body: bytes, content_type: bytes | None) -> bool:
    """Return whether *body* is meant to be JSON."""
    media = (content_type or b"").decode("latin-1").partition(";")[0].strip().lower()
    if media == "application/json" or media.endswith("+json"):
        return bool(body.strip())
    return media in ("", _FORM_TYPE) and body.lstrip()[:1] in (b"{", b"[")


def is_json(text: bytes) -> bool:
    """Return whether *text* is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
