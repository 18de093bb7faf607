"""Targets: what is forwarded as it came, and every way to climb or confuse that is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.errors import BadRequest, Refusal
from ngpu_bootstrap.front.paths import (
    check_path,
    parameter_target,
    parse_parameters,
    proxied_target,
    split_target,
)

PORTS = (8080, 9000)


@pytest.mark.parametrize(
    ("path", "query", "port", "target"),
    [
        ("/proxy/8080/v1/chat", None, 8080, "/v1/chat"),
        ("/proxy/9000/", "x=1", 9000, "/?x=1"),
        ("/proxy/9000", None, 9000, "/"),
        ("/proxy/8080/a%20b//c/./d..e/...", "q=../x", 8080, "/a%20b//c/./d..e/...?q=../x"),
        ("/proxy/8080/org%2Fmodel", "", 8080, "/org%2Fmodel?"),
        ("/proxy/8080/100%", None, 8080, "/100%"),
    ],
)
def test_a_path_passes_as_it_came(path: str, query: str | None, port: int, target: str) -> None:
    found = proxied_target(path, query, PORTS)
    assert (found.port, found.target) == (port, target)


@pytest.mark.parametrize(
    "path",
    [
        "/..",
        "/a/../b",
        "/a/..",
        "/%2e%2e/etc",
        "/%2E./x",
        "/.%2e",
        "/a/..%2f..%2fetc/passwd",
        "/a%2f..%2fb",
        "/..\\x",
        "/a\\..\\b",
        "/a%5c..%5cb",
        "/%252e%252e/x",
        "/%25252e%25252e/x",
        "/..;/x",
        "/..;a=b/x",
        "/..%3b/x",
    ],
)
def test_a_climbing_path_is_refused(path: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_path(path)
    assert refused.value.reason == "path_climbs"


@pytest.mark.parametrize("path", ["/a%00", "/a%0d%0ab", "/%7f", "/%250a"])
def test_an_encoded_control_character_is_refused(path: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_path(path)
    assert refused.value.reason == "bad_path"


@given(st.text(alphabet="./\\%25efc;a", max_size=24))
def test_nothing_that_passes_climbs_when_a_workspace_decodes_it(path: str) -> None:
    from urllib.parse import unquote

    try:
        check_path("/" + path)
    except BadRequest:
        return
    for reading in (path, unquote(path), unquote(unquote(path))):
        assert ".." not in reading.replace("\\", "/").split("/")


@pytest.mark.parametrize("port", ["0", "65536", "99999999", "-1", "80a", "8_0", "٣"])
def test_what_is_no_port_is_a_bad_request(port: str) -> None:
    with pytest.raises(BadRequest):
        proxied_target(f"/proxy/{port}/x", None, PORTS)


def test_an_undeclared_port_is_not_found_and_the_answer_names_the_declared_ones() -> None:
    with pytest.raises(Refusal) as refused:
        proxied_target("/proxy/22/x", None, PORTS)
    assert (refused.value.status, refused.value.reason) == (404, "port_undeclared")
    assert "8080, 9000" in refused.value.message


def test_a_target_too_long_to_sign_is_refused() -> None:
    with pytest.raises(Refusal) as refused:
        proxied_target("/proxy/8080/" + "a" * 9000, None, PORTS)
    assert refused.value.status == 414


@pytest.mark.parametrize(
    ("url", "port", "expected"),
    [
        ("startSync", "8080", (8080, "/startSync")),
        ("sdapi/v1/img2img", "", (8080, "/sdapi/v1/img2img")),
        ("/sdapi/v1/img2img?x=1&y=", "9000", (9000, "/sdapi/v1/img2img?x=1&y=")),
        ("", "", (8080, "/")),
    ],
)
def test_param_url_names_a_path_of_the_workspace(url: str, port: str, expected: tuple[int, str]) -> None:
    found = parameter_target(url, port, PORTS)
    assert (found.port, found.target) == expected


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/x", "HTTPS://a/b", "//host/x", "\\\\host\\x", "/\\host", "file:///etc/passwd", "a:b"],
)
def test_an_absolute_param_url_is_refused(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parameter_target(url, "8080", PORTS)
    assert refused.value.reason == "absolute_url"


@pytest.mark.parametrize("url", ["a b", "a\r\nb", "a\0", "a#b", "ü"])
def test_param_url_must_be_a_url_path(url: str) -> None:
    with pytest.raises(BadRequest):
        parameter_target(url, "8080", PORTS)


def test_param_url_may_not_climb() -> None:
    with pytest.raises(BadRequest) as refused:
        parameter_target("a/%2e%2e/b", "8080", PORTS)
    assert refused.value.reason == "path_climbs"


def test_targets_are_split_in_both_forms() -> None:
    assert split_target("/a?b=c?d") == ("/a", "b=c?d")
    assert split_target("/a") == ("/a", None)
    assert split_target("http://host:80/a?b") == ("/a", "b")
    assert split_target("http://host") == ("/", None)


@pytest.mark.parametrize("target", ["*", "host:443", "/a b", "/a#b", "ftp://x/y", "/\x7f"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(BadRequest):
        split_target(target)


def test_parameters_are_decoded_once_and_may_not_repeat() -> None:
    assert parse_parameters("taskID=a%2Fb+c&other=1&other=2", ("taskID",)) == {"taskID": "a/b c"}
    assert parse_parameters(None, ("taskID",)) == {}
    with pytest.raises(BadRequest) as refused:
        parse_parameters("paramUrl=a&paramUrl=a", ("paramUrl",))
    assert refused.value.reason == "duplicate_parameter"
    with pytest.raises(BadRequest):
        parse_parameters("paramUrl=a&param%55rl=a", ("paramUrl",))
