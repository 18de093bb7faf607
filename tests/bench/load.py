"""The load generator: keep-alive HTTP/1.1 clients that each send the next request when the answer is complete.

Runs as a process of its own (``python -m tests.bench.load``), so that its CPU time is told apart from that of what it
measures. Reads one JSON job from standard input, writes one JSON result to standard output. It speaks HTTP on raw
asyncio protocols: a client library would cost more than most of the systems measured.

Closed loop: with *c* clients there are never more than *c* requests under way, so the load is bounded by the system
itself and latencies mean what one client sees.
"""

import asyncio
import json
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Job:
    """What to send: the same request *clients* at a time for *duration_s*, after *warm_up_s* that are not counted."""

    url: str
    method: str
    headers: dict[str, str]
    body: str
    clients: int
    duration_s: float
    warm_up_s: float
    expect: str = ""  # text the body must hold; an answer without it is an error


@dataclass(slots=True)
class Result:
    """What came back, counted after the warm-up. Latencies are in seconds."""

    requests: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    total_requests: int = 0  # with those of the warm-up: what the system has really answered


class _Client(asyncio.Protocol):
    """One connection; begins a request as soon as the one before is answered."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        answer = complete_answer(self._buffer)
        if answer is None:
            return
        status, body_start, end, closes = answer
        self._run.record(self._sent_at, status, bytes(self._buffer[body_start:end]))
        del self._buffer[:end]
        if closes and self._transport is not None:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._run.connection_lost(finished=self._sent_at == 0.0)

    def _send(self) -> None:
        if self._transport is None:
            return
        now = time.perf_counter()
        if now >= self._run.ends_at:
            self._sent_at = 0.0
            self._transport.close()
            return
        self._sent_at = now
        self._transport.write(self._run.request)


def complete_answer(buffer: bytearray) -> tuple[int, int, int, bool] | None:
    """Return status, start of the body, end of the answer, whether the server closes; None until all is here."""
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    head = bytes(buffer[:head_end]).lower()
    body_start = head_end + 4
    status = int(head[9:12])
    closes = b"\r\nconnection: close" in head
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        line_end = head.find(b"\r\n", at + 2)
        length = int(head[at + 17 : line_end if line_end > 0 else None])
        end = body_start + length
        return (status, body_start, end, closes) if len(buffer) >= end else None
    if b"\r\ntransfer-encoding: chunked" not in head:
        return status, body_start, body_start, closes
    position = body_start
    while True:
        line_end = buffer.find(b"\r\n", position)
        if line_end < 0:
            return None
        size = int(bytes(buffer[position:line_end]).partition(b";")[0], 16)
        if size == 0:
            # the trailers end with an empty line
            end = line_end if buffer[line_end : line_end + 4] == b"\r\n\r\n" else buffer.find(b"\r\n\r\n", line_end + 2)
            return (status, body_start, end + 4, closes) if end >= 0 and len(buffer) >= end + 4 else None
        position = line_end + 2 + size + 2
        if position > len(buffer):
            return None


class _Run:
    """One job under way."""

    def __init__(self, job: Job) -> None:
        self.job = job
        parts = urlsplit(job.url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        lines = [f"{job.method} {target} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += [f"{name}: {value}" for name, value in job.headers.items()]
        body = job.body.encode()
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self.expect = job.expect.encode()
        self.counts_from = self.ends_at = 0.0
        self.latencies = array("d")
        self.errors: dict[str, int] = {}
        self.total = 0
        self.open = 0
        self.done = asyncio.Event()

    def record(self, sent_at: float, status: int, body: bytes) -> None:
        now = time.perf_counter()
        good = status == 200 and self.expect in body
        self.total += good
        if sent_at < self.counts_from:
            return
        if good:
            self.latencies.append(now - sent_at)
        else:
            self._error(str(status) if status != 200 else "wrong body")

    def connection_lost(self, *, finished: bool) -> None:
        self.open -= 1
        if not finished:
            self._error("connection lost")
            if time.perf_counter() < self.ends_at - 0.1:
                self.open += 1
                asyncio.get_running_loop().create_task(self._connect_again())
        if self.open == 0:
            self.done.set()

    async def _connect_again(self) -> None:
        await asyncio.sleep(0.05)  # a system that refuses everything must not become a busy loop here
        try:
            await asyncio.get_running_loop().create_connection(lambda: _Client(self), self.host, self.port)
        except OSError:
            self.connection_lost(finished=False)

    def _error(self, kind: str) -> None:
        self.errors[kind] = self.errors.get(kind, 0) + 1


async def run(job: Job) -> Result:
    """Run *job* and return what was measured; never raises for what the system under test does."""
    state = _Run(job)
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    state.counts_from = start + job.warm_up_s
    state.ends_at = state.counts_from + job.duration_s
    state.open = job.clients
    for _ in range(job.clients):
        try:
            await loop.create_connection(lambda: _Client(state), state.host, state.port)
        except OSError:
            state.connection_lost(finished=False)
    await asyncio.sleep(max(0.0, state.counts_from - time.perf_counter()))
    cpu_before = time.process_time()
    try:
        async with asyncio.timeout(job.duration_s + 30):
            await state.done.wait()
    except TimeoutError:
        state.errors["no answer in 30 s"] = state.open
    seconds = time.perf_counter() - state.counts_from
    return Result(
        requests=len(state.latencies),
        seconds=seconds,
        errors=state.errors,
        latencies=list(state.latencies),
        cpu_seconds=time.process_time() - cpu_before,
        total_requests=state.total,
    )


def main() -> None:
    """Read a job, run it, write the result."""
    document: dict[str, Any] = json.load(sys.stdin)
    result = asyncio.run(run(Job(**document)))
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
