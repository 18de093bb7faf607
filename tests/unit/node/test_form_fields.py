"""Fields of a form found among its files."""

from __future__ import annotations

import contextlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.form_fields import FormBroken, form_fields


def form(**parts: bytes | str) -> tuple[str, bytes]:
    """Return content type and body as httpx writes them."""
    files = {name: ("x.bin", value) for name, value in parts.items() if isinstance(value, bytes)}
    data = {name: value for name, value in parts.items() if isinstance(value, str)}
    request = httpx.Request("POST", "http://x", files=files, data=data)
    return request.headers["content-type"], request.read()


def test_fields_are_found_among_files() -> None:
    content_type, body = form(image=bytes(range(256)) * 1000, node_id="16Uiu2HAm", prompt="a beret")
    assert form_fields(content_type, body, ("node_id", "model")) == {"node_id": "16Uiu2HAm"}
    assert form_fields(content_type, body, ("prompt", "node_id")) == {"prompt": "a beret", "node_id": "16Uiu2HAm"}


def test_of_a_repeated_field_the_first_counts() -> None:
    content_type = "multipart/form-data; boundary=x"
    part = b'--x\r\nContent-Disposition: form-data; name="node_id"\r\n\r\n%b\r\n'
    assert form_fields(content_type, part % b"a" + part % b"b" + b"--x--\r\n", ("node_id",)) == {"node_id": "a"}


@pytest.mark.parametrize(
    ("content_type", "body", "says"),
    [
        ("multipart/form-data", b"", "boundary"),
        ("multipart/form-data; boundary=x", b"", "cut off"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb', "cut off"),
        ("multipart/form-data; boundary=x", b"nonsense", "boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n" * 300 + b"--x--\r\n", "parts"),
    ],
)
def test_what_is_no_form_is_refused(content_type: str, body: bytes, says: str) -> None:
    with pytest.raises(FormBroken, match=says):
        form_fields(content_type, body, ("node_id",))


def test_a_field_is_bounded() -> None:
    with pytest.raises(FormBroken, match="node_id is over"):
        form_fields(*form(image=b"", node_id="a" * 5000), ("node_id",))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_form_or_refused(body: bytes) -> None:
    with contextlib.suppress(FormBroken):
        form_fields("multipart/form-data; boundary=x", b"--x\r\n" + body, ("a",))
