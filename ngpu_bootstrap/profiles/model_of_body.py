"""The members of a JSON object that decide where it goes, found while it passes: never parsed whole, never changed.

A body may hold its `model` after ten megabytes of an image in base64, so the object is scanned as it comes, in pieces
of any size. Only what is wanted is kept: short values of the object's own members. What lies deeper is skipped by two
regular expressions, which is what makes the scan as fast as the network. A value that is found is given with its place
in bytes, so that a credential can be replaced and the rest stay as it came.

The scan judges structure only as far as it must to be sure of what it found: strings, nesting, members. Whether the
rest is valid JSON is for whoever gets it. A member given twice is an error of the caller's: servers differ in which
of the two counts, and a body that means one model to us and another to the server is not passed on.

Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import IntEnum, auto
from typing import Any

from ngpu_bootstrap.errors import BadRequest
from ngpu_protocol.frozen import dataclass

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 4096

_QUOTE, _BACKSLASH, _COLON, _COMMA, _OPEN, _CLOSE = b'"\\:,{}'
_SPACE = re.compile(rb"[ \t\r\n]*")
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_IN_SCALAR = re.compile(rb"[^,}\]\s\"{\[]*")
# Everything below the object's own members up to the next bracket, or to a string that this piece does not end.
_DEEP = re.compile(rb'(?>[^"{}\[\]]+|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Member:
    """A wanted member of the object.

    Attributes:
        raw: its value as it came; None where that is an object, a list, or longer than `MAX_VALUE_BYTES`.
        start: of the value, in bytes from the beginning of the body.
        end: one after its last byte; 0 for a value that is not kept.
    """

    raw: bytes | None
    start: int
    end: int

    @property
    def value(self) -> Any:
        """The value; None for what was not kept, and for what is no JSON."""
        try:
            return None if self.raw is None else json.loads(self.raw)
        except (ValueError, RecursionError):
            return None


class _At(IntEnum):
    START = auto()
    KEY_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    STRING = auto()
    SCALAR = auto()
    DEEP = auto()
    DEEP_STRING = auto()
    AFTER_VALUE = auto()
    END = auto()


class ObjectScan:
    """Finds members of one JSON object that comes in pieces.

    Attributes:
        found: by name, in the order in which they were met; a second one of a name is an error.

    Args:
        wanted: names of members.
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self.found: dict[str, Member] = {}
        self._wanted = frozenset(wanted)
        self._at = _At.START
        self._depth = 0
        self._offset = 0  # of the piece at hand
        self._escaped = False  # the piece before ended after a backslash
        self._kept: bytearray | None = None  # of the key or value under way; None: not wanted
        self._start = 0
        self._name: str | None = None  # of the member under way, where it is wanted
        self._begun = b""  # of a body too short to tell whether it starts with a byte order mark

    def feed(self, data: bytes) -> None:
        """Take the next piece.

        Raises:
            BadRequest: it is no object, or a wanted member is given twice.
        """
        if self._at is _At.START:
            data = self._begun + data
            if len(data) < 3 and _BOM.startswith(data):
                self._begun = data
                return
            self._begun = b""
        position, size = 0, len(data)
        while position < size:
            position = self._step(data, position)
        self._offset += size

    @property
    def kept_from(self) -> int:
        """Where the wanted value under way begins, in bytes from the beginning; else how much was taken."""
        under_way = self._name is not None and self._at in (_At.STRING, _At.SCALAR) and self._kept is not None
        return self._start if under_way else self._offset + len(self._begun)

    def end(self) -> None:
        """Take note that the body is complete.

        Raises:
            BadRequest: the object is not.
        """
        if self._at is not _At.END:
            raise _malformed("the body ends before its JSON object does")

    def _step(self, data: bytes, position: int) -> int:
        """Take what follows at *position* as far as it is of one kind; return where the next begins."""
        at = self._at
        if at is _At.DEEP:
            return self._deep(data, position)
        if at in (_At.KEY, _At.STRING, _At.DEEP_STRING):
            return self._string(data, position)
        if at is _At.SCALAR:
            return self._scalar(data, position)
        if at is _At.START and data.startswith(_BOM, position):
            position += 3
        matched = _SPACE.match(data, position)
        assert matched is not None
        position = matched.end()
        if position == len(data):
            return position
        byte = data[position]
        if at is _At.START:
            if byte != _OPEN:
                raise _malformed("the body is no JSON object")
            self._at = _At.KEY_OR_END
        elif at is _At.KEY_OR_END:
            if byte == _QUOTE:
                self._at, self._kept = _At.KEY, bytearray()
            elif byte == _CLOSE:
                self._at = _At.END
            else:
                raise _malformed(self._where("a member's name is expected", position))
        elif at is _At.COLON:
            if byte != _COLON:
                raise _malformed(self._where("a colon is expected", position))
            self._at = _At.VALUE
        elif at is _At.VALUE:
            return self._value(data, position)
        elif at is _At.AFTER_VALUE:
            if byte not in (_COMMA, _CLOSE):
                raise _malformed(self._where("a comma or the object's end is expected", position))
            self._at = _At.KEY_OR_END if byte == _COMMA else _At.END
        else:
            raise _malformed(self._where("something follows the JSON object", position))
        return position + 1

    def _value(self, data: bytes, position: int) -> int:
        byte = data[position]
        self._start = self._offset + position
        if byte in b"{[":
            self._keep(None)
            self._at, self._depth = _At.DEEP, 2
            return position + 1
        self._kept = bytearray() if self._name is not None else None
        if byte == _QUOTE:
            self._at = _At.STRING
            return position + 1
        if byte in b",}]:":
            raise _malformed(self._where("a value is expected", position))
        self._at = _At.SCALAR
        return position

    def _string(self, data: bytes, position: int) -> int:
        first = position
        if self._escaped:
            self._escaped = False
            position += 1
        matched = _IN_STRING.match(data, position)
        assert matched is not None
        position = matched.end()
        ended = position < len(data) and data[position] == _QUOTE
        if position < len(data) and not ended:  # a backslash, the last byte of this piece
            self._escaped = True
            position += 1
        if self._kept is not None:
            self._append(data[first:position])
        if not ended:
            return position
        if self._at is _At.DEEP_STRING:
            self._at = _At.DEEP
        elif self._at is _At.KEY:
            self._name = self._key()
            self._at = _At.COLON
        else:
            self._keep(None if self._kept is None else b'"%b"' % bytes(self._kept), self._offset + position + 1)
            self._at = _At.AFTER_VALUE
        return position + 1

    def _scalar(self, data: bytes, position: int) -> int:
        matched = _IN_SCALAR.match(data, position)
        assert matched is not None
        if self._kept is not None:
            self._append(matched[0])
        position = matched.end()
        if position < len(data):
            self._keep(None if self._kept is None else bytes(self._kept), self._offset + position)
            self._at = _At.AFTER_VALUE
        return position

    def _deep(self, data: bytes, position: int) -> int:
        matched = _DEEP.match(data, position)
        assert matched is not None
        position = matched.end()
        if position == len(data):
            return position
        byte = data[position]
        if byte == _QUOTE:
            self._at, self._kept = _At.DEEP_STRING, None
        elif byte in b"{[":
            self._depth += 1
        else:
            self._depth -= 1
            if self._depth == 1:
                self._at = _At.AFTER_VALUE
        return position + 1

    def _append(self, piece: bytes) -> None:
        assert self._kept is not None
        limit = MAX_KEY_BYTES if self._at is _At.KEY else MAX_VALUE_BYTES
        if len(self._kept) + len(piece) > limit:
            self._kept = None
        else:
            self._kept += piece

    def _key(self) -> str | None:
        """Return the name just read, where it is wanted."""
        if self._kept is None:
            return None
        raw = bytes(self._kept)
        try:
            name = json.loads(b'"%b"' % raw) if _BACKSLASH in raw else raw.decode()
        except ValueError:
            raise _malformed("a member's name is no text") from None
        return name if name in self._wanted else None

    def _keep(self, raw: bytes | None, end: int = 0) -> None:
        """Keep the value just read, or, while it goes on, that there is one."""
        name, self._name, self._kept = self._name, None, None
        if name is None:
            return
        if name in self.found:
            reason = f"{name}_twice" if name in ("model", "project") else "member_twice"
            raise BadRequest(reason, f"the body names {name} more than once; name it once")
        self.found[name] = Member(raw, self._start, end if raw is not None else 0)

    def _where(self, words: str, position: int) -> str:
        return f"the body is not valid JSON: {words} at byte {self._offset + position}"


def text_of(member: Member | None, name: str) -> str | None:
    """Return the text that a member named *name* must be; None where there is no such member, or it is null.

    Raises:
        BadRequest: it is something else, or longer than any name.
    """
    if member is None:
        return None
    if member.raw is None:
        raise BadRequest(f"{name}_not_text", f"{name} must be a text of at most {MAX_VALUE_BYTES} bytes")
    value = member.value
    if value is None and member.raw == b"null":
        return None
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name}_not_text", f"{name} must be a text that is not empty")
    return value


def _malformed(message: str) -> BadRequest:
    return BadRequest("malformed_json", message)
