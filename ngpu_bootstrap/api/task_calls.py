"""The calls about one task that change it or go on: cancelling, following its events; and its receipt.

Whoever knows a task's id may look; ending it takes the workspace's own token, or an operator key.
"""

# Annotations are evaluated here: FastAPI reads them, and those of the calls name things local to the function.
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import trio
from fastapi import Depends, FastAPI, Query
from fastapi.responses import JSONResponse, StreamingResponse

from ngpu_bootstrap.api import models
from ngpu_bootstrap.api.live import EVENT_STREAM, Live
from ngpu_bootstrap.credentials import Token
from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import Forbidden, Refusal
from ngpu_bootstrap.operator_keys import Scope
from ngpu_bootstrap.registry.workspaces import Workspaces
from ngpu_bootstrap.stand_ins import StandIns
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import TaskIsFinal
from ngpu_bootstrap.store.records import TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.orders import SignedOrder

FindTask = Callable[[str, Token | None], Awaitable[TaskRecord]]
Owner = Callable[[Token | None, str, Scope], None]

# How long a cancellation is waited for before it is answered 202: the node is told and says how it ended.
CANCEL_WAIT_S = 3.0


class TaskControl:
    """What can be done to a task in the hands of this bootstrap, or of another one on the same database."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        detached: DetachedTasks,
        watch: TaskWatch,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._detached = detached
        self._watch = watch
        self._now_ms = now_ms

    async def cancel(self, record: TaskRecord) -> TaskRecord:
        """Commit the wish that a task end, carry it out, and return the task as it is a moment later."""
        task_id = record.task_id
        if record.state.is_final:
            return record
        try:
            await self._store.ask_cancel(task_id, self._now_ms())
        except TaskIsFinal:
            return await self._store.task_state(task_id) or record
        await self.end(task_id)
        with trio.move_on_after(CANCEL_WAIT_S):
            while True:
                now = await self._store.task_state(task_id)
                if now is None or now.state.is_final:
                    return now or record
                await self._watch.wait(task_id, 0.5)
        return await self._store.task_state(task_id) or record

    async def end(self, task_id: str) -> None:
        """Carry out the cancellation of a task that is in hand here; one that is not is another bootstrap's."""
        if not self._detached.cancel(task_id):
            await self._dispatcher.cancel(task_id)

    async def look(self, task_id: str) -> tuple[TaskRecord | None, dict[str, dict[str, Any]]]:
        """Return a task, and what its followers see of it, by the name of the event."""
        record = await self._store.task_state(task_id)
        if record is None:
            return None, {}
        seen: dict[str, dict[str, Any]] = {
            "state": {
                "task_id": task_id,
                "state": int(record.state),
                "state_name": record.state.name.lower(),
                "attempts": record.attempts,
                "node_addr": record.node or "",
                "result_code": record.result_code,
                "reason": record.reason,
                "message": record.message,
                "cancelling": record.cancel_asked_at_ms is not None and not record.state.is_final,
            }
        }
        position = self._detached.position(task_id)
        if position is not None and not record.state.is_final:
            seen["position"] = {"task_id": task_id, "position": position}
        attempt = self._dispatcher.under_way.get(task_id)
        if attempt is not None:
            seen["progress"] = {
                "task_id": task_id,
                "attempt": attempt.number,
                "elapsed_s": int(attempt.elapsed_s),
                "answer_bytes": attempt.received_bytes,
            }
        return record, seen

    async def changed(self, task_id: str) -> None:
        """Return when the task may look otherwise."""
        await self._watch.wait(task_id)


