"""Bodies: any split of the same bytes is the same content, and nothing cut short is ever complete."""

from __future__ import annotations

from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.http1 import IncompleteError, LimitError, Limits, MalformedError, MisuseError, RemoteError
from ngpu_protocol.http1.bodies import (
    ChunkedDecoder,
    CloseDecoder,
    Decoder,
    LengthDecoder,
    encode_chunk,
    encode_last_chunk,
)

LIMITS = Limits()


def decode(decoder: Decoder, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """Return content and what is left over; pieces after the end are left over too."""
    content = b""
    for number, piece in enumerate(pieces):
        content += decoder.feed(piece)
        if decoder.done:
            return content, decoder.rest + b"".join(pieces[number + 1 :])
    return content, b""


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


_cuts = st.lists(st.integers(0, 10_000), max_size=12)


@given(body=st.binary(max_size=80), rest=st.binary(max_size=20), cuts=_cuts)
def test_length_body_is_the_same_under_any_split(body: bytes, rest: bytes, cuts: list[int]) -> None:
    decoder = LengthDecoder(len(body))
    pieces = split(body + rest, cuts)
    if decoder.done:
        assert body == b""
        return
    assert decode(decoder, pieces) == (body, rest)
    assert decoder.done


_chunks = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
_trailers = st.lists(
    st.tuples(st.sampled_from([b"a", b"x-sum", b"ngpu-receipt"]), st.sampled_from([b"", b"1", b"a b"])), max_size=3
)


@given(chunks=_chunks, trailers=_trailers, rest=st.binary(max_size=20), cuts=_cuts)
def test_chunked_body_is_the_same_under_any_split(
    chunks: list[bytes], trailers: list[tuple[bytes, bytes]], rest: bytes, cuts: list[int]
) -> None:
    wire = b"".join(map(encode_chunk, chunks)) + encode_last_chunk(trailers)
    decoder = ChunkedDecoder(LIMITS)
    assert decode(decoder, split(wire + rest, cuts)) == (b"".join(chunks), rest)
    assert decoder.done
    assert decoder.trailers == trailers


@given(chunks=_chunks, trailers=_trailers, cut=st.integers(0, 10_000), cuts=_cuts)
def test_no_prefix_of_a_chunked_body_is_complete(
    chunks: list[bytes], trailers: list[tuple[bytes, bytes]], cut: int, cuts: list[int]
) -> None:
    wire = b"".join(map(encode_chunk, chunks)) + encode_last_chunk(trailers)
    decoder = ChunkedDecoder(LIMITS)
    decode(decoder, split(wire[: cut % len(wire)], cuts))
    assert not decoder.done
    with pytest.raises(IncompleteError):
        decoder.eof()


@given(
    wire=st.lists(
        st.sampled_from(
            [
                b"5\r\n",
                b"hello",
                b"\r\n",
                b"0\r\n",
                b"\n",
                b"a;x=y\r\n",
                b"0123456789",
                b"A: b\r\n",
                b"g\r\n",
                b"-1\r\n",
            ]
        ),
        max_size=9,
    ).map(b"".join),
    cuts=_cuts,
)
def test_h11_reads_alike_whatever_is_accepted(wire: bytes, cuts: list[int]) -> None:
    decoder = ChunkedDecoder(LIMITS)
    try:
        content, rest = decode(decoder, split(wire, cuts))
    except RemoteError:
        return
    if not decoder.done:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + wire)
    connection.next_event()
    theirs = b""
    while isinstance(event := connection.next_event(), h11.Data):
        theirs += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert (theirs, list(event.headers), connection.trailing_data[0]) == (content, decoder.trailers, rest)


@given(chunks=_chunks, trailers=_trailers)
def test_h11_reads_what_is_written(chunks: list[bytes], trailers: list[tuple[bytes, bytes]]) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.receive_data(b"".join(map(encode_chunk, chunks)) + encode_last_chunk(trailers))
    connection.next_event()
    content = b""
    while isinstance(event := connection.next_event(), h11.Data):
        content += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert (content, list(event.headers)) == (b"".join(chunks), trailers)


@pytest.mark.parametrize(
    "wire",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"+5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b" 5\r\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"5_0\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"g\r\n",
        b"ffffffffffffffff\r\n",
        b"5;a\x00b\r\nhello\r\n0\r\n\r\n",
        b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        b"0\r\nA: b\n\r\n\r\n",
        b"0\r\nA: b\r\n c\r\n\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\n\x01: b\r\n\r\n",
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_broken_chunks_are_refused(wire: bytes, one_by_one: bool) -> None:
    decoder = ChunkedDecoder(LIMITS)
    with pytest.raises(RemoteError):
        decode(decoder, [wire[i : i + 1] for i in range(len(wire))] if one_by_one else [wire])
    assert not decoder.done


def test_chunk_extensions_are_ignored_and_bounded() -> None:
    decoder = ChunkedDecoder(LIMITS)
    assert decoder.feed(b'5;name="a;b" ;c\r\nhello\r\n0;last\r\n\r\n') == b"hello"
    assert decoder.done
    for pieces in ([b"5;" + b"x" * 2000 + b"\r\n"], [b"5;"] + [b"x" * 100] * 20):
        with pytest.raises(LimitError):
            decode(ChunkedDecoder(LIMITS), pieces)


def test_trailer_sections_are_bounded() -> None:
    limits = Limits(max_head_bytes=1000, max_headers=10)
    with pytest.raises(LimitError):
        decode(ChunkedDecoder(limits), [b"0\r\n", b"A: " + b"x" * 1100])
    with pytest.raises(LimitError):
        decode(ChunkedDecoder(limits), [b"0\r\n" + b"A: b\r\n" * 11 + b"\r\n"])


def test_many_small_chunks_are_handed_over_together() -> None:
    decoder = ChunkedDecoder(LIMITS)
    assert decoder.feed(b"1\r\na\r\n" * 1000) == b"a" * 1000


def test_large_pieces_inside_a_chunk_are_not_copied() -> None:
    decoder = ChunkedDecoder(LIMITS)
    decoder.feed(b"100000\r\n")
    piece = bytes(65536)
    assert decoder.feed(piece) is piece


def test_length_body_cut_short_is_incomplete() -> None:
    decoder = LengthDecoder(5)
    decoder.feed(b"four")
    with pytest.raises(IncompleteError, match="1 bytes missing"):
        decoder.eof()


def test_body_until_close_is_complete_at_the_end_only() -> None:
    decoder = CloseDecoder()
    assert decoder.feed(b"abc") == b"abc"
    assert not decoder.done
    decoder.eof()
    assert decoder.done


def test_an_empty_piece_does_not_end_a_chunked_body() -> None:
    assert encode_chunk(b"") == b""


def test_trailers_cannot_break_out_of_their_lines() -> None:
    with pytest.raises(MisuseError):
        encode_last_chunk([(b"a", b"b\r\nc: d")])


def test_chunk_that_is_not_followed_by_crlf_is_refused_at_once() -> None:
    decoder = ChunkedDecoder(LIMITS)
    with pytest.raises(MalformedError):
        decoder.feed(b"2\r\nabX")
