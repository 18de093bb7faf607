"""A file of any size from a URL that a client gave: bounded, in pieces, from public addresses only.

Raises nothing but `ImageProblem`s: what went wrong, and whether it may pass.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

import httpx
import trio

from ngpu_daemon.addresses import IpAddress, is_public
from ngpu_daemon.metrics import software_version
from ngpu_daemon.outbound import AddressRefused, GuardedTransport, without_query
from ngpu_node.images.problems import (
    AddressNotAllowed,
    BadCredentials,
    ImageMissing,
    ImageProblem,
    RateLimited,
    RegistryDown,
    Stalled,
    TooLarge,
)

CONNECT_TIMEOUT_S = 15.0
MAX_REDIRECTS = 5
PIECE_BYTES = 256 * 1024


class Download:
    """One download; as a context manager it opens and closes the connection.

    Attributes:
        size: as the server says; 0 when it does not.
        received: bytes so far.
    """

    def __init__(
        self, url: str, *, limit: int | None, answer_timeout_s: float, allow_private: Callable[[str], bool]
    ) -> None:
        """Prepare it.

        Args:
            limit: bytes it may have.
            answer_timeout_s: how long the server may take to begin.
            allow_private: whether this host may be at an address of this machine's network.
        """
        self._url = url
        self._shown = without_query(url)
        self._limit = limit
        self._answer_timeout_s = answer_timeout_s
        self._allow_private = allow_private
        self._stack = AsyncExitStack()
        self._response: httpx.Response | None = None
        self.size = 0
        self.received = 0

    async def __aenter__(self) -> Download:
        try:
            with trio.move_on_after(self._answer_timeout_s) as waiting:
                self._response = await self._open()
            if waiting.cancelled_caught:
                raise Stalled(f"the server of {self._shown} has not answered for {self._answer_timeout_s:g} s")
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> httpx.Response:
        def judge(host: str, address: IpAddress) -> bool:
            return is_public(address) or self._allow_private(host)

        client = await self._stack.enter_async_context(
            httpx.AsyncClient(
                transport=GuardedTransport(judge),
                follow_redirects=True,
                max_redirects=MAX_REDIRECTS,
                # whoever watches over the whole says when it has stalled
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
                headers={"User-Agent": f"ngpu-node/{software_version()}", "Accept-Encoding": "identity"},
            )
        )
        try:
            response = await self._stack.enter_async_context(client.stream("GET", self._url))
        except AddressRefused as error:
            raise AddressNotAllowed(f"{self._shown}: {error}, where this node's owner lets no client point") from error
        except (httpx.TransportError, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise self._refusal(response.status_code)
        length = response.headers.get("content-length", "")
        self.size = int(length) if length.isascii() and length.isdigit() else 0
        self._check_size(self.size)
        return response

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes as they come."""
        assert self._response is not None
        try:
            async for piece in self._response.aiter_raw(PIECE_BYTES):
                self.received += len(piece)
                self._check_size(self.received)
                yield piece
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _check_size(self, size: int) -> None:
        if self._limit is not None and size > self._limit:
            raise TooLarge(f"the file at {self._shown}", size=size, limit=self._limit)

    def _unreachable(self, error: Exception) -> ImageProblem:
        return RegistryDown(f"{self._shown} cannot be fetched: {str(error) or type(error).__name__}")

    def _refusal(self, status: int) -> ImageProblem:
        if status in (404, 410):
            return ImageMissing(f"there is no file at {self._shown} ({status})")
        if status in (401, 403):
            return BadCredentials(f"{self._shown} wants a login ({status}): give a URL that anybody may fetch")
        if status == 429:
            return RateLimited(f"the server of {self._shown} has had enough for a while (429)")
        if status >= 500 or status == 408:
            return RegistryDown(f"the server of {self._shown} is out of order ({status})")
        return ImageMissing(f"{self._shown} answers {status}")
