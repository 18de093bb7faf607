"""Answers of detached attempts: grown while the attempt runs, followed by whoever listens, kept for whoever asks later.

Small answers live in memory and then in the ledger, in the transaction of their receipt; longer ones in a file of the
spool directory, synced before that transaction, so that a receipt never stands without its answer. Bounded three
ways: bytes of an answer, bytes of all of them, age. What was acknowledged is dropped first and soon; the rest oldest
first.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgpack  # type: ignore[import-untyped]
import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.errors import NodeError
from ngpu_node.execution.attempt import Attempt, Key
from ngpu_node.execution.passthrough import AnswerHead, Ended
from ngpu_node.ledger import Ledger, StoredAnswer, Written
from ngpu_protocol.http1 import Headers
from ngpu_protocol.receipts import Outcome, SignedReceipt

log = structlog.get_logger(__name__)

IN_MEMORY_BYTES = 64 * 1024
READ_BYTES = 64 * 1024
KEEP_S = 24 * 3600
#: After the acknowledgement the answer may still be on its way to a bootstrap that asked for it.
KEEP_ACKNOWLEDGED_S = 600
SWEEP_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """How much may be kept, in bytes."""

    answer_bytes: int = 64 * 1024 * 1024
    total_bytes: int = 1024 * 1024 * 1024


class AnswerLost(NodeError):
    """An answer that is followed will never be whole: its receipt could not be written, or it was dropped meanwhile."""


class SpooledAnswer:
    """One answer, growing or finished: a `Sink` for the attempt, and a source for those who follow it.

    Attributes:
        written: the receipt, once there is one; nothing grows after that.
        followers: how many streams are being sent it.
    """

    def __init__(self, directory: Path, limits: SpoolLimits, reserve: Callable[[int], Awaitable[None]]) -> None:
        """Start empty. *reserve* is asked for room before bytes are kept."""
        self._directory = directory
        self._limits = limits
        self._reserve = reserve
        self._changes = Changes()
        self._head: AnswerHead | None = None
        self._memory = bytearray()
        self._file: BinaryIO | None = None
        self.path: Path | None = None
        self.size = 0
        self.trailers: Headers = []
        self.written: Written | None = None
        self.failed = False
        self.followers = 0

    async def begin(self, head: AnswerHead, *, more: bool) -> None:
        self._head = head
        if not more:
            self._changes.announce()

    async def send(self, data: bytes, *, more: bool = False) -> None:
        if self.size + len(data) > self._limits.answer_bytes:
            raise Ended(
                Outcome.LIMIT, f"the answer is over {self._limits.answer_bytes} bytes, the most this node keeps"
            )
        await self._reserve(len(data))
        if self.path is None and self.size + len(data) <= IN_MEMORY_BYTES:
            self._memory += data
        else:
            await trio.to_thread.run_sync(self._append, bytes(data))
        self.size += len(data)
        if not more:
            self._changes.announce()

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self.path = self._directory / secrets.token_hex(16)
            self._file = _create(self.path)
            _write_all(self._file, bytes(self._memory))
            self._memory.clear()
        _write_all(self._file, data)

    async def seal(self) -> None:
        """Make what is in a file durable: before the ledger names it."""
        file, self._file = self._file, None
        if file is not None:
            await trio.to_thread.run_sync(_sync_and_close, file, self._directory)

    def stored(self, attempt: Attempt) -> StoredAnswer:
        """Return the row for the ledger."""
        service, task_id, number = attempt.key
        head = self._head
        assert head is not None
        return StoredAnswer(
            service=service,
            task_id=task_id,
            attempt=number,
            status=head.status,
            head=msgpack.packb([head.reason, head.bodiless, head.fields, self.trailers]),
            body=bytes(self._memory) if self.path is None else None,
            body_file=None if self.path is None else self.path.name,
            body_bytes=self.size,
        )

    def finish(self, written: Written) -> None:
        """Tell those who follow that this is all, and the receipt."""
        self.written = written
        self._changes.announce()

    def fail(self) -> None:
        """Tell those who follow that there is no receipt and never will be: the ledger failed."""
        self.failed = True
        self._changes.announce()

    # -- following -----------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        return self._head is not None

    async def head(self) -> AnswerHead:
        """Wait for the head and return it; raises AnswerLost if there will be none."""
        while self._head is None:
            if self.failed:
                raise AnswerLost("the attempt ended without a receipt")
            await self._changes.beyond(self._changes.count)
        return self._head

    async def read(self, offset: int) -> bytes:
        """Wait for bytes at *offset* and return some, b"" when the answer ended there and its receipt is written."""
        while True:
            if offset < self.size:
                if self.path is None:
                    return bytes(self._memory[offset : offset + READ_BYTES])
                try:
                    count = min(READ_BYTES, self.size - offset)
                    return await trio.to_thread.run_sync(_read_at, self.path, offset, count)
                except FileNotFoundError:
                    raise AnswerLost("the answer was dropped to make room") from None
            if self.written is not None:
                return b""
            if self.failed:
                raise AnswerLost("the attempt ended without a receipt")
            await self._changes.beyond(self._changes.count)

    @classmethod
    def restored(cls, answer: StoredAnswer, directory: Path) -> SpooledAnswer:
        """Return a finished answer from the ledger's row."""
        self = cls(directory, SpoolLimits(), _no_room)
        reason, bodiless, fields, trailers = msgpack.unpackb(answer.head, use_list=True)
        self._head = AnswerHead(answer.status, reason, [(n, v) for n, v in fields], bodiless)
        self.trailers = [(n, v) for n, v in trailers]
        self.size = answer.body_bytes
        if answer.body_file is None:
            self._memory = bytearray(answer.body or b"")
        else:
            self.path = directory / answer.body_file
        self.written = Written(SignedReceipt.from_bytes(answer.signed_receipt), answer.receipt_hash)
        return self


