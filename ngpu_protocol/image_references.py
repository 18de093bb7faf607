"""Names of container images, as registries and engines read them. Pure.

Owns the grammar of references, taken over from the distribution project (`reference`, version 3), and the defaults an
engine puts in::

    reference       = name [ ":" tag ] [ "@" digest ]
    name            = [ domain "/" ] path
    domain          = host [ ":" port ]                 host: domain name, IPv4 address, or [ IPv6 address ]
    path            = component { "/" component }
    component       = alnum { ( "." | "_" | "__" | one or more "-" ) alnum }       alnum: lower-case letters, digits
    tag             = word character { word character | "." | "-" }                at most 128
    digest          = "sha256:" 64 lower-case hexadecimal digits

The first part of a name is its domain only if it has a dot, a colon or a capital letter, or is `localhost`; any other
name is Docker Hub's, and there one without a slash is in `library/`. So `chat` is `docker.io/library/chat`, and a
colon is a port's or a tag's by where it stands. Splitting at the first colon, as is often done, breaks `host:5000/a`
and digests.

Narrower than the grammar where nobody could pull: ports above 65535, brackets without an IPv6 address, and digests
other than SHA-256, which receipts have no room for.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
MAX_NAME = 255
MAX_REFERENCE = MAX_NAME + 1 + 128 + 1 + 71

_LEGACY_DOMAIN = "index.docker.io"
_LIBRARY = "library/"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*|\[(?P<v6>[a-fA-F0-9:]+)\])(?::(?P<port>[0-9]+))?")
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")


class ImageReferenceError(ValueError):
    """Not a reference to an image; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A reference with its defaults put in, but for the tag.

    Attributes:
        domain: the registry, with its port if it names one.
        path: the repository there.
        tag: None where none was given.
        digest: `sha256:` and 64 digits, None where none was given. It decides; a tag beside it is a note.
    """

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """Domain and path."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """The name as the engine lists it: without what an engine puts in by itself."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        rest = self.path.removeprefix(_LIBRARY)
        return rest if "/" not in rest else self.path

    @property
    def target(self) -> str:
        """What the registry is asked for: the digest, else the tag, else `latest`."""
        return self.digest or self.tag or DEFAULT_TAG

    def pinned(self, digest: bytes) -> ImageReference:
        """Return the reference to exactly the manifest with this SHA-256, in the same repository."""
        return replace(self, tag=None, digest="sha256:" + digest.hex())

    @property
    def digest_bytes(self) -> bytes | None:
        """The 32 bytes of the digest."""
        return None if self.digest is None else bytes.fromhex(self.digest.removeprefix("sha256:"))

    def __str__(self) -> str:
        text = self.name
        if self.tag is not None or self.digest is None:
            text += ":" + (self.tag or DEFAULT_TAG)
        return text if self.digest is None else f"{text}@{self.digest}"


def parse_image_reference(text: str) -> ImageReference:
    """Return what *text* refers to.

    Raises:
        ImageReferenceError: it follows no part of the grammar, which one the message says.
    """
    if len(text) > MAX_REFERENCE:
        raise ImageReferenceError(f"{len(text)} characters are too long for a reference to an image")
    if not text:
        raise ImageReferenceError("a reference to an image is needed, such as registry.example/team/app:1.2")
    if _IDENTIFIER.fullmatch(text):
        raise ImageReferenceError("64 hexadecimal digits are an image's id on one engine: give the name of the image")
    rest, at, digest = text.partition("@")
    if at and _DIGEST.fullmatch(digest) is None:
        raise ImageReferenceError("after @ comes a digest: sha256: and 64 lower-case hexadecimal digits")
    before, slash, last = rest.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and _TAG.fullmatch(tag) is None:
        raise ImageReferenceError(
            "after the last : comes a tag: up to 128 letters, digits, _ . and -, beginning with none of . and -"
        )
    domain, path = _split(before + slash + last)
    _check_domain(domain)
    if _PATH.fullmatch(path) is None:
        hint = "use lower-case letters only" if path != path.lower() else "parts are lower-case letters and digits, "
        hint += "" if path != path.lower() else "joined by . _ __ or -, between slashes"
        raise ImageReferenceError(f"{path[:64]!r} is not the name of a repository: {hint}")
    reference = ImageReference(domain, path, tag if colon else None, digest if at else None)
    if len(reference.name) > MAX_NAME:
        raise ImageReferenceError(f"the name has {len(reference.name)} characters, of which {MAX_NAME} are allowed")
    return reference


def _split(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    is_domain = slash and (any(c in first for c in ".:") or first == "localhost" or first != first.lower())
    domain, path = (first, rest) if is_domain else (DEFAULT_DOMAIN, name)
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = _LIBRARY + path
    return domain, path


def _check_domain(domain: str) -> None:
    match = _DOMAIN.fullmatch(domain)
    if match is None:
        raise ImageReferenceError(f"{domain[:64]!r} is not a registry: a host, and a port after : where it has one")
    if match["port"] and int(match["port"][:6]) > 65535:
        raise ImageReferenceError(f"port {match['port'][:6]} of the registry is above 65535")
    if match["v6"]:
        try:
            ipaddress.IPv6Address(match["v6"])
        except ValueError:
            raise ImageReferenceError(f"[{match['v6'][:64]}] is not an IPv6 address") from None
