"""What the bootstrap is asked to run: one call of a client on one workspace, complete enough to be run again."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import field
from typing import Protocol

from ngpu_bootstrap.errors import BootstrapError
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.job_rows import JobRow
from ngpu_bootstrap.store.records import NewTask
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.http1 import Exchange, Headers, RemoteError, trailers_end_to_end
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

NOTHING_HASH = hashlib.sha256().digest()


class ClientFault(BootstrapError):
    """The client's request broke while it was being read: `error` says how, and what it is answered."""

    def __init__(self, error: RemoteError) -> None:
        super().__init__(str(error))
        self.error = error


class Body(Protocol):
    """A request's body on its way to a node."""

    @property
    def can_be_sent(self) -> bool:
        """Whether it can go out (again): not once a part of it was taken from a client."""

    async def prepare(self) -> bytes | AsyncIterable[bytes]:
        """Return what is to be sent."""

    def sent(self) -> tuple[bytes, int]:
        """Return the SHA-256 and the length of what was sent, once it went out whole."""


class WholeBody:
    """A body that is at hand."""

    __slots__ = ("_hash", "content")

    can_be_sent = True

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self._hash: bytes | None = None if content else NOTHING_HASH

    async def prepare(self) -> bytes:
        return self.content

    def sent(self) -> tuple[bytes, int]:
        if self._hash is None:
            self._hash = hashlib.sha256(self.content).digest()
        return self._hash, len(self.content)


class KeptBody:
    """A body that waits in the store and is read when a node is there to take it."""

    __slots__ = ("_read", "_sent")

    can_be_sent = True

    def __init__(self, read: Callable[[], Awaitable[bytes]]) -> None:
        self._read = read
        self._sent = (NOTHING_HASH, 0)

    async def prepare(self) -> bytes:
        content = await self._read()
        self._sent = (hashlib.sha256(content).digest(), len(content))
        return content

    def sent(self) -> tuple[bytes, int]:
        return self._sent


class StreamedBody:
    """A body that comes from the client while it goes to the node: it can be sent once.

    The client is asked for it (100 Continue) only when the node has asked, so until the first byte was taken the call
    can still go to another node.
    """

    __slots__ = ("_exchange", "_hash", "_sent_bytes", "_touched")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._hash = hashlib.sha256()
        self._sent_bytes = 0
        self._touched = False

    @property
    def can_be_sent(self) -> bool:
        return not self._touched

    @property
    def trailers(self) -> Headers:
        """The request's trailers for the workspace, once the body was taken whole."""
        return [pair for pair in trailers_end_to_end(self._exchange.trailers) if not pair[0].startswith(b"ngpu-")]

    async def prepare(self) -> AsyncIterable[bytes]:
        return self

    def sent(self) -> tuple[bytes, int]:
        return self._hash.digest(), self._sent_bytes

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._touched = True
        try:
            data = await self._exchange.receive()
        except RemoteError as error:
            raise ClientFault(error) from error
        if not data:
            raise StopAsyncIteration
        self._hash.update(data)
        self._sent_bytes += len(data)
        return data


@dataclass(frozen=True, slots=True)
class Call:
    """One task as its client asked for it.

    Attributes:
        api: `schedulingTask`, the declared name, or `proxy`.
        method: of the request to the workspace.
        target: `/path?query` exactly as it goes to the workspace.
        headers: what goes to the workspace: no credential of ours, nothing hop-by-hop, no `Ngpu-` field.
        detach: the client does not wait on its connection.
        wrapped: the answer goes back inside `data`.
        idempotency_key: the client's own: it says that running the call again changes nothing.
        deadline_ms: after which the task is given up, waiting for a node included; one order gets the workspace's own
            time limit at most.
        upgrade: the client wants another protocol on the connection (WebSocket).
        priority: among waiting tasks of its workspace, higher first.
        webhook: URL that is told of the end; empty for none.
        affinity: the client's key for calls that belong on one node (`Ngpu-Affinity`); empty without one.
        tell_place: tells the client, who waits, how many calls wait before its own; None where it did not ask.
        caller: the workspace whose token asked for it, where that is another than the one it runs on; else empty.
        gpu_types: GPU models preferred for this call, the best first; empty for the workspace's own order.
        only: the one node it may go to; None for any.
        beside: the task it is about, which may hold a slot there that does for both; empty for most.
        job: what is kept of it where it is a job of the workspace's own; None for every other call.
    """

    task_id: str
    spec: WorkspaceSpec
    api: str
    method: str
    port: int
    target: str
    headers: Headers = field(repr=False)
    body: Body
    accepted_at_ms: int
    deadline_ms: int
    detach: bool = False
    wrapped: bool = False
    idempotency_key: str | None = None
    upgrade: bool = False
    affinity: bytes = b""
    tell_place: Callable[[int], Awaitable[None]] | None = field(default=None, repr=False, compare=False)
    btc_address: str = ""
    user_ip: str = ""
    request_url: str = ""
    token_label: str = ""
    priority: int = 0
    webhook: str = ""
    caller: str = ""
    gpu_types: tuple[str, ...] = ()
    only: Address | None = None
    beside: str = ""
    job: JobRow | None = None

    def new_task(self) -> NewTask:
        """Return the record of this call.

        Headers and body are kept for wrapped calls alone: they may be taken up again after a restart. What goes
        through is not ours to keep, and nobody could be given its answer later.
        """
        body: bytes | None = None
        headers: tuple[tuple[str, str], ...] = ()
        if self.wrapped and isinstance(self.body, WholeBody):
            body = self.body.content
            headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers)
        return NewTask(
            task_id=self.task_id,
            workspace=self.spec.id,
            revision=self.spec.revision,
            api=self.api,
            method=self.method,
            port=self.port,
            target=self.target,
            accepted_at_ms=self.accepted_at_ms,
            deadline_at_ms=self.deadline_ms,
            detach=self.detach,
            wrapped=self.wrapped,
            token_label=self.token_label,
            btc_address=self.btc_address,
            user_ip=self.user_ip,
            request_url=self.request_url,
            headers=headers,
            idempotency_key=self.idempotency_key if self.wrapped else None,
            request=body,
            priority=self.priority,
            webhook=self.webhook,
            caller=self.caller,
            job=None if self.job is None else job_rows.values(self.job),
            affinity=self.affinity.decode("latin-1"),
        )