def add_task_calls(
    app: FastAPI,
    *,
    control: TaskControl,
    store: Store,
    workspaces: Workspaces,
    find_task: FindTask,
    presented: Callable[..., Token | None],
    owner: Owner,
    live: Live,
    stand_ins: StandIns,
    is_operators_own: bool,
    errors: dict[int | str, dict[str, Any]],
) -> None:
    """Add the calls to *app*."""

    @app.delete(
        "/api/v1/tasks/{task_id}",
        tags=["tasks"],
        responses={**errors, 202: {"model": models.TaskView, "description": "its node has been told to end it"}},
        response_model=models.TaskView,
    )
    async def cancel_task(task_id: str, token: Annotated[Token | None, Depends(presented)]) -> JSONResponse:
        """Cancel a task. 200: it has ended (perhaps before, perhaps with its answer); 202: its node is ending it.

        A task that runs is ended at its node, whose receipt then says `cancelled`. Cancelling again changes nothing.
        """
        # who asks is judged first, so that ids cannot be tried out with nothing in hand
        record = await find_task(task_id, None if is_operators_own else _workspace_token(token))
        owner(token, record.client, Scope.TASKS)
        now = await control.cancel(record)
        view = models.task_view(await store.detail(task_id))
        return JSONResponse(view.model_dump(mode="json"), 200 if now.state.is_final else 202)

    @app.get(
        "/api/v1/tasks/{task_id}/events",
        tags=["tasks"],
        responses={**errors, 200: {"content": {EVENT_STREAM: {}}, "description": "server-sent events"}},
        response_class=StreamingResponse,
    )
    async def follow_task(task_id: str, token: Annotated[Token | None, Depends(presented)]) -> StreamingResponse:
        """Follow a task: events `state`, `position` in the queue and `progress`, each as it changes; then `end`."""
        record = await find_task(task_id, None if is_operators_own else _workspace_token(token))

        def look() -> Awaitable[tuple[bool, dict[str, dict[str, Any]]]]:
            return _seen(control, task_id)

        return live.follow(record.client, look, lambda: control.changed(task_id))

    @app.get("/api/v1/tasks/{task_id}/receipt", tags=["tasks"], responses=errors)
    async def get_receipt(
        task_id: str,
        token: Annotated[Token | None, Depends(presented)],
        attempt: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    ) -> dict[str, Any]:
        """The receipt file: order, receipt and acknowledgement with their signatures, to be verified offline.

        It outlives the task, which is removed after a time the operator sets.
        """
        shown = None if is_operators_own else token
        filed = None
        try:
            await find_task(task_id, shown)
        except Refusal as refusal:
            filed = await store.receipt(task_id, attempt) if refusal.reason == "task_unknown" else None
            if filed is None or not filed.order:
                raise
            client = filed.caller or SignedOrder.from_bytes(filed.order).order.workspace
            if shown is not None and not shown.is_operator_key and workspaces.authenticate(shown)[0].id != client:
                raise Forbidden("token_foreign", "this token is of another workspace than the task") from None
        filed = filed or await store.receipt(task_id, attempt)
        if filed is None:
            raise Refusal(404, "no_receipt", f"task {task_id} has no receipt yet")
        try:
            return stand_ins.receipt_file(filed.order, filed.receipt.raw, filed.receipt.acknowledgement).to_document()
        except MalformedError as error:
            raise Refusal(404, "no_receipt", f"the receipt on file cannot be shown: {error}") from None

    @app.get("/api/v1/tasks/{task_id}/loss", tags=["tasks"], responses=errors)
    async def get_loss(task_id: str, token: Annotated[Token | None, Depends(presented)]) -> dict[str, Any]:
        """The loss file of a job whose node is gone: what this bootstrap signed of it, in the place of a receipt."""
        await find_task(task_id, None if is_operators_own else token)
        row = await store.look_up(lambda connection: job_rows.of_task(connection, task_id))
        if row is None or not row.loss:
            raise Refusal(404, "no_loss", f"task {task_id} is no job whose node is gone")
        for attempt in await store.attempts(task_id):
            filed = await store.receipt(task_id, attempt.attempt)
            receipt = b"" if filed is None else filed.receipt.raw
            file = stand_ins.loss_file(attempt.order, receipt, row.loss)
            if file.is_of_its_order:
                return file.to_document()
        raise Refusal(404, "no_loss", f"the order that submitted task {task_id} is no longer kept")


async def _seen(control: TaskControl, task_id: str) -> tuple[bool, dict[str, dict[str, Any]]]:
    record, seen = await control.look(task_id)
    return record is None or record.state.is_final, seen


def _workspace_token(token: Token | None) -> Token | None:
    return token if token is not None and not token.is_operator_key else None
