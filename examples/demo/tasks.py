"""The three tasks a client runs in the demonstration, spoken as any client would: plain HTTP, nothing of this project.

Each returns a `TaskRun` with the receipt file the bootstrap gives for it. A task's receipt may arrive after its answer
(the node sends it last), and its acknowledgement after that, so `collect_receipt` asks until both are there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

PORT = 8000
CHAT_PATH = "/v1/chat/completions"
RECEIPT_TIMEOUT_S = 15.0
_POLL_S = 0.1

Say = Callable[[str], None]


class TaskFailed(Exception):
    """A task did not end as it should; the message says what came instead."""


@dataclass(slots=True)
class TaskRun:
    """One task and what came of it.

    Attributes:
        mode: sync, async or stream.
        text: the words the workspace answered.
        wall_ms: from sending the request to having the whole answer, at the client.
        receipt_file: the document of ``GET /api/v1/tasks/{id}/receipt``.
    """

    task_id: str
    mode: str
    text: str
    wall_ms: int
    receipt_file: dict[str, Any] = field(default_factory=dict)

    @property
    def receipt(self) -> dict[str, Any]:
        """The receipt's fields by their names on the wire."""
        found: dict[str, Any] = self.receipt_file["receipt"]
        return found

    @property
    def node_addr(self) -> str:
        """Who ran it."""
        return str(self.receipt["node"])

    @property
    def verdict(self) -> str:
        """What the bootstrap acknowledged: verified, skew or disputed."""
        return str((self.receipt_file.get("acknowledgement") or {}).get("verdict", "none"))

    @property
    def verified(self) -> bool:
        """Whether the receipt met every rule."""
        return self.verdict == "verified"


def synchronous(client: httpx.Client) -> TaskRun:
    """Call the workspace by the name it declares and wait for the answer, which comes wrapped in ``data``."""
    started = time.monotonic()
    body = json.dumps(_chat("What does a receipt say?", seed=1, max_tokens=24))
    answer = client.post("/user/chat", json={"data": body})
    document = _document(answer)
    return TaskRun(
        task_id=str(document["taskId"]),
        mode="sync",
        text=_completion_text(document["data"]),
        wall_ms=_ms_since(started),
    )


def asynchronous(client: httpx.Client, say: Say) -> TaskRun:
    """Submit a task and poll for its answer, as long jobs are run."""
    started = time.monotonic()
    body = json.dumps(_chat("How does a node admit an order?", seed=2, max_tokens=48))
    submitted = client.post(
        "/user/schedulingTask", params={"paramUrl": CHAT_PATH.lstrip("/"), "paramPort": PORT}, json={"data": body}
    )
    task_id = str(_document(submitted)["taskId"])
    say(f"submitted {task_id}")
    polls = 0
    while True:
        polls += 1
        document = client.get("/user/queryTask", params={"taskID": task_id}).json()
        code = document.get("result_code")
        if code == 200:
            break
        if code != 100 or time.monotonic() - started > 60:
            raise TaskFailed(f"the asynchronous task {task_id} ended with {document}")
        time.sleep(0.25)
    say(f"finished after {polls} polls")
    return TaskRun(task_id, "async", _completion_text(document["data"]), _ms_since(started))


def streamed(client: httpx.Client, show_event: Callable[[int, str], None]) -> TaskRun:
    """Stream a completion through ``/proxy/``; *show_event* gets each piece with its milliseconds as it arrives."""
    started = time.monotonic()
    request = {**_chat("A task runs", seed=3, max_tokens=16), "stream": True}
    pieces: list[str] = []
    done = False
    with client.stream("POST", f"/proxy/{PORT}{CHAT_PATH}", json=request) as answer:
        if answer.status_code != 200:
            raise TaskFailed(f"the streamed task was answered {answer.status_code}: {answer.read()[:500]!r}")
        task_id = answer.headers.get("ngpu-task-id", "")
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                continue
            piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            if piece:
                pieces.append(piece)
                show_event(_ms_since(started), piece)
    if not done or not task_id:
        raise TaskFailed("the stream ended without its last event, or without a task id")
    return TaskRun(task_id, "stream", "".join(pieces), _ms_since(started))


def collect_receipt(client: httpx.Client, run: TaskRun) -> None:
    """Fetch the task's receipt file once it is acknowledged.

    Raises:
        TaskFailed: it is not there in time.
    """
    deadline = time.monotonic() + RECEIPT_TIMEOUT_S
    while True:
        answer = client.get(f"/api/v1/tasks/{run.task_id}/receipt")
        if answer.status_code == 200:
            run.receipt_file = answer.json()
            if run.receipt_file.get("acknowledgement"):
                return
        if time.monotonic() > deadline:
            raise TaskFailed(
                f"no acknowledged receipt of task {run.task_id} within {RECEIPT_TIMEOUT_S:.0f} s: "
                f"{answer.status_code} {answer.text[:300]}"
            )
        time.sleep(_POLL_S)


def _chat(prompt: str, *, seed: int, max_tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": max_tokens}


def _document(answer: httpx.Response) -> dict[str, Any]:
    try:
        document = answer.json()
    except ValueError:
        document = None
    if answer.status_code != 200 or not isinstance(document, dict) or not document.get("taskId"):
        raise TaskFailed(f"{answer.request.url} was answered {answer.status_code}: {answer.text[:500]}")
    return document


def _completion_text(data: str) -> str:
    try:
        return str(json.loads(data)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise TaskFailed(f"the workspace's answer is not a chat completion: {data[:500]}") from error


def _ms_since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
