"""Bodies beyond 64 KiB: files beside the database, written as they stream in, bounded in size each and together.

A body is buffered in memory up to *inline_limit* and then belongs in its task's row; a longer one goes to a ``.part``
file that is flushed and renamed by ``commit``, before any row names it. So a row never names a file that a crash took
away; the other way round, a file without a row, is removed at the next open (``sweep``).

Paths are ``<day>/<task id>.<part>.<random>`` below the root, the day being the first part of the task id: what
retention removes together lies together. The random end keeps a second body of the same task, whose row will be
refused, from replacing the first. The directory belongs to one process.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, TypeVar

import trio

from ngpu_bootstrap.store.errors import BodyMissing, BodyTooLarge, RecordRefused, StoreUnavailable
from ngpu_bootstrap.store.records import Part, StoredBody

T = TypeVar("T")

INLINE_LIMIT_BYTES: Final = 64 * 1024
# one trip to a worker thread per this much: the trip costs about what writing 100 KiB does
_WRITE_BYTES: Final = 256 * 1024

# what a task id may be for its files' sake; what it must be is ngpu_protocol.task_ids' to say
_SAFE_ID = re.compile(r"[0-9A-Za-z_-]{8,128}")


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How much is kept: *inline_bytes* in a row, *body_bytes* per body, *total_bytes* of all files together."""

    inline_bytes: int = INLINE_LIMIT_BYTES
    body_bytes: int = 1024 * 1024 * 1024
    total_bytes: int = 64 * 1024 * 1024 * 1024


