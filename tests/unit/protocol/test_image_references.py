"""References to images: read as registries and engines read them, whatever stands in them."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.image_references import (
    MAX_NAME,
    MAX_REFERENCE,
    ImageReference,
    ImageReferenceError,
    parse_image_reference,
)
from ngpu_protocol.workspaces import WorkspaceSpec

DIGEST = "sha256:" + "0123456789abcdef" * 4

# The grammar as it is published, one rule after the other, to hold the parser against.
DOMAIN_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
HOST = rf"(?:{DOMAIN_COMPONENT}(?:\.{DOMAIN_COMPONENT})*|\[[a-fA-F0-9:]+\])"
PATH_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*"
PUBLISHED = re.compile(
    rf"(?:{HOST}(?::[0-9]+)?/)?{PATH_COMPONENT}(?:/{PATH_COMPONENT})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
    r"(?:@sha256:[a-f0-9]{64})?"
)

components = st.from_regex(PATH_COMPONENT, fullmatch=True).filter(lambda c: len(c) < 40)
paths = st.lists(components, min_size=1, max_size=4).map("/".join)
domains = st.one_of(
    st.just("localhost"),
    st.from_regex(rf"{DOMAIN_COMPONENT}(?:\.{DOMAIN_COMPONENT})+", fullmatch=True).filter(lambda d: len(d) < 60),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
ports = st.one_of(st.just(""), st.integers(0, 65535).map(lambda port: f":{port}"))
tags = st.one_of(st.none(), st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True))
digests = st.one_of(st.none(), st.binary(min_size=32, max_size=32).map(lambda raw: "sha256:" + raw.hex()))


@pytest.mark.parametrize(
    ("text", "name", "target", "familiar"),
    [
        ("chat", "docker.io/library/chat", "latest", "chat"),
        ("chat:1", "docker.io/library/chat", "1", "chat"),
        ("team/chat", "docker.io/team/chat", "latest", "team/chat"),
        ("docker.io/chat", "docker.io/library/chat", "latest", "chat"),
        ("index.docker.io/team/chat", "docker.io/team/chat", "latest", "team/chat"),
        ("docker.io/library/team/chat", "docker.io/library/team/chat", "latest", "library/team/chat"),
        ("localhost/chat", "localhost/chat", "latest", "localhost/chat"),
        ("host:5000/a/b", "host:5000/a/b", "latest", "host:5000/a/b"),
        (f"host:5000/a/b:tag@{DIGEST}", "host:5000/a/b", DIGEST, "host:5000/a/b"),
        (f"chat@{DIGEST}", "docker.io/library/chat", DIGEST, "chat"),
        ("[2001:db8::1]:5000/a:b", "[2001:db8::1]:5000/a", "b", "[2001:db8::1]:5000/a"),
        ("[::1]/a", "[::1]/a", "latest", "[::1]/a"),
        ("Registry/a", "Registry/a", "latest", "Registry/a"),
        ("a__b/c-d.e_f---g:V.1-2_3", "docker.io/a__b/c-d.e_f---g", "V.1-2_3", "a__b/c-d.e_f---g"),
        ("xn--n3h.example/a", "xn--n3h.example/a", "latest", "xn--n3h.example/a"),
        ("host.:80x/a", None, None, None),
    ],
)
def test_what_a_reference_means(text: str, name: str | None, target: str, familiar: str) -> None:
    if name is None:
        with pytest.raises(ImageReferenceError):
            parse_image_reference(text)
        return
    reference = parse_image_reference(text)
    assert (reference.name, reference.target, reference.familiar_name) == (name, target, familiar)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needed"),
        ("Chat", "lower-case"),
        ("team/Chat", "lower-case"),
        ("a" * 64, "id on one engine"),
        ("a//b", "not the name of a repository"),
        ("/a", "not the name of a repository"),
        ("a/", "not the name of a repository"),
        ("-a", "not the name of a repository"),
        ("a___b", "not the name of a repository"),
        ("a..b", "not the name of a repository"),
        ("chat:", "tag"),
        ("chat:.1", "tag"),
        ("chat:" + "a" * 129, "tag"),
        ("chat:1:2", "tag"),
        ("chat@", "digest"),
        ("chat@sha256:" + "0" * 63, "digest"),
        ("chat@sha256:" + "A" * 64, "digest"),
        ("chat@sha512:" + "0" * 128, "digest"),
        (f"chat@{DIGEST}:1", "digest"),
        ("host:99999/a", "65535"),
        ("host:999999999999999999999999/a", "65535"),
        ("host:/a", "not a registry"),
        ("-host.example/a", "not a registry"),
        ("user@host.example/a", "digest"),
        ("[::1::]/a", "IPv6"),
        ("[fe80::1%eth0]/a", "not a registry"),
        ("http://host/a", "not a registry"),
        ("chat\n", "not the name of a repository"),
        ("chät", "not the name of a repository"),
        ("chat:é", "tag"),
        ("host.example/" + "a" * 250, "255"),
        ("a" * 5000, "too long"),
    ],
)
def test_what_is_no_reference_is_refused_with_the_part_that_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ImageReferenceError, match=re.escape(says)):
        parse_image_reference(text)


@given(domains, ports, paths, tags, digests)
def test_every_reference_of_the_grammar_is_read_into_its_parts(
    domain: str, port: str, path: str, tag: str | None, digest: str | None
) -> None:
    text = f"{domain}{port}/{path}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    if "." not in domain + port and ":" not in domain + port and domain not in ("localhost", domain.upper()):
        return
    reference = parse_image_reference(text)
    assert (reference.tag, reference.digest) == (tag, digest)
    if domain not in ("docker.io", "index.docker.io"):
        assert (reference.domain, reference.path) == (domain + port, path)


@given(st.text(alphabet="aZ0.:/@_-[]", max_size=40) | st.text(max_size=30))
def test_nothing_is_accepted_that_the_published_grammar_does_not(text: str) -> None:
    try:
        reference = parse_image_reference(text)
    except ImageReferenceError:
        return
    assert PUBLISHED.fullmatch(text)
    assert len(reference.name) <= MAX_NAME
    assert len(text) <= MAX_REFERENCE


odd_hosts = st.one_of(
    domains,
    st.from_regex(r"\[[a-fA-F0-9:]{1,12}\]", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True),
)


@given(odd_hosts, st.one_of(st.just(""), st.integers(0, 10**6).map(lambda port: f":{port}")), paths, tags, digests)
def test_what_is_refused_though_the_grammar_has_it_could_not_be_pulled(
    host: str, port: str, path: str, tag: str | None, digest: str | None
) -> None:
    text = f"{host}{port}/{path}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    assert PUBLISHED.fullmatch(text)
    try:
        refused = ""
        parse_image_reference(text)
    except ImageReferenceError as error:
        refused = str(error)
    # `[0]` has no colon: it is no domain by the rule that tells domains from paths, and no path either
    assert not refused or "65535" in refused or host.startswith("[")


@given(st.one_of(domains.map(lambda d: d + "/"), st.just("")), paths, tags, digests)
def test_writing_a_reference_and_reading_it_again_changes_nothing(
    domain: str, path: str, tag: str | None, digest: str | None
) -> None:
    text = domain + path + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    try:
        reference = parse_image_reference(text)
    except ImageReferenceError:
        return  # 64 digits, or too long
    again = parse_image_reference(str(reference))
    assert (again.name, again.target) == (reference.name, reference.target)
    familiar = parse_image_reference(reference.familiar_name)
    assert familiar.name == reference.name


def test_a_pinned_reference_names_the_manifest_and_no_tag() -> None:
    reference = parse_image_reference("host:5000/a:1").pinned(bytes(31) + b"\x01")
    assert str(reference) == "host:5000/a@sha256:" + "0" * 63 + "1"
    assert reference.digest_bytes == bytes(31) + b"\x01"
    assert ImageReference("docker.io", "library/a").digest_bytes is None


def test_reading_a_hostile_reference_takes_no_time() -> None:
    for text in ("a" + "-" * 380, "a_" * 190, "a." * 190 + "/", "[" + ":" * 380, "a/" * 190, "a" + "-a" * 180 + "!"):
        with pytest.raises(ImageReferenceError):
            parse_image_reference(text)


def test_a_workspace_takes_references_only() -> None:
    WorkspaceSpec(id="1", name="a", image="[2001:db8::1]:5000/a/b:1@" + DIGEST, ports=[80])
    for image in ("Chat", "a b", "http://host/a", ""):
        with pytest.raises(MalformedError, match="image: "):
            WorkspaceSpec.from_wire({"id": "1", "name": "a", "image": image, "ports": [80]})


def test_ipv6_hosts_are_addresses() -> None:
    assert ipaddress.ip_address(parse_image_reference("[::1]:5000/a").domain[1:4]) == ipaddress.ip_address("::1")
