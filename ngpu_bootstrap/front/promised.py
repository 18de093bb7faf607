"""Tasks promised to clients who wait for them: kept until they end, and found again under the client's own key.

Owns what an `Idempotency-Key` means: the first call under it is the task; the same call again gets that task's answer,
whether it runs yet, has ended, or was taken over by a sibling since, and also where the call would not be taken now (a
full queue, no node); another call under it is refused. A key is its caller's own.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from ngpu_bootstrap.dispatch.calls import Call, WholeBody
from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import BootstrapError, NotServed, Refusal
from ngpu_bootstrap.front.answers import WorkspaceAnswer
from ngpu_bootstrap.profiles.form_bodies import MULTIPART, boundary_of, form_digest, media_type
from ngpu_bootstrap.store.errors import BodyMissing, IdempotencyKeyUsed
from ngpu_bootstrap.store.records import Part, TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.http1 import Headers, header

MAX_KEY_BYTES = 255
# How long past its deadline a promised task's end may take to be known here.
LATE_MS = 30_000
# No field of a request may hold this: what is before it is never a client's word.
_BETWEEN = "\x1f"


class TaskEnded(BootstrapError):
    """A task that was accepted has no answer its client can be given, or none yet.

    Attributes:
        refusal: what its client gets.
    """

    def __init__(self, task_id: str, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.task_id = task_id
        self.refusal = refusal


def idempotency_key(headers: Headers, caller: str = "") -> str | None:
    """Return the client's `Idempotency-Key` as it is kept, None without one.

    Args:
        caller: the client's workspace, where the call runs on another's: keys of two clients never meet.

    Raises:
        Refusal: it is longer than anything that is kept.
    """
    value = header(headers, b"idempotency-key")
    if value is None:
        return None
    if not value or len(value) > MAX_KEY_BYTES:
        raise Refusal(400, "bad_idempotency_key", f"Idempotency-Key must have 1 to {MAX_KEY_BYTES} characters")
    key = value.decode("latin-1")
    return f"{caller}{_BETWEEN}{key}" if caller else key


class Promises:
    """Takes calls that are kept until they end, and waits for their answers."""

    def __init__(self, *, detached: DetachedTasks, store: Store, watch: TaskWatch, now_ms: Callable[[], int]) -> None:
        self._detached = detached
        self._store = store
        self._watch = watch
        self._now_ms = now_ms
        self._stops = False

    def stop(self) -> None:
        """Have whoever waits for an answer be told that this bootstrap stops before it is there, and what goes on."""
        self._stops = True
        self._watch.wake_all()

    def check_goes_on(self, task_id: str) -> None:
        """Raise, for a client that waits for *task_id*, that it waits in vain.

        Raises:
            TaskEnded: this bootstrap stops.
        """
        if self._stops:
            words = f"this bootstrap stops, and task {task_id} goes on: ask for it with queryTask when it is back"
            raise TaskEnded(task_id, NotServed(503, "bootstrap_stopping", words, retry_after_s=5))

    async def submit(self, call: Call, refused: Refusal | None = None) -> str:
        """Promise *call*, a wrapped one; return the id of its task: of the first, where it was asked for before.

        Args:
            refused: why it may not be taken now, unless it was before.

        Raises:
            Refusal: *refused*; its key was used for another call; it is not served now.
            StoreError: it could not be committed; nothing is promised.
        """
        if refused is None:
            try:
                await self._detached.submit(call)
                return call.task_id
            except IdempotencyKeyUsed as used:
                return await self._again(call, used.task_id)
            except NotServed as not_served:
                refused = not_served
        first = None
        if call.idempotency_key is not None:
            first = await self._store.task_by_key(call.spec.id, call.idempotency_key)
        if first is None:
            raise refused
        return await self._again(call, first)

    async def ended(self, task_id: str, deadline_ms: int) -> TaskRecord:
        """Return a task once it has ended.

        Raises:
            Refusal: it is no longer kept.
            TaskEnded: it ended without an answer of its workspace's, or has not by *deadline_ms* and some more, or
                before this bootstrap stops.
        """
        while True:
            record = await self._store.task_state(task_id)
            if record is None:
                raise Refusal(410, "answer_gone", f"task {task_id} is no longer kept")
            if record.state.is_final:
                break
            if self._now_ms() >= deadline_ms + LATE_MS:
                raise TaskEnded(task_id, Refusal(504, "deadline", f"task {task_id} has not ended in time; poll for it"))
            self.check_goes_on(task_id)
            await self._watch.wait(task_id)
        if record.state is not TaskState.FINISHED:
            raise TaskEnded(task_id, Refusal(record.result_code or 502, record.reason, record.message))
        return await self._store.task(task_id) or record

    async def answer(self, task_id: str, deadline_ms: int) -> WorkspaceAnswer:
        """Return the workspace's answer to a task once it has ended.

        Raises:
            Refusal, TaskEnded: as `ended`; or the answer is no longer kept.
        """
        return await self.kept(await self.ended(task_id, deadline_ms))

    async def kept(self, record: TaskRecord) -> WorkspaceAnswer:
        """Return the answer that is kept with a task that has finished.

        Raises:
            Refusal: it is no longer kept.
        """
        body = b""
        if record.response is not None:
            try:
                body = await self._store.read_body(record.task_id, Part.RESPONSE, record.response)
            except BodyMissing:
                raise Refusal(410, "answer_gone", "the answer of this task is no longer kept") from None
        return WorkspaceAnswer(record.status, body, record.content_type)

    async def _again(self, call: Call, task_id: str) -> str:
        if not await self._is_same(call, task_id):
            words = f"this Idempotency-Key was used for another call, task {task_id}; send a new one"
            raise Refusal(422, "idempotency_key_reused", words)
        return task_id

    async def _is_same(self, call: Call, task_id: str) -> bool:
        """Return whether the task of a used key was asked for by the same call as this one."""
        record = await self._store.task(task_id)
        if record is None:
            return True
        asked = (call.api, call.method, call.port, call.target)
        if asked != (record.api, record.method, record.port, record.target):
            return False
        if record.request is None or not isinstance(call.body, WholeBody):
            return True
        media, parameters = media_type(header(call.headers, b"content-type"))
        if media != MULTIPART and record.request.size != len(call.body.content):
            return False
        try:
            first = await self._store.read_body(task_id, Part.REQUEST, record.request)
        except BodyMissing:
            return True
        if media != MULTIPART or first == call.body.content:
            return first == call.body.content
        boundary = parameters.get(b"boundary", b"")
        return await trio.to_thread.run_sync(_is_same_form, first, call.body.content, boundary)


def _is_same_form(first: bytes, again: bytes, boundary: bytes) -> bool:
    """Return whether two forms have the same parts: clients make up a new boundary each time they send one."""
    digest = form_digest(again, boundary)
    return digest is not None and digest == form_digest(first, boundary_of(first))
