"""Every call of the client as a value: what goes out, and how its answer is read. No I/O, no clock.

The documented calls are those of `docs/api.md`. `data` carries the workspace's own body: a string as it is, anything
else as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from ngpu_client.errors import ApiError, TaskFailed, UnexpectedAnswer
from ngpu_client.records import Deployment, Progress, Result, content_of
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.receipt_file import ReceiptFile

T = TypeVar("T")

PENDING = 100
SUCCESS = 200
MAX_PAGE = 10_000


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request and the reading of its answer.

    Attributes:
        repeatable: whether it may be sent again when the connection broke before an answer.
        waits: whether the answer waits for a workspace: then the bootstrap's limits hold, not the client's.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    repeatable: bool = True
    waits: bool = False


def body_text(data: Any) -> str:
    """Return what travels in `data` for a body given as text or as a JSON value."""
    return data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Options:
    """What may be asked of a task beside the call itself; see `Client.submit`."""

    btc_address: str = ""
    timeout_s: float | None = None
    priority: int | None = None
    webhook: str = ""
    affinity: str = ""

    def headers(self, key: str) -> dict[str, str]:
        """Return the request's fields; *key* makes sending it again safe."""
        fields = {"Idempotency-Key": key}
        if self.timeout_s is not None:
            fields["Ngpu-Timeout"] = f"{self.timeout_s:g}"
        if self.priority is not None:
            fields["Ngpu-Priority"] = str(self.priority)
        if self.webhook:
            fields["Ngpu-Webhook"] = self.webhook
        if self.affinity:
            fields["Ngpu-Affinity"] = self.affinity
        return fields


def submit(path: str, data: Any, port: int | None, options: Options, key: str) -> Call[str]:
    """Submit a task; its id comes back once it is committed."""
    params: dict[str, str | int] = {"paramUrl": path}
    if port is not None:
        params["paramPort"] = port
    return Call(
        "POST",
        "/user/schedulingTask",
        _task_id,
        params=params,
        headers=options.headers(key),
        json=_wrapped(data, options),
    )


def submit_named(name: str, data: Any, options: Options, key: str) -> Call[str]:
    """Submit a task by the name of an asynchronous API of the workspace."""
    path = f"/user/{quote(name, safe='')}"
    return Call("POST", path, _task_id, headers=options.headers(key), json=_wrapped(data, options))


def call_named(name: str, data: Any, options: Options, key: str) -> Call[Result]:
    """Call a synchronous API of the workspace by its name; the answer comes back with the call."""
    request = body_text(data).encode()

    def read(response: httpx.Response) -> Result:
        document = _gateway(response)
        return _result(document, request)

    path = f"/user/{quote(name, safe='')}"
    return Call("POST", path, read, headers=options.headers(key), json=_wrapped(data, options), waits=True)


def poll(task_id: str, request: bytes | None = None) -> Call[Result | Progress]:
    """Ask for a task's result, or how far it is."""

    def read(response: httpx.Response) -> Result | Progress:
        document = _gateway(response)
        if document.get("result_size"):
            return _result(document, request)
        position = response.headers.get("ngpu-queue-position", "")
        return Progress(
            task_id=task_id,
            state=int(document.get("state", 0)),
            message=str(document.get("msg", "")),
            queue_position=int(position) if position.isdigit() else None,
        )

    return Call("GET", "/user/queryTask", read, params={"taskID": task_id})


def details(task_id: str) -> Call[dict[str, Any]]:
    """A task with its attempts, receipts and verdicts."""
    return Call("GET", f"/api/v1/tasks/{quote(task_id, safe='')}", _native)


def cancel(task_id: str) -> Call[dict[str, Any]]:
    """Ask for a task to end; the workspace is told."""
    return Call("DELETE", f"/api/v1/tasks/{quote(task_id, safe='')}", _native)


