"""What a registry says an image is made of: manifests, lists of them by platform, and configurations. Pure.

Docker's schema 2 and OCI's image specification 1.1 say the same in different media types; both are read alike. All of
it comes from a stranger's registry: sizes are capped before parsing, and whatever does not fit is `BadImage`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ngpu_node.images.problems import BadImage, CorruptLayer, WrongPlatform

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 512
MAX_SIZE = 2**50

_MANIFESTS = ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json")
_LISTS = ("application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.oci.image.index.v1+json")
ACCEPT = ", ".join(_MANIFESTS + _LISTS)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Platform:
    """What an engine runs, in the words of image lists."""

    os: str = "linux"
    architecture: str = "amd64"

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as the registry holds it: compressed."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its configuration's digest and size, and its layers from the bottom up."""

    config: str
    config_size: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """An image at its registry.

    Attributes:
        digest: SHA-256 of what the reference names there, a list where there is one: what pins it on every platform.
        manifest: of this platform.
        diff_ids: digests of the unpacked layers, as the engine keeps them; empty when not known.
    """

    digest: bytes
    manifest: Manifest
    diff_ids: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all layers, compressed."""
        return sum(layer.size for layer in self.manifest.layers)

    def missing(self, chains: Iterable[Sequence[str]]) -> tuple[Layer, ...]:
        """Return the layers that an engine with images of these layers still has to fetch.

        Args:
            chains: the `RootFS.Layers` of each image it has. An engine shares layers only from the bottom up.
        """
        if len(self.diff_ids) != len(self.manifest.layers):
            return self.manifest.layers
        shared = max((_common(self.diff_ids, chain) for chain in chains), default=0)
        return self.manifest.layers[shared:]


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    length = 0
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            break
        length += 1
    return length


def check_digest(data: bytes, digest: str, what: str) -> None:
    """See that *data* is what *digest* names.

    Raises:
        CorruptLayer: it is not.
    """
    found = "sha256:" + hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptLayer(f"{what} does not match its digest: {digest} was asked for, {found} came")


def choose(data: bytes, platform: Platform, what: str) -> Manifest | str:
    """Return the manifest in *data*, or the digest of the one for *platform* when it is a list.

    Raises:
        BadImage: it is neither.
        WrongPlatform: the list has none for *platform*.
    """
    document = _document(data, f"the manifest of {what}")
    kind = document.get("mediaType")
    if document.get("schemaVersion") != 2:
        raise BadImage(f"{what} has a manifest of an old form (schema 1): push it again with a current engine")
    if kind in _LISTS or (kind is None and "manifests" in document):
        return _of_platform(document, platform, what)
    if (kind is not None and kind not in _MANIFESTS) or "layers" not in document:
        raise BadImage(f"{what} is something other than a container image ({str(kind)[:100]})")
    layers = document["layers"]
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise BadImage(f"{what} has a list of layers no engine could use")
    config, config_size = _descriptor(document.get("config"), what)
    return Manifest(config, config_size, tuple(Layer(*_descriptor(layer, what)) for layer in layers))


def diff_ids(data: bytes, what: str) -> tuple[str, ...]:
    """Return the digests of the unpacked layers in a configuration."""
    document = _document(data, f"the configuration of {what}")
    rootfs = document.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) > MAX_LAYERS or not all(isinstance(item, str) for item in found):
        return ()
    return tuple(found)


def check_platform(data: bytes, platform: Platform, what: str) -> None:
    """See that an image that is in no list is made for *platform*.

    Raises:
        WrongPlatform: its configuration says it is not.
    """
    document = _document(data, f"the configuration of {what}")
    made_for = Platform(str(document.get("os") or platform.os), str(document.get("architecture") or "")[:64])
    if made_for.architecture and made_for != platform:
        raise WrongPlatform(f"{what} is made for {made_for}, and this node runs {platform}")


def _of_platform(document: Mapping[str, Any], platform: Platform, what: str) -> str:
    entries = document.get("manifests")
    if not isinstance(entries, list) or len(entries) > MAX_LAYERS:
        raise BadImage(f"{what} has a list of platforms no engine could use")
    offered = []
    for entry in entries:
        made_for = entry.get("platform") if isinstance(entry, dict) else None
        if not isinstance(made_for, dict):
            continue
        one = Platform(str(made_for.get("os"))[:32], str(made_for.get("architecture"))[:32])
        if one == platform:
            return _descriptor(entry, what)[0]
        if "unknown" not in (one.os, one.architecture):  # attestations, which are no images
            offered.append(str(one))
    kinds = ", ".join(sorted(set(offered))[:8]) or "none"
    raise WrongPlatform(f"{what} is not made for {platform}; it is made for: {kinds}")


def _descriptor(value: object, what: str) -> tuple[str, int]:
    if isinstance(value, dict):
        digest, size = value.get("digest"), value.get("size")
        if isinstance(digest, str) and _DIGEST.fullmatch(digest) and type(size) is int and 0 <= size <= MAX_SIZE:
            return digest, size
    raise BadImage(f"the manifest of {what} has an entry without a SHA-256 digest and a size")


def _document(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BadImage(f"{what} is not JSON") from None
    if not isinstance(document, dict):
        raise BadImage(f"{what} is not a JSON object")
    return document
