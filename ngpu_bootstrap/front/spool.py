"""Bodies that must be read before a node is chosen for them, kept meanwhile in little memory.

A model's name may stand after megabytes of an image, so such a body is read whole first: short ones in memory, longer
ones in a file that has no name and is gone with its call, whatever ends it. Since they are at hand then, calls with
such bodies can be tried again elsewhere. Files hold no credential: those are taken out before (`profiles.reading`).

All of them together have a bound, so that uploads cannot fill a disk; beyond it a call is refused at once. What is held
in memory meanwhile, to be parsed, has one too (`Room`), of which one caller leaves a part to others, and who sends too
slowly is not waited for (`Pace`).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import trio

from ngpu_bootstrap.dispatch.calls import Body, WholeBody
from ngpu_bootstrap.errors import NotServed, Refusal

IN_MEMORY_BYTES = 256 * 1024
PARSED_BYTES = 256 * 1024 * 1024
"""Held in memory at once of all bodies that are to be parsed."""
SHARE = 4
"""One network may hold this part of it: who has sent a body may be anyone, since its credential may stand in it."""
PATIENCE_S = 60.0
SLOWEST_BYTES_PER_S = 1024
PIECE_BYTES = 256 * 1024


class Room:
    """How many bytes all calls may hold together, and of those one caller's."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0
        self._of_callers: dict[str, int] = {}

    def reserve(self, size: int, caller: str = "") -> None:
        """Count *size* bytes more.

        Args:
            caller: who holds them, and so at most one `SHARE`-th of the room; empty for nobody in particular.

        Raises:
            NotServed: there is no room for them.
        """
        own = self._of_callers.get(caller, 0) + size
        if self.held_bytes + size > self._limit_bytes or (caller and own > self._limit_bytes // SHARE):
            raise NotServed(
                503, "spool_full", "too many long requests are being read now; come again later", retry_after_s=5
            )
        self.held_bytes += size
        if caller:
            self._of_callers[caller] = own

    def give_back(self, size: int, caller: str = "") -> None:
        """Count *size* bytes less, which *caller* held."""
        self.held_bytes -= size
        if caller and size:
            self._of_callers[caller] -= size
            if not self._of_callers[caller]:
                del self._of_callers[caller]


class Spool(Room):
    """Where bodies wait, and how much of them there may be.

    Args:
        folder: made where it is missing; its files have no names.
        limit_bytes: of all bodies that are longer than `IN_MEMORY_BYTES` together.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self._folder = folder

    def open_file(self) -> BinaryIO:
        """Return a new file without a name."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self._folder, buffering=0)


class Pace:
    """Whether a body comes fast enough to be waited for: after each stretch of `PATIENCE_S` or more, whether it came at
    `SLOWEST_BYTES_PER_S` in that stretch. What came before buys no time: else a burst would be held for hours."""

    def __init__(self, now_s: float) -> None:
        self._since_s, self._size_then = now_s, 0

    def check(self, size: int, now_s: float) -> None:
        """Return if a body of which *size* bytes are here may come to its end.

        Raises:
            Refusal: 408; it is too slow.
        """
        took_s, came = now_s - self._since_s, size - self._size_then
        if took_s <= PATIENCE_S:
            return
        if came < took_s * SLOWEST_BYTES_PER_S:
            raise Refusal(408, "request_timeout", f"the body comes too slowly: {came} bytes in {took_s:.0f} s")
        self._since_s, self._size_then = now_s, size


class SpooledBody:
    """A body that is being read, then one that can be sent. Use it in an `async with` block, which frees it."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._hash = hashlib.sha256()
        self._pending = bytearray()
        self._file: BinaryIO | None = None
        self._reserved = 0
        self.size = 0

    async def __aenter__(self) -> SpooledBody:
        return self

    async def __aexit__(self, *_: object) -> None:
        file, self._file = self._file, None
        self._spool.give_back(self._reserved)
        self._reserved = 0
        if file is not None:
            file.close()

    can_be_sent = True

    async def write(self, data: bytes) -> None:
        """Take the next piece.

        Raises:
            NotServed: there is no room for it.
        """
        if not data:
            return
        self.size += len(data)
        self._hash.update(data)
        self._pending += data
        if len(self._pending) >= IN_MEMORY_BYTES:
            await self._flush()

    async def body(self, *, whole: bool = False) -> Body:
        """Return all of it, once it was written.

        Args:
            whole: as one piece in memory, to be stored.
        """
        if self._file is None:
            return WholeBody(bytes(self._pending))
        await self._flush()
        return WholeBody(b"".join([piece async for piece in self._pieces()])) if whole else self

    async def _flush(self) -> None:
        data, self._pending = bytes(self._pending), bytearray()
        if not data:
            return
        self._spool.reserve(len(data))
        self._reserved += len(data)
        try:
            if self._file is None:
                self._file = await trio.to_thread.run_sync(self._spool.open_file)
            # the whole of it: a raw file may take a part
            await trio.to_thread.run_sync(_write_all, self._file, data)
        except OSError as error:
            raise NotServed(
                503, "spool_full", f"the request cannot be kept now: {error.strerror}", retry_after_s=5
            ) from None

    # -- as a body (`dispatch.calls.Body`)

    async def prepare(self) -> AsyncIterator[bytes]:
        return self._pieces()

    def sent(self) -> tuple[bytes, int]:
        return self._hash.digest(), self.size

    async def _pieces(self) -> AsyncIterator[bytes]:
        file = self._file
        if file is None:
            return
        descriptor, at = file.fileno(), 0
        while at < self.size:
            data = await trio.to_thread.run_sync(os.pread, descriptor, min(PIECE_BYTES, self.size - at), at)
            if not data:
                return
            at += len(data)
            yield data


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]
