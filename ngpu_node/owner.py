"""Whether the owner lends his machine now: his word (`pause`, `drain`, `resume`) and his hours (`serve`).

    open       orders are taken
    paused     none are; what runs ends, and workspaces stay where they are, so that `resume` is immediate
    drained    none are; what runs ends, then workspaces leave the machine and its GPUs are free, until `resume`
    closed     as drained, outside the hours of `serve`

The word holds over restarts; the hours are looked at every `LOOK_INTERVAL_S`, by the clock on the wall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from enum import StrEnum

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.execution.admission import AdmissionState
from ngpu_node.schedule import Span, is_open
from ngpu_node.state import NodeState

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 15.0
_WORD = "lending"


class Lending(StrEnum):
    """How the machine is lent."""

    OPEN = "open"
    PAUSED = "paused"
    DRAINED = "drained"
    CLOSED = "closed"


class Owner:
    """The owner's word and hours, and those who act on them."""

    def __init__(
        self,
        state: NodeState,
        deployments: Deployments,
        admission: AdmissionState[Deployment],
        changes: Changes,
        *,
        hours: Sequence[str] = (),
        local_time: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._state = state
        self._deployments = deployments
        self._admission = admission
        self._changes = changes
        self._hours_text = ", ".join(hours)
        self._hours = [Span.parse(text) for text in hours]
        self._local_time = local_time
        self._said = Lending.OPEN
        self._spoke = Changes()
        self.lending = Lending.OPEN

    @property
    def detail(self) -> str:
        """Return why nothing is taken, empty while the machine is lent."""
        return {
            Lending.OPEN: "",
            Lending.PAUSED: "this node's owner paused it",
            Lending.DRAINED: "this node's owner drained it",
            Lending.CLOSED: f"outside the hours of this node, {self._hours_text}",
        }[self.lending]

    async def load(self) -> None:
        """Take up the last run's word; before the node takes orders."""
        word = await self._state.owners_word(_WORD)
        self._said = Lending(word) if word in (Lending.PAUSED, Lending.DRAINED) else Lending.OPEN
        self._apply()

    async def run(self) -> None:
        """Follow the hours until cancelled."""
        while True:
            seen = self._spoke.count
            with trio.move_on_after(LOOK_INTERVAL_S):
                await self._spoke.beyond(seen)
            self._apply()

    async def say(self, word: Lending) -> None:
        """Take the owner's word: `PAUSED`, `DRAINED`, or `OPEN` to resume."""
        await self._state.keep_owners_word(_WORD, word)
        self._said = word
        self._apply()
        self._spoke.announce()

    def _apply(self) -> None:
        before, self.lending = self.lending, self._now()
        if before is self.lending:
            return
        log.info("lending_changed", lending=str(self.lending), detail=self.detail)
        self._admission.closed = self.detail
        if self.lending in (Lending.DRAINED, Lending.CLOSED):
            self._deployments.hold_back(self.detail, str(self.lending))
        else:
            self._deployments.let_back()
        self._changes.announce()

    def _now(self) -> Lending:
        if self._said is Lending.DRAINED:
            return self._said
        if not is_open(self._hours, self._local_time()):
            return Lending.CLOSED
        return self._said
