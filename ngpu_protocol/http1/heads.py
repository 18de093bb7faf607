"""Start lines and header fields, between bytes and values. Pure.

The grammar is RFC 9112's without its tolerances: lines end in CRLF alone, fields do not fold, nothing stands between
a field name and its colon, values hold no control characters, and a message says its length in one way only. Each
tolerance is one more reading of the same bytes, and two readings of one message are how requests are smuggled (RFC
9112 section 11.2), so what other implementations disagree about is refused rather than interpreted.

h11 is stricter than most, yet it reads a bare LF as a line end, unfolds fields, lets Transfer-Encoding win over a
Content-Length and control characters through, and takes 33 us for a head that takes 5 us here. So heads are read here,
and the tests hold h11 against it: whatever this accepts, h11 reads alike.
"""

import re
from dataclasses import dataclass, field
from http import HTTPStatus

from ngpu_protocol.http1.errors import LimitError, MalformedError, MisuseError
from ngpu_protocol.http1.headers import Headers
from ngpu_protocol.http1.limits import Limits

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]++) HTTP/(\d)\.(\d)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: ([\t\x20-\x7e\x80-\xff]*+))?")
# Possessive quantifiers: a hostile head fails in linear time.
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+")
_TOKEN_ONLY = re.compile(_TOKEN)
_VALUE_ONLY = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_ABSOLUTE = re.compile(rb"https?://([0-9A-Za-z.\-_~%\[\]:]+)((?:[/?].*)?)", re.IGNORECASE)
_SLASH = ord("/")
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_TOKEN_BYTE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]")

# The fields that frame a message or steer its connection; everything else is the handler's.
_STEERING = frozenset((b"content-length", b"transfer-encoding", b"connection", b"host", b"expect"))

_REASONS = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}

HEAD_END = b"\r\n\r\n"


@dataclass(slots=True)
class Request:
    """The head of a request, as the client sent it.

    Attributes:
        method: Any token, in the client's case.
        target: `/path?query` still encoded, or `*` for OPTIONS; an absolute form was reduced to its path.
        headers: All fields in order, names in lower case, values without surrounding blanks.
        http_version: "1.1" or "1.0".
        content_length: Of the body where the client said it, else None.
        chunked: Whether the body is chunked; with content_length None and not chunked there is no body.
        keep_alive: Whether the client wants the connection kept.
        expects_continue: Whether the client waits for 100 Continue before it sends the body.
    """

    method: str
    target: str
    headers: Headers
    http_version: str = "1.1"
    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True
    expects_continue: bool = False

    @property
    def path(self) -> str:
        """The target up to its query, still percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """What follows the target's first question mark, still encoded; "" where there is none."""
        return self.target.partition("?")[2]


@dataclass(slots=True)
class ResponseHead:
    """The head of an answer, as the server sent it; `content_length` None and not chunked means: until it closes."""

    status: int
    reason: bytes
    headers: Headers
    http_version: str = "1.1"
    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True


@dataclass(slots=True)
class _Steering:
    """What the steering fields of one head say, before the rules of requests or answers are applied."""

    lengths: list[bytes] = field(default_factory=list)
    codings: list[bytes] = field(default_factory=list)
    connection: bytes = b""
    hosts: int = 0
    expect: bytes = b""


