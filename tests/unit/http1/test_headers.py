"""What a proxy forwards: everything but what belongs to one hop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.http1 import comma_list, end_to_end, header, trailers_end_to_end, wants_upgrade
from ngpu_protocol.http1.headers import HOP_BY_HOP


def test_hop_by_hop_fields_and_those_connection_names_are_left_out() -> None:
    fields = [
        (b"host", b"h"),
        (b"connection", b"X-Mine, keep-alive"),
        (b"keep-alive", b"timeout=5"),
        (b"Proxy-Authorization", b"secret"),
        (b"te", b"trailers"),
        (b"transfer-encoding", b"chunked"),
        (b"Upgrade", b"websocket"),
        (b"x-mine", b"1"),
        (b"set-cookie", b"a"),
        (b"content-length", b"5"),
        (b"set-cookie", b"b"),
        (b"connection", b"also"),
        (b"also", b"1"),
        (b"trailer", b"x-sum"),
    ]
    assert end_to_end(fields) == [
        (b"host", b"h"),
        (b"set-cookie", b"a"),
        (b"content-length", b"5"),
        (b"set-cookie", b"b"),
        (b"trailer", b"x-sum"),
    ]


def test_connection_cannot_name_what_frames_or_routes() -> None:
    fields = [(b"connection", b"content-length, host, authorization"), (b"host", b"h"), (b"content-length", b"5")]
    assert end_to_end(fields) == fields[1:]


def test_further_names_are_dropped_on_demand() -> None:
    assert end_to_end([(b"Expect", b"100-continue"), (b"host", b"h"), (b"x", b"y")], drop=(b"expect", b"host")) == [
        (b"x", b"y")
    ]


def test_trailers_cannot_reframe_or_authenticate() -> None:
    fields = [(b"x-sum", b"1"), (b"Content-Length", b"5"), (b"authorization", b"x"), (b"transfer-encoding", b"chunked")]
    assert trailers_end_to_end(fields) == [(b"x-sum", b"1")]


def test_lookups_ignore_case() -> None:
    fields = [(b"X", b"1"), (b"x", b"2"), (b"Connection", b"a,, B ,"), (b"connection", b"\tc")]
    assert header(fields, b"x") == b"1"
    assert header(fields, b"y") is None
    assert comma_list(fields, b"connection") == [b"a", b"b", b"c"]


def test_upgrade_is_wanted_when_both_fields_say_so() -> None:
    assert wants_upgrade([(b"connection", b"keep-alive, Upgrade"), (b"upgrade", b"websocket")])
    assert not wants_upgrade([(b"upgrade", b"websocket")])
    assert not wants_upgrade([(b"connection", b"upgrade")])


_name = st.sampled_from([*sorted(HOP_BY_HOP), b"x", b"y", b"host", b"content-length"]).flatmap(
    lambda name: st.sampled_from([name, name.title(), name.upper()])
)


@given(st.lists(st.tuples(_name, st.sampled_from([b"x", b"X, y", b"close", b"host", b""])), max_size=8))
def test_nothing_of_the_hop_remains_and_order_is_kept(fields: list[tuple[bytes, bytes]]) -> None:
    kept = end_to_end(fields)
    named = set(comma_list(fields, b"connection")) - {b"host", b"content-length"}
    assert not {name.lower() for name, _ in kept} & (HOP_BY_HOP | named)
    assert kept == [pair for pair in fields if pair[0].lower() not in HOP_BY_HOP | named]
