"""What is read as a head and what is refused: nothing that two readers could see differently."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.http1 import LimitError, Limits, MalformedError, MisuseError, RemoteError
from ngpu_protocol.http1.heads import (
    check_partial_head,
    encode_fields,
    encode_request_line,
    encode_status_line,
    parse_request_head,
    parse_response_head,
    parse_trailers,
)

LIMITS = Limits()


def request(*lines: bytes, line: bytes = b"GET / HTTP/1.1", host: bool = True):
    return parse_request_head(b"\r\n".join((line, *((b"Host: x",) if host else ()), *lines)), LIMITS)


def test_request_head_is_read_with_names_in_lower_case_and_values_trimmed() -> None:
    read = parse_request_head(
        b"POST /a%20b?c=d&e HTTP/1.1\r\nHOST: example:80\r\nX-Two:  a b \t\r\nX-Two:\r\nContent-Length: 12", LIMITS
    )
    assert (read.method, read.target, read.path, read.query) == ("POST", "/a%20b?c=d&e", "/a%20b", "c=d&e")
    assert read.headers == [(b"host", b"example:80"), (b"x-two", b"a b"), (b"x-two", b""), (b"content-length", b"12")]
    assert (read.content_length, read.chunked, read.keep_alive, read.expects_continue) == (12, False, True, False)


def test_any_token_is_a_method() -> None:
    assert request(line=b"M-SEARCH /x HTTP/1.1").method == "M-SEARCH"
    assert request(line=b"get /x HTTP/1.1").method == "get"


def test_bytes_beyond_ascii_pass_in_values() -> None:
    assert request("X: \u00e9\u4e00".encode()).headers[1] == (b"x", "\u00e9\u4e00".encode())


def test_absolute_target_is_served_as_its_path_under_its_own_authority() -> None:
    read = request(b"X: y", line=b"GET http://other:81/a?b HTTP/1.1")
    assert read.target == "/a?b"
    assert read.headers == [(b"host", b"other:81"), (b"x", b"y")]
    assert request(line=b"GET https://other HTTP/1.1").target == "/"


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], 400),
        ([b"Transfer-Encoding: chunked", b"Content-Length: 5"], 400),
        ([b"Content-Length: 5", b"Content-Length: 5"], 400),
        ([b"Content-Length: 5", b"Content-Length: 6"], 400),
        ([b"Content-Length: 5, 5"], 400),
        ([b"Content-Length: +5"], 400),
        ([b"Content-Length: -5"], 400),
        ([b"Content-Length: 0x5"], 400),
        ([b"Content-Length: 5_0"], 400),
        ([b"Content-Length: "], 400),
        ([b"Content-Length: 9999999999999999999"], 400),
        ([b"Content-Length: \xd9\xa5"], 400),
        ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], 501),
        ([b"Transfer-Encoding: gzip, chunked"], 501),
        ([b"Transfer-Encoding: chunked, identity"], 501),
        ([b"Transfer-Encoding: xchunked"], 501),
        ([b"Transfer-Encoding:\x0bchunked"], 400),
        ([b"Transfer-Encoding : chunked"], 400),
        ([b"Content-Length : 5"], 400),
        ([b" Content-Length: 5"], 400),
        ([b"X: a", b" folded"], 400),
        ([b"X: a", b"\tfolded"], 400),
        ([b"X: a\nContent-Length: 5"], 400),
        ([b"X: a\rContent-Length: 5"], 400),
        ([b"X: a\x00b"], 400),
        ([b"X: a\x01b"], 400),
        ([b"X: a\x7fb"], 400),
        ([b"X\x00: a"], 400),
        ([b"X(y): a"], 400),
        ([b"X\xe9: a"], 400),
        ([b": a"], 400),
        ([b"no colon"], 400),
        ([b"Host: second"], 400),
        ([b"Expect: something"], 417),
        ([b"Expect: 100-continue, more"], 417),
    ],
)
def test_ambiguous_or_illegal_fields_are_refused(lines: list[bytes], status: int) -> None:
    with pytest.raises(RemoteError) as caught:
        request(*lines, line=b"POST / HTTP/1.1")
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"GET /  HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b" GET / HTTP/1.1", 400),
        (b"GET\t/ HTTP/1.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET /a\x01 HTTP/1.1", 400),
        (b"GET /a\x7f HTTP/1.1", 400),
        (b"GET /\xc3\xa9 HTTP/1.1", 400),
        (b"GET /\nx HTTP/1.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET / HTTP/1.10", 400),
        (b"GET / HTTP/11", 400),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/0.9", 505),
        (b"PRI * HTTP/2.0", 505),
        (b"G@T / HTTP/1.1", 400),
        (b"GET relative HTTP/1.1", 400),
        (b"GET * HTTP/1.1", 400),
        (b"GET ftp://x/ HTTP/1.1", 400),
        (b"GET http:///x HTTP/1.1", 400),
        (b"GET http://user@x/ HTTP/1.1", 400),
        (b"CONNECT example:80 HTTP/1.1", 501),
        (b"", 400),
    ],
)
def test_illegal_request_lines_are_refused(line: bytes, status: int) -> None:
    with pytest.raises(RemoteError) as caught:
        request(line=line)
    assert caught.value.status == status


def test_host_is_wanted_once_and_only_in_http_1_1() -> None:
    with pytest.raises(MalformedError):
        request(host=False)
    with pytest.raises(MalformedError):
        request(b"X: y", host=False)
    assert request(line=b"GET / HTTP/1.0", host=False).keep_alive is False


def test_transfer_encoding_in_http_1_0_is_refused() -> None:
    with pytest.raises(MalformedError):
        request(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0")


def test_close_is_found_among_the_connection_tokens() -> None:
    assert request(b"Connection: keep-alive").keep_alive
    assert not request(b"Connection: TE, Close").keep_alive
    assert not request(b"Connection: te", b"Connection: close").keep_alive
    assert request(b"Connection: closed").keep_alive


def test_only_a_request_with_a_body_waits_for_continue() -> None:
    assert request(b"Content-Length: 5", b"Expect: 100-Continue", line=b"POST / HTTP/1.1").expects_continue
    assert request(b"Transfer-Encoding: chunked", b"Expect: 100-continue", line=b"POST / HTTP/1.1").expects_continue
    assert not request(b"Expect: 100-continue").expects_continue
    assert not request(b"Content-Length: 5", b"Expect: 100-continue", line=b"POST / HTTP/1.0").expects_continue


def test_sizes_and_numbers_are_bounded() -> None:
    with pytest.raises(LimitError) as caught:
        request(line=b"GET /" + b"x" * LIMITS.max_target_bytes + b" HTTP/1.1")
    assert caught.value.status == 414
    with pytest.raises(LimitError) as caught:
        request(*[b"X: y"] * LIMITS.max_headers)
    assert caught.value.status == 431
    with pytest.raises(LimitError) as caught:
        check_partial_head(b"GET / HTTP/1.1\r\nX: " + b"y" * LIMITS.max_head_bytes, 0, LIMITS)
    assert caught.value.status == 431


@pytest.mark.parametrize("start", [b"\x16\x03\x01\x02\x00", b" GET", b"GET / HTTP/1.1\nHost: x\n\n", b"A\rB"])
def test_what_cannot_become_a_head_is_refused_before_it_ends(start: bytes) -> None:
    with pytest.raises(MalformedError):
        check_partial_head(start, 0, LIMITS)


def test_a_head_split_between_cr_and_lf_is_waited_for() -> None:
    check_partial_head(b"GET / HTTP/1.1\r", 0, LIMITS)
    check_partial_head(b"GET / HTTP/1.1\r\n", 15, LIMITS)
    with pytest.raises(MalformedError):
        check_partial_head(b"GET / HTTP/1.1\rX", 15, LIMITS)


def test_errors_never_show_values() -> None:
    with pytest.raises(MalformedError) as caught:
        request(b"Authorization: Bearer secret\x01")
    assert "secret" not in str(caught.value)
    assert "Authorization" in str(caught.value)


def test_answers_are_read() -> None:
    read = parse_response_head(b"HTTP/1.1 404 Not Here\r\nContent-Length: 3\r\ncontent-length: 3", LIMITS)
    assert (read.status, read.reason, read.content_length, read.keep_alive) == (404, b"Not Here", 3, True)
    assert read.headers == [(b"content-length", b"3")]  # a proxy passes on one
    assert parse_response_head(b"HTTP/1.1 200", LIMITS).reason == b""
    assert parse_response_head(b"HTTP/1.1 200 ", LIMITS).chunked is False
    assert parse_response_head(b"HTTP/1.0 200 OK", LIMITS).keep_alive is False


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 099 X",
        b"HTTP/2 200 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1 200 O\x01K",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b",
        b"garbage",
        b"",
    ],
)
def test_illegal_answers_are_refused(head: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_response_head(head, LIMITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x", b"a\r\nset-cookie: b"),
        (b"x", b"a\nb"),
        (b"x", b"a\rb"),
        (b"x", b"a\x00"),
        (b"x", b"a\x1f"),
        (b"x\r\ny", b"a"),
        (b"x y", b"a"),
        (b"x:", b"a"),
        (b"", b"a"),
    ],
)
def test_no_field_breaks_out_of_its_line(name: bytes, value: bytes) -> None:
    with pytest.raises(MisuseError):
        encode_fields([(b"before", b"1"), (name, value), (b"after", b"2")])


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/a b"), ("GET", "/\r\nx"), ("G T", "/"), ("GET", ""), ("GET", "/\u00e9")],
)
def test_no_request_line_breaks_out_of_its_line(method: str, target: str) -> None:
    with pytest.raises(MisuseError):
        encode_request_line(method, target)


def test_status_lines_have_the_registered_phrase_or_ours() -> None:
    assert encode_status_line(404) == b"HTTP/1.1 404 Not Found\r\n"
    assert encode_status_line(299) == b"HTTP/1.1 299 \r\n"
    assert encode_status_line(200, b"Fine") == b"HTTP/1.1 200 Fine\r\n"
    with pytest.raises(MisuseError):
        encode_status_line(200, b"a\r\nb")


def test_trailers_follow_the_same_grammar() -> None:
    assert parse_trailers(b"A: b\r\nC:d\r\n", LIMITS) == [(b"a", b"b"), (b"c", b"d")]
    for block in (b"A: b\n", b"A : b\r\n", b"A: b\r\n c\r\n", b"A: \x01\r\n"):
        with pytest.raises(MalformedError):
            parse_trailers(block, LIMITS)


# -- against h11 -------------------------------------------------------------------------------------------------------

_names = st.sampled_from(
    [
        b"Host",
        b"host",
        b"Content-Length",
        b"Transfer-Encoding",
        b"Connection",
        b"Expect",
        b"X-Any",
        b"X Bad",
        b"x\x00",
        b"Te",
    ]
)
_values = st.one_of(
    st.sampled_from(
        [b"chunked", b"Chunked", b"5", b"05", b"5, 5", b"close", b"100-continue", b"x", b" y ", b"", b"a\x01", b"\xff"]
    ),
    st.binary(max_size=6),
)
_lines = st.tuples(_names, st.sampled_from([b":", b": ", b" : ", b":\t"]), _values).map(b"".join)
_starts = st.tuples(
    st.sampled_from([b"GET", b"POST", b"get", b"G@T", b"OPTIONS"]),
    st.sampled_from([b" ", b"  ", b"\t"]),
    st.sampled_from([b"/", b"/a?b", b"*", b"/\x7f", b"/a b", b"/\xff"]),
    st.sampled_from([b" HTTP/1.1", b" HTTP/1.0", b" HTTP/1.1 ", b" HTTP/2.0", b""]),
).map(b"".join)


@given(start=_starts, lines=st.lists(_lines, max_size=5), line_end=st.sampled_from([b"\r\n", b"\r\n", b"\n"]))
def test_h11_reads_alike_whatever_is_accepted(start: bytes, lines: list[bytes], line_end: bytes) -> None:
    head = line_end.join((start, *lines))
    try:
        ours = parse_request_head(head, LIMITS)
    except RemoteError:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head + b"\r\n\r\n")
    theirs = connection.next_event()
    assert isinstance(theirs, h11.Request)
    assert ours.method.encode() == theirs.method
    assert ours.target.encode() == theirs.target
    assert ours.http_version.encode() == theirs.http_version
    as_h11 = [(n, v.lower() if n == b"transfer-encoding" else v) for n, v in ours.headers]
    assert as_h11 == list(theirs.headers)
    assert ours.expects_continue <= connection.they_are_waiting_for_100_continue
    has_body = ours.chunked or bool(ours.content_length)
    if not has_body:
        assert isinstance(connection.next_event(), h11.EndOfMessage)
        assert ours.keep_alive == (connection.their_state is h11.DONE)
    elif ours.chunked:
        connection.receive_data(b"0\r\n\r\n")
        assert isinstance(connection.next_event(), h11.EndOfMessage)
    else:
        connection.receive_data(b"z" * (ours.content_length or 0))
        event = connection.next_event()
        assert isinstance(event, h11.Data)
        assert len(event.data) == ours.content_length


_token = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=8).map(str.encode)
_clean_value = st.binary(max_size=12).map(lambda raw: bytes(b for b in raw if b == 9 or 32 <= b != 127).strip(b" \t"))


@given(fields=st.lists(st.tuples(_token, _clean_value), max_size=8))
def test_whatever_is_written_is_read_back_by_h11_and_by_us(fields: list[tuple[bytes, bytes]]) -> None:
    steering = {b"content-length", b"transfer-encoding", b"connection", b"expect", b"host"}
    fields = [pair for pair in fields if pair[0].lower() not in steering]
    head = encode_request_line("PUT", "/x?y") + encode_fields([(b"Host", b"h"), *fields])
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head + b"\r\n")
    theirs = connection.next_event()
    assert isinstance(theirs, h11.Request)
    expected = [(b"host", b"h"), *((name.lower(), value) for name, value in fields)]
    assert list(theirs.headers) == expected
    assert parse_request_head(head[:-2], LIMITS).headers == expected