def parse_request_head(head: bytes, limits: Limits) -> Request:
    """Return the request whose head is *head* (without the blank line that ended it).

    Raises:
        MalformedError: No valid HTTP/1.1 request, or one whose length two readers could see differently.
        LimitError: A target or a number of fields beyond *limits*.
    """
    line_end = head.find(b"\r\n")
    line, block = (head, b"") if line_end < 0 else (head[:line_end], head[line_end + 2 :] + b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise MalformedError(f"illegal request line: {_shown(line)}")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise MalformedError(
            f"HTTP/{major.decode()}.{minor.decode()} is not spoken here; use HTTP/1.1",
            status=505,
            reason="version_unsupported",
        )
    if len(target) > limits.max_target_bytes:
        raise LimitError(f"request target over {limits.max_target_bytes} bytes", status=414, reason="target_too_long")
    if method == b"CONNECT":
        raise MalformedError("CONNECT is not offered here", status=501, reason="not_implemented")
    shown_host: bytes | None = None
    if target[0] != _SLASH:
        target, shown_host = _origin_form(method, target)
    headers, steering = _fields(block, limits)
    http_11 = minor != b"0"
    request = Request(method.decode("ascii"), target.decode("ascii"), headers, "1.1" if http_11 else "1.0")
    if not http_11:
        request.keep_alive = False
    if steering is None:
        if http_11:
            raise MalformedError("HTTP/1.1 requests need one Host header")
        return request
    if steering.hosts != 1 and (http_11 or steering.hosts > 1):
        raise MalformedError("HTTP/1.1 requests need one Host header")
    if shown_host is not None:
        request.headers = [(name, shown_host if name == b"host" else value) for name, value in headers]
    if steering.codings:
        if steering.lengths:
            raise MalformedError("both Content-Length and Transfer-Encoding")
        if not http_11:
            raise MalformedError("Transfer-Encoding in HTTP/1.0")
        _require_chunked(steering.codings)
        request.chunked = True
    elif steering.lengths:
        if len(steering.lengths) > 1:
            raise MalformedError("more than one Content-Length")
        request.content_length = _length(steering.lengths[0])
    if steering.connection and b"close" in _tokens(steering.connection):
        request.keep_alive = False
    if steering.expect and http_11:
        if steering.expect.lower() != b"100-continue":
            raise MalformedError(
                f"expectation {_shown(steering.expect)} is not known", status=417, reason="expectation_failed"
            )
        request.expects_continue = request.chunked or bool(request.content_length)
    return request


def parse_response_head(head: bytes, limits: Limits) -> ResponseHead:
    """Return the answer whose head is *head* (without the blank line that ended it).

    Raises:
        MalformedError: No valid HTTP/1.1 answer.
        LimitError: More fields than *limits* allow.
    """
    line_end = head.find(b"\r\n")
    line, block = (head, b"") if line_end < 0 else (head[:line_end], head[line_end + 2 :] + b"\r\n")
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise MalformedError(f"illegal status line: {_shown(line)}")
    minor, status, reason = match.groups()
    headers, steering = _fields(block, limits)
    response = ResponseHead(int(status), reason or b"", headers, "1.0" if minor == b"0" else "1.1")
    if minor == b"0":
        response.keep_alive = False
    if steering is None:
        return response
    if steering.codings:
        if steering.lengths:
            raise MalformedError("both Content-Length and Transfer-Encoding")
        _require_chunked(steering.codings)
        response.chunked = True
    elif steering.lengths:
        # RFC 9112 section 6.3: repeated equal lengths may be taken as one. Servers behind careless middleware send
        # them.
        if len(steering.lengths) > 1:
            if len(set(steering.lengths)) > 1:
                raise MalformedError("conflicting Content-Length")
            first = headers.index((b"content-length", steering.lengths[0]))
            response.headers = [pair for at, pair in enumerate(headers) if at == first or pair[0] != b"content-length"]
        response.content_length = _length(steering.lengths[0])
    if steering.connection and b"close" in _tokens(steering.connection):
        response.keep_alive = False
    return response


def parse_trailers(block: bytes, limits: Limits) -> Headers:
    """Return the fields of a trailer section (*block*: each line with its CRLF, without the blank line)."""
    return _fields(block, limits)[0]


def check_partial_head(data: bytes, already_checked: int, limits: Limits) -> None:
    """Refuse a head that is not complete yet, as early as it can be known to be bad.

    Args:
        data: All bytes of the head so far; it holds no blank line.
        already_checked: How many of them an earlier call has seen.
    """
    if len(data) > limits.max_head_bytes:
        raise LimitError(
            f"request line and headers over {limits.max_head_bytes} bytes: send fewer or shorter ones",
            status=431,
            reason="head_too_large",
        )
    if already_checked == 0 and not _TOKEN_BYTE.match(data):
        # A TLS client on a plain port, for one: it would otherwise wait for our half of its handshake.
        raise MalformedError("the connection does not start with HTTP")
    if _BARE_LINE_END.search(data, max(0, already_checked - 1)):
        raise MalformedError("a line ends in something else than CRLF")


def encode_fields(headers: Headers) -> bytes:
    """Return the wire form of *headers*, each line with its CRLF.

    Raises:
        MisuseError: A name or value that would change the message's structure (CR, LF, NUL, a blank in a name).
    """
    block = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    names = b":".join([name for name, _ in headers])
    # The block alone would pass a name with a colon in it: the names are counted, and so are the lines.
    if (
        _FIELDS.fullmatch(block) is None
        or block.count(b"\n") != len(headers)
        or names.count(b":") != max(0, len(headers) - 1)
    ):
        for name, value in headers:
            if _TOKEN_ONLY.fullmatch(name) is None or _VALUE_ONLY.fullmatch(value) is None:
                raise MisuseError(f"header field {_shown(name)} has an illegal name or value")
    return block


def encode_request_line(method: str, target: str) -> bytes:
    """Return the request line with its CRLF.

    Raises:
        MisuseError: A method that is no token or a target with blanks, controls or characters beyond ASCII.
    """
    try:
        line = f"{method} {target} HTTP/1.1".encode("ascii")
    except UnicodeEncodeError:
        line = b""
    if _REQUEST_LINE.fullmatch(line) is None:
        raise MisuseError(f"no valid method and target: {method!r} {target!r}")
    return line + b"\r\n"


def encode_status_line(status: int, reason: bytes = b"") -> bytes:
    """Return the status line with its CRLF; the registered phrase where *reason* is empty."""
    line = b"HTTP/1.1 %d %b" % (status, reason or _REASONS.get(status, b""))
    if _STATUS_LINE.fullmatch(line) is None:
        raise MisuseError(f"no valid status: {status} {reason!r}")
    return line + b"\r\n"


def _fields(block: bytes, limits: Limits) -> tuple[Headers, _Steering | None]:
    """Return the fields of *block*, and what those that steer say (None where there is none)."""
    if _FIELDS.fullmatch(block) is None:
        raise MalformedError(f"illegal header field: {_shown(_first_bad_line(block))}")
    lines = block.split(b"\r\n")
    lines.pop()
    if len(lines) > limits.max_headers:
        raise LimitError(
            f"more than {limits.max_headers} header fields: send fewer", status=431, reason="too_many_headers"
        )
    headers: Headers = []
    steering: _Steering | None = None
    for line in lines:
        name, _, value = line.partition(b":")
        name = name.lower()
        value = value.strip(b" \t")
        headers.append((name, value))
        if name in _STEERING:
            if steering is None:
                steering = _Steering()
            if name == b"host":
                steering.hosts += 1
            elif name == b"content-length":
                steering.lengths.append(value)
            elif name == b"connection":
                steering.connection += b"," + value
            elif name == b"transfer-encoding":
                steering.codings.append(value)
            else:
                steering.expect = value if not steering.expect else steering.expect + b"," + value
    return headers, steering


def _origin_form(method: bytes, target: bytes) -> tuple[bytes, bytes | None]:
    """Return path and query of a target that does not start with them, and the Host it names instead of the field's.

    RFC 9112 section 3.2.2: servers must take the absolute form, and its authority goes before the Host field. So that
    no handler can be made to see a foreign URL where it expects a path, none ever sees this form.
    """
    if target == b"*" and method == b"OPTIONS":
        return target, None
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise MalformedError(f"the request target must start with a slash: {_shown(target)}")
    path = match[2]
    return (path if path.startswith(b"/") else b"/" + path), match[1]


def _require_chunked(codings: list[bytes]) -> None:
    if len(codings) != 1 or codings[0].lower() != b"chunked":
        raise MalformedError("no transfer coding but chunked is known", status=501, reason="not_implemented")


def _length(value: bytes) -> int:
    if _LENGTH.fullmatch(value) is None:
        raise MalformedError(f"bad Content-Length: {_shown(value)}")
    return int(value)


def _tokens(value: bytes) -> list[bytes]:
    return [part.strip(b" \t") for part in value.lower().split(b",")]


def _first_bad_line(block: bytes) -> bytes:
    match = _FIELDS.match(block)
    start = match.end() if match else 0
    return block[start:].split(b"\r\n", 1)[0]


def _shown(data: bytes) -> str:
    """Return *data* fit for a message: escaped, and short. Values of fields are never shown, they may be secrets."""
    return ascii(data.partition(b":")[0][:60].decode("latin-1"))
