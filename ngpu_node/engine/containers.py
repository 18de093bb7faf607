"""One container per deployment: brought up, watched, brought up again, taken down.

The life of a deployment, each step telling the table how it stands:

    queued -> pulling (if the engine lacks the image) -> starting -> ready <-> unhealthy -> (dead) -> starting ... ->
    failed

Ready is an HTTP answer to the readiness path. A container that died is started again after a growing wait; after
`MAX_RESTARTS` deaths in a row, none of which was ready for `STABLE_S`, it is given up with its last words. An engine
that does not answer is waited for.

After a crash of this daemon the next one adopts what still runs, by label, if it is what is wanted to the last
detail. Containers of this node that belong to no deployment are removed, once their service has said what it wants;
nothing else on the engine is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.config import ContainerSettings
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.engine.confinement import (
    LABEL_GPUS,
    LABEL_NODE,
    LABEL_REVISION,
    LABEL_SERVICE,
    LABEL_SPECIFICATION,
    LABEL_WORKSPACE,
    ContainerPlan,
)
from ngpu_node.engine.docker_engine import ContainerState, DockerEngine, Image
from ngpu_node.errors import DeploymentImpossible, EngineFailed, EngineUnavailable, ImageUnavailable, NodeError
from ngpu_node.gpus.choice import TooFewGpus, UsableGpu, choose
from ngpu_node.probes import probe
from ngpu_node.trust import Trust
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

READINESS_INTERVAL_S = 0.1
READINESS_INTERVAL_MAX_S = 2.0
HEALTH_INTERVAL_S = 5.0
UNHEALTHY_LIMIT_S = 60.0
STABLE_S = 60.0
PROGRESS_INTERVAL_S = 0.5
MAX_RESTARTS = 5
RESTART_WAITS_S = (1.0, 2.0, 5.0, 15.0, 30.0)
ENGINE_WAIT_S = 5.0
REMOVE_TIMEOUT_S = 30.0
SWEEP_INTERVAL_S = 30.0

#: Goes into the mark of what a container was made from: to be raised when the options of `confinement` change.
PLAN_VERSION = 1


class Died(NodeError):
    """A container ended, or answered no more for too long."""


class GpuSick(Died):
    """A device the container holds must not be used any more; the message says why."""


class Containers:
    """The backend of deployments that are images (see `deployments.Backend`)."""

    def __init__(
        self,
        engine: DockerEngine,
        settings: ContainerSettings,
        deployments: Deployments,
        *,
        node: Address,
        trust: Trust,
        gpus: Callable[[], Sequence[UsableGpu]],
        reason_against: Callable[[str], str] = lambda uuid: "",
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._deployments = deployments
        self._node = node
        self._trust = trust
        self._gpus = gpus
        self._reason_against = reason_against
        self._gpu_changes = Changes()
        self._network: str | None = None
        self._mark = node[2:10].lower()
        self._held: dict[Deployment, tuple[str, ...]] = {}
        self._containers: dict[Deployment, str] = {}
        self._starting: set[str] = set()
        self._doubts: dict[Deployment, Changes] = {}

    async def prepare(self) -> None:
        """Decide how containers are reached, and make the network that takes.

        Raises:
            EngineUnavailable, EngineFailed: the engine does not do it.
            DeploymentImpossible: the owner wants the internal network and it cannot be reached from here.
        """
        if self._settings.network == "published":
            return
        network = await self._engine.ensure_network(f"ngpu-{self._mark}", f"ngpu{self._mark}")
        if network.routable:
            self._network = network.name
        elif self._settings.network == "internal":
            raise DeploymentImpossible(
                "the internal network's containers cannot be reached from here (the engine is on another machine or in "
                'a namespace of its own): set network = "published" under [containers]'
            )
        else:
            log.warning("containers_published", hint="containers reach the outside: the engine's networks are not here")
            await self._engine.remove_network(network.name)

    async def run(self) -> None:
        """Remove this node's containers that belong to no deployment, now and then, until cancelled."""
        while True:
            try:
                await self._sweep()
            except (EngineUnavailable, EngineFailed) as error:
                log.info("engine_unavailable", reason=str(error))
            await trio.sleep(SWEEP_INTERVAL_S)

    async def finish(self) -> None:
        """Take the node's network away, unless a container is still on it."""
        if self._network is not None:
            try:
                await self._engine.remove_network(self._network)
            except (EngineUnavailable, EngineFailed) as error:
                log.info("network_kept", network=self._network, reason=str(error))

    async def _sweep(self) -> None:
        for container in await self._engine.containers():
            if container.id in self._containers.values() or container.name in self._starting:
                continue
            service = container.labels.get(LABEL_SERVICE, "")
            trusted = any(bootstrap.service == service for bootstrap in self._trust)
            if trusted and not self._deployments.knows_wishes_of(service):
                continue
            log.info("container_removed", container=container.name, reason="no deployment here")
            await self._engine.remove(container.id)

    def doubt(self, deployment: Deployment, reason: str) -> None:
        """Look at *deployment* now: a request could not reach it."""
        doubts = self._doubts.get(deployment)
        if doubts is not None:
            doubts.announce()

    # -- GPUs ----------------------------------------------------------------------------------------------------------

    def gpus_changed(self) -> None:
        """Look at what holds devices, and at what waits for some: which of them may be used is different."""
        self._gpu_changes.announce()
        for deployment, held in self._held.items():
            if held:
                self.doubt(deployment, "the usable GPUs changed")

    def held(self) -> list[str]:
        """Return the UUIDs of the devices that containers have."""
        return [uuid for held in self._held.values() for uuid in held]

    def holders(self) -> dict[str, Hashable]:
        """Return which deployment each container is, by its id."""
        return {container: deployment for deployment, container in self._containers.items()}

    def _raise_if_sick(self, deployment: Deployment) -> None:
        for uuid in self._held.get(deployment, ()):
            if reason := self._reason_against(uuid):
                raise GpuSick(f"{uuid}: {reason}")

    # -- one deployment ------------------------------------------------------------------------------------------------

    async def serve(self, deployment: Deployment) -> None:
        """Bring *deployment* up and keep it up until cancelled; returns when it was given up."""
        deaths = 0
        self._doubts[deployment] = Changes()
        try:
            while True:
                began_s = trio.current_time()
                seen = self._gpu_changes.count
                try:
                    image = await self._image(deployment)
                    container = await self._up(deployment, image)
                    began_s = trio.current_time()
                    await self._watch(deployment, container)
                except EngineUnavailable as error:
                    self._deployments.set_phase(deployment, _waiting_phase(deployment), str(error))
                    await trio.sleep(ENGINE_WAIT_S)
                    continue
                except TooFewGpus as error:
                    self._deployments.set_phase(deployment, DeploymentPhase.FAILED, str(error))
                    await self._gpu_changes.beyond(seen)
                    continue
                except GpuSick as error:
                    # No fault of the workspace: it starts again at once, on another device where there is one.
                    await self._down(deployment)
                    self._deployments.set_phase(deployment, DeploymentPhase.STARTING, str(error))
                    continue
                except (ImageUnavailable, DeploymentImpossible) as error:
                    self._deployments.set_phase(deployment, DeploymentPhase.FAILED, str(error))
                    return
                except (Died, EngineFailed) as error:
                    deaths = 1 if trio.current_time() - began_s >= STABLE_S else deaths + 1
                    await self._down(deployment)
                    if deaths >= MAX_RESTARTS:
                        self._deployments.set_phase(
                            deployment, DeploymentPhase.FAILED, f"given up after {deaths} starts: {error}"
                        )
                        return
                    wait_s = RESTART_WAITS_S[min(deaths, len(RESTART_WAITS_S)) - 1]
                    detail = f"{error}; starting again in {wait_s:g} s"
                    self._deployments.set_phase(deployment, DeploymentPhase.STARTING, detail)
                    await trio.sleep(wait_s)
        finally:
            # whatever happens, the container goes; and an engine that hangs cannot hold up the daemon's end
            with trio.move_on_after(REMOVE_TIMEOUT_S, shield=True):
                await self._down(deployment)
            self._doubts.pop(deployment, None)

    async def _image(self, deployment: Deployment) -> Image:
        reference = deployment.spec.image
        assert reference is not None
        image = await self._engine.find_image(reference)
        if image is not None:
            return image
        self._deployments.set_phase(deployment, DeploymentPhase.PULLING, f"pulling {reference}")

        told_s = -PROGRESS_INTERVAL_S

        def progress(here: int, known: int) -> None:
            nonlocal told_s
            now_s = trio.current_time()
            if deployment.phase is DeploymentPhase.PULLING and now_s - told_s >= PROGRESS_INTERVAL_S:
                told_s = now_s
                detail = f"pulling {reference}: {here / 1e6:.0f} of {known / 1e6:.0f} MB"
                self._deployments.set_phase(deployment, DeploymentPhase.PULLING, detail)

        with trio.move_on_after(self._settings.pull_timeout_s):
            return await self._engine.pull(reference, progress)
        raise ImageUnavailable(f"pulling {reference} took more than {self._settings.pull_timeout_s:g} s")

    async def _up(self, deployment: Deployment, image: Image) -> ContainerState:
        name = self._name(deployment)
        self._starting.add(name)
        try:
            container = await self._adopt(deployment, name, image)
            if container is None:
                self._deployments.set_phase(deployment, DeploymentPhase.STARTING, "starting the container")
                gpus = choose(
                    deployment.spec.gpu_count,
                    deployment.spec.gpu_types,
                    self._gpus(),
                    [uuid for held in self._held.values() for uuid in held],
                )
                self._held[deployment] = tuple(gpu.uuid for gpu in gpus)
                container = await self._engine.start(self._plan(deployment, name, image))
            self._containers[deployment] = container.id
        finally:
            self._starting.discard(name)
        held = set(self._held.get(deployment, ()))
        deployment.gpus = tuple(gpu.id for gpu in self._gpus() if gpu.uuid in held)
        deployment.image_digest = image.digest
        if container.address is None and not container.published:
            await self._raise_if_dead(container)
        upstreams = self._upstreams(deployment, container)
        deployment.upstream = upstreams.get
        await self._wait_ready(deployment, container, upstreams[deployment.spec.ports[0]])
        return container

    async def _adopt(self, deployment: Deployment, name: str, image: Image) -> ContainerState | None:
        """Return a container of an earlier run that is exactly what is wanted; remove one that is not."""
        for found in await self._engine.containers():
            if found.name != name or found.id in self._containers.values():
                continue
            uuids = tuple(filter(None, found.labels.get(LABEL_GPUS, "").split(",")))
            taken = {uuid for other, held in self._held.items() if other is not deployment for uuid in held}
            same = found.labels.get(LABEL_SPECIFICATION) == specification_mark(deployment.spec)
            if found.running and same and found.image == image.id and not taken & set(uuids):
                self._held[deployment] = uuids
                log.info("container_adopted", container=name, workspace=deployment.spec.id)
                return found
            log.info("container_removed", container=name, reason="left by an earlier run, and not what is wanted")
            await self._engine.remove(found.id)
        return None

    def _plan(self, deployment: Deployment, name: str, image: Image) -> ContainerPlan:
        spec, settings = deployment.spec, self._settings
        held = self._held.get(deployment, ())
        return ContainerPlan(
            name=name,
            image=image.id,
            command=tuple(spec.command),
            env=spec.env,
            ports=tuple(spec.ports),
            labels={
                LABEL_NODE: self._node,
                LABEL_SERVICE: deployment.service,
                LABEL_WORKSPACE: spec.id,
                LABEL_REVISION: str(spec.revision),
                LABEL_SPECIFICATION: specification_mark(spec),
                LABEL_GPUS: ",".join(held),
            },
            memory_bytes=spec.memory_bytes or settings.memory_bytes,
            cpus=spec.cpus or settings.cpus,
            pids=settings.pids,
            network=self._network,
            gpu_uuids=held,
        )

    def _name(self, deployment: Deployment) -> str:
        service = hashlib.sha256(deployment.service.encode()).hexdigest()[:8]
        return f"ngpu-{self._mark}-{service}-{deployment.spec.id}-{deployment.spec.revision}"

    def _upstreams(self, deployment: Deployment, container: ContainerState) -> dict[int, Upstream]:
        places: dict[int, tuple[str, int]] = {}
        for port in deployment.spec.ports:
            if container.published.get(port):
                places[port] = ("127.0.0.1", container.published[port])
            elif container.address is not None and self._network is not None:
                places[port] = (container.address, port)
            else:
                raise Died("the container has no address")
        connections = deployment.concurrency + 2
        return {port: Upstream(*place, max_connections=connections) for port, place in places.items()}

    # -- up and down ---------------------------------------------------------------------------------------------------

    async def _wait_ready(self, deployment: Deployment, container: ContainerState, upstream: Upstream) -> None:
        deadline_s = trio.current_time() + self._settings.start_timeout_s
        wait_s = READINESS_INTERVAL_S
        while True:
            problem = await probe(upstream.host, upstream.port, deployment.spec.readiness_path)
            if problem is None:
                self._deployments.set_phase(deployment, DeploymentPhase.READY)
                return
            await self._raise_if_dead(container)
            if trio.current_time() >= deadline_s:
                raise Died(f"not ready within {self._settings.start_timeout_s:g} s: {problem}")
            self._deployments.set_phase(deployment, DeploymentPhase.STARTING, f"waiting for an answer: {problem}")
            await trio.sleep(wait_s)
            wait_s = min(wait_s * 1.5, READINESS_INTERVAL_MAX_S)

    async def _watch(self, deployment: Deployment, container: ContainerState) -> None:
        """Ask for an HTTP answer now and then; the engine is only asked when there is none. Raises `Died`."""
        doubts = self._doubts[deployment]
        upstream = deployment.upstream(deployment.spec.ports[0])
        assert upstream is not None
        last_answer_s = trio.current_time()
        while True:
            seen = doubts.count
            with trio.move_on_after(HEALTH_INTERVAL_S):
                await doubts.beyond(seen)
            self._raise_if_sick(deployment)
            problem = await probe(upstream.host, upstream.port, deployment.spec.readiness_path)
            if problem is None:
                last_answer_s = trio.current_time()
                self._deployments.set_phase(deployment, DeploymentPhase.READY)
                continue
            self._deployments.set_phase(deployment, DeploymentPhase.UNHEALTHY, problem)
            await self._raise_if_dead(container)
            if trio.current_time() - last_answer_s >= UNHEALTHY_LIMIT_S:
                raise Died(f"no answer for {UNHEALTHY_LIMIT_S:g} s: {problem}")

    async def _raise_if_dead(self, container: ContainerState) -> None:
        now = await self._engine.look_at(container.id)
        if now is None:
            raise Died("the container was removed by someone else")
        if not now.running:
            words = await self._engine.last_words(container.id)
            how = "out of memory" if now.oom_killed else f"exit code {now.exit_code}"
            raise Died(f"the container ended ({how})" + (f"; it last said: {words}" if words else ""))

    async def _down(self, deployment: Deployment) -> None:
        """Take the container away, and with it what it held."""
        deployment_upstreams = [u for p in deployment.spec.ports if (u := deployment.upstream(p)) is not None]
        deployment.upstream = lambda port: None
        for upstream in deployment_upstreams:
            await upstream.aclose()
        container_id = self._containers.pop(deployment, None)
        try:
            if container_id is not None:
                await self._engine.remove(container_id)
        except (EngineUnavailable, EngineFailed) as error:
            # It carries our label: this daemon's sweep, or the next daemon's, removes it.
            log.warning("container_not_removed", workspace=deployment.spec.id, reason=str(error))
        finally:
            self._held.pop(deployment, None)
            deployment.gpus = ()


def _waiting_phase(deployment: Deployment) -> DeploymentPhase:
    if deployment.phase in (DeploymentPhase.READY, DeploymentPhase.UNHEALTHY):
        return DeploymentPhase.UNHEALTHY
    return DeploymentPhase.STARTING


def specification_mark(spec: WorkspaceSpec) -> str:
    """Return what tells whether a running container is what *spec* asks for: a hash of all that goes into making it."""
    material = {
        "plan": PLAN_VERSION,
        "image": spec.image,
        "command": spec.command,
        "env": spec.env,
        "ports": spec.ports,
        "memory_bytes": spec.memory_bytes,
        "cpus": spec.cpus,
        "gpu_count": spec.gpu_count,
        "gpu_types": spec.gpu_types,
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()
