"""A sink that keeps a wrapped answer in memory, up to a bound, until its receipt was verified."""

from __future__ import annotations

from ngpu_bootstrap.dispatch.attempt import AnswerTooLarge
from ngpu_protocol.http1 import Headers, MisuseError, SwitchedStream, header


class Collector:
    """Collects one answer. Nothing reaches the client before the task is finished, so an attempt may be repeated.

    Attributes:
        status, content_type: of the answer's head.
        reached_client: always False.
    """

    reached_client = False

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._size = 0
        self.status = 0
        self.content_type = ""

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    async def begin(self, status: int, reason: bytes, headers: Headers, length: int | None, *, more: bool) -> None:
        self._pieces.clear()
        self._size = 0
        self.status = status
        self.content_type = (header(headers, b"content-type") or b"").decode("latin-1")[:256]
        if length is not None and length > self._max_bytes:
            raise AnswerTooLarge(f"the answer announces {length} bytes; at most {self._max_bytes} are kept")

    async def take(self, data: bytes, *, more: bool) -> None:
        self._size += len(data)
        if self._size > self._max_bytes:
            raise AnswerTooLarge(f"the answer is over {self._max_bytes} bytes")
        self._pieces.append(data)

    async def switch(self, headers: Headers) -> SwitchedStream:
        raise MisuseError("a wrapped call does not change protocols")
