"""Signed, expiring URLs on this bootstrap that fetch one file from the node that has it.

A model's answer names files on the machine it ran on (`"url": "/home/.../v4.png"`), or in its own workspace
(`/api/v1b/files/...`). Both become URLs here: the path as it was, below `/v1/files/<node>` for the first kind, with
what is needed to fetch it in the query, signed by this bootstrap's account. Nothing about them is stored: whoever
holds a URL may fetch that file until it expires, as with the presigned URLs of object stores, and every bootstrap of
the same database checks the others' signatures by their addresses.

    digest = keccak("NGPU file link" 0 network 0 workspace 0 node 0 path 0 expires)

Pure: the clock comes in, keys stay outside.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import quote, unquote

from ngpu_bootstrap.errors import Forbidden, Refusal
from ngpu_bootstrap.front.paths import parse_parameters
from ngpu_protocol.errors import AddressError, SignatureError
from ngpu_protocol.identity import Address, parse_address, recover
from ngpu_protocol.keccak import keccak

FILES_PREFIX = "/v1/files/"
MAX_LINKS = 1000
"""In one answer. Each is signed, which takes 0.1 ms, and an answer of 16 MiB could name a million files."""
PARAMETERS = ("workspace", "node", "Expires", "Signature")
_URL_SAFE = "/:@!$&'()*+,;=-._~"

# A member `url` whose value is a path of the file system: what a quote may follow and no escape is in it, so that the
# same bytes inside a text, where they would be escaped, are left alone.
_FILE_URL = re.compile(rb'("url"[ \t\r\n]*:[ \t\r\n]*")((?:/|\\/)(?![/\\])(?:[^"\\\x00-\x1f]|\\/)*)(")')


@dataclass(frozen=True, slots=True)
class Link:
    """One file. `workspace` is empty for a file below its node's output folders."""

    workspace: str
    node: Address
    path: str
    expires_s: int

    def digest(self, network: str) -> bytes:
        """Return what is signed."""
        parts = ("NGPU file link", network, self.workspace, self.node, self.path, str(self.expires_s))
        return keccak(b"\0".join(part.encode("utf-8", "surrogatepass") for part in parts))


def link_url(origin: str, link: Link, signature: bytes) -> str:
    """Return the URL of a link."""
    signed = base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    tail = f"Expires={link.expires_s}&Signature={signed}"
    if not link.workspace:
        path = quote(link.path.encode("utf-8", "surrogateescape"), safe=_URL_SAFE)
        return f"{origin}{FILES_PREFIX}{link.node}{path}?{tail}"
    return f"{origin}{link.path}?workspace={link.workspace}&node={link.node}&{tail}"


def read_link(
    path: str, query: str | None, *, network: str, signers: Collection[str], now_s: float, origin_file: bool
) -> Link:
    """Return the link that a request's path and query are.

    Args:
        signers: addresses whose signatures count: this bootstrap's and its siblings'.
        origin_file: the path is below `/v1/files/`; else it is a workspace's own.

    Raises:
        Refusal: no link, expired, or signed by nobody who counts.
    """
    found = parse_parameters(query, PARAMETERS)
    workspace, node, text = found.get("workspace", ""), found.get("node", ""), path
    if origin_file:
        node, _, rest = path.removeprefix(FILES_PREFIX).partition("/")
        workspace, text = "", "/" + unquote(rest, errors="surrogateescape")
    elif not workspace:
        raise Forbidden("link_bad", "this path is reached by the links in the workspace's answers alone")
    expires, signed = found.get("Expires", ""), found.get("Signature", "")
    try:
        address = parse_address(node)
        signature = base64.urlsafe_b64decode(signed + "=" * (-len(signed) % 4)) if len(signed) <= 128 else b""
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
            raise ValueError
        link = Link(workspace, address, text, int(expires))
        signer = recover(link.digest(network), signature)
    except (AddressError, SignatureError, ValueError, binascii.Error):
        raise Forbidden("link_bad", "this is no link that a bootstrap of this service has made") from None
    if signer not in signers:
        raise Forbidden("link_bad", "this is no link that a bootstrap of this service has made")
    if link.expires_s < now_s:
        raise Refusal(410, "link_expired", "this link has expired; ask for the file again")
    return link


def with_file_urls(body: bytes, url_of: Callable[[str], str]) -> bytes:
    """Return a JSON *body* with the file paths in its members `url` replaced, every other byte as it was;
    those after the first `MAX_LINKS` stay.

    Args:
        url_of: from a path to its URL.
    """

    def replaced(found: re.Match[bytes]) -> bytes:
        path = found[2].replace(b"\\/", b"/").decode("utf-8", "surrogateescape")
        return found[1] + url_of(path).encode("utf-8", "surrogateescape") + found[3]

    return _FILE_URL.sub(replaced, body, count=MAX_LINKS)


def with_links(body: bytes, prefix: str, url_of: Callable[[str], str], most: int = MAX_LINKS) -> bytes:
    """Return a JSON *body* in which each text that begins with *prefix* is replaced, or the first *most*."""
    pattern = re.compile(rb'(?<!\\)"(%b[^"\\\x00-\x1f]*)"' % re.escape(prefix.encode()))

    def replaced(found: re.Match[bytes]) -> bytes:
        return b'"%b"' % url_of(found[1].decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    return pattern.sub(replaced, body, count=most)
