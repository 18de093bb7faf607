"""The life of a job that a workspace runs by itself: submitted, asked for until it is final, its result fetched.

    SUBMITTING --answer with an id--> POLLING --done--> FETCHING --file--> DONE
        |                                |  \\--done, nothing to fetch--------^
        '--refused, no id--> FAILED      |--its final value of failure, answers that cannot be read--> FAILED
                                         |--the workspace knows no such job, its node is gone--------> LOST
                                         '--duration over--------------------------------------------> TIMED_OUT

A machine of values: `next_step` says what to do now, the events (`submitted`, `polled`, `missed`, `fetched`) return the
job as it is after them. The shell (`dispatch.jobs`) calls the workspace, sleeps and stores. What has ended stays as it
is. A node that cannot be reached is given `away_s`, counted from the first call that failed: daemons restart while the
containers of their workspaces go on. Answers that cannot be read are borne `BEARABLE` times in a row.

Pure: time comes in as UTC milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

from ngpu_bootstrap.errors import BadRequest, Refusal
from ngpu_bootstrap.front.paths import workspace_target
from ngpu_protocol.job_answers import JobState, Read, job_id_in, parsed
from ngpu_protocol.job_terms import JobTerms

BEARABLE: Final = 5
"""Answers in a row that cannot be read, or calls for the result in vain, before the job is given up."""

_OWN_HOSTS = frozenset({"", "localhost", "127.0.0.1", "0.0.0.0", "::1"})
RESUBMIT = "submit it again to have it run anew"


class Phase(StrEnum):
    """Where a job stands."""

    SUBMITTING = "submitting"
    """It is not known to run anywhere."""
    POLLING = "polling"
    """Its workspace has it, on `Job.node`, under `Job.key`."""
    FETCHING = "fetching"
    """It is done, and its result is still at its node."""
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"
    """Whether it was done will not be known: its node or its workspace forgot it, or is gone."""
    TIMED_OUT = "timed_out"
    """It took longer than its declaration allows."""

    @property
    def is_final(self) -> bool:
        return self not in (Phase.SUBMITTING, Phase.POLLING, Phase.FETCHING)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job ended without a result: the status, stable reason and words for its client.

    Attributes:
        passed_on: the workspace's own answer is what its client gets: it refused the submission itself.
    """

    status: int
    reason: str
    message: str
    passed_on: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A job at a moment.

    Attributes:
        key: the workspace's id of it.
        node: where it runs: the only one that can be asked.
        since_ms: when it was submitted with success; before, when it was begun.
        next_at_ms: when it is asked for next.
        polls: answers to polls so far.
        unread: answers in a row that could not be read.
        away_since_ms: of the first call in a row that its node did not answer.
        state, progress: the workspace's own word and number, as last heard.
        result: path and query of the result in the workspace.
        failure: of a final phase other than DONE.
    """

    since_ms: int
    phase: Phase = Phase.SUBMITTING
    key: str = ""
    node: str = ""
    next_at_ms: int = 0
    polls: int = 0
    unread: int = 0
    away_since_ms: int | None = None
    state: str = ""
    progress: float | None = None
    result: str = ""
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """Call the workspace with the client's own request."""


@dataclass(frozen=True, slots=True)
class Poll:
    """Ask the job's node for it; *last*: its time is over, so what it says now decides."""

    last: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the result, at *target* of the workspace on the job's node."""

    target: str


@dataclass(frozen=True, slots=True)
class Rest:
    """Do nothing before *until_ms*."""

    until_ms: int


@dataclass(frozen=True, slots=True)
class Over:
    """There is nothing left to do."""


Step = Submit | Poll | Fetch | Rest | Over


def next_step(job: Job, declared: JobTerms, now_ms: int) -> Step:
    """Return what to do with *job* now."""
    if job.phase.is_final:
        return Over()
    if job.phase is Phase.SUBMITTING:
        return Submit()
    late = now_ms >= ends_at_ms(job, declared)
    if now_ms < job.next_at_ms and not late:
        return Rest(min(job.next_at_ms, ends_at_ms(job, declared)))
    return Fetch(job.result) if job.phase is Phase.FETCHING else Poll(last=late)


def ends_at_ms(job: Job, declared: JobTerms) -> int:
    """Return when *job* is given up."""
    return job.since_ms + int(declared.duration_s * 1000)


def submitted(job: Job, declared: JobTerms, status: int, body: bytes, node: str, now_ms: int) -> Job:
    """Return *job* after the workspace on *node* answered its submission."""
    if not 200 <= status < 300:
        words = f"the workspace refused the job with status {status}"
        return failed(replace(job, node=node), Failure(status, "job_refused", words, passed_on=True))
    key = job_id_in(parsed(body), declared.id)
    if key is None:
        where = ", ".join(declared.id)
        words = f"the workspace's answer to the submission has no id of a job where one is declared ({where})"
        return failed(replace(job, node=node), Failure(502, "job_id_missing", words))
    first = now_ms if declared.hold else now_ms + _interval_ms(declared)
    return replace(job, phase=Phase.POLLING, key=key, node=node, since_ms=now_ms, next_at_ms=first)


def failed(job: Job, failure: Failure) -> Job:
    """Return *job* after no node took it, or something came that no call can mend."""
    return replace(job, phase=Phase.FAILED, failure=failure)


def busy(job: Job, declared: JobTerms, now_ms: int) -> Job:
    """Return *job* after its node had no slot for a question: it is there, and asked again."""
    after = replace(job, away_since_ms=None, next_at_ms=now_ms + _interval_ms(declared))
    return _late(after, declared, now_ms)


