"""What a client gets to see: a task's progress, its result, where a workspace is deployed."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class TaskState(IntEnum):
    """Where a task stands; from FINISHED on nothing changes any more."""

    ACCEPTED = 0
    DISPATCHED = 1
    RUNNING = 2
    FINISHED = 3
    FAILED = 4
    CANCELLED = 5
    EXPIRED = 6


@dataclass(frozen=True, slots=True)
class Progress:
    """A task that has no result yet.

    Attributes:
        state: a `TaskState`; a later version's number stays a number.
        message: for people: what it is at, or waits for.
        queue_position: how many wait for a slot before it; None when it does not wait for one.
    """

    task_id: str
    state: int
    message: str
    queue_position: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a workspace answered.

    Attributes:
        content: the body, byte for byte.
        content_type: as the workspace declared it where it was not text; else empty.
        request: the body this client sent to the workspace, for checking the receipt; None when it is not known.
    """

    task_id: str
    content: bytes
    content_type: str = ""
    request: bytes | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """Return the body's JSON value.

        Raises:
            ValueError: it is none.
        """
        return json.loads(self.content)


@dataclass(frozen=True, slots=True)
class Deployment:
    """A workspace on one node.

    Attributes:
        state: queued, pulling, starting, ready, unhealthy, failed, stopping or gone.
        progress: of getting the image, in percent.
        bytes_total: 0 while unknown.
        reason: a stable word for what is not as it should be, and `detail` a sentence.
    """

    node_addr: str
    revision: int
    state: str
    progress: int
    bytes_done: int
    bytes_total: int
    seconds_left: int | None
    reason: str
    detail: str


def content_of(document: dict[str, Any]) -> bytes:
    """Return the bytes in the `data` of a gateway's answer."""
    data = document.get("data", "")
    text = data if isinstance(data, str) else json.dumps(data)
    if document.get("encoding") == "base64":
        return base64.b64decode(text)
    return text.encode()