class BodyFiles:
    """The directory of bodies. Methods that touch the disk are blocking unless they are async."""

    def __init__(self, root: Path, limits: BodyLimits = BodyLimits()) -> None:
        self._root = root
        self.limits = limits
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, those being written included."""
        return self._used_bytes

    def open(self) -> None:
        """Make the directory and add up what is there. Blocking."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._used_bytes = sum(path.stat().st_size for path in self._root.glob("*/*"))

    def sweep(self, named: Callable[[Iterable[str]], set[str]], *, days: int = 2) -> int:
        """Remove files no row names, in the newest *days* directories, and return how many. Blocking.

        Only a crash between ``commit`` and the row leaves such files, so older directories need no look.

        Args:
            named: Returns those of the given relative paths that a row names.
        """
        removed = 0
        for directory in sorted((p for p in self._root.iterdir() if p.is_dir()), reverse=True)[:days]:
            paths = {f"{directory.name}/{path.name}": path for path in directory.iterdir()}
            for relative in paths.keys() - named(paths):
                size = paths[relative].stat().st_size
                paths[relative].unlink(missing_ok=True)
                self._used_bytes -= size
                removed += 1
        return removed

    def new(self, task_id: str, part: Part) -> BodyWriter:
        """Begin a body. Use the writer as an async context manager."""
        if not _SAFE_ID.fullmatch(task_id):
            raise RecordRefused(f"not a task id: {task_id[:80]!r}")
        return BodyWriter(self, task_id, part)

    async def read(self, task_id: str, part: Part, body: StoredBody) -> bytes:
        """Return a whole body."""
        if body.content is not None:
            return body.content
        return b"".join([chunk async for chunk in self.chunks(task_id, part, body)])

    async def chunks(self, task_id: str, part: Part, body: StoredBody) -> AsyncIterator[bytes]:
        """Yield a body in pieces.

        Raises:
            BodyMissing: the file is gone or has another size than recorded; may come after the first pieces.
        """
        if body.content is not None:
            yield body.content
            return
        try:
            file = await trio.to_thread.run_sync(open, self._path(body.path), "rb")
        except FileNotFoundError as error:
            raise BodyMissing(task_id, part) from error
        try:
            left = body.size
            while chunk := await trio.to_thread.run_sync(file.read, _WRITE_BYTES):
                left -= len(chunk)
                yield chunk
            if left != 0:
                raise BodyMissing(task_id, part)
        finally:
            file.close()

    async def remove(self, bodies: Iterable[StoredBody]) -> None:
        """Delete the files of *bodies*, those already gone included."""
        paths = [self._path(body.path) for body in bodies if body.path]
        if paths:
            self._used_bytes -= await trio.to_thread.run_sync(_unlink, paths)

    def reserve(self, task_id: str, size: int) -> None:
        """Count *size* more bytes against the total.

        Raises:
            StoreUnavailable: it would exceed ``total_bytes``.
        """
        if self._used_bytes + size > self.limits.total_bytes:
            raise StoreUnavailable(
                f"the bodies directory is full ({self._used_bytes} of {self.limits.total_bytes} bytes): "
                f"a body of task {task_id} was not kept"
            )
        self._used_bytes += size

    def release(self, size: int) -> None:
        """Take back what ``reserve`` counted."""
        self._used_bytes -= size

    def new_path(self, task_id: str, part: Part) -> str:
        """Return a relative path for a body of *task_id*, another one each time."""
        return f"{task_id[:8]}/{task_id}.{part.value}.{secrets.token_hex(4)}"

    def _path(self, relative: str) -> Path:
        return self._root / relative

    def create(self, relative: str) -> BinaryIO:
        """Open the ``.part`` file of *relative*, replacing one left by a crash. Blocking."""
        path = self._path(relative + ".part")
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _flush_directory(self._root)
        return open(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb", buffering=0)

    def publish(self, relative: str, file: BinaryIO) -> None:
        """Flush *file* and give it its name, durably. Blocking."""
        os.fsync(file.fileno())
        file.close()
        path = self._path(relative)
        os.replace(self._path(relative + ".part"), path)
        _flush_directory(path.parent)

    def discard(self, relative: str, file: BinaryIO) -> None:
        """Close and delete an unfinished file. Blocking, never raises."""
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            self._path(relative + ".part").unlink(missing_ok=True)


class BodyWriter:
    """One body being written; ``commit`` makes it durable, leaving the context without that removes it.

    After a ``commit`` the body is the caller's to hand to ``Store.accept`` or ``Store.finish``; one that is never
    handed over is removed at the next open of the store.
    """

    def __init__(self, files: BodyFiles, task_id: str, part: Part) -> None:
        self._files = files
        self._task_id = task_id
        self._relative = files.new_path(task_id, part)
        self._pieces: list[bytes] = []
        self._pending_bytes = 0
        self._reserved_bytes = 0
        self._file: BinaryIO | None = None
        self._done = False
        self.size = 0

    async def __aenter__(self) -> BodyWriter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._done:
            return
        self._done = True
        self._files.release(self._reserved_bytes)
        if self._file is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._files.discard, self._relative, self._file)

    async def write(self, data: bytes) -> None:
        """Append *data*.

        Raises:
            BodyTooLarge: the body would exceed its limit.
            StoreUnavailable: the disk is full or failing, or all bodies together reached theirs.
        """
        if self.size + len(data) > self._files.limits.body_bytes:
            raise BodyTooLarge(self._task_id, self._files.limits.body_bytes)
        self.size += len(data)
        self._pieces.append(data)
        self._pending_bytes += len(data)
        if self._file is None and self.size <= self._files.limits.inline_bytes:
            return
        if self._pending_bytes >= _WRITE_BYTES:
            await self._flush()

    async def commit(self) -> StoredBody:
        """Return the body to store with its task; a file is on disk, name and all, when this returns."""
        if self._file is None and self.size <= self._files.limits.inline_bytes:
            self._done = True
            return StoredBody(self.size, b"".join(self._pieces))
        await self._flush()
        assert self._file is not None
        await self._blocking(self._files.publish, self._relative, self._file)
        self._done = True
        return StoredBody(self.size, path=self._relative)

    async def _flush(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._pending_bytes = 0
        self._files.reserve(self._task_id, len(data))
        self._reserved_bytes += len(data)
        if self._file is None:
            self._file = await self._blocking(self._files.create, self._relative)
        await self._blocking(_write_all, self._file, data)

    async def _blocking(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await trio.to_thread.run_sync(work, *arguments)
        except OSError as error:
            raise StoreUnavailable(f"a body of task {self._task_id} cannot be kept: {error.strerror}") from error


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _unlink(paths: Iterable[Path]) -> int:
    freed = 0
    for path in paths:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            continue
        freed += size
    return freed


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