def polled(
    job: Job, declared: JobTerms, status: int, body: bytes, now_ms: int, *, asked_at_ms: int | None = None
) -> Job:
    """Return *job* after its workspace answered a poll.

    Args:
        asked_at_ms: when the poll began. One that lasted for an interval is followed by the next at once, so that
            what is held is held without a gap.
    """
    began_ms = now_ms if asked_at_ms is None else asked_at_ms
    next_at_ms = max(now_ms, began_ms + _interval_ms(declared))
    heard = replace(job, polls=job.polls + 1, away_since_ms=None, next_at_ms=next_at_ms)
    if status in declared.lost_status:
        words = f"the workspace on node {job.node} knows no job {job.key} (any more): status {status}; {RESUBMIT}"
        return _lost(heard, "job_unknown_there", words)
    read = declared.signs.read(status, body, job.key)
    if read.means is JobState.UNREADABLE:
        heard = replace(heard, unread=job.unread + 1)
        if 400 <= status < 500 or heard.unread >= BEARABLE:
            words = f"the workspace's answers about job {job.key} cannot be read ({read.error}); {RESUBMIT}"
            return failed(heard, Failure(502, "job_unreadable", words))
        return _late(heard, declared, now_ms)
    heard = replace(heard, unread=0, state=read.state, progress=read.progress)
    if read.means is JobState.FAILED:
        words = f"the workspace says that job {job.key} has failed ({read.state})"
        return failed(heard, Failure(502, "job_failed", f"{words}: {read.error}" if read.error else words))
    if read.means is JobState.PENDING:
        return _late(heard, declared, now_ms)
    return _done(heard, declared, read, now_ms)


def missed(job: Job, declared: JobTerms, why: str, now_ms: int, *, node_stayed: bool = False) -> Job:
    """Return *job* after its node could not be asked, or did not answer.

    Args:
        node_stayed: the node is connected, and the run that had the job: what does not answer is the workspace on it.
    """
    since_ms = job.away_since_ms if job.away_since_ms is not None else now_ms
    after = replace(job, away_since_ms=since_ms, next_at_ms=now_ms + _interval_ms(declared))
    if now_ms - since_ms < declared.away_s * 1000:
        return _late(after, declared, now_ms)
    if node_stayed:
        words = f"the workspace on node {job.node} that took job {job.key} is gone ({why}), and the job with it"
        return _lost(after, "job_workspace_gone", f"{words}; {RESUBMIT}")
    words = f"the node {job.node} that took job {job.key} is gone ({why}), and the job with it; {RESUBMIT}"
    return _lost(after, "job_node_gone", words)


def fetched(job: Job, declared: JobTerms, status: int, now_ms: int) -> Job:
    """Return *job* after its workspace answered the call for the result: with it, where *status* is 200 to 299."""
    if 200 <= status < 300:
        return replace(job, phase=Phase.DONE, away_since_ms=None)
    after = replace(job, unread=job.unread + 1, away_since_ms=None, next_at_ms=now_ms + _interval_ms(declared))
    if status < 500 or after.unread >= BEARABLE:
        words = f"job {job.key} is done, and its result cannot be fetched: status {status} for {job.result}"
        return failed(after, Failure(502, "job_result_missing", words))
    return _late(after, declared, now_ms)


def result_target(result: object) -> str:
    """Return path and query of the file that a job's *result* names.

    A URL is taken for the workspace's own only if its host is one that every machine calls itself: the bootstrap
    fetches nothing from elsewhere, whatever a workspace says.

    Raises:
        ValueError: it names no file of the workspace.
    """
    if not isinstance(result, str) or not result:
        raise ValueError("it is no text")
    target = result
    if "://" in result:
        parts = urlsplit(result)
        if parts.scheme not in ("http", "https") or (parts.hostname or "") not in _OWN_HOSTS:
            raise ValueError("it is a URL of another machine")
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    elif not result.startswith("/"):
        target = f"/{result}"
    if target.startswith("//") or not target.isascii() or not target.isprintable() or " " in target or "#" in target:
        raise ValueError("it is no path that can be asked for")
    path, _, query = target.partition("?")
    try:
        workspace_target(0, path, query or None)
    except (BadRequest, Refusal) as refusal:
        raise ValueError(str(refusal)) from None
    return target


def _done(job: Job, declared: JobTerms, read: Read, now_ms: int) -> Job:
    if not declared.fetch:
        return replace(job, phase=Phase.DONE)
    try:
        target = result_target(read.result)
    except ValueError as error:
        words = f"job {job.key} is done, and its answer does not name its result: {error}"
        return failed(job, Failure(502, "job_result_missing", words))
    return replace(job, phase=Phase.FETCHING, result=target, next_at_ms=now_ms)


def _late(job: Job, declared: JobTerms, now_ms: int) -> Job:
    """Return *job*, timed out if its time is over."""
    if now_ms < ends_at_ms(job, declared):
        return job
    said = f"; the last it said was {job.state!r}" if job.state else ""
    words = f"job {job.key} did not end within {declared.duration_s:g} s{said}"
    return replace(job, phase=Phase.TIMED_OUT, failure=Failure(504, "job_timed_out", words))


def _lost(job: Job, reason: str, words: str) -> Job:
    return replace(job, phase=Phase.LOST, failure=Failure(502, reason, words))


def _interval_ms(declared: JobTerms) -> int:
    return int(declared.interval_s * 1000)
