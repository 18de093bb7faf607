"""Which engine this node has: decided at start, or when one first answers (`late`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import structlog
import trio

from ngpu_node.config import NodeSettings
from ngpu_node.deployments import Deployment, Deployments, ImageBackend
from ngpu_node.engine.outlook import BreakOff, Finding, Log, Machine
from ngpu_node.errors import DeploymentImpossible, EngineFailed, EngineUnavailable, NodeConfigurationError
from ngpu_node.gpus.choice import UsableGpu
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account

if TYPE_CHECKING:
    from ngpu_node.engine.containers import Books

log = structlog.get_logger(__name__)


FINISH_S = 10.0


@dataclass(slots=True)
class EngineStatus:
    """The engine, for the owner, as it is now: `docker` or `none`, its version, and why there is none."""

    name: str
    version: str = ""
    problem: str = ""


class EngineBackend(ImageBackend, Protocol):
    """A backend of images: it also looks after what it left behind, and can be told of doubts."""

    break_off: BreakOff

    async def run(self) -> None: ...
    def doubt(self, deployment: Deployment, reason: str) -> None: ...
    def gpus_changed(self) -> None: ...
    def held(self) -> list[str]: ...
    def holders(self) -> dict[str, Hashable]: ...
    def findings(self) -> Iterable[Finding]: ...
    def machine(self) -> Machine: ...
    def images(self) -> list[dict[str, Any]]: ...
    def log_of(self, deployment: Deployment, lines: int, *, follow: bool) -> AbstractAsyncContextManager[Log]: ...


class NoEngine:
    """The backend of a node without containers: every image fails, and says why."""

    def __init__(self, deployments: Deployments, problem: str) -> None:
        self._deployments = deployments
        self._problem = problem
        self.break_off: BreakOff = lambda deployment, reason, outcome: None

    async def run(self) -> None:
        """There is nothing to look after."""
        await trio.sleep_forever()

    async def serve(self, deployment: Deployment) -> None:
        """Say that *deployment* cannot be."""
        self._deployments.set_phase(deployment, DeploymentPhase.FAILED, self._problem, "no_engine")
        await deployment.let_go.wait()

    def told(self, deployment: Deployment) -> None:
        """Nothing runs here that could leave."""

    def fits_without(self, deployment: Deployment, others: Collection[Deployment]) -> bool:
        """Nothing fits here."""
        return False

    def doubt(self, deployment: Deployment, reason: str) -> None:
        """Nothing runs here that could be doubted."""

    def gpus_changed(self) -> None:
        """Nothing here holds devices."""

    def held(self) -> list[str]:
        """Return none."""
        return []

    def holders(self) -> dict[str, Hashable]:
        """Return none."""
        return {}

    def findings(self) -> Iterable[Finding]:
        """Say that there is no engine."""
        return [Finding("engine", self._problem, "install Docker, or serve registered model servers only")]

    def machine(self) -> Machine:
        """Return that it runs no images."""
        return Machine(runs_images=False)

    def images(self) -> list[dict[str, Any]]:
        """Return none."""
        return []

    @asynccontextmanager
    async def log_of(self, deployment: Deployment, lines: int, *, follow: bool) -> AsyncIterator[Log]:
        """Yield nothing: there are no containers."""
        yield Log(b"", None)


@asynccontextmanager
async def open_backend(
    settings: NodeSettings,
    *,
    account: Account,
    deployments: Deployments,
    books: Books | None,
    gpus: Callable[[], Sequence[UsableGpu]],
    reason_against: Callable[[str], str],
) -> AsyncIterator[tuple[EngineBackend, EngineStatus]]:
    """Yield what runs images on this node.

    Raises:
        NodeConfigurationError: the owner demands an engine (`engine = "docker"`) that does not answer or cannot do what
            is wanted of it.
    """
    if settings.engine == "none":
        problem = 'this node runs no images: its owner set engine = "none"'
        yield NoEngine(deployments, problem), EngineStatus("none", problem=problem)
        return

    def open_engine() -> AbstractAsyncContextManager[EngineBackend]:
        return _open_engine(
            settings,
            status,
            account=account,
            deployments=deployments,
            books=books,
            gpus=gpus,
            reason_against=reason_against,
        )

    status = EngineStatus("none")
    async with AsyncExitStack() as stack:
        backend: EngineBackend
        try:
            backend = await stack.enter_async_context(open_engine())
        except EngineUnavailable as error:
            if settings.engine == "docker":
                raise NodeConfigurationError(f'engine = "docker": {error}') from error
            log.info("no_engine", reason=str(error))
            from ngpu_node.engine.late import LateEngine

            status.problem = str(error)
            backend = LateEngine(deployments, status, open_engine, stack)
        yield backend, status


@asynccontextmanager
async def _open_engine(
    settings: NodeSettings,
    status: EngineStatus,
    *,
    account: Account,
    deployments: Deployments,
    books: Books | None,
    gpus: Callable[[], Sequence[UsableGpu]],
    reason_against: Callable[[str], str],
) -> AsyncIterator[EngineBackend]:
    """Yield the engine's backend and fill in *status*. Entered and left by different tasks: it holds no scope open.

    Raises:
        EngineUnavailable: no engine answers.
        NodeConfigurationError: one does, and cannot do what is wanted of it.
    """
    # The docker SDK and what it brings are 15 MB that a node without an engine need not carry.
    from ngpu_node.engine.containers import Containers
    from ngpu_node.engine.docker_engine import DockerEngine
    from ngpu_node.engine.lifecycle import Policy
    from ngpu_node.images.images import Images

    engine = await DockerEngine.connect(account.address)
    images = None
    try:
        try:
            images = await Images.open(settings.images, settings.data_dir / "images.json")
        except (EngineUnavailable, EngineFailed) as error:
            raise NodeConfigurationError(f"engine: {error}") from error
        containers = Containers(
            engine,
            settings.containers,
            deployments,
            account=account,
            images=images,
            trust=settings.trust(),
            gpus=gpus,
            reason_against=reason_against,
            books=books,
            shares_per_gpu=settings.gpus.shares_per_gpu,
            policy=Policy(stop_grace_s=settings.drain_s),
        )
        try:
            await containers.prepare()
        except (EngineUnavailable, EngineFailed, DeploymentImpossible) as error:
            raise NodeConfigurationError(f"engine: {error}") from error
        status.name, status.version = "docker", containers.facts.version
        try:
            yield containers
        finally:
            with trio.move_on_after(FINISH_S, shield=True):
                await containers.finish()
    finally:
        with trio.move_on_after(5, shield=True):
            await engine.aclose()
            if images is not None:
                await images.aclose()
