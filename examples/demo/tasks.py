"""The three tasks a client runs in the demonstration, with `ngpu_client` as any program would.

Each returns a `TaskRun`; `collect_receipt` adds the receipt file the bootstrap gives for it, checked here rule by rule,
against the bytes that were sent and that came where the client saw them whole.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from json import loads
from typing import Any, TypeVar

from ngpu_client import Client, NgpuError, Options, Progress, Result

PORT = 8000
CHAT_PATH = "/v1/chat/completions"
RECEIPT_TIMEOUT_S = 15.0
TASK_TIMEOUT_S = 60.0

T = TypeVar("T")


class TaskFailed(Exception):
    """A task did not end as it should; the message says what came instead."""


@dataclass(slots=True)
class TaskRun:
    """One task and what came of it.

    Attributes:
        mode: sync, async or stream.
        text: the words the workspace answered.
        wall_ms: from sending the request to having the whole answer, at the client.
        result: the answer as the client got it, None for a streamed one.
        receipt_file: the document of ``GET /api/v1/tasks/{id}/receipt``.
        broken: names of the rules that do not hold.
    """

    task_id: str
    mode: str
    text: str
    wall_ms: int
    result: Result | None = None
    receipt_file: dict[str, Any] = field(default_factory=dict)
    broken: tuple[str, ...] = ()

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
        """Whether the receipt met every rule, at the bootstrap and here."""
        return self.verdict == "verified" and not self.broken


def synchronous(client: Client) -> TaskRun:
    """Call the workspace by the name it declares and wait for the answer, which comes with the call."""
    started = time.monotonic()
    result = _asked(lambda: client.call("chat", _chat("What does a receipt say?", seed=1, max_tokens=24)))
    return TaskRun(result.task_id, "sync", _completion_text(result), _ms_since(started), result)


def asynchronous(client: Client, say: Callable[[str], None]) -> TaskRun:
    """Submit a task and come back for its answer, as long jobs are run."""
    started = time.monotonic()

    def run() -> Result:
        return client.run(
            CHAT_PATH.lstrip("/"),
            _chat("How does a node admit an order?", seed=2, max_tokens=48),
            port=PORT,
            options=Options(timeout_s=TASK_TIMEOUT_S),
            within_s=TASK_TIMEOUT_S,
            on_progress=lambda progress: say(_progress_text(progress)),
        )

    result = _asked(run)
    return TaskRun(result.task_id, "async", _completion_text(result), _ms_since(started), result)


def streamed(client: Client, show_event: Callable[[int, str], None]) -> TaskRun:
    """Stream a completion through ``/proxy/``; *show_event* gets each piece with its milliseconds as it arrives."""
    started = time.monotonic()
    request = {**_chat("A task runs", seed=3, max_tokens=16), "stream": True}
    pieces: list[str] = []
    done = False
    try:
        with client.stream("POST", CHAT_PATH, port=PORT, json=request) as answer:
            if answer.status != 200:
                raise TaskFailed(f"the workspace answered {answer.status}: {b''.join(answer.bytes())[:500]!r}")
            for event in answer.events():
                if event == "[DONE]":
                    done = True
                    continue
                piece = loads(event)["choices"][0]["delta"].get("content", "")
                if piece:
                    pieces.append(piece)
                    show_event(_ms_since(started), piece)
    except NgpuError as error:
        raise TaskFailed(f"the streamed task: {error}") from error
    if not done or not answer.task_id:
        raise TaskFailed("the stream ended without its last event, or without a task id")
    return TaskRun(answer.task_id, "stream", "".join(pieces), _ms_since(started))


def collect_receipt(client: Client, run: TaskRun) -> None:
    """Fetch the task's receipt once it is acknowledged, and check it.

    Raises:
        TaskFailed: it is not there in time.
    """
    checked = _asked(lambda: client.check(run.result or run.task_id, within_s=RECEIPT_TIMEOUT_S))
    run.receipt_file = checked.file.to_document()
    run.broken = checked.broken


def _asked(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except NgpuError as error:
        raise TaskFailed(str(error)) from error


def _progress_text(progress: Progress) -> str:
    return f"{progress.task_id}: {progress.message}"


def _chat(prompt: str, *, seed: int, max_tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": max_tokens}


def _completion_text(result: Result) -> str:
    try:
        return str(result.json()["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise TaskFailed(f"the workspace's answer is not a chat completion: {result.text[:500]}") from error


def _ms_since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