class SpooledRequest:
    """A detached attempt's request, received whole before the workspace gets any of it: a `Source`.

    Attributes:
        whole: the body, where it fitted into memory; None while it is not complete, or when it is in a file.
        trailers: what came behind it.
    """

    def __init__(self, directory: Path, reserve: Callable[[int], Awaitable[None]]) -> None:
        self._directory = directory
        self._reserve = reserve
        self._memory = bytearray()
        self._file: BinaryIO | None = None
        self._offset = 0
        self.path: Path | None = None
        self.size = 0
        self.is_complete = False
        self.whole: bytes | None = None
        self.trailers: Headers = []

    async def add(self, data: bytes) -> None:
        """Keep the next bytes."""
        await self._reserve(len(data))
        if self.path is None and self.size + len(data) <= IN_MEMORY_BYTES:
            self._memory += data
        else:
            await trio.to_thread.run_sync(self._append, data)
        self.size += len(data)

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self.path = self._directory / secrets.token_hex(16)
            self._file = _create(self.path)
            _write_all(self._file, bytes(self._memory))
            self._memory.clear()
        _write_all(self._file, data)

    def complete(self) -> None:
        """Say that the request is whole."""
        self.is_complete = True
        if self.path is None:
            self.whole = bytes(self._memory)

    def close(self) -> None:
        """Forget the bytes."""
        self._memory.clear()
        if self._file is not None:
            self._file.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __aiter__(self) -> SpooledRequest:
        return self

    async def __anext__(self) -> bytes:
        assert self.path is not None
        data = await trio.to_thread.run_sync(_read_at, self.path, self._offset, READ_BYTES)
        if not data:
            raise StopAsyncIteration
        self._offset += len(data)
        return data


def to_drop(
    answers: Sequence[StoredAnswer], limits: SpoolLimits, now_ms: int, *, room_for: int = 0
) -> list[StoredAnswer]:
    """Return which of *answers* must go: too old, done with, or beyond the total.

    Pure. Acknowledged answers go before others, older before younger.

    Args:
        room_for: bytes that are about to be added.
    """
    dropped = []
    total = room_for + sum(answer.body_bytes for answer in answers)
    in_order = sorted(answers, key=lambda a: (a.acknowledged_at_ms is None, a.ended_at_ms))
    for answer in in_order:
        old = now_ms - answer.ended_at_ms > KEEP_S * 1000
        done = answer.acknowledged_at_ms is not None and now_ms - answer.acknowledged_at_ms > KEEP_ACKNOWLEDGED_S * 1000
        if old or done or total > limits.total_bytes:
            dropped.append(answer)
            total -= answer.body_bytes
    return dropped


