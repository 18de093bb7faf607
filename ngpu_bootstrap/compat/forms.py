"""The fields of a call, wherever a client puts them: the query, a form, JSON, and a form in the body of a GET. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from ngpu_bootstrap.errors import BadRequest

MAX_FIELDS = 100


def fields_of(query: str | None, content_type: bytes | None, body: bytes) -> dict[str, Any]:
    """Return the fields of a call; those of the body win.

    Raises:
        BadRequest: the body is neither a JSON object nor a form.
    """
    fields: dict[str, Any] = dict(_pairs(query or ""))
    if not body.strip():
        return fields
    media = (content_type or b"").partition(b";")[0].strip().lower()
    if media.endswith(b"json") or (media != b"application/x-www-form-urlencoded" and body.lstrip()[:1] == b"{"):
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise BadRequest("malformed_json", "the body is not valid JSON; send a JSON object") from None
        if not isinstance(document, dict):
            raise BadRequest("malformed_json", "the body must be a JSON object")
        return fields | document
    try:
        return fields | dict(_pairs(body.decode("utf-8")))
    except UnicodeDecodeError:
        raise BadRequest("malformed_form", "the body is no form: it is not UTF-8") from None


def text_field(fields: Mapping[str, Any], name: str, *, most: int = 4096, required: bool = False) -> str:
    """Return a field as text; numbers and truth values are taken as clients print them. "" when it is missing.

    Raises:
        BadRequest: it is missing and required, too long, or an object or list.
    """
    value = fields.get(name)
    if value is None:
        value = ""
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if not isinstance(value, str) or len(value) > most or not _is_storable(value):
        raise BadRequest("bad_field", f"{name} must be a text of at most {most} characters")
    if required and not value.strip():
        raise BadRequest("field_missing", f"{name} is missing; send it")
    return value


def number_field(fields: Mapping[str, Any], name: str, *, least: int, most: int, default: int | None = None) -> int:
    """Return a field as a whole number.

    Raises:
        BadRequest: it is missing without a default, no whole number, or out of range.
    """
    text = text_field(fields, name, most=20).strip()
    if not text and default is not None:
        return default
    digits = text.removesuffix(".0")
    if not (digits.isascii() and digits.isdigit()) or not least <= int(digits) <= most:
        raise BadRequest("bad_field", f"{name} must be a whole number from {least} to {most}")
    return int(digits)


def flag_field(fields: Mapping[str, Any], name: str) -> bool:
    """Return a field as a truth value; clients send 1, true, yes."""
    return text_field(fields, name, most=20).strip().lower() in ("1", "true", "yes", "on")


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _pairs(text: str) -> list[tuple[str, str]]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace")
    except ValueError:
        raise BadRequest("too_many_fields", f"at most {MAX_FIELDS} fields are taken") from None
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest("duplicate_parameter", f"the field {twice[:64]} is given more than once; send it once")
    return pairs
