"""The workspaces wanted on this node against those that are here.

Owns the table: what each service of bootstraps wishes for, one `Deployment` for each wish and its phase. Making a
wish come true is a backend's work (`services.ModelServers` for registered model servers, `engine.containers` for
images): the table runs `backend.serve(deployment)` until the deployment is gone, and tells it when it is not wanted
any more, or shall leave the machine for a while.

Wishes of two services never meet: workspace 7 of one and workspace 7 of another are two deployments. The revisions of
one workspace are deployments of their own too, so that an old one can serve while a new one starts (`revisions` says
how one follows the other).

The table is written down (`state`), so that the next run begins with it, whether a bootstrap is there or not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.errors import StateUnavailable
from ngpu_node.images.progress import Progress
from ngpu_node.revisions import MakeRoom, RevisionState, Stop, TakeBack, settle
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import DeploymentPhase, DeploymentState, without_last_words
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

#: How long the last attempts of an unwanted deployment may go on.
STOP_GRACE_S = 30.0
WRITE_AGAIN_S = 10.0

_NO_IMAGE = bytes(32)


@dataclass(frozen=True, slots=True)
class KeptDeployment:
    """A deployment as it is written down.

    Attributes:
        is_wished: False for an older revision that serves until its successor is ready.
        sealed: its secrets, as they came; empty where it has none.
    """

    service: str
    spec: WorkspaceSpec
    is_wished: bool = True
    sealed: bytes = b""


class Keeper(Protocol):
    """Where the table is written down (`state.NodeState`)."""

    async def deployments(self) -> list[KeptDeployment]: ...
    async def keep_deployments(self, kept: Sequence[KeptDeployment]) -> None: ...


@dataclass(eq=False, slots=True)
class Deployment:
    """One revision of one workspace on this node.

    Attributes:
        service: the service of bootstraps that wants it.
        detail: a sentence for people about the phase.
        reason: the stable word for it, empty when all is well.
        image_digest: SHA-256 of the image that runs, zero for a model server.
        gpus: ids of the GPUs it holds.
        running: attempts that run on it now.
        upstream: where a port is served, None while it is not; set by the backend.
        route: where a method and target go and what is asked for there, None where they may not be, and no server
            where none that takes them answers now; only model servers have one, on a machine that is
            more than the workspace's own.
        sealed: its secrets, sealed to this node; empty where it has none.
        is_wished: a bootstrap wants this revision; else it serves until its successor is ready.
        served: it was ready once.
        lacks_room: it waits for others to leave.
        made_room: it left the machine for its successor.
        unwanted: why it shall go for good, empty while it is wanted.
        withdrawn: why it shall not be on the machine now, a sentence and a stable word; None where it shall.
    """

    service: str
    spec: WorkspaceSpec
    phase: DeploymentPhase = DeploymentPhase.QUEUED
    detail: str = ""
    reason: str = ""
    image_digest: bytes = _NO_IMAGE
    gpus: tuple[bytes, ...] = ()
    running: int = 0
    upstream: Callable[[int], Upstream | None] = lambda port: None
    route: Callable[[str, str], tuple[Upstream | None, str] | None] | None = None
    sealed: bytes = field(default=b"", repr=False)
    progress: Progress = field(default_factory=Progress)
    is_wished: bool = True
    served: bool = False
    lacks_room: bool = False
    made_room: bool = False
    ports: frozenset[int] = field(init=False)
    idle: Changes = field(default_factory=Changes)
    unwanted: str = ""
    withdrawn: tuple[str, str] | None = None
    let_go: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.ports = frozenset(self.spec.ports)

    @property
    def is_ready(self) -> bool:
        return self.phase is DeploymentPhase.READY

    @property
    def concurrency(self) -> int:
        return self.spec.concurrency

    @property
    def key(self) -> str:
        """Its name in this node's own books."""
        return f"{self.service}/{self.spec.id}/{self.spec.revision}"

    def began(self) -> None:
        """Count an attempt in."""
        self.running += 1

    def ended(self) -> None:
        """Count an attempt out."""
        self.running -= 1
        if self.running == 0 and self.phase is DeploymentPhase.STOPPING:
            self.idle.announce()

    async def empty(self, grace_s: float) -> None:
        """Wait until nothing runs on it, for *grace_s* at most; it must be stopping, or more comes."""
        with trio.move_on_after(grace_s):
            while self.running:
                await self.idle.beyond(self.idle.count)

    def state(self, yours: int | None = None) -> DeploymentState:
        """Return what the heartbeat says about it to a bootstrap with *yours* attempts on it."""
        return DeploymentState(
            workspace=self.spec.id,
            revision=self.spec.revision,
            state=self.phase,
            detail=self.detail,
            slots_free=max(0, self.concurrency - self.running) if self.is_ready else 0,
            image_digest=self.image_digest,
            gpus=self.gpus,
            progress=self.progress.percent,
            bytes_done=self.progress.bytes_done,
            bytes_total=self.progress.bytes_total,
            seconds_left=self.progress.seconds_left,
            reason=self.reason,
            yours=yours,
        )

    def __repr__(self) -> str:
        return f"Deployment({self.service}/{self.spec.id}@{self.spec.revision} {self.phase})"