class Spool:
    """The directory of long answers, and the rules of how long any answer stays."""

    def __init__(
        self,
        directory: Path,
        ledger: Ledger,
        limits: SpoolLimits,
        *,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.directory = directory
        self.limits = limits
        self._ledger = ledger
        self._clock_ms = clock_ms
        self._sweeping = trio.Lock()
        self._growing: set[SpooledAnswer | SpooledRequest] = set()
        self._used = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def new(self) -> SpooledAnswer:
        """Return an empty answer to be grown; the caller gives it back by `release`."""
        answer = SpooledAnswer(self.directory, self.limits, self._reserve)
        self._growing.add(answer)
        return answer

    def new_request(self) -> SpooledRequest:
        """Return an empty request to be filled; the caller gives it back by `release_request`."""
        request = SpooledRequest(self.directory, self._reserve)
        self._growing.add(request)
        return request

    def release_request(self, request: SpooledRequest) -> None:
        """Forget *request*: the workspace has it, or will not get it."""
        request.close()
        if request in self._growing:
            self._growing.remove(request)
            self._used -= request.size

    def release(self, answer: SpooledAnswer) -> None:
        """Say that *answer* grows no more: the ledger has it, or nobody wants it."""
        self._growing.discard(answer)

    async def find(self, key: Key) -> SpooledAnswer | None:
        """Return the finished answer of an attempt; None when it is not kept (any more)."""
        stored = await self._ledger.answer(*key)
        return None if stored is None else SpooledAnswer.restored(stored, self.directory)

    async def run(self, *, interval_s: float = SWEEP_INTERVAL_S) -> None:
        """Sweep now and then until cancelled."""
        while True:
            await self.sweep()
            await trio.sleep(interval_s)

    async def sweep(self, *, room_for: int = 0) -> None:
        """Drop what must go, and files that nothing names (a crash came between a file and its row).

        Args:
            room_for: bytes about to be added.
        """
        async with self._sweeping:
            # In this order: a file that is listed is named by the growing answers, or by a row that is read after them.
            files = await trio.to_thread.run_sync(os.listdir, self.directory)
            named = {one.path.name for one in self._growing if one.path is not None}
            answers = await self._ledger.answers_by_age()
            growing = sum(one.size for one in self._growing)
            dropped = to_drop(answers, self.limits, self._clock_ms(), room_for=growing + room_for)
            if dropped:
                await self._ledger.forget_answers([(a.service, a.task_id, a.attempt) for a in dropped])
                log.info("answers_dropped", answers=len(dropped), bytes=sum(a.body_bytes for a in dropped))
            gone = {(a.service, a.task_id, a.attempt) for a in dropped}
            kept = [a for a in answers if (a.service, a.task_id, a.attempt) not in gone]
            named |= {a.body_file for a in kept if a.body_file is not None}
            self._used = growing + sum(a.body_bytes for a in kept)
            unnamed = [self.directory / name for name in files if name not in named]
            if unnamed:
                await trio.to_thread.run_sync(_remove, unnamed)

    async def _reserve(self, count: int) -> None:
        if self._used + count > self.limits.total_bytes:
            await self.sweep(room_for=count)
            if self._used + count > self.limits.total_bytes:
                raise Ended(Outcome.LIMIT, f"this node keeps {self.limits.total_bytes} bytes of answers, all taken")
        self._used += count


async def _no_room(count: int) -> None:
    raise AssertionError("a finished answer does not grow")


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync_and_close(file: BinaryIO, directory: Path) -> None:
    os.fsync(file.fileno())
    file.close()
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), count, offset)
