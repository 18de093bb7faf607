"""The client for programs with an event loop, trio's or asyncio's: `client` with `await`. See there for each method."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import httpx

from ngpu_client import calls
from ngpu_client.calls import Call, Options
from ngpu_client.client import CONNECT_TIMEOUT_S, DEFAULT_TIMEOUT_S, new_key, unreachable, workspace_of
from ngpu_client.errors import AnswerCut, ApiError, NotFinished
from ngpu_client.receipts import ReceiptCheck, check
from ngpu_client.records import Deployment, Progress, Result
from ngpu_client.waiting import TRIES, pauses, receipt_pauses
from ngpu_protocol.receipt_file import ReceiptFile

T = TypeVar("T")


class AsyncStreamed:
    """An answer that arrives piece by piece, as the workspace sends it.

    Attributes:
        status: the workspace's HTTP status.
        headers: its fields.
        task_id: for the receipt.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers = response.headers
        self.task_id: str = response.headers.get("ngpu-task-id", "")

    async def bytes(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they come.

        Raises:
            AnswerCut: it ended before it was whole.
        """
        try:
            async for piece in self._response.aiter_bytes():
                yield piece
        except httpx.TransportError as error:
            raise AnswerCut(f"the answer of task {self.task_id} was cut: {error}") from error

    async def events(self) -> AsyncIterator[str]:
        """Yield the `data:` of each server-sent event, as it comes.

        Raises:
            AnswerCut: as `bytes`.
        """
        try:
            async for line in self._response.aiter_lines():
                if line.startswith("data:"):
                    yield line[5:].removeprefix(" ")
        except httpx.TransportError as error:
            raise AnswerCut(f"the answer of task {self.task_id} was cut: {error}") from error


class AsyncClient:
    """A client of one workspace on one bootstrap. Use it as `async with`, or `aclose` it; tasks may share it.

    Args:
        url: of the bootstrap, such as ``http://127.0.0.1:8080``.
        token: the workspace's.
        timeout_s: for one request to be answered, but for those that wait for a workspace.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._token = token
        self._answering = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        self._waiting = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, read=None)
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=self._answering,
            transport=transport,
            trust_env=transport is None,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Tasks go on."""
        await self._http.aclose()

    # -- running something

    async def submit(
        self, path: str, data: Any, *, port: int | None = None, options: Options | None = None, key: str | None = None
    ) -> str:
        """Submit a task to the workspace's *path* and return its id at once; it survives this program.

        Args:
            data: the workspace's request body: text as it is, anything else as JSON.
            port: one of the workspace's; its first by default.
            key: makes a second submission of the same work the same task; made up by default.

        Raises:
            ApiError: it was refused.
            BootstrapUnreachable: no answer came; with the same *key* it may be submitted again.
        """
        return await self._send(calls.submit(path, data, port, options or Options(), key or new_key()))

    async def submit_named(
        self, name: str, data: Any, *, options: Options | None = None, key: str | None = None
    ) -> str:
        """Submit a task by the name of an asynchronous API the workspace declares; else as `submit`."""
        return await self._send(calls.submit_named(name, data, options or Options(), key or new_key()))

    async def call(self, name: str, data: Any, *, options: Options | None = None, key: str | None = None) -> Result:
        """Call a synchronous API the workspace declares and return its answer.

        Raises:
            TaskFailed: the workspace answered an error, or could not.
            ApiError, BootstrapUnreachable: as `submit`.
        """
        return await self._send(calls.call_named(name, data, options or Options(), key or new_key()))

    async def poll(self, task_id: str) -> Result | Progress:
        """Return a task's result, or how far it is.

        Raises:
            TaskFailed: it ended otherwise.
        """
        return await self._send(calls.poll(task_id))

    async def wait(
        self,
        task_id: str,
        *,
        within_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        request: bytes | None = None,
    ) -> Result:
        """Return a task's result once there is one.

        Args:
            within_s: how long to wait; None for as long as it takes.
            on_progress: told whenever what is known of the task changes.
            request: the body that was sent, for checking the receipt.

        Raises:
            TaskFailed: it ended otherwise.
            NotFinished: the time is over; the task goes on.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        last: Progress | None = None
        for pause_s in pauses():
            found = await self._send(calls.poll(task_id, request))
            if isinstance(found, Result):
                return found
            if found != last and on_progress is not None:
                on_progress(found)
            last = found
            if deadline is not None and time.monotonic() + pause_s > deadline:
                break
            await anyio.sleep(pause_s)
        raise NotFinished(task_id, within_s or 0.0)

    async def run(
        self,
        path: str,
        data: Any,
        *,
        port: int | None = None,
        options: Options | None = None,
        within_s: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Result:
        """Submit a task and wait for its result: `submit` and `wait`."""
        task_id = await self.submit(path, data, port=port, options=options)
        request = calls.body_text(data).encode()
        return await self.wait(task_id, within_s=within_s, on_progress=on_progress, request=request)

    async def cancel(self, task_id: str) -> dict[str, Any]:
        """Ask for a task to end, and return it as it is a moment later."""
        return await self._send(calls.cancel(task_id))

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        port: int,
        json: Any = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[AsyncStreamed]:
        """Pass a request through to the workspace and give its answer as it comes. Never sent twice.

        Raises:
            ApiError: the bootstrap refused it. An error of the workspace itself is an answer like any other.
            BootstrapUnreachable: no answer came.
        """
        target = f"/proxy/{port}/{path.lstrip('/')}"
        try:
            async with self._http.stream(
                method, target, json=json, content=content, headers=headers, timeout=self._waiting
            ) as response:
                if response.is_error and "ngpu-task-id" not in response.headers:
                    await response.aread()
                    raise calls.refusal_of(response)
                yield AsyncStreamed(response)
        except httpx.TransportError as error:
            raise unreachable(error) from error

    # -- looking back

    async def details(self, task_id: str) -> dict[str, Any]:
        """Return a task with its attempts, receipts and verdicts, as `GET /api/v1/tasks/{id}` shows it."""
        return await self._send(calls.details(task_id))

    async def tasks(
        self, *, since: str | None = None, until: str | None = None, node: str | None = None, limit: int | None = None
    ) -> AsyncIterator[str]:
        """Yield the workspace's task ids, newest first.

        Args:
            since: a date or date-time in the bootstrap's zone; *until* likewise, a day included whole.
            node: only those of this nodeAddr.
            limit: how many at most.
        """
        left = -1 if limit is None else limit
        cursor = ""
        while True:
            page = await self._send(calls.task_page(since, until, node, cursor, 1000))
            for task_id in page.task_ids:
                if left == 0:
                    return
                left -= 1
                yield task_id
            cursor = page.cursor
            if not cursor:
                return

    async def deployments(self) -> tuple[Deployment, ...]:
        """Return where the workspace is deployed, and how far."""
        return await self._send(calls.deployments(workspace_of(self._token)))

    async def receipt(self, task_id: str, *, within_s: float = 10.0) -> ReceiptFile:
        """Return a task's receipt, acknowledged; it comes moments after the answer.

        Raises:
            NotFinished: there is none in time.
        """
        deadline = time.monotonic() + within_s
        for pause_s in receipt_pauses():
            try:
                file = await self._send(calls.receipt(task_id))
                if file.acknowledgement is not None:
                    return file
            except ApiError as error:
                if error.reason != "no_receipt":
                    raise
            if time.monotonic() + pause_s > deadline:
                break
            await anyio.sleep(pause_s)
        raise NotFinished(task_id, within_s)

    async def check(self, result: Result | str, *, within_s: float = 10.0) -> ReceiptCheck:
        """Fetch the receipt of a result, or of a task by its id, and judge it here, rule by rule."""
        task_id = result if isinstance(result, str) else result.task_id
        return check(await self.receipt(task_id, within_s=within_s), None if isinstance(result, str) else result)

    # -- carrying

    async def _send(self, call: Call[T]) -> T:
        for tries, pause_s in enumerate(pauses(), start=1):
            try:
                response = await self._http.request(
                    call.method,
                    call.path,
                    params=call.params,
                    headers=call.headers,
                    json=call.json,
                    timeout=self._waiting if call.waits else self._answering,
                )
            except httpx.TransportError as error:
                if tries == TRIES or not call.repeatable:
                    raise unreachable(error) from error
                await anyio.sleep(pause_s)
            else:
                return call.read(response)
        raise AssertionError("pauses never end")
