"""Finding `model` in a body that is never parsed whole: any object, cut anywhere, read as a parser reads it."""

from __future__ import annotations

import base64
import itertools
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.profiles.model_of_body import Member, ObjectScan, text_of

WANTED = ("model", "project", "token")


def scan(body: bytes, *cuts: int) -> dict[str, Member]:
    found = ObjectScan(WANTED)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(edges):
        found.feed(body[start:end])
    found.end()
    return found.found


def test_the_members_are_found_wherever_they_stand() -> None:
    body = b'{"messages":[{"role":"user","content":"\\"model\\":\\"no\\" }]"}], "model" : "Llama3-8B" ,"project":"P"}'
    found = scan(body)
    assert text_of(found["model"], "model") == "Llama3-8B"
    assert text_of(found["project"], "project") == "P"
    model = found["model"]
    assert body[model.start : model.end] == b'"Llama3-8B"'


def test_a_model_inside_another_value_is_none() -> None:
    assert scan(b'{"a":{"model":"x"},"b":[{"model":"y"}],"c":"\\"model\\":1"}') == {}


def test_escaped_names_are_the_same_names() -> None:
    assert text_of(scan(b'{"mod\\u0065l":"\\u0061\\n\\"b\\\\"}')["model"], "model") == 'a\n"b\\'


def test_a_model_after_ten_megabytes_is_found_in_little_memory_and_time() -> None:
    image = base64.b64encode(bytes(range(256)) * 30_000)
    body = b'{"image":"data:image/png;base64,%b","prompt":"p","model":"SuperImage"}' % image
    assert len(body) > 10_000_000
    pieces = [body[at : at + 65_536] for at in range(0, len(body), 65_536)]
    found = ObjectScan(WANTED)
    tracemalloc.start()
    try:
        began = time.perf_counter()
        for piece in pieces:
            found.feed(piece)
        took_s = time.perf_counter() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    found.end()
    assert found.found["model"].value == "SuperImage"
    assert peak < 1_000_000
    assert took_s < 5.0


def test_a_million_small_values_are_skipped_without_a_step_for_each() -> None:
    body = b'{"input":[%b],"model":"m"}' % b",".join([b'"ab"'] * 1_000_000)
    began = time.perf_counter()
    assert scan(body, *range(0, len(body), 65_536))["model"].value == "m"
    assert time.perf_counter() - began < 5.0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"model":"a","x":1,"model":"b"}', "model_twice"),
        (b'{"model":"a","mod\\u0065l":"a"}', "model_twice"),
        (b'{"project":"a","model":"a","project":{}}', "project_twice"),
        (b'{"token":"a","token":"a"}', "member_twice"),
        (b"[1]", "malformed_json"),
        (b'"model"', "malformed_json"),
        (b"", "malformed_json"),
        (b"   ", "malformed_json"),
        (b'{"model":"a"', "malformed_json"),
        (b'{"model":"a"} {}', "malformed_json"),
        (b'{"model" "a"}', "malformed_json"),
        (b'{"model":}', "malformed_json"),
        (b"{model:1}", "malformed_json"),
        (b'{"a":1 "model":"b"}', "malformed_json"),
        (b'{"mod\\x":1}', "malformed_json"),
        (b'{"a":"\\', "malformed_json"),
        (b"\xef\xbb", "malformed_json"),
    ],
)
def test_what_is_no_object_or_says_it_twice_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(BadRequest) as caught:
        scan(body)
    assert caught.value.reason == reason
    with pytest.raises(BadRequest) as caught:
        scan(body, *range(len(body)))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "body", [b'{"model":7}', b'{"model":["a"]}', b'{"model":{}}', b'{"model":""}', b'{"model":"%b"}' % (b"a" * 5000)]
)
def test_a_model_that_is_no_name_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(BadRequest, match="model must be a text"):
        text_of(scan(body)["model"], "model")


def test_null_is_as_if_it_were_not_there() -> None:
    assert text_of(scan(b'{"model":null}')["model"], "model") is None
    assert text_of(None, "model") is None


def test_a_byte_order_mark_and_a_trailing_comma_are_for_the_server_to_judge() -> None:
    assert scan(b'\xef\xbb\xbf {"model":"m",}', 1, 2, 3)["model"].value == "m"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["model", "project", "x", 'a"b', "\\", "ü"]) | st.text(max_size=5), json_values),
    st.lists(st.integers(0, 400), max_size=6),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_it_reads_what_a_parser_reads_however_it_is_cut(
    document: dict[str, Any], cuts: list[int], ascii_only: bool, indent: int | None
) -> None:
    body = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    found = scan(body, *cuts)
    assert set(found) == set(document) & set(WANTED)
    for name, member in found.items():
        if member.raw is None:
            assert isinstance(document[name], dict | list)
        else:
            assert body[member.start : member.end] == member.raw
            assert json.loads(member.raw.decode("utf-8", "surrogatepass")) == document[name]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60).map(lambda tail: b'{"model":"' + tail), st.lists(st.integers(0, 60), max_size=4))
def test_whatever_comes_it_is_read_alike_in_one_piece_and_in_several(body: bytes, cuts: list[int]) -> None:
    def outcome(*at: int) -> Any:
        try:
            return scan(body, *at)
        except BadRequest as error:
            return error.reason

    assert outcome() == outcome(*cuts)
