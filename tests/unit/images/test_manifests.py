"""What registries say of images: read for this platform, refused when it makes no sense, never worse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.images.manifests import (
    MAX_LAYERS,
    Layer,
    Manifest,
    Platform,
    RemoteImage,
    check_digest,
    check_platform,
    choose,
    diff_ids,
)
from ngpu_node.images.problems import BadImage, CorruptLayer, ImageProblem, WrongPlatform
from tests.support.fake_registry import digest_of, list_of, make_image

HERE = Platform()
IMAGE = make_image([100, 200], "manifests")


def test_a_manifest_gives_configuration_and_layers_from_the_bottom_up() -> None:
    manifest = choose(IMAGE.manifest, HERE, "app")
    assert isinstance(manifest, Manifest)
    assert manifest.config == IMAGE.config
    assert [layer.digest for layer in manifest.layers] == list(IMAGE.layers)
    assert [layer.size for layer in manifest.layers] == [len(IMAGE.blobs[layer]) for layer in IMAGE.layers]
    assert len(diff_ids(IMAGE.blobs[IMAGE.config], "app")) == 2


def test_an_oci_manifest_reads_alike() -> None:
    document = json.loads(IMAGE.manifest)
    document["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    first = choose(json.dumps(document).encode(), HERE, "app")
    del document["mediaType"]
    assert first == choose(json.dumps(document).encode(), HERE, "app") == choose(IMAGE.manifest, HERE, "app")


def test_of_a_list_the_one_for_this_platform_is_chosen() -> None:
    other = make_image([1], "other")
    listing = list_of(("arm64", other), ("amd64", IMAGE), ("unknown", other))
    assert choose(listing, HERE, "app") == IMAGE.digest
    with pytest.raises(WrongPlatform, match="amd64") as raised:
        choose(listing, Platform("linux", "riscv64"), "app")
    assert "linux/arm64" in str(raised.value)
    assert "unknown" not in str(raised.value)


def test_an_image_for_another_machine_is_told_by_its_configuration() -> None:
    check_platform(IMAGE.blobs[IMAGE.config], HERE, "app")
    check_platform(b"{}", HERE, "app")
    with pytest.raises(WrongPlatform, match="arm64"):
        check_platform(b'{"os": "linux", "architecture": "arm64"}', HERE, "app")


def test_only_what_lies_above_shared_layers_is_missing() -> None:
    layers = tuple(Layer(f"sha256:{digit * 64}", 10) for digit in "abc")
    remote = RemoteImage(bytes(32), Manifest("sha256:" + "0" * 64, 1, layers), ("x", "y", "z"))
    assert remote.missing([]) == layers
    assert remote.missing([["x"], ["x", "q"], ["y"]]) == layers[1:]
    assert remote.missing([["x", "y", "z", "more"]]) == ()
    assert remote.missing([["q", "y", "z"]]) == layers
    unknown = RemoteImage(bytes(32), remote.manifest, ())
    assert unknown.missing([["x", "y", "z"]]) == layers
    assert remote.size == 30


def test_bytes_are_held_to_their_digest() -> None:
    check_digest(b"abc", digest_of(b"abc"), "it")
    with pytest.raises(CorruptLayer, match=digest_of(b"abd")):
        check_digest(b"abd", digest_of(b"abc"), "it")


def broken(**changes: Any) -> bytes:
    return json.dumps({**json.loads(IMAGE.manifest), **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"<html>",
        b"[" * 100_000,
        broken(schemaVersion=1),
        broken(mediaType="application/vnd.cncf.helm.config.v1+json"),
        broken(layers=None),
        broken(layers=[{}]),
        broken(layers=[{"digest": "sha256:" + "a" * 64, "size": -1}]),
        broken(layers=[{"digest": "sha256:" + "a" * 64, "size": 2**60}]),
        broken(layers=[{"digest": "sha256:" + "a" * 64, "size": True}]),
        broken(layers=[{"digest": "md5:" + "a" * 32, "size": 1}]),
        broken(layers=[{"digest": "sha256:" + "a" * 64, "size": 1}] * (MAX_LAYERS + 1)),
        broken(config=None),
        json.dumps({"schemaVersion": 2, "manifests": {}}).encode(),
        json.dumps(
            {"schemaVersion": 2, "manifests": [{"platform": {"os": "linux", "architecture": "amd64"}}]}
        ).encode(),
    ],
)
def test_what_no_engine_could_use_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(BadImage):
        choose(data, HERE, "app")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["schemaVersion", "manifests", "layers", "config", "platform", "digest", "size", "rootfs", "os"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_no_document_does_worse_than_a_problem(value: Any) -> None:
    for document in (value, {**value, "schemaVersion": 2} if isinstance(value, dict) else value):
        data = json.dumps(document).encode()
        for read in (choose, lambda d, p, w: diff_ids(d, w), check_platform):
            try:
                read(data, HERE, "app")  # type: ignore[operator]
            except ImageProblem:
                continue
