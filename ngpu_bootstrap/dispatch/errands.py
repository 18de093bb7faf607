"""Tasks of the bootstrap's own: one attempt on one named node, with order, receipt and record like any other.

What looks into a node (a challenge, a task run again) goes this way. No client is behind it: it has no token, so nobody
is charged, and its `api` says what it was for.
"""

from __future__ import annotations

from collections.abc import Callable

from ngpu_bootstrap.dispatch.attempt import Attempt, How
from ngpu_bootstrap.dispatch.calls import Call, WholeBody
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher, Result
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.http1 import Headers
from ngpu_protocol.workspaces import WorkspaceSpec


@dataclass(frozen=True, slots=True)
class Errand:
    """How one went.

    Attributes:
        result: None when the node had no slot for it.
        seconds: from the moment the request went out to the end of its answer.
    """

    task_id: str
    status: int = 0
    body: bytes = b""
    seconds: float = 0.0
    result: Result | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the workspace's answer came whole and its receipt stands."""
        return self.result is not None and self.result.ending.state is TaskState.FINISHED

    @property
    def is_late(self) -> bool:
        """Whether its time was over before there was an answer."""
        return self.result is not None and self.result.ending.state is TaskState.EXPIRED

    @property
    def attempt(self) -> Attempt | None:
        return self.result.attempt if self.result is not None else None

    @property
    def problem(self) -> str:
        """Why there is no answer, for people."""
        if self.result is None:
            return "the node has no slot for it"
        return self.result.ending.message or self.result.ending.reason


class Errands:
    """Runs them."""

    def __init__(
        self, dispatcher: Dispatcher, nodes: Nodes, *, new_task_id: Callable[[], str], now_ms: Callable[[], int]
    ) -> None:
        self._dispatcher = dispatcher
        self._nodes = nodes
        self._new_task_id = new_task_id
        self._now_ms = now_ms

    async def run(
        self,
        session: NodeSession,
        spec: WorkspaceSpec,
        *,
        api: str,
        method: str,
        target: str,
        body: bytes,
        headers: Headers,
        timeout_s: float,
        answer_bytes: int,
        port: int | None = None,
        caller: str = "",
        detach: bool = False,
    ) -> Errand:
        """Have *session* run one call of *spec* and return how it went. No other node gets it.

        Args:
            port: None for the workspace's first.
            caller: who is said to have asked; empty: the workspace itself, which then finds it among its tasks.
            detach: as the order says it, for one that must look like another; it is waited for all the same.

        Raises:
            StoreError: it could not be committed; nothing was sent.
        """
        task_id, now_ms = self._new_task_id(), self._now_ms()
        slot = self._nodes.take_to_check(session, spec)
        if slot is None:
            return Errand(task_id)
        call = Call(
            task_id=task_id,
            spec=spec,
            api=api,
            method=method,
            port=spec.ports[0] if port is None else port,
            target=target,
            headers=headers,
            body=WholeBody(body),
            accepted_at_ms=now_ms,
            deadline_ms=now_ms + int(timeout_s * 1000),
            detach=detach,
            wrapped=True,
            caller=caller,
        )
        sink = Collector(answer_bytes)
        result = await self._dispatcher.carry(call, sink, given=slot)
        attempt = result.attempt
        if detach and attempt is not None and attempt.how in (How.LOST, How.DEADLINE):
            await self._dispatcher.give_up(call, result.ending, attempt)  # nobody collects it
        seconds = (attempt.ended_at_ms - attempt.sent_at_ms) / 1000 if attempt is not None else 0.0
        if attempt is None or attempt.how is not How.ANSWERED or result.ending.state is not TaskState.FINISHED:
            return Errand(task_id, seconds=seconds, result=result)
        return Errand(task_id, sink.status, sink.body, seconds, result)
