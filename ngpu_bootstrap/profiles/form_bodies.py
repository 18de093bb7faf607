"""Forms on their way: the few fields that decide where a call goes are read while the rest passes, however long.

Owns multipart forms (RFC 7578) and the urlencoded ones. A multipart form passes byte for byte, unless a credential
may stand in one of its parts: then every part is written anew with its own fields, in the order in which they came, and
the credential's content is the workspace's public id. Nothing of a file is kept.

Whether a form is well formed is judged here, since what a parser does not understand may hide a field from us that the
server finds. What a form may have besides is declared (`FormBounds`). Pure; the parser is python-multipart's.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from typing import Any
from urllib.parse import parse_qsl, quote_plus

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ngpu_bootstrap.credentials import parse_token
from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.profiles.declaration import FormBounds

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
MAX_VALUE_BYTES = 4096
MAX_TEXT_BYTES = 1024 * 1024
_MAX_NAME = 256
ANY_FORM = FormBounds()
# Readers differ in which of two names counts, and in whether RFC 2231's `name*=` is one (RFC 7578 forbids it).
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_ANOTHER_NAME = re.compile(rb";\s*name\s*(?:\*|=.*;\s*name\s*[*=])", re.IGNORECASE | re.DOTALL)


def media_type(content_type: bytes | None) -> tuple[str, dict[bytes, bytes]]:
    """Return the media type in lower case and its parameters."""
    media, parameters = parse_options_header(content_type or b"")
    return media.decode("latin-1").lower(), parameters


class MultipartScan:
    """Reads a multipart form that comes in pieces.

    Attributes:
        values: the wanted fields' texts, first come; those longer than `MAX_VALUE_BYTES` are left out.
        credentials: texts that stood where one may, by name.
        counts: how often each name was met.

    Args:
        wanted: names of fields to read.
        credentials: names of parts whose content is a credential.
        keep_texts: keep all fields' texts for `document`.
    """

    def __init__(
        self,
        boundary: bytes,
        *,
        wanted: Collection[str] = (),
        credentials: Collection[str] = (),
        bounds: FormBounds = ANY_FORM,
        keep_texts: bool = False,
    ) -> None:
        if not boundary:
            raise _malformed("its type names no boundary")
        self.values: dict[str, str] = {}
        self.credentials: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self._wanted = frozenset(wanted)
        self._secret = frozenset(credentials)
        self._bounds = bounds
        self._keep_texts = keep_texts
        self._texts: dict[str, list[Any]] = {}
        self._text_bytes = 0
        self._boundary = boundary
        self._out: list[bytes] | None = [] if self._secret else None
        self._headers: list[tuple[bytes, bytes]] = []
        self._field = self._value = b""
        self._name = ""
        self._is_file = False
        self._content: bytearray | None = None
        self._is_secret = False
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._part_ends,
                    "on_end": self._form_ends,
                },
                max_header_count=16,
                max_header_size=4096,
            )
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; return what goes on in its place.

        Raises:
            BadRequest: it is no such form, or has what it may not have.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)) from None
        if self._out is None:
            return data
        out = b"".join(self._out)
        self._out.clear()
        return out

    def end(self) -> None:
        """Take note that the body is complete.

        Raises:
            BadRequest: the form is not, or lacks a field.
        """
        if not self._ended:
            raise _malformed("it ends before its last boundary")
        for name in self._bounds.required:
            if not self.counts[name]:
                raise BadRequest("field_missing", f"the form needs a field {name}")

    @property
    def document(self) -> dict[str, Any]:
        """The form as a JSON object, for a schema: a text for each field, a list where it came more than once; of a
        file its name and type."""
        return {name: values[0] if len(values) == 1 else values for name, values in self._texts.items()}

    # -- what the parser meets

    def _part_begins(self) -> None:
        self._headers, self._field, self._value = [], b"", b""
        if self._out is not None:
            # whatever stood before the first boundary is dropped: no reader looks at it
            self._out.append(b"%b--%b\r\n" % (b"\r\n" if self.counts else b"", self._boundary))

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers.append((self._field, self._value))
        self._field = self._value = b""

    def _headers_end(self) -> None:
        dispositions = [value for name, value in self._headers if name.lower() == b"content-disposition"]
        disposition = dispositions[0] if len(dispositions) == 1 else b""
        if _ANOTHER_NAME.search(_QUOTED.sub(b'""', disposition)):
            raise _malformed("a part has its name in more than one way")
        kind, options = parse_options_header(disposition)
        raw = options.get(b"name")
        if kind != b"form-data" or raw is None or len(raw) > _MAX_NAME:
            raise _malformed("a part has no name")
        name = self._name = raw.decode("utf-8", "replace")
        self._is_file = b"filename" in options
        self.counts[name] += 1
        bounds = self._bounds
        if self.counts.total() > bounds.parts:
            raise BadRequest("too_many_fields", f"the form has more than {bounds.parts} fields")
        if bounds.allowed and name not in bounds.allowed and name not in self._secret:
            known = ", ".join(bounds.allowed)
            raise BadRequest("field_unknown", f"the form has a field {name[:64]!r}, and may have: {known}")
        if self.counts[name] > 1 and (name in bounds.once or name in self._secret or name in ("model", "project")):
            reason = f"{name}_twice" if name in ("model", "project") else "field_twice"
            raise BadRequest(reason, f"the form has the field {name} more than once; send it once")
        self._is_secret = name in self._secret
        keeps = self._is_secret or name in self._wanted or (self._keep_texts and not self._is_file)
        self._content = bytearray() if keeps else None
        if self._keep_texts and self._is_file and not self._is_secret:
            content_type = next((v for n, v in self._headers if n.lower() == b"content-type"), b"")
            self._add_text(
                {
                    "filename": options[b"filename"].decode("utf-8", "replace"),
                    "type": content_type.decode("latin-1"),
                }
            )
        if self._out is not None:
            self._out += [b"%b: %b\r\n" % pair for pair in self._headers]
            self._out.append(b"\r\n")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._content is not None:
            limit = MAX_TEXT_BYTES if self._keep_texts and not self._is_file else MAX_VALUE_BYTES
            if len(self._content) + end - start <= limit:
                self._content += data[start:end]
            elif self._is_secret or self._keep_texts:
                raise BadRequest("field_too_long", f"the field {self._name[:64]} has more than {limit} bytes")
            else:
                self._content = None
        if self._out is not None and not self._is_secret:
            self._out.append(data[start:end])

    def _part_ends(self) -> None:
        content, self._content = self._content, None
        if content is None:
            return
        text = content.decode("utf-8", "replace")
        if self._is_secret:
            self._is_secret = False
            self.credentials[self._name] = text.strip()
            public = public_id(text)
            if self._out is not None:
                self._out.append(public.encode())
            text = public
        if self._name in self._wanted:
            self.values.setdefault(self._name, text)
        if self._keep_texts and not self._is_file:
            self._add_text(text)

    def _add_text(self, value: Any) -> None:
        self._text_bytes += len(str(value))
        if self._text_bytes > MAX_TEXT_BYTES:
            raise BadRequest("form_too_long", f"the form's fields have more than {MAX_TEXT_BYTES} bytes together")
        self._texts.setdefault(self._name, []).append(value)

    def _form_ends(self) -> None:
        self._ended = True
        if self._out is not None:
            self._out.append(b"\r\n--%b--\r\n" % self._boundary)


def form_digest(body: bytes, boundary: bytes) -> bytes | None:
    """Return what a multipart form is known by: its parts in their order, each by name, file name, type and content.

    What its sender made up for this one time, the boundary, is not in it; so the same form sent again has the same.
    None for what is no such form.
    """
    whole, content = hashlib.sha256(), hashlib.sha256()
    part: dict[bytes, bytes] = {}
    field = value = b""

    def begins() -> None:
        nonlocal content
        content = hashlib.sha256()
        part.clear()

    def names(data: bytes, start: int, end: int) -> None:
        nonlocal field
        field += data[start:end]

    def says(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def has_said() -> None:
        nonlocal field, value
        part[field.lower()] = value
        field = value = b""

    def holds(data: bytes, start: int, end: int) -> None:
        content.update(memoryview(data)[start:end])

    def ends() -> None:
        for one in (part.get(b"content-disposition", b""), part.get(b"content-type", b""), content.digest()):
            whole.update(b"%d:%b" % (len(one), one))

    complete = False

    def completed() -> None:
        nonlocal complete
        complete = True

    try:
        MultipartParser(
            boundary,
            {
                "on_part_begin": begins,
                "on_header_field": names,
                "on_header_value": says,
                "on_header_end": has_said,
                "on_part_data": holds,
                "on_part_end": ends,
                "on_end": completed,
            },
            max_header_count=16,
            max_header_size=4096,
        ).write(body)
    except FormParserError:
        return None
    return whole.digest() if complete else None


def boundary_of(body: bytes) -> bytes:
    """Return the boundary that a multipart form begins with, empty where it begins otherwise."""
    line = body[:200].partition(b"\r\n")[0]
    return line[2:] if line.startswith(b"--") and len(line) < 200 else b""


def public_id(text: str) -> str:
    """Return what stands in a body in a credential's place: the id in it that is public, empty where it is none."""
    token = parse_token(text.strip())
    return token.subject if token is not None else ""


def read_urlencoded(body: bytes, credentials: Collection[str]) -> tuple[dict[str, str], dict[str, str], bytes]:
    """Return an urlencoded form's fields, the credentials in it by name, and the body with public ids for them.

    Raises:
        BadRequest: it cannot be read, or a field that decides where it goes is given twice.
    """
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=1000, errors="replace")
    except (UnicodeDecodeError, ValueError) as error:
        raise BadRequest("malformed_form", f"the body is no urlencoded form: {error}") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values and (name in ("model", "project") or name in credentials):
            reason = f"{name}_twice" if name in ("model", "project") else "field_twice"
            raise BadRequest(reason, f"the form has the field {name} more than once; send it once")
        values.setdefault(name, value)
    found = {name: values[name].strip() for name in credentials if name in values}
    if not found:
        return values, {}, body
    written = []
    for name, value in pairs:
        value = public_id(value) if name in found else value
        written.append(f"{quote_plus(name)}={quote_plus(value)}")
        if name in found:
            values[name] = value
    return values, found, "&".join(written).encode()


def _malformed(words: str) -> BadRequest:
    return BadRequest("malformed_form", f"the body is no multipart form: {words}")
