"""What is declared of jobs that a workspace runs by itself: how they are asked for, read, fetched and ended.

A job is submitted by one call, which answers at once with an id; it is asked for under that id until its state is
final; its result is in the last answer, or at a path that answer names. Said alike for a workspace's own APIs
(`workspaces.Api`) and in a bootstrap's profiles.

Pure. How answers are read is `job_answers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ngpu_protocol.job_answers import Pointers, Signs, Values, at_pointer, check_pointer

_OF_REQUEST = re.compile(r"\{request:(.*)\}")
# What of a client's request goes along with each question: an account, a session, no prompt.
MAX_REPEATED_CHARS = 256
Seconds = Annotated[float, Field(gt=0, le=604_800)]
_TARGET = re.compile(r"/(?!/)[!-~]*")
MIB = 1024 * 1024


class Ask(BaseModel):
    """A call about a job, made of its id.

    Attributes:
        target: path and query; `{id}` in it is the id, percent-encoded.
        body: a JSON value; texts `{id}` in it are the id. A member `"{request:/token}"` is what stands at that pointer
            in the body of the submission, and is left out where no short text or number stands there. None: no body.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Annotated[str, StringConstraints(pattern=r"^[A-Z]{1,16}$")] = "GET"
    target: Annotated[str, Field(max_length=1024)]
    body: Any = None

    @model_validator(mode="after")
    def _names_the_job(self) -> Self:
        if _TARGET.fullmatch(self.target.replace("{id}", "id")) is None:
            raise ValueError("target must begin with one / and hold only printable ASCII; {id} is the job's id")
        if "{id}" not in self.target and "{id}" not in json.dumps(self.body):
            raise ValueError("nothing in target and body names the job: write {id} where its id belongs")
        for pointer in _of_request(self.body):
            check_pointer(pointer)
        return self

    @property
    def repeats_request(self) -> bool:
        """Whether something of the submission's body goes along."""
        return any(True for _ in _of_request(self.body))

    def for_request(self, request: Any) -> Self:
        """Return the call for a job that the JSON value *request* submitted."""
        return self.model_copy(update={"body": _repeated(self.body, request)}) if self.repeats_request else self

    def target_of(self, job_id: str) -> str:
        """Return path and query for *job_id*."""
        return self.target.replace("{id}", quote(job_id, safe=""))

    def body_of(self, job_id: str) -> bytes:
        """Return the body for *job_id*, b"" where there is none."""
        return b"" if self.body is None else json.dumps(_filled(self.body, job_id), ensure_ascii=False).encode()


class JobTerms(BaseModel):
    """What is declared of the jobs of one submitting call.

    Attributes:
        id: of the job, in the answer to its submission.
        poll: how it is asked for.
        state, done, failed, error, result, progress: see `job_answers.Signs`.
        fetch: what *result* leads to is the path of a file in the workspace (or a URL of it by the workspace's own
            address), and that file is the job's result. Otherwise the last answer to a poll is.
        wait: the submission is answered once, with the result. Otherwise with the workspace's own answer, and the
            client asks for itself.
        hold: one order lasts as long as the job does, so that it takes one of the node's slots and its receipts count
            all of the job's GPU time. Without it the bootstrap asks now and then, the slot is free in between, and
            what the workspace does then is in no receipt.
        interval_s: between two questions.
        duration_s: after which a job is given up.
        submit_timeout_s, poll_timeout_s, fetch_timeout_s: of one call each; a held order is not one call.
        fetch_bytes: largest result that is fetched.
        lost_status: statuses of a poll that say that the workspace knows no such job (any more).
        away_s: how long the job's node may be away before the job counts as lost.
        cancel: how the workspace is told to end one; without it a cancelled job is only no longer asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[Pointers, Field(min_length=1)]
    poll: Ask
    state: Annotated[Pointers, Field(min_length=1)]
    done: Annotated[Values, Field(min_length=1)]
    failed: Values = ()
    error: Pointers = ()
    result: Pointers = ()
    progress: Pointers = ()
    fetch: bool = False
    wait: bool = True
    hold: bool = True
    interval_s: Annotated[float, Field(ge=0.05, le=600)] = 1.0
    duration_s: Seconds = 300.0
    submit_timeout_s: Seconds = 30.0
    poll_timeout_s: Seconds = 10.0
    fetch_timeout_s: Seconds = 30.0
    fetch_bytes: Annotated[int, Field(ge=1)] = 64 * MIB
    lost_status: tuple[Annotated[int, Field(ge=400, le=599)], ...] = (404, 410)
    away_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    cancel: Ask | None = None

    @model_validator(mode="after")
    def _fetches_something(self) -> Self:
        if self.fetch and not self.result:
            raise ValueError("fetch needs result: where the answer has the path of the file")
        return self

    @property
    def repeats_request(self) -> bool:
        """Whether something of the submission's body goes along with the calls about the job."""
        return self.poll.repeats_request or (self.cancel is not None and self.cancel.repeats_request)

    def for_request(self, request: Any) -> Self:
        """Return what is declared, filled in for a job that the JSON value *request* submitted."""
        if not self.repeats_request:
            return self
        cancel = None if self.cancel is None else self.cancel.for_request(request)
        return self.model_copy(update={"poll": self.poll.for_request(request), "cancel": cancel})

    @property
    def signs(self) -> Signs:
        """How answers to polls are read."""
        return Signs(
            state=self.state,
            done=self.done,
            failed=self.failed,
            error=self.error,
            result=self.result,
            progress=self.progress,
        )


def _of_request(value: Any) -> Iterator[str]:
    """Yield the pointers into the request that *value* has."""
    if isinstance(value, str) and (found := _OF_REQUEST.fullmatch(value)) is not None:
        yield found[1]
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _of_request(one)


def _repeated(value: Any, request: Any) -> Any:
    if isinstance(value, dict):
        filled = {name: _repeated(one, request) for name, one in value.items()}
        return {name: one for name, one in filled.items() if one is not None or value[name] is None}
    if isinstance(value, list | tuple):
        return [_repeated(one, request) for one in value]
    if isinstance(value, str) and (pointer := _OF_REQUEST.fullmatch(value)) is not None:
        found = at_pointer(request, pointer[1])
        is_short = isinstance(found, int | float) or (isinstance(found, str) and len(found) <= MAX_REPEATED_CHARS)
        return found if is_short else None
    return value


def _filled(value: Any, job_id: str) -> Any:
    if isinstance(value, str):
        return value.replace("{id}", job_id)
    if isinstance(value, dict):
        return {name: _filled(one, job_id) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(one, job_id) for one in value]
    return value
