"""The workspaces wanted on this node against those that are here.

Owns the table: what each service of bootstraps wishes for, one `Deployment` for each wish and its phase. Making a
wish come true is a backend's work (`services.ModelServers` for registered model servers, `engine.containers` for
images): the table runs `backend.serve(deployment)` for as long as it is wanted, and cancels it, once its last
attempts have ended, when it is not.

Wishes of two services never meet: workspace 7 of one and workspace 7 of another are two deployments. The revisions of
one workspace are deployments of their own too, so that an old one can serve while a new one starts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import DeploymentPhase, DeploymentState
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

#: How long the last attempts of an unwanted deployment may go on.
STOP_GRACE_S = 30.0

_NO_IMAGE = bytes(32)


@dataclass(eq=False, slots=True)
class Deployment:
    """One revision of one workspace on this node.

    Attributes:
        service: the service of bootstraps that wants it.
        detail: a sentence for people about the phase.
        image_digest: SHA-256 of the image that runs, zero for a model server.
        gpus: ids of the GPUs it holds.
        running: attempts that run on it now.
        upstream: where a port is served, None while it is not; set by the backend.
    """

    service: str
    spec: WorkspaceSpec
    phase: DeploymentPhase = DeploymentPhase.QUEUED
    detail: str = ""
    image_digest: bytes = _NO_IMAGE
    gpus: tuple[bytes, ...] = ()
    running: int = 0
    upstream: Callable[[int], Upstream | None] = lambda port: None
    ports: frozenset[int] = field(init=False)
    idle: Changes = field(default_factory=Changes)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self) -> None:
        self.ports = frozenset(self.spec.ports)

    @property
    def is_ready(self) -> bool:
        return self.phase is DeploymentPhase.READY

    @property
    def concurrency(self) -> int:
        return self.spec.concurrency

    def began(self) -> None:
        """Count an attempt in."""
        self.running += 1

    def ended(self) -> None:
        """Count an attempt out."""
        self.running -= 1
        if self.running == 0 and self.phase is DeploymentPhase.STOPPING:
            self.idle.announce()

    def state(self) -> DeploymentState:
        """Return what the heartbeat says about it."""
        return DeploymentState(
            workspace=self.spec.id,
            revision=self.spec.revision,
            state=self.phase,
            detail=self.detail,
            slots_free=max(0, self.concurrency - self.running) if self.is_ready else 0,
            image_digest=self.image_digest,
            gpus=self.gpus,
        )

    def __repr__(self) -> str:
        return f"Deployment({self.service}/{self.spec.id}@{self.spec.revision} {self.phase})"


class Backend(Protocol):
    """What makes deployments of one kind come true."""

    async def serve(self, deployment: Deployment) -> None:
        """Bring *deployment* up and keep it up until cancelled, then take it down.

        Tells by `Deployments.set_phase` how it stands. Returns only after it gave up and said `failed`.
        """


class Deployments:
    """The table of one node."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._table: dict[tuple[str, str], dict[int, Deployment]] = {}
        self._backends: dict[str, Backend] = {}
        self._nursery: trio.Nursery | None = None
        self._wished: dict[str, dict[tuple[str, int], WorkspaceSpec]] = {}

    def __iter__(self) -> Iterator[Deployment]:
        for revisions in self._table.values():
            yield from revisions.values()

    def revisions(self, service: str, workspace: str) -> Mapping[int, Deployment]:
        """Return the deployments of a workspace by revision; empty when it is not wanted here."""
        return self._table.get((service, workspace), _NONE)

    def of_service(self, service: str) -> list[Deployment]:
        """Return everything a service has here, in the order of its ids."""
        found = [d for (owner, _), revisions in self._table.items() if owner == service for d in revisions.values()]
        return sorted(found, key=lambda d: (len(d.spec.id), d.spec.id, d.spec.revision))

    def knows_wishes_of(self, service: str) -> bool:
        """Tell whether *service* has said since this start what it wants: before, nothing of it is unwanted."""
        return service in self._wished

    def set_phase(self, deployment: Deployment, phase: DeploymentPhase, detail: str = "") -> None:
        """Record how *deployment* stands and announce it. A deployment that is stopping stays so until it is gone."""
        if deployment.phase is DeploymentPhase.STOPPING and phase is not DeploymentPhase.GONE:
            return
        if (deployment.phase, deployment.detail) == (phase, detail):
            return
        log.log(
            logging.INFO if deployment.phase is not phase else logging.DEBUG,
            "deployment_changed",
            service=deployment.service,
            workspace=deployment.spec.id,
            revision=deployment.spec.revision,
            state=str(phase),
            detail=detail,
        )
        deployment.phase, deployment.detail = phase, detail
        self._changes.announce()

    def announce(self) -> None:
        """Say that something about a deployment changed that is not its phase."""
        self._changes.announce()

    async def run(
        self,
        *,
        images: Backend,
        models: Backend,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve wishes until cancelled; on the way out every backend takes its deployments down."""
        self._backends = {"images": images, "models": models}
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def wish(self, service: str, specs: Sequence[WorkspaceSpec]) -> None:
        """Make *specs* all that *service* wants on this node from now on."""
        wanted = {(spec.id, spec.revision): spec for spec in specs}
        self._wished[service] = wanted
        for deployment in self.of_service(service):
            spec = wanted.pop((deployment.spec.id, deployment.spec.revision), None)
            if (
                spec is not None
                and spec.runs_like(deployment.spec)
                and deployment.phase is not DeploymentPhase.STOPPING
            ):
                deployment.spec = spec  # its pin was filled in, or it was renamed: what runs goes on
                continue
            # Unwanted, or wanted otherwise under the same number: `_stop` looks at the wishes again when it is gone.
            self._stop(deployment)
        for spec in wanted.values():
            self._start(service, spec)

    def _start(self, service: str, spec: WorkspaceSpec) -> None:
        deployment = Deployment(service, spec)
        self._table.setdefault((service, spec.id), {})[spec.revision] = deployment
        log.info("deployment_wanted", service=service, workspace=spec.id, revision=spec.revision)
        self._changes.announce()
        assert self._nursery is not None, "wishes before run()"
        self._nursery.start_soon(self._serve, deployment)

    async def _serve(self, deployment: Deployment) -> None:
        backend = self._backends["images" if deployment.spec.is_image else "models"]
        try:
            with deployment.scope:
                try:
                    await backend.serve(deployment)
                except Exception as error:
                    # A backend explains what it foresaw; this is for what it did not, and must not end the daemon.
                    log.exception("deployment_crashed", workspace=deployment.spec.id)
                    self.set_phase(deployment, DeploymentPhase.FAILED, f"internal error: {error}")
                await trio.sleep_forever()
        finally:
            self._remove(deployment)

    def _stop(self, deployment: Deployment) -> None:
        if deployment.phase is DeploymentPhase.STOPPING:
            return
        self.set_phase(deployment, DeploymentPhase.STOPPING, "no longer wanted")
        assert self._nursery is not None
        self._nursery.start_soon(self._let_go, deployment)

    async def _let_go(self, deployment: Deployment) -> None:
        with trio.move_on_after(STOP_GRACE_S):
            seen = deployment.idle.count
            if deployment.running:
                await deployment.idle.beyond(seen)
        deployment.scope.cancel()

    def _remove(self, deployment: Deployment) -> None:
        key = (deployment.service, deployment.spec.id)
        revisions = self._table.get(key, {})
        if revisions.get(deployment.spec.revision) is deployment:
            del revisions[deployment.spec.revision]
            if not revisions:
                self._table.pop(key, None)
        self.set_phase(deployment, DeploymentPhase.GONE)
        again = self._wished.get(deployment.service, {}).get((deployment.spec.id, deployment.spec.revision))
        ending = trio.current_effective_deadline() == -math.inf
        if again is not None and not ending:
            self._start(deployment.service, again)


_NONE: Mapping[int, Deployment] = {}
