"""Files that model servers on this machine wrote and named in their answers, handed out to bootstraps.

A model's answer may say `"url": "/home/.../v4.png"`: a file here. The owner lists the folders whose files may leave
(`models.output_folders`, none by default); a bootstrap this node trusts may then read any regular file below them, and
nothing else on this machine. What counts is where the file is when it is open: links and `..` are resolved by the
kernel first, and the open file's own path is looked at, so that nobody can put a link in its place in between.

    GET, HEAD  /ngpu/v1/files/{base64url of the path}
"""

from __future__ import annotations

import base64
import binascii
import mimetypes
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from ngpu_protocol.http1 import Exchange

log = structlog.get_logger(__name__)

FILES = "/ngpu/v1/files/"
MAX_PATH_BYTES = 4096
PIECE_BYTES = 256 * 1024
AT_ONCE = 64


class FileRefused(Exception):
    """A file that is not handed out: a status, a stable reason, words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that may be read. Whoever has it closes the descriptor."""

    descriptor: int
    size: int
    content_type: str


class OutputFiles:
    """Hands out what lies below the owner's output folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self._places = trio.CapacityLimiter(AT_ONCE)

    def open(self, path: bytes) -> OpenFile:
        """Open the regular file at *path*. Blocking.

        Raises:
            FileRefused: it is not below an output folder, or no regular file, or not there: all said alike, since
                what else is on this machine is nobody's business.
        """
        refused = FileRefused(404, "file_unknown", "no such file in the output folders of this node")
        if not path.startswith(b"/") or b"\0" in path or len(path) > MAX_PATH_BYTES:
            raise refused
        folders = [os.fsencode(os.path.realpath(folder)) for folder in self._folders]
        resolved = os.path.realpath(path)
        if not _is_below(resolved, folders):
            raise refused
        try:
            # non-blocking: a pipe in the file's place must not hold a thread
            descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise refused from None
        try:
            status = os.fstat(descriptor)
            opened = os.fsencode(os.readlink(f"/proc/self/fd/{descriptor}"))
            if not stat.S_ISREG(status.st_mode) or not _is_below(opened, folders):
                raise refused
        except BaseException:
            os.close(descriptor)
            raise
        kind = mimetypes.guess_type(os.fsdecode(os.path.basename(opened)), strict=False)[0]
        return OpenFile(descriptor, status.st_size, kind or "application/octet-stream")

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request, which comes from a bootstrap that is trusted."""
        request = exchange.request
        if request.method not in ("GET", "HEAD"):
            await exchange.respond_json(405, {"reason": "method_not_allowed", "message": "ask with GET or HEAD"})
            return
        try:
            file = await trio.to_thread.run_sync(self.open, _decoded(request.path[len(FILES) :]))
        except FileRefused as refused:
            log.info("file_refused", reason=refused.reason, peer=exchange.remote.peer)
            await exchange.respond_json(refused.status, {"reason": refused.reason, "message": str(refused)})
            return
        try:
            fields = [
                (b"content-type", file.content_type.encode("latin-1")),
                (b"content-length", b"%d" % file.size),
            ]
            await exchange.send_head(200, fields, more=request.method == "GET")
            if request.method == "GET":
                await self._send(exchange, file)
            await exchange.end()
        finally:
            os.close(file.descriptor)

    async def _send(self, exchange: Exchange, file: OpenFile) -> None:
        at = 0
        while at < file.size:
            length = min(PIECE_BYTES, file.size - at)
            data = await trio.to_thread.run_sync(os.pread, file.descriptor, length, at, limiter=self._places)
            if not data:  # it became shorter meanwhile: an answer that is not whole does not look so
                await exchange.abort()
                return
            at += len(data)
            await exchange.send(data)


def _is_below(path: bytes, folders: Sequence[bytes]) -> bool:
    return any(path.startswith(folder.rstrip(b"/") + b"/") for folder in folders)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise FileRefused(400, "malformed_request", "the path must be base64url") from None