def receipt(task_id: str) -> Call[ReceiptFile]:
    """The receipt file of a task's last attempt."""

    def read(response: httpx.Response) -> ReceiptFile:
        try:
            return ReceiptFile.from_document(_native(response))
        except MalformedError as error:
            raise UnexpectedAnswer(f"the receipt cannot be read: {error}") from error

    return Call("GET", f"/api/v1/tasks/{quote(task_id, safe='')}/receipt", read)


@dataclass(frozen=True, slots=True)
class Page:
    """Task ids, newest first; *cursor* is empty on the last page."""

    task_ids: tuple[str, ...]
    cursor: str


def task_page(since: str | None, until: str | None, node: str | None, cursor: str, limit: int) -> Call[Page]:
    """One page of a workspace's tasks, of one node where *node* is given."""

    def read(response: httpx.Response) -> Page:
        document = _gateway(response)
        return Page(tuple(map(str, document.get("taskIds", ()))), str(document.get("cursor", "") or ""))

    params: dict[str, str | int] = {"limit": min(limit, MAX_PAGE)}
    for name, value in (("startTime", since), ("endTime", until), ("nodeAddr", node), ("cursor", cursor)):
        if value:
            params[name] = value
    return Call("GET", "/user/getTasksFromNode" if node else "/user/queryTaskList", read, params=params)


def deployments(workspace: str) -> Call[tuple[Deployment, ...]]:
    """Where a workspace is deployed, and how far."""

    def read(response: httpx.Response) -> tuple[Deployment, ...]:
        return tuple(
            Deployment(
                node_addr=str(one["node"]),
                revision=int(one["revision"]),
                state=str(one["state"]),
                progress=int(one.get("progress", 0)),
                bytes_done=int(one.get("bytes_done", 0)),
                bytes_total=int(one.get("bytes_total", 0)),
                seconds_left=one.get("seconds_left"),
                reason=str(one.get("reason", "")),
                detail=str(one.get("detail", "")),
            )
            for one in _native(response).get("deployments", ())
        )

    return Call("GET", f"/api/v1/workspaces/{quote(workspace, safe='')}/deployments", read)


def refusal_of(response: httpx.Response) -> ApiError:
    """Return the error in an answer of either dialect."""
    try:
        document = response.json()
    except ValueError:
        document = None
    fields = document if isinstance(document, dict) else {}
    message = fields.get("message") or fields.get("msg") or response.reason_phrase or "no explanation"
    after = response.headers.get("retry-after", "")
    return ApiError(
        response.status_code, str(fields.get("reason", "")), str(message), float(after) if after.isdigit() else None
    )


def _wrapped(data: Any, options: Options) -> dict[str, str]:
    wrapped = {"data": body_text(data)}
    if options.btc_address:
        wrapped["btc_address"] = options.btc_address
    return wrapped


def _native(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise refusal_of(response)
    return _object(response)


def _gateway(response: httpx.Response) -> dict[str, Any]:
    """Return the gateway's answer; one that says how a workspace answered is not an error here, whatever its status."""
    if response.is_error and "ngpu-task-id" not in response.headers:
        document = _object(response) if "json" in response.headers.get("content-type", "") else {}
        if "taskId" not in document:
            raise refusal_of(response)
        return document
    return _object(response)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code} without a JSON object: is it a bootstrap?"
        )
    return document


def _task_id(response: httpx.Response) -> str:
    document = _gateway(response)
    task_id = document.get("taskId")
    if response.is_error or not isinstance(task_id, str):
        raise refusal_of(response)
    return task_id


def _result(document: dict[str, Any], request: bytes | None) -> Result:
    task_id, code = str(document.get("taskId", "")), document.get("result_code")
    content = content_of(document)
    if code != SUCCESS:
        shown = content.decode("utf-8", "replace")
        raise TaskFailed(
            task_id,
            code if isinstance(code, int) else 0,
            str(document.get("reason", "")),
            str(document.get("msg", "")),
            shown,
        )
    return Result(task_id, content, str(document.get("content_type", "")), request)
