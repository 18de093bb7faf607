"""Files of nodes that models' answers named, fetched through signed links and passed to whoever holds one.

What comes from a model server is shown under this bootstrap's own name, so a browser must not take it for a page of
ours: nothing in it runs (`sandbox`), its type is not guessed at, and only pictures, sounds and films are shown in
place. Nothing is kept here.
"""

from __future__ import annotations

import base64

from ngpu_bootstrap.errors import NodeFault, NotServed, Refusal
from ngpu_bootstrap.profiles.links import Link
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_protocol.http1 import Exchange, Headers, HttpError, Response, header

_SHOWN = (b"image/png", b"image/jpeg", b"image/gif", b"image/webp", b"image/avif", b"audio/", b"video/")
_MAX_REFUSAL_BYTES = 4096


class NodeFiles:
    """Fetches files from nodes.

    Args:
        max_bytes: of one file.
    """

    def __init__(self, nodes: Nodes, *, max_bytes: int) -> None:
        self._nodes = nodes
        self._max_bytes = max_bytes

    async def answer(self, exchange: Exchange, link: Link) -> None:
        """Answer with the file that *link* names.

        Raises:
            Refusal: the node is away, has no such file, or it is too large.
        """
        session = self._nodes.get(link.node)
        if session is None or not session.admitted:
            raise NotServed(503, "node_away", f"the node {link.node} that has this file is away", retry_after_s=10)
        name = base64.urlsafe_b64encode(link.path.encode("utf-8", "surrogateescape")).rstrip(b"=").decode()
        try:
            async with session.requests.request(exchange.request.method, f"/ngpu/v1/files/{name}") as response:
                await self._pass_on(exchange, response)
        except HttpError as error:
            if exchange.head_sent:
                await exchange.abort()
                return
            raise NodeFault(502, "node_unreachable", f"the node that has this file cannot be asked: {error}") from None

    async def _pass_on(self, exchange: Exchange, response: Response) -> None:
        if response.status != 200:
            await response.read(_MAX_REFUSAL_BYTES)
            raise Refusal(404, "file_unknown", "the node has no such file in its output folders (any more)")
        length = header(response.headers, b"content-length") or header(response.headers, b"ngpu-content-length")
        size = int(length) if length is not None and length.isdigit() and len(length) < 16 else None
        if size is None or size > self._max_bytes:
            raise Refusal(
                413,
                "file_too_large",
                f"the file has {size or 'unknown'} bytes, at most {self._max_bytes} are passed on",
            )
        await exchange.send_head(200, _fields(header(response.headers, b"content-type") or b"", size))
        if exchange.request.method == "GET":
            while data := await response.receive():
                await exchange.send(data)
        await exchange.end()


def _fields(content_type: bytes, size: int) -> Headers:
    shown = content_type.startswith(_SHOWN)
    return [
        (b"content-type", content_type if shown else b"application/octet-stream"),
        (b"content-length", b"%d" % size),
        (b"content-disposition", b"inline" if shown else b"attachment"),
        (b"content-security-policy", b"default-src 'none'; sandbox"),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"private, no-store"),
    ]
