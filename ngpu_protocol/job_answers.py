"""How a workspace's answers about one of its jobs are read: where the state stands, and which values of it are final.

Workspaces that submit and poll by themselves agree on nothing but that they answer JSON. So what to look for is
declared: JSON pointers (RFC 6901), several where an answer has several forms, of which the first that leads to a value
counts. `{id}` inside a pointer's token stands for the job's id, since some answer `{"<id>": {...}}`. A bootstrap reads
answers by these rules, and so does a node that asks its workspace again and again for one order (`PollUntil`), so that
the order, its slot and its receipt last as long as the job does.

Pure.
"""

from __future__ import annotations

import base64
import json
import re
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.frozen import dataclass

UNTIL_HEADER = "Ngpu-Until"
"""Of an order's request: the node repeats it on its workspace until the answer's state is final (`PollUntil`)."""

BESIDE_HEADER = "Ngpu-Beside"
"""Of an order's request: the id of a task whose question the node repeats on the same deployment (`Ngpu-Until`). That
task holds a slot there, and this order is about it, so it needs none of its own; `MAX_BESIDE` such orders at once."""

MAX_BESIDE = 4
MAX_UNTIL_BYTES = 8 * 1024
MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""An answer about a job that is longer is not read: no state is expected in it."""
MAX_ID_CHARS = 256
MAX_TEXT_CHARS = 2000

Scalar = str | int | float | bool
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def check_pointer(text: str) -> str:
    """Return *text* if it is a JSON pointer.

    Raises:
        ValueError: it is none.
    """
    if (text and not text.startswith("/")) or re.search(r"~(?![01])", text):
        raise ValueError("must be a JSON pointer (RFC 6901) such as /task_id or /data/0/id")
    return text


Pointer = Annotated[str, Field(max_length=512), AfterValidator(check_pointer)]
Pointers = Annotated[tuple[Pointer, ...], Field(max_length=16)]
Values = Annotated[
    tuple[Annotated[str, Field(max_length=256)] | bool | int | float, ...],
    Field(max_length=32),
]


def at_pointer(document: Any, pointer: str, job_id: str = "") -> Any:
    """Return what *pointer* leads to in *document*; None where it leads nowhere, or to null.

    Args:
        job_id: what `{id}` in the pointer stands for.
    """
    found = document
    for token in pointer.split("/")[1:]:
        # unescaped before the id is put in: an id may hold a ~ of its own
        name = token.replace("~1", "/").replace("~0", "~").replace("{id}", job_id)
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and _INDEX.fullmatch(name) and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def first_of(document: Any, pointers: tuple[str, ...], job_id: str = "") -> Any:
    """Return what the first of *pointers* that leads to something leads to; None where none does."""
    for pointer in pointers:
        found = at_pointer(document, pointer, job_id)
        if found is not None:
            return found
    return None


class JobState(StrEnum):
    """What an answer says of its job."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    """No JSON, or nothing where the state should stand: the job may be anywhere."""


@dataclass(frozen=True, slots=True)
class Read:
    """An answer about a job, read.

    Attributes:
        state: the workspace's own word, for people.
        progress: 0 to 1, None where the answer does not say.
        error: the workspace's words for what went wrong.
        result: where the result stands: None where nothing is declared or there.
    """

    means: JobState
    state: str = ""
    progress: float | None = None
    error: str = ""
    result: Any = None


class Signs(BaseModel):
    """Where to look in the answer to a poll, and what the values found there mean.

    Attributes:
        state: of the job; every value that is not among *done* and *failed* means that it goes on.
        done: final values of success.
        failed: final values of failure.
        error: what went wrong, in words.
        result: of a job that is done.
        progress: a number up to 1, or up to 100.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Annotated[Pointers, Field(min_length=1)]
    done: Annotated[Values, Field(min_length=1)]
    failed: Values = ()
    error: Pointers = ()
    result: Pointers = ()
    progress: Pointers = ()

    def read(self, status: int, body: bytes, job_id: str) -> Read:
        """Return what an answer with *status* and *body* says of the job *job_id*. Never raises."""
        if not 200 <= status < 300:
            return Read(JobState.UNREADABLE, error=f"status {status}")
        document = parsed(body)
        if document is None:
            return Read(JobState.UNREADABLE, error="no JSON")
        state = first_of(document, self.state, job_id)
        if not isinstance(state, str | int | float | bool):
            return Read(JobState.UNREADABLE, error="no state where it should stand")
        shown = state if isinstance(state, str) else json.dumps(state)
        means = JobState.PENDING
        if _is_among(state, self.failed):
            means = JobState.FAILED
        elif _is_among(state, self.done):
            means = JobState.DONE
        return Read(
            means,
            state=shown[:64],
            progress=_progress(first_of(document, self.progress, job_id)),
            error=_words(first_of(document, self.error, job_id)) if means is not JobState.DONE else "",
            result=first_of(document, self.result, job_id),
        )


class PollUntil(BaseModel):
    """What a node is told with an order that it repeats: how to read the answers, how often to ask, and how long.

    Attributes:
        job_id: for pointers that name it.
        interval_ms: between an answer and the next question.
        hold_ms: after which the answer goes back as it is, final or not; the order's deadline holds as well.
        ask_ms: what one question may take; None: as long as all of them.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    signs: Signs
    job_id: Annotated[str, Field(max_length=MAX_ID_CHARS)]
    interval_ms: Annotated[int, Field(ge=10, le=600_000)]
    hold_ms: Annotated[int, Field(ge=0, le=3_600_000)]
    ask_ms: Annotated[int, Field(ge=10, le=3_600_000)] | None = None

    def encode(self) -> bytes:
        """Return the value of the field `Ngpu-Until`."""
        return base64.urlsafe_b64encode(self.model_dump_json(exclude_defaults=True).encode()).rstrip(b"=")

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """Return what the field `Ngpu-Until` says.

        Raises:
            MalformedError: it cannot be understood.
        """
        if len(text) > MAX_UNTIL_BYTES:
            raise MalformedError("ngpu_until", f"{len(text)} bytes, more than {MAX_UNTIL_BYTES}")
        try:
            padded = text + b"=" * (-len(text) % 4)
            return cls.model_validate_json(base64.b64decode(padded, altchars=b"-_", validate=True))
        except (ValueError, ValidationError) as error:
            raise MalformedError("ngpu_until", f"cannot be understood: {type(error).__name__}") from None


def parsed(body: bytes) -> Any:
    """Return the JSON value *body* is; None where it is none, or is null, or too long to be looked at."""
    if len(body) > MAX_ANSWER_BYTES:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def job_id_in(document: Any, pointers: tuple[str, ...]) -> str | None:
    """Return the id of a job that a workspace answered with; None where there is none that can be one.

    Text goes as it is, whole numbers as their digits. An id with control characters, or too long, is none: it becomes
    part of targets and of rows.
    """
    found = first_of(document, pointers)
    if isinstance(found, int) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str) or not found or len(found) > MAX_ID_CHARS or not found.isprintable():
        return None
    return found


def _is_among(value: Scalar, values: tuple[Scalar, ...]) -> bool:
    # True == 1 in Python and not in JSON; 1 and 1.0 are one number in both
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _progress(found: Any) -> float | None:
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 100:
        return None
    return found if found <= 1 else found / 100


def _words(found: Any) -> str:
    if found is None:
        return ""
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return text.replace("\0", "")[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode()
