"""Whole conversations: the same bytes in any pieces are the same requests, and no bytes at all break the server."""

from __future__ import annotations

import contextlib
import re
from itertools import pairwise

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from ngpu_protocol.http1 import Exchange, Limits, serve_stream
from ngpu_protocol.http1.bodies import encode_chunk, encode_last_chunk
from tests.support.streams import stream_pair

_token = st.text("abcXYZ", min_size=1, max_size=5)
_value = st.text("abc 019,;=\u00e9", max_size=12).map(str.strip)


@st.composite
def _request(draw: st.DrawFn) -> bytes:
    lines = [f"{draw(_token)} /{draw(_token)} HTTP/1.1", "Host: h"]
    lines += [f"X-{draw(_token)}: {draw(_value)}" for _ in range(draw(st.integers(0, 3)))]
    body = draw(st.binary(max_size=60))
    framing = draw(st.sampled_from(["none", "length", "chunked"]))
    if framing == "length":
        lines.append(f"Content-Length: {len(body)}")
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    if framing == "none":
        return head
    if framing == "length":
        return head + body
    size = draw(st.integers(1, 20))
    chunks = b"".join(encode_chunk(body[at : at + size]) for at in range(0, len(body), size))
    trailers = draw(st.sampled_from([[], [(b"x-sum", b"1")]]))
    return head + chunks + encode_last_chunk(trailers)


async def _retell(exchange: Exchange) -> None:
    """Answer with all that was understood of the request."""
    request = exchange.request
    body = await exchange.receive_all(100_000)
    told = [request.method, request.target, request.headers, body, exchange.trailers]
    await exchange.respond_json(200, repr(told))


def _answers(pieces: list[bytes], *, wait_between: bool = True) -> bytes:
    async def talk() -> bytes:
        client, server = stream_pair()
        got = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, server)
            with contextlib.suppress(trio.BrokenResourceError):  # refused, or left in the middle of a body
                for piece in pieces:
                    await client.send_all(piece)
                    if wait_between:
                        await trio.testing.wait_all_tasks_blocked()
                await client.send_eof()
            with contextlib.suppress(trio.BrokenResourceError):
                while data := await client.receive_some():
                    got += data
        return got

    return trio.run(talk, clock=MockClock(autojump_threshold=0))


async def _serve(stream: trio.abc.Stream) -> None:
    await serve_stream(stream, _retell, limits=Limits(max_headers=20), half_close=True)


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(_request(), min_size=1, max_size=3), cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_requests_are_the_same_under_any_split(requests: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(requests)
    places = sorted({0, len(wire), *(cut % len(wire) for cut in cuts)})
    whole = _answers([wire])
    assert whole.count(b"HTTP/1.1 200 OK\r\n") == len(requests)
    assert _answers([wire[a:b] for a, b in pairwise(places)]) == whole


_noise = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n", b"Host: h\r\n", b"\r\n", b"\n"]
    ),
    st.sampled_from(
        [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"abc"]
    ),
    st.sampled_from([b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: x\r\n", b"X: \x00\r\n", b" x\r\n"]),
)


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(_noise, max_size=10))
def test_any_bytes_get_well_formed_answers_and_an_end(pieces: list[bytes]) -> None:
    got = _answers(pieces, wait_between=False)
    assert not got or re.match(rb"HTTP/1\.1 (100|200|4\d\d|5\d\d) ", got)
    assert b"HTTP/1.1 500" not in got
