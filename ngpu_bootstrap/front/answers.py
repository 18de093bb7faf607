"""The shapes of the bootstrap's own answers: results, pending polls and refusals, as the documents spell them.

On `/user/...` an answer is `{"result_code", "msg", ...}` and an error's `result_code` equals its HTTP status; on
every other path an error is `{"reason", "message"}`. `data` is a string whatever the workspace answered: text as it
is, anything else base64 with `encoding` and `content_type` beside it, so that no byte is lost and no client that
expects a string breaks. The id is given as `taskID`, `taskId` and `task_id`, because
clients read either. Pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ngpu_bootstrap.dispatch.calls import ClientFault
from ngpu_bootstrap.errors import NotServed, Refusal
from ngpu_bootstrap.store.errors import StoreError
from ngpu_protocol.http1 import RemoteError

Headers = list[tuple[bytes, bytes]]

SUCCESS = 200
PENDING = 100
_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/javascript", "application/x-ndjson")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of the bootstrap itself: never a workspace's."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class WorkspaceAnswer:
    """What a workspace answered to a wrapped call."""

    status: int
    body: bytes
    content_type: str


def json_answer(status: int, document: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
    """Return *document* as an answer."""
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
    fields: Headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    for name, value in (headers or {}).items():
        fields.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    return Answer(status, fields, body)


def refusal_for(error: Exception) -> Refusal:
    """Return what the client of a call gets that *error* ended before anything was answered."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, StoreError):
        return NotServed(503, "store_unavailable", "the task cannot be stored now; come again", retry_after_s=5)
    fault = error.error if isinstance(error, ClientFault) else error
    assert isinstance(fault, RemoteError)
    return Refusal(fault.status, fault.reason, str(fault))


def refusal_answer(refusal: Refusal, *, documented: bool, task_id: str | None = None) -> Answer:
    """Return how *refusal* looks on the wire.

    Args:
        documented: True on `/user/...`, where the documents fix the shape.
        task_id: of the task that was accepted and then could not be served; None when there is none.
    """
    document: dict[str, Any] = (
        {"result_code": refusal.status, "msg": refusal.message, "reason": refusal.reason}
        if documented
        else {"reason": refusal.reason, "message": refusal.message}
    )
    headers = dict(refusal.headers)
    if task_id is not None:
        document |= _ids(task_id)
        headers["Ngpu-Task-Id"] = task_id
    return json_answer(refusal.status, document, headers)


def broken_request(error: RemoteError) -> dict[str, Any]:
    """Return what is said of a request that could not even be read: in both shapes, as no path of it is known."""
    words = str(error)
    return {"result_code": error.status, "msg": words, "reason": error.reason, "message": words}


def submitted(task_id: str, result_code: int = SUCCESS) -> Answer:
    """Return the answer to an asynchronous call that was accepted and committed."""
    return json_answer(200, {"result_code": result_code, "msg": "success", **_ids(task_id)}, {"Ngpu-Task-Id": task_id})


def completed(task_id: str, answer: WorkspaceAnswer) -> Answer:
    """Return the answer to a synchronous wrapped call; the workspace's own error status is the HTTP status too."""
    document = {**_outcome(answer.status), **_data(answer), **_ids(task_id)}
    status = answer.status if answer.status >= 400 else 200
    return json_answer(status, document, {"Ngpu-Task-Id": task_id})


def pending(
    task_id: str, state: int, state_name: str, waits_for: str = "", queue_position: int | None = None
) -> Answer:
    """Return the answer to a poll of a task that has no result yet.

    Args:
        waits_for: what it waits for while no node serves its workspace, if known.
        queue_position: how many wait for a slot before it does; None when it does not wait.
    """
    headers: dict[str, str] = {}
    if queue_position is not None:
        waits_for = waits_for or f"it waits for a free slot, {queue_position} before it"
        headers["Ngpu-Queue-Position"] = str(queue_position)
    document = {
        "result_code": PENDING,
        "msg": f"the task is {state_name}: {waits_for}" if waits_for else f"the task is {state_name}",
        "result_size": 0,
        "state": state,
        "data": "",
    }
    return json_answer(200, {**document, **_ids(task_id)}, headers)


def polled(task_id: str, state: int, answer: WorkspaceAnswer) -> Answer:
    """Return the answer to a poll of a task whose workspace answered. HTTP 200: the poll itself succeeded."""
    document = {**_outcome(answer.status), "result_size": 1, "state": state, **_data(answer)}
    return json_answer(200, {**document, **_ids(task_id)})


def polled_failure(
    task_id: str, state: int, result_code: int, reason: str, message: str, loss: Mapping[str, Any] | None = None
) -> Answer:
    """Return the answer to a poll of a task that ended without a workspace's answer: `result_size` 1, polling ends.

    Args:
        loss: what this bootstrap signed about a job whose node is gone.
    """
    document: dict[str, Any] = {
        "result_code": result_code,
        "msg": message,
        "reason": reason,
        "result_size": 1,
        "state": state,
        "data": "",
    }
    if loss is not None:
        document["loss"] = loss
    return json_answer(200, {**document, **_ids(task_id)})


def text_of(body: bytes, content_type: str) -> str | None:
    """Return *body* as text, or None when it is not text by its type or by its bytes.

    A type that says text in another charset is honoured where Python knows it; bytes with no type are text when they
    are UTF-8 without control characters that no text holds.
    """
    media, _, parameters = content_type.partition(";")
    media = media.strip().lower()
    declared_text = media.startswith(_TEXT_TYPES) or media.endswith(("+json", "+xml"))
    if not declared_text and media not in ("", "application/x-www-form-urlencoded"):
        return None
    try:
        text = body.decode(_charset(parameters))
    except (UnicodeDecodeError, LookupError):
        return None
    return text if declared_text or "\0" not in text else None


def _charset(parameters: str) -> str:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip('"').lower()
            return charset if charset in ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin1") else "utf-8"
    return "utf-8"


def _outcome(status: int) -> dict[str, Any]:
    if 200 <= status < 300:
        return {"result_code": SUCCESS, "msg": "success"}
    return {"result_code": status, "msg": f"the workspace answered with status {status}"}


def _data(answer: WorkspaceAnswer) -> dict[str, Any]:
    text = text_of(answer.body, answer.content_type)
    if text is not None:
        return {"data": text}
    encoded = base64.b64encode(answer.body).decode()
    return {"data": encoded, "encoding": "base64", "content_type": answer.content_type or "application/octet-stream"}


def _ids(task_id: str) -> dict[str, str]:
    return {"taskID": task_id, "taskId": task_id, "task_id": task_id}
