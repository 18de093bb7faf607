"""JSON that means one thing to whoever reads it.

What is validated here and read there must not be two things: of a member that is given twice, servers take the first,
the last or both, and `NaN` is a number to some and an error to others (RFC 8259 leaves the one to its readers, and
knows no other). Pure.
"""

from __future__ import annotations

import json
from typing import Any

from ngpu_bootstrap.errors import BadRequest

# A parsed body takes some hundred bytes of memory for each value in it, and its schema some microseconds.
MAX_VALUES = 50_000
# Parsing and validating what is longer takes so long that others would wait for it.
SHORT_BYTES = 64 * 1024


def read_json(body: bytes | bytearray) -> Any:
    """Return the JSON value that *body* is.

    Raises:
        BadRequest: it is none, has more than `MAX_VALUES`, or could be read in two ways.
    """
    if sum(map(body.count, b",[{")) > MAX_VALUES:
        raise BadRequest("too_many_values", f"the body has more than {MAX_VALUES} values; send fewer", status=413)
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = f" at line {error.lineno} column {error.colno}"
    except (ValueError, RecursionError):
        where = ""
    raise BadRequest("malformed_json", f"the body is not valid JSON{where}; send a JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadRequest("member_twice", f"the body names {twice[:64]!r} more than once in one object; name it once")
    return found


def _no_number(text: str) -> Any:
    raise BadRequest("malformed_json", f"the body is not valid JSON: {text} is no number there")
