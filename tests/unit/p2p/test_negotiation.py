from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.p2p.negotiation import NegotiationError, decode_line, encode_line

names = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=200)


def test_a_line_as_the_specification_writes_it() -> None:
    assert encode_line("/multistream/1.0.0") == b"\x13/multistream/1.0.0\n"


@given(names, st.binary(max_size=50))
def test_lines_come_back_with_the_rest_untouched(name: str, rest: bytes) -> None:
    assert decode_line(encode_line(name) + rest) == (name, rest)


@given(names)
def test_an_incomplete_line_is_waited_for(name: str) -> None:
    line = encode_line(name)
    assert all(decode_line(line[:cut]) is None for cut in range(len(line)))


@given(st.binary(max_size=2000))
def test_any_bytes_are_a_line_or_refused(data: bytes) -> None:
    try:
        found = decode_line(data)
    except NegotiationError:
        return
    if found is not None:
        text, rest = found
        assert data.endswith(rest)
        assert len(text.encode()) < len(data)


@pytest.mark.parametrize(
    "bad",
    [b"\x00", b"\x03abc", b"\x03\xff\xfe\n", b"\xff\xff\x01", b"\x81\x10" + b"x" * 2048 + b"\n"],
    ids=["empty", "no newline", "not UTF-8", "three-byte length", "too long"],
)
def test_what_is_no_line_is_refused(bad: bytes) -> None:
    with pytest.raises(NegotiationError):
        decode_line(bad)
