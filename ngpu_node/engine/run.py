"""The shell around one deployment's `lifecycle.Life`: performs its activities, brings it what happens.

One activity runs at a time. Its result, and what others post (`Containers`, the engine's events, the owner), come
through one mailbox, so that the life sees one thing after the other. An activity that is replaced is called off, and
the next begins when it has let go: a start that was on its way is then known, and is cleared by whoever comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
import trio

from ngpu_node.deployments import Deployment
from ngpu_node.engine.docker_engine import ContainerState
from ngpu_node.engine.lifecycle import (
    Activity,
    Allowed,
    Answered,
    Ask,
    Clear,
    Cleared,
    Doubted,
    Due,
    Emptied,
    Empty,
    End,
    EngineLost,
    Event,
    Fetch,
    GpuSick,
    ImageHere,
    ImageRefused,
    Impossible,
    Life,
    Place,
    Pulling,
    Rest,
    RoomChanged,
    Silent,
    StartRefused,
    Unwanted,
    Withdrawn,
)
from ngpu_node.errors import (
    DeploymentImpossible,
    EgressUnguarded,
    EngineFailed,
    EngineUnavailable,
    GpusNotGiven,
    StateUnavailable,
    VolumeFull,
)
from ngpu_node.images.images import LocalImage
from ngpu_node.images.problems import ImageProblem
from ngpu_node.probes import probe
from ngpu_node.upstreams import Upstream
from ngpu_protocol.receipts import Outcome

if TYPE_CHECKING:
    from ngpu_node.engine.containers import Containers

log = structlog.get_logger(__name__)

#: After a container's end its connections end too; what still runs on it then never will.
BREAK_OFF_AFTER_S = 1.0
#: How long the way down may take when the daemon ends.
REMOVE_TIMEOUT_S = 30.0
#: The loop takes letters as fast as they come, so they are few; what may be said often is left out beyond half of it.
MAILBOX = 256


@dataclass(eq=False, slots=True)
class Run:
    """One deployment at work; `run` is its whole life on this machine.

    Attributes:
        image: what it runs, once it is here.
        container: what runs, or may run, on the engine.
        last_log: the end of the log of a container that is gone.
        looked_at_gpus_s: when the container's own view of its GPUs was last checked.
    """

    deployment: Deployment
    backend: Containers
    life: Life
    image: LocalImage | None = None
    container: ContainerState | None = None
    last_log: bytes = b""
    looked_at_gpus_s: float = -math.inf
    _upstreams: dict[int, Upstream] = field(default_factory=dict)
    _mail: tuple[trio.MemorySendChannel[_Letter], trio.MemoryReceiveChannel[_Letter]] = field(
        default_factory=lambda: trio.open_memory_channel[_Letter](MAILBOX)
    )
    _number: int = 0

    # -- what happens --------------------------------------------------------------------------------------------------

    def post(self, event: Event) -> None:
        """Tell the deployment's life of something."""
        self._post(event, None)

    def _post(self, event: Event, number: int | None) -> None:
        waiting = self._mail[0].statistics().current_buffer_used
        if waiting >= MAILBOX // 2 and isinstance(event, RoomChanged | Doubted):
            return  # one more of those would say nothing that the ones before it do not
        try:
            self._mail[0].send_nowait(_Letter(event, number))
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            log.error("event_lost", deployment=self.deployment.key, kind=type(event).__name__)

    def told(self) -> None:
        """Post what the table now wants of the deployment."""
        deployment = self.deployment
        if deployment.unwanted:
            self.post(Unwanted(deployment.unwanted))
        elif deployment.withdrawn is not None:
            self.post(Withdrawn(*deployment.withdrawn))
        else:
            self.post(Allowed())

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Live until gone; cancelled, the container goes too."""
        if self.deployment.unwanted or self.deployment.withdrawn is not None:
            self.told()
        try:
            async with trio.open_nursery() as nursery:
                scope, let_go = self._begin(nursery, self.life.activity, None)
                async for letter in self._mail[1]:
                    if letter.number not in (None, self._number):
                        continue  # the word of an activity that was called off
                    following = self.life.on(letter.event, trio.current_time())
                    self._tell()
                    if isinstance(following, End):
                        break
                    if following is not None:
                        scope.cancel()
                        scope, let_go = self._begin(nursery, following, let_go)
                nursery.cancel_scope.cancel()
        finally:
            # Whatever happens, the container goes; and an engine that hangs cannot hold up the daemon's end. What
            # could not be removed carries our label: the next daemon finds it.
            with trio.move_on_after(REMOVE_TIMEOUT_S, shield=True):
                try:
                    await self._clear()
                except (EngineUnavailable, EngineFailed, StateUnavailable) as error:
                    log.warning("container_not_removed", deployment=self.deployment.key, reason=str(error))

    def _tell(self) -> None:
        life, deployment = self.life, self.deployment
        deployment.lacks_room = life.lacks_room
        self.backend.deployments.set_phase(deployment, life.phase, life.detail, life.word)

    def _begin(
        self, nursery: trio.Nursery, activity: Activity, before: trio.Event | None
    ) -> tuple[trio.CancelScope, trio.Event]:
        self._number += 1
        scope, let_go = trio.CancelScope(), trio.Event()
        nursery.start_soon(self._perform, activity, self._number, scope, before, let_go)
        return scope, let_go

    async def _perform(
        self, activity: Activity, number: int, scope: trio.CancelScope, before: trio.Event | None, let_go: trio.Event
    ) -> None:
        try:
            if before is not None:
                with trio.CancelScope(shield=True):
                    await before.wait()
            with scope:
                event = await self._do(activity, lambda event: self._post(event, number))
                self._post(event, number)
        finally:
            let_go.set()

    async def _do(self, activity: Activity, say: Callable[[Event], None]) -> Event:
        """Perform *activity* and return how it ended."""
        try:
            match activity:
                case Fetch():
                    self.image = await self.backend.fetch(self, lambda detail, word: say(Pulling(detail, word)))
                    return ImageHere()
                case Place():
                    return await self.backend.put_in_place(self)
                case Ask(after_s):
                    await trio.sleep(after_s)
                    return await self._ask()
                case Empty(grace_s):
                    await self.deployment.empty(grace_s)
                    if self.deployment.running:
                        self.backend.break_off(self.deployment, self.deployment.detail, Outcome.NODE_STOPPING)
                        await self.deployment.empty(BREAK_OFF_AFTER_S)
                    return Emptied()
                case Clear():
                    await self._clear()
                    return Cleared()
                case Rest(None):
                    await trio.sleep_forever()
                case Rest(float() | int() as for_s):
                    await trio.sleep(for_s)
                    return Due()
                case End():
                    pass
        except EngineUnavailable as error:
            return EngineLost(str(error))
        except StateUnavailable as error:
            # No container starts on what is not written down; what was given back and is not, the next start sweeps.
            return Cleared() if isinstance(activity, Clear) else StartRefused(str(error))
        except EngineFailed as error:
            if isinstance(activity, Clear):
                # The engine would not remove it now. It is tried again like an engine that does not answer.
                return EngineLost(str(error))
            return StartRefused(str(error))
        except ImageProblem as error:
            return ImageRefused(str(error), error.again_s, error.reason)
        except GpusNotGiven as error:
            return Impossible(str(error), "gpus_not_given", until_engine_back=True)
        except VolumeFull as error:
            return Impossible(str(error), "volume_full")
        except EgressUnguarded as error:
            return Impossible(str(error), "egress_unguarded", until_engine_back=True)
        except DeploymentImpossible as error:
            return Impossible(str(error))
        raise AssertionError(f"{activity} ended")

    # -- asking --------------------------------------------------------------------------------------------------------

    async def _ask(self) -> Event:
        for uuid in self.backend.gpus_of(self.deployment):
            if reason := self.backend.reason_against(uuid):
                return GpuSick(f"{uuid}: {reason}")
        upstream = self._upstreams.get(self.deployment.spec.ports[0])
        if upstream is None:
            return Silent("the container has no address")
        problem = await probe(upstream.host, upstream.port, self.deployment.spec.readiness_path)
        if problem is not None:
            return Silent(problem)
        if reason := await self.backend.lost_gpus(self):
            return GpuSick(reason)
        return Answered()

    # -- places --------------------------------------------------------------------------------------------------------

    def reach(self, places: dict[int, tuple[str, int]]) -> None:
        """Send requests to *places*, an address and port for each of the workspace's."""
        connections = self.deployment.concurrency + 2
        self._upstreams = {port: Upstream(*place, max_connections=connections) for port, place in places.items()}
        self.deployment.upstream = self._upstreams.get

    async def _clear(self) -> None:
        """Take the container away, then what it held.

        Raises:
            EngineUnavailable, EngineFailed: it may be there still, and keeps what it holds.
        """
        deployment = self.deployment
        deployment.upstream = lambda port: None
        upstreams, self._upstreams = self._upstreams, {}
        for upstream in upstreams.values():
            await upstream.aclose()
        await self.backend.take_away(self)
        if deployment.running:
            await trio.sleep(BREAK_OFF_AFTER_S)
            self.backend.break_off(deployment, "the workspace's container is gone", Outcome.WORKSPACE_BROKE)


@dataclass(frozen=True, slots=True)
class _Letter:
    """An event, and of which activity; None where it is nobody's result."""

    event: Event
    number: int | None
