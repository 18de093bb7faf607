"""The backend of a node whose engine was not there when it started: none until one answers, that one from then on.

Docker may start after this daemon, or be installed while it runs. Deployments that came meanwhile have failed with
`no_engine`, as with an owner who wants none, and begin in earnest once the engine is there. An engine that goes away
after that is `containers`' to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import structlog
import trio

from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.engine.backend import EngineBackend, EngineStatus, NoEngine
from ngpu_node.engine.outlook import BreakOff, Finding, Log, Machine
from ngpu_node.errors import EngineUnavailable, NodeConfigurationError
from ngpu_protocol.control import DeploymentPhase

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 30.0


class LateEngine:
    """See the module; `run` must be running for an engine to be found."""

    def __init__(
        self,
        deployments: Deployments,
        status: EngineStatus,
        open_engine: Callable[[], AbstractAsyncContextManager[EngineBackend]],
        stack: AsyncExitStack,
    ) -> None:
        """Make it.

        Args:
            status: is brought up to date when the engine is there.
            open_engine: connects; raises `EngineUnavailable` or `NodeConfigurationError` while that does not work.
            stack: closes what was opened, once nothing runs on it any more.
        """
        self._deployments = deployments
        self._status = status
        self._open_engine = open_engine
        self._stack = stack
        self._arrived = trio.Event()
        self._now: EngineBackend = NoEngine(deployments, _words(status.problem))

    async def run(self) -> None:
        """Look for an engine until there is one, then run it; until cancelled."""
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            try:
                found = await self._stack.enter_async_context(self._open_engine())
            except (EngineUnavailable, NodeConfigurationError) as error:
                if self._status.problem != str(error):
                    log.info("no_engine", reason=str(error))
                    self._status.problem = str(error)
                continue
            break
        found.break_off = self._now.break_off
        self._now = found
        self._status.problem = ""
        log.info("engine_arrived", engine=self._status.name, version=self._status.version)
        self._arrived.set()
        self._deployments.announce()
        await found.run()

    async def serve(self, deployment: Deployment) -> None:
        """Serve *deployment* once there is an engine; until then say that there is none."""
        if not self._arrived.is_set():
            self._deployments.set_phase(deployment, DeploymentPhase.FAILED, _words(self._status.problem), "no_engine")
            async with trio.open_nursery() as nursery:

                async def first(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(first, self._arrived)
                nursery.start_soon(first, deployment.let_go)
            if deployment.unwanted:
                return
            self._deployments.set_phase(deployment, DeploymentPhase.QUEUED)
        await self._now.serve(deployment)

    # -- as the one that is there does ---------------------------------------------------------------------------------

    @property
    def break_off(self) -> BreakOff:
        """Ends attempts of a deployment."""
        return self._now.break_off

    @break_off.setter
    def break_off(self, break_off: BreakOff) -> None:
        self._now.break_off = break_off

    def told(self, deployment: Deployment) -> None:
        """Look at what *deployment* shall do now."""
        self._now.told(deployment)

    def fits_without(self, deployment: Deployment, others: Collection[Deployment]) -> bool:
        """Tell whether there is room for *deployment* if *others* leave."""
        return self._now.fits_without(deployment, others)

    def doubt(self, deployment: Deployment, reason: str) -> None:
        """Look at *deployment* now."""
        self._now.doubt(deployment, reason)

    def gpus_changed(self) -> None:
        """Look at what holds devices, and at what waits for some."""
        self._now.gpus_changed()

    def held(self) -> list[str]:
        """Return the UUIDs of the devices that containers have."""
        return self._now.held()

    def holders(self) -> dict[str, Hashable]:
        """Return which deployment each container is, by its id."""
        return self._now.holders()

    def findings(self) -> Iterable[Finding]:
        """Return what an owner should know."""
        return self._now.findings()

    def machine(self) -> Machine:
        """Return what the machine has for workspaces."""
        return self._now.machine()

    def images(self) -> list[dict[str, Any]]:
        """Return the images this node knows."""
        return self._now.images()

    def log_of(self, deployment: Deployment, lines: int, *, follow: bool) -> AbstractAsyncContextManager[Log]:
        """Open a deployment's log."""
        return self._now.log_of(deployment, lines, follow=follow)


def _words(problem: str) -> str:
    return f"this node runs no images: {problem}; it is looked for every {LOOK_INTERVAL_S:g} s"