class Backend(Protocol):
    """What makes deployments of one kind come true."""

    async def serve(self, deployment: Deployment) -> None:
        """Bring *deployment* up and keep it up until cancelled, then take it down.

        Tells by `Deployments.set_phase` how it stands.
        """


class ImageBackend(Backend, Protocol):
    """What makes deployments of images come true: `serve` also returns once an unwanted one is gone."""

    def told(self, deployment: Deployment) -> None:
        """Look at what *deployment* shall do now: `Deployment.unwanted` or `Deployment.withdrawn` changed."""

    def fits_without(self, deployment: Deployment, others: Collection[Deployment]) -> bool:
        """Tell whether there is room for *deployment* if *others* leave."""


class Deployments:
    """The table of one node."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._table: dict[tuple[str, str], dict[int, Deployment]] = {}
        self._images: ImageBackend | None = None
        self._models: Backend | None = None
        self._nursery: trio.Nursery | None = None
        self._wished: dict[str, dict[tuple[str, int], KeptDeployment]] = {}
        self._held_back: tuple[str, str] | None = None
        self._to_write = Changes()
        self.gone: Callable[[Deployment], None] = lambda deployment: None

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

    def set_phase(self, deployment: Deployment, phase: DeploymentPhase, detail: str = "", reason: str = "") -> None:
        """Record how *deployment* stands and announce it. A stopping model server's stays so until it is gone."""
        is_stopping = deployment.phase is DeploymentPhase.STOPPING and not deployment.spec.is_image
        if is_stopping and phase is not DeploymentPhase.GONE:
            return
        if (deployment.phase, deployment.detail, deployment.reason) == (phase, detail, reason):
            return
        log.log(
            logging.INFO if deployment.phase is not phase else logging.DEBUG,
            "deployment_changed",
            service=deployment.service,
            workspace=deployment.spec.id,
            revision=deployment.spec.revision,
            state=str(phase),
            detail=without_last_words(detail),
            reason=reason,
        )
        if detail != without_last_words(detail):
            log.debug("container_last_said", workspace=deployment.spec.id, detail=detail)
        deployment.phase, deployment.detail, deployment.reason = phase, detail, reason
        deployment.served = deployment.served or phase is DeploymentPhase.READY
        self._changes.announce()
        self._settle(deployment.service, deployment.spec.id)

    def announce(self) -> None:
        """Say that something about a deployment changed that is not its phase."""
        self._changes.announce()

    async def run(
        self,
        *,
        images: ImageBackend,
        models: Backend,
        keeper: Keeper | None = None,
        is_trusted: Callable[[str], bool] = lambda service: True,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve wishes until cancelled; on the way out every backend takes its deployments down.

        Args:
            keeper: where the table is written down; it begins with what is there.
            is_trusted: tells of a service whether its deployments of the last run may come back.
        """
        self._images, self._models = images, models
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if keeper is not None:
                    for kept in await keeper.deployments():
                        if is_trusted(kept.service):
                            self._start(kept, served=not kept.is_wished)
                    nursery.start_soon(self._keep_writing, keeper)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def wish(self, service: str, specs: Sequence[WorkspaceSpec], sealed: Mapping[str, bytes] | None = None) -> None:
        """Make *specs* all that *service* wants on this node from now on; *sealed* has their secrets, by workspace."""
        boxes = sealed or {}
        wanted = {
            (spec.id, spec.revision): KeptDeployment(service, spec, sealed=boxes.get(spec.id, b"")) for spec in specs
        }
        self._wished[service] = wanted
        touched = {spec.id for spec in specs}
        for deployment in self.of_service(service):
            touched.add(deployment.spec.id)
            wish = wanted.get((deployment.spec.id, deployment.spec.revision))
            deployment.is_wished = wish is not None
            if wish is None:
                continue
            if not wish.spec.runs_like(deployment.spec):
                # Wanted otherwise under the same number: `_remove` looks at the wishes again when it is gone.
                self._stop(deployment, "its specification changed")
            else:
                deployment.spec, deployment.sealed = wish.spec, wish.sealed or deployment.sealed
        for (workspace, revision), wish in wanted.items():
            if revision not in self.revisions(service, workspace):
                self._start(wish)
        for workspace in touched:
            self._settle(service, workspace)
        self._to_write.announce()
        # Said again even where nothing is new: a bootstrap counts on what it told this node to run, and hears of what
        # was adopted before it had told.
        self._changes.announce()

    # -- leaving the machine for a while -------------------------------------------------------------------------------

    def hold_back(self, reason: str, word: str) -> None:
        """Have every image leave the machine, and none start, until `let_back`: the owner wants it for himself."""
        self._held_back = (reason, word)
        for deployment in list(self):
            self._apply_hold(deployment)

    def let_back(self) -> None:
        """End a `hold_back`."""
        self._held_back = None
        for deployment in list(self):
            self._apply_hold(deployment)

    def _apply_hold(self, deployment: Deployment) -> None:
        if self._images is None or not deployment.spec.is_image or deployment.unwanted:
            return
        deployment.withdrawn = self._why_not_now(deployment)
        self._images.told(deployment)

    def _why_not_now(self, deployment: Deployment) -> tuple[str, str] | None:
        if self._held_back is not None:
            return self._held_back
        return ("made room for a newer revision", "made_room") if deployment.made_room else None

    def _settle(self, service: str, workspace: str) -> None:
        """Do what `revisions` says about one workspace."""
        if self._images is None:
            return
        here = {d.spec.revision: d for d in self.revisions(service, workspace).values() if not d.unwanted}
        standings = [
            RevisionState(
                revision=revision,
                phase=deployment.phase,
                is_wished=deployment.is_wished,
                served=deployment.served,
                made_room=deployment.made_room,
                would_fit_alone=deployment.lacks_room
                and len(here) > 1
                and self._images.fits_without(deployment, [d for d in here.values() if d is not deployment]),
            )
            for revision, deployment in here.items()
        ]
        for step in settle(standings):
            deployment = here[step.revision]
            match step:
                case Stop(_, reason):
                    self._stop(deployment, reason)
                case MakeRoom(_, successor):
                    deployment.made_room = True
                    log.info("revision_makes_room", workspace=workspace, revision=step.revision, successor=successor)
                    self._apply_hold(deployment)
                case TakeBack():
                    deployment.made_room = False
                    self._apply_hold(deployment)

    # -- coming and going ----------------------------------------------------------------------------------------------

    def _start(self, wish: KeptDeployment, *, served: bool = False) -> None:
        deployment = Deployment(wish.service, wish.spec, sealed=wish.sealed, is_wished=wish.is_wished, served=served)
        if deployment.spec.is_image:
            deployment.withdrawn = self._why_not_now(deployment)
        self._table.setdefault((wish.service, wish.spec.id), {})[wish.spec.revision] = deployment
        log.info("deployment_wanted", service=wish.service, workspace=wish.spec.id, revision=wish.spec.revision)
        self._changes.announce()
        assert self._nursery is not None, "wishes before run()"
        self._nursery.start_soon(self._serve, deployment)

    async def _serve(self, deployment: Deployment) -> None:
        try:
            try:
                if deployment.spec.is_image:
                    assert self._images is not None
                    await self._images.serve(deployment)
                else:
                    await self._serve_model(deployment)
            except Exception as error:
                # A backend explains what it foresaw; this is for what it did not, and must not end the daemon.
                log.exception("deployment_crashed", workspace=deployment.spec.id)
                self.set_phase(deployment, DeploymentPhase.FAILED, f"internal error: {error}", "internal")
                await deployment.let_go.wait()
        finally:
            self._remove(deployment)

    async def _serve_model(self, deployment: Deployment) -> None:
        assert self._models is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._models.serve, deployment)
            await deployment.let_go.wait()
            await deployment.empty(STOP_GRACE_S)
            nursery.cancel_scope.cancel()

    def _stop(self, deployment: Deployment, reason: str) -> None:
        if deployment.unwanted:
            return
        deployment.unwanted = reason
        deployment.let_go.set()
        if deployment.spec.is_image:
            assert self._images is not None
            self._images.told(deployment)
        else:
            self.set_phase(deployment, DeploymentPhase.STOPPING, reason)

    def _remove(self, deployment: Deployment) -> None:
        key = (deployment.service, deployment.spec.id)
        revisions = self._table.get(key, {})
        if revisions.get(deployment.spec.revision) is deployment:
            del revisions[deployment.spec.revision]
            if not revisions:
                self._table.pop(key, None)
        ending = trio.current_effective_deadline() == -math.inf
        self.set_phase(deployment, DeploymentPhase.GONE, deployment.detail if ending else "")
        self.gone(deployment)
        self._to_write.announce()
        again = self._wished.get(deployment.service, {}).get((deployment.spec.id, deployment.spec.revision))
        if again is not None and not ending:
            self._start(again)

    # -- written down --------------------------------------------------------------------------------------------------

    async def _keep_writing(self, keeper: Keeper) -> None:
        while True:
            seen = self._to_write.count
            # also what a service that was not heard of yet wanted in the last run: it is in the table
            kept = [KeptDeployment(d.service, d.spec, d.is_wished, d.sealed) for d in self if not d.unwanted]
            again = [
                wish
                for wishes in self._wished.values()
                for wish in wishes.values()
                if (d := self.revisions(wish.service, wish.spec.id).get(wish.spec.revision)) is None or d.unwanted
            ]
            wait_s = math.inf
            try:
                await keeper.keep_deployments([*kept, *again])
            except StateUnavailable as error:
                # What runs goes on: only the next start would know less.
                log.error("deployments_not_written", reason=str(error))
                wait_s = WRITE_AGAIN_S
            with trio.move_on_after(wait_s):
                await self._to_write.beyond(seen)


_NONE: Mapping[int, Deployment] = {}
