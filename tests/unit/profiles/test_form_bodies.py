"""Forms that pass: what is read of them, what is put in a credential's place, and what is not let through."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from email import message_from_bytes
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_bootstrap.credentials import make_token, reveal
from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.profiles.declaration import FormBounds
from ngpu_bootstrap.profiles.form_bodies import (
    MultipartScan,
    boundary_of,
    form_digest,
    media_type,
    read_urlencoded,
)

TOKEN = reveal(make_token("367614711220405248", bytes(range(24))))


def form(parts: list[tuple[str, tuple[str | None, bytes] | tuple[str | None, bytes, str]]]) -> tuple[bytes, bytes]:
    """Return the boundary and the body of a form as a client library writes it."""
    request = httpx.Request("POST", "http://x", files=parts)
    return media_type(request.headers["content-type"].encode())[1][b"boundary"], request.read()


def run(scan: MultipartScan, body: bytes, *cuts: int) -> bytes:
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    out = b"".join(scan.feed(body[start:end]) for start, end in itertools.pairwise(edges))
    scan.end()
    return out


def parts_of(boundary: bytes, body: bytes) -> list[tuple[str, str | None, bytes]]:
    """Return name, file name and content of each part, as the standard library reads them."""
    message = message_from_bytes(b"Content-Type: multipart/form-data; boundary=%b\r\n\r\n%b" % (boundary, body))
    found = []
    for part in message.get_payload():
        assert not isinstance(part, str)
        name = part.get_param("name", header="content-disposition")
        found.append((str(name), part.get_filename(), bytes(part.get_payload(decode=True) or b"")))
    return found


def test_a_form_passes_byte_for_byte_and_its_model_is_read() -> None:
    boundary, body = form([("image", ("a.png", b"\r\n--x\x00")), ("model", (None, b"SuperImage"))])
    scan = MultipartScan(boundary, wanted=("model", "project"))
    assert run(scan, body, 3, 77, 78) == body
    assert scan.values == {"model": "SuperImage"}


def test_a_credential_among_the_files_is_replaced_and_nothing_else_is() -> None:
    boundary, body = form(
        [
            ("init_img", ("1.png", b"\x89PNG\r\n\r\n--", "image/png")),
            ("token", ("token", TOKEN.encode())),
            ("init_img", ("2.png", b"", "image/png")),
        ]
    )
    scan = MultipartScan(boundary, credentials=("token",))
    out = run(scan, body, *range(0, len(body), 5))
    assert scan.credentials == {"token": TOKEN}
    assert TOKEN.encode() not in out
    expected = [
        (name, file, b"367614711220405248" if name == "token" else content)
        for name, file, content in parts_of(boundary, body)
    ]
    assert parts_of(boundary, out) == expected
    assert len(expected) == 3


@pytest.mark.parametrize(
    "header",
    [
        b'content-disposition: form-data; name="model"; name="other"',
        b"content-disposition: form-data; name=\"model\"; name*=utf-8''other",
        b'content-disposition: form-data; name*0="mod"; name*1="el"',
        b'content-disposition: form-data; name="model"\r\nContent-Disposition: form-data; name="other"',
        b"content-disposition: form-data",
        b"content-type: text/plain",
    ],
)
def test_a_part_whose_name_readers_would_not_agree_on_is_refused(header: bytes) -> None:
    scan = MultipartScan(b"B", wanted=("model",))
    with pytest.raises(BadRequest) as caught:
        scan.feed(b"--B\r\n%b\r\n\r\nx\r\n--B--\r\n" % header)
    assert caught.value.reason == "malformed_form"


def test_a_name_within_a_quoted_file_name_is_none() -> None:
    scan = MultipartScan(b"B", wanted=("model",))
    scan.feed(
        b'--B\r\ncontent-disposition: form-data; filename="a; name=\\"b; name=c"; name="model"\r\n\r\nx\r\n--B--\r\n'
    )
    assert scan.values == {"model": "x"}


def test_what_stands_in_a_credentials_place_and_is_none_does_not_pass_either() -> None:
    boundary, body = form([("token", (None, b"hunter2-secret")), ("a", (None, b"b"))])
    scan = MultipartScan(boundary, credentials=("token",))
    assert b"hunter2" not in run(scan, body)
    assert scan.credentials == {"token": "hunter2-secret"}


@pytest.mark.parametrize(
    ("names", "bounds", "reason"),
    [
        (["a", "b", "c"], FormBounds(parts=2), "too_many_fields"),
        (["a"], FormBounds(required=("image",)), "field_missing"),
        (["a", "b"], FormBounds(allowed=("a",)), "field_unknown"),
        (["a", "a"], FormBounds(once=("a",)), "field_twice"),
        (["model", "model"], FormBounds(), "model_twice"),
        (["token", "token"], FormBounds(), "field_twice"),
    ],
)
def test_a_form_with_too_many_or_too_few_fields_is_refused(names: list[str], bounds: FormBounds, reason: str) -> None:
    boundary, body = form([(name, (None, b"x")) for name in names])
    with pytest.raises(BadRequest) as caught:
        run(MultipartScan(boundary, wanted=("model",), credentials=("token",), bounds=bounds), body)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--b\r\n",
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx',
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b\r\n',
        b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--b--\r\n',
        b"--b\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(40)) + b"\r\nx\r\n--b--\r\n",
        b"--b\r\nX: " + b"y" * 9000,
    ],
)
def test_a_form_that_cannot_be_read_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        run(MultipartScan(b"b"), body)
    assert caught.value.reason == "malformed_form"


def test_a_type_without_a_boundary_is_refused() -> None:
    with pytest.raises(BadRequest, match="names no boundary"):
        MultipartScan(media_type(b"multipart/form-data")[1].get(b"boundary", b""))


def test_for_a_schema_a_form_is_an_object() -> None:
    boundary, body = form([("n", (None, b"2")), ("n", (None, b"3")), ("f", ("x.png", b"\x00" * 9, "image/png"))])
    scan = MultipartScan(boundary, keep_texts=True)
    run(scan, body)
    assert scan.document == {"n": ["2", "3"], "f": {"filename": "x.png", "type": "image/png"}}


def test_twenty_megabytes_pass_in_little_memory_and_time() -> None:
    boundary, body = form([("image", ("a.bin", bytes(range(256)) * 80_000)), ("model", (None, b"m"))])
    for secrets in ((), ("token",)):
        scan = MultipartScan(boundary, wanted=("model",), credentials=secrets)
        tracemalloc.start()
        try:
            for at in range(0, len(body), 65_536):
                scan.feed(body[at : at + 65_536])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert scan.values == {"model": "m"}
        assert peak < 1_000_000
    scan = MultipartScan(boundary, wanted=("model",))
    began = time.perf_counter()
    for at in range(0, len(body), 65_536):
        scan.feed(body[at : at + 65_536])
    assert time.perf_counter() - began < 5.0


def test_urlencoded_forms_are_read_and_their_credential_replaced() -> None:
    values, found, body = read_urlencoded(f"a=1+2&token={TOKEN}&b=%26".encode(), ("token",))
    assert (values["a"], values["b"]) == ("1 2", "&")
    assert found == {"token": TOKEN}
    assert body == b"a=1+2&token=367614711220405248&b=%26"
    assert read_urlencoded(b"model=m&x", ())[2] == b"model=m&x"
    with pytest.raises(BadRequest) as caught:
        read_urlencoded(b"model=m&model=n", ())
    assert caught.value.reason == "model_twice"


names = st.sampled_from(["a", "model", "token", "image", "ü"])
part = st.tuples(names, st.binary(max_size=40), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(part, min_size=1, max_size=5), st.lists(st.integers(0, 2000), max_size=6))
def test_however_a_form_is_cut_it_is_read_and_written_alike(
    given_parts: list[tuple[str, bytes, bool]], cuts: list[int]
) -> None:
    seen: set[str] = set()
    parts = [p for p in given_parts if not (p[0] in seen or seen.add(p[0]))]
    boundary, body = form([(name, ("f.bin" if file else None, content)) for name, content, file in parts])
    plain = MultipartScan(boundary, wanted=("model",))
    assert run(plain, body, *cuts) == body
    rewriting = MultipartScan(boundary, wanted=("model",), credentials=("token",))
    out = run(rewriting, body, *cuts)
    assert run(MultipartScan(boundary, wanted=("model",), credentials=("token",)), body) == out
    again = MultipartScan(boundary, wanted=("model",))
    run(again, out)
    assert again.values == plain.values
    assert again.counts == plain.counts


def test_a_form_sent_again_is_known_by_its_parts_whatever_its_boundary() -> None:
    parts: list[Any] = [("image", ("a.png", b"\r\n--x\x00" * 50, "image/png")), ("model", (None, b"SuperImage"))]
    boundary, body = form(parts)
    other = b"0123456789-other"
    again = body.replace(boundary, other)
    assert again != body
    assert boundary_of(again) == other
    digest = form_digest(body, boundary)
    assert digest is not None
    assert form_digest(again, other) == digest
    its, turned = form(parts[::-1])
    for changed in (
        body.replace(b"SuperImage", b"SuperimagE"),
        body.replace(b"a.png", b"b.png"),
        body.replace(b"image/png", b"image/gif"),
        body.replace(b'"model"', b'"medel"'),
        turned.replace(its, boundary),
    ):
        assert form_digest(changed, boundary) not in (digest, None)
    assert form_digest(body[:-20], boundary) is None, "half of one"
    assert form_digest(body, b"") is None
    assert boundary_of(b"{}") == b""
