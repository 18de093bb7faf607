"""The backend of deployments that are images: one container each, on the engine.

What is done when is `lifecycle`'s; here is how: `run` performs one deployment's activities with the parts of this
module, which has what all deployments share: the books of what each holds (`room`), the networks, the engine's events,
the containers of earlier runs.

Ready is an HTTP answer to the readiness path. That a container ended is told by the engine's events, not asked for; in
a steady state the engine is asked for nothing but, every `SWEEP_INTERVAL_S`, one list of all of this node's containers.

After a crash of this daemon the next one adopts what still runs, by label, if it is what is wanted to the last
detail. Containers and volumes of this node that belong to no deployment are removed, once their service has said what
it wants; nothing else on the engine is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

from ngpu_node.config import ContainerSettings
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.engine.confinement import (
    LABEL_GPUS,
    LABEL_NODE,
    LABEL_REVISION,
    LABEL_SERVICE,
    LABEL_SPECIFICATION,
    LABEL_VOLUME,
    LABEL_WORKSPACE,
    ContainerPlan,
)
from ngpu_node.engine.docker_engine import ContainerState, DockerEngine, EngineFacts
from ngpu_node.engine.lifecycle import (
    Doubted,
    Ended,
    EngineBack,
    Event,
    Impossible,
    Life,
    NoRoom,
    Policy,
    RoomChanged,
    Up,
)
from ngpu_node.engine.networks import Networks
from ngpu_node.engine.outlook import BreakOff, Finding, Log, Machine
from ngpu_node.engine.room import Grant, Lack, Limits, Need, Room
from ngpu_node.engine.run import Run
from ngpu_node.engine.volumes import Scales, verdict
from ngpu_node.errors import (
    DeploymentImpossible,
    EngineFailed,
    EngineUnavailable,
    GpusNotGiven,
    StateUnavailable,
    VolumeFull,
)
from ngpu_node.gpus.choice import UsableGpu
from ngpu_node.gpus.containers import COMMAND as GPU_COMMAND
from ngpu_node.gpus.containers import Outside, could_tell, look_outside, lost_inside, lost_outside, nodes_in
from ngpu_node.images.images import Images, ImageWish, LocalImage
from ngpu_node.images.progress import Progress
from ngpu_node.trust import Trust
from ngpu_protocol.control import LAST_WORDS
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.sealing import open_sealed
from ngpu_protocol.workspace_secrets import NO_SECRETS, WorkspaceSecrets
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 30.0
ENGINE_WAITS_S = (0.2, 0.5, 1.0, 2.0, 5.0)
GPU_LOOK_INTERVAL_S = 60.0
GPU_LOOK_TIMEOUT_S = 20.0
LAST_LOG_LINES = 200
LAST_LOG_BYTES = 64 * 1024
LOG_BYTES = 1024 * 1024
EARLY_ENDS = 256
#: How often it is thought of weighing volumes; how often it is done says `volumes`.
WEIGH_INTERVAL_S = 5.0

#: Goes into the mark of what a container was made from: to be raised when the options of `confinement` change.
PLAN_VERSION = 3


class Books(Protocol):
    """Where holdings are written down (`state.NodeState`)."""

    async def holdings(self) -> dict[str, Grant]: ...
    async def keep_holding(self, holder: str, grant: Grant | None) -> None: ...


class Containers:
    """The backend of deployments that are images (see `deployments.ImageBackend`)."""

    def __init__(
        self,
        engine: DockerEngine,
        settings: ContainerSettings,
        deployments: Deployments,
        *,
        account: Account,
        images: Images,
        trust: Trust,
        gpus: Callable[[], Sequence[UsableGpu]],
        reason_against: Callable[[str], str] = lambda uuid: "",
        books: Books | None = None,
        shares_per_gpu: int = 1,
        policy: Policy | None = None,
    ) -> None:
        """Put the parts together; nothing is asked of the engine before `prepare`."""
        self.deployments = deployments
        self.reason_against = reason_against
        self.break_off: BreakOff = lambda deployment, reason, outcome: None
        self.facts = EngineFacts()
        self.problem = ""
        self._engine = engine
        self._images = images
        self._settings = settings
        self._account = account
        self._node: Address = account.address
        self._trust = trust
        self._gpus = gpus
        self._books = books
        self._policy = policy or Policy()
        self._mark = self._node[2:10].lower()
        self._limits = Limits(settings.total_memory_bytes, settings.total_cpus, shares_per_gpu)
        self._room = Room(self._limits)
        self._networks = Networks(engine, settings, self._mark)
        self._networks.lost = self._end_egress
        self._networks.guarded = lambda: self._post_to_all(EngineBack())
        self._gpu_problem = ""
        self._runs: dict[Deployment, Run] = {}
        self._starting: set[str] = set()
        self._early: deque[str] = deque(maxlen=EARLY_ENDS)
        #: deployments whose volumes held too much at the last look, and how much
        self._full: dict[str, str] = {}

    async def prepare(self) -> None:
        """Decide how containers are reached, and take up the books of the last run.

        Raises:
            EngineUnavailable, EngineFailed: the engine does not do it.
            DeploymentImpossible: the owner wants the internal network and it cannot be reached from here.
        """
        self.facts = await self._engine.facts()
        await self._networks.prepare()
        if self._books is not None:
            self._room = Room(self._limits, await self._books.holdings())

    async def finish(self) -> None:
        """Take the node's networks away, unless a container is still on them."""
        await self._networks.finish()

    # -- the engine ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow the engine's events and keep its shelves clean, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._images.run)
            nursery.start_soon(self._networks.watch)
            nursery.start_soon(self._keep_weighing)
            nursery.start_soon(self._follow, nursery)
            nursery.start_soon(self._keep_sweeping)

    async def _follow(self, nursery: trio.Nursery) -> None:
        failures = 0
        while True:
            try:
                async with self._engine.events() as events:
                    # From here on nothing is missed; what happened before is found by looking once.
                    await self._look_around()
                    if self.problem:
                        log.info("engine_back")
                        await self._networks.restore()
                        self.facts = await self._engine.facts()
                        self._gpu_problem = ""
                    self.problem, failures = "", 0
                    self._post_to_all(EngineBack())
                    async for event in events:
                        self._early.append(event.id)
                        run = self._run_of(event.id)
                        if run is not None and event.action == "die":
                            nursery.start_soon(self._autopsy, run, event.id)
                problem = "the container engine ended its event stream"
            except (EngineUnavailable, EngineFailed) as error:
                problem = str(error)
            except Exception:
                log.exception("engine_watch_crashed")
                problem = "internal error"
            if not self.problem:
                log.warning("engine_lost", reason=problem)
                self.problem = problem
                self.deployments.announce()
            await trio.sleep(ENGINE_WAITS_S[min(failures, len(ENGINE_WAITS_S) - 1)])
            failures += 1

    async def _look_around(self) -> None:
        """Find what ended while nobody listened."""
        running = {container.id for container in await self._engine.listed() if container.running}
        for run in list(self._runs.values()):
            if run.container is not None and run.container.id not in running:
                run.post(Ended("the container ended while the engine was away", is_fault=False, word="engine_away"))

    async def _autopsy(self, run: Run, container_id: str) -> None:
        """Find out why a container ended, and tell."""
        try:
            event = await self._how_it_ended(run, container_id)
        except (EngineUnavailable, EngineFailed) as error:
            event = Ended(f"the container ended: {error}", is_fault=False, word="engine_away")
        except Exception:
            # a fault of ours, said loudly; other deployments and their tasks are not to end with it
            log.exception("autopsy_crashed", container=container_id[:12])
            event = Ended("the container ended: internal error", is_fault=False, word="internal")
        if event is not None and run.container is not None and run.container.id == container_id:
            run.post(event)

    async def _how_it_ended(self, run: Run, container_id: str) -> Ended | None:
        now = await self._engine.look_at(container_id)
        if now is None:
            return Ended("the container was removed by someone else", word="removed")
        if now.running:
            return None
        words = ""
        try:
            run.last_log = await self._engine.log_tail(container_id, LAST_LOG_LINES, LAST_LOG_BYTES)
            words = await self._engine.last_words(container_id)
        except EngineFailed as error:
            # a log that cannot be read makes the end no less the workspace's: it counts, or it would start forever
            log.info("container_log_unreadable", container=now.name, reason=str(error))
        how = "out of memory" if now.oom_killed else f"exit code {now.exit_code}"
        text = f"the container ended ({how})" + (f"{LAST_WORDS}{words}" if words else "")
        return Ended(text, word="out_of_memory" if now.oom_killed else "exited")

    def _run_of(self, container_id: str) -> Run | None:
        return next(
            (run for run in self._runs.values() if run.container is not None and run.container.id == container_id), None
        )

    def _end_egress(self, reason: str) -> None:
        """End the containers that may reach the outside: nothing keeps them out of the owner's network any more."""
        text = f"the rules that keep the workspace out of its owner's network are gone and cannot be set: {reason}"
        for deployment, run in list(self._runs.items()):
            if deployment.spec.egress and run.container is not None:
                run.post(Ended(text, is_fault=False, word="egress_unguarded"))
        self.deployments.announce()

    async def _keep_weighing(self) -> None:
        """Stop whoever's volumes take more of the owner's disk than they may."""
        scales = Scales(self._engine, is_short=self._images.disk.is_short)
        while True:
            await trio.sleep(WEIGH_INTERVAL_S)
            keeping = [d for d, run in self._runs.items() if d.spec.volumes and run.container is not None]
            if not keeping or not scales.is_due or self.problem:
                continue
            try:
                is_short = await scales.look()
            except (EngineUnavailable, EngineFailed) as error:
                log.info("volumes_not_measured", reason=str(error))
                continue
            except Exception:
                log.exception("weighing_crashed")  # a fault of ours, said loudly
                continue
            for deployment in keeping:
                own = [self._volume_name(deployment, volume.name) for volume in deployment.spec.volumes]
                found = verdict(scales.now, scales.before, own, limit=self._settings.volume_bytes, is_short=is_short)
                self._full[deployment.key] = found.reason if found and found.word == "volume_full" else ""
                run = self._runs.get(deployment)
                if found is not None and run is not None and run.container is not None:
                    run.post(Impossible(found.reason, found.word))

    def _post_to_all(self, event: Event) -> None:
        for run in list(self._runs.values()):
            run.post(event)

    # -- what belongs to nobody ----------------------------------------------------------------------------------------

    async def _keep_sweeping(self) -> None:
        while True:
            try:
                await self.sweep()
            except (EngineUnavailable, EngineFailed, StateUnavailable) as error:
                log.info("sweep_put_off", reason=str(error))
            except Exception:
                # a fault of ours, said loudly; what is left behind is looked at again all the same
                log.exception("sweep_crashed")
            await trio.sleep(SWEEP_INTERVAL_S)

    async def sweep(self) -> None:
        """Remove this node's containers that belong to no deployment, and the holdings and volumes of what is gone."""
        ours = {run.container.id for run in self._runs.values() if run.container is not None}
        for container in await self._engine.listed():
            if container.id in ours or container.name in self._starting or container.name in self._names():
                continue
            if self._starting and LABEL_WORKSPACE not in container.labels:
                continue  # a helper that may be at work for one that starts
            if self._may_be_wanted(container.labels.get(LABEL_SERVICE, ""), container.labels):
                continue
            log.info("container_removed", container=container.name, reason="no deployment here")
            await self._engine.remove(container.id)
        await self._sweep_books()
        await self._sweep_volumes()

    def _names(self) -> set[str]:
        """Return the names of containers whose deployments are here, and remove or adopt them themselves."""
        return {self._name(deployment) for deployment in self._runs}

    def _may_be_wanted(self, service: str, labels: Mapping[str, str]) -> bool:
        if LABEL_WORKSPACE not in labels:
            return False  # a helper of ours, left by a crash (`DockerEngine.ensure_volume`)
        trusted = any(bootstrap.service == service for bootstrap in self._trust)
        return trusted and not self.deployments.knows_wishes_of(service)

    async def _sweep_books(self) -> None:
        for holder in list(self._room):
            if holder in {deployment.key for deployment in self._runs}:  # looked at each time: one may come meanwhile
                continue
            service = holder.rsplit("/", 2)[0]
            if not self._may_be_wanted(service, {LABEL_WORKSPACE: ""}):
                await self._give_back(holder)

    async def _sweep_volumes(self) -> None:
        for name, labels in (await self._engine.volumes()).items():
            service, workspace = labels.get(LABEL_SERVICE, ""), labels.get(LABEL_WORKSPACE, "")
            # looked at each time: while the engine is asked, a wish may come for a workspace whose data is here
            here = self.deployments.revisions(service, workspace)
            named = {volume.name for deployment in here.values() for volume in deployment.spec.volumes}
            if (here and labels.get(LABEL_VOLUME, "") in named) or self._may_be_wanted(service, labels):
                continue  # what no revision names any more goes too
            try:
                await self._engine.remove_volume(name)
            except EngineFailed as error:
                log.info("volume_kept", volume=name, reason=str(error))  # a container is about to let go of it
            else:
                log.info("volume_removed", volume=name, workspace=workspace)

    # -- what others ask (`deployments.ImageBackend`, `engine.backend`) ------------------------------------------------

    async def serve(self, deployment: Deployment) -> None:
        """Bring *deployment* up and keep it up until it is gone or this is cancelled."""
        run = Run(deployment, self, Life(self._policy))
        self._runs[deployment] = run
        try:
            await run.run()
        finally:
            del self._runs[deployment]
            self._full.pop(deployment.key, None)
            self._images.release(deployment.key, forget=bool(deployment.unwanted))

    def told(self, deployment: Deployment) -> None:
        """Look at what *deployment* shall do now."""
        if (run := self._runs.get(deployment)) is not None:
            run.told()

    def fits_without(self, deployment: Deployment, others: Collection[Deployment]) -> bool:
        """Tell whether there is room for *deployment* if *others* leave."""
        return self._room.would_fit(self._need(deployment.spec), self._gpus(), [other.key for other in others])

    def doubt(self, deployment: Deployment, reason: str) -> None:
        """Look at *deployment* now: a request could not reach it."""
        if (run := self._runs.get(deployment)) is not None:
            run.post(Doubted())

    def gpus_changed(self) -> None:
        """Look at what holds devices, and at what waits for some: which of them may be used is different."""
        for deployment, run in list(self._runs.items()):
            run.post(Doubted() if self.gpus_of(deployment) else RoomChanged())

    def held(self) -> list[str]:
        """Return the UUIDs of the devices that containers have."""
        return self._room.gpus()

    def holders(self) -> dict[str, Hashable]:
        """Return which deployment each container is, by its id."""
        return {run.container.id: d for d, run in self._runs.items() if run.container is not None}

    def findings(self) -> Iterator[Finding]:
        """Return what an owner should know of this engine."""
        facts = self.facts
        yield Finding("engine", self.problem or f"{facts.product} {facts.version} answers", self.problem and "start it")
        yield from self._networks.findings()
        if "rootless" in facts.security:
            yield Finding("engine's rights", "the engine runs without root: what breaks out of a container is nobody")
        elif "userns" in facts.security:
            yield Finding("engine's rights", "containers' users are none of this machine's (user namespaces)")
        else:
            yield Finding(
                "engine's rights",
                "a container's user is a user of this machine (nobody)",
                'consider a rootless engine, or "userns-remap" in its daemon.json',
            )
        if "seccomp" not in facts.security:
            yield Finding("seccomp", "the engine does not filter system calls", "use a kernel and an engine that do")
        if self._gpus() and (self._gpu_problem or "nvidia" not in facts.runtimes):
            yield Finding(
                "GPUs in containers",
                self._gpu_problem
                or "the engine does not list the nvidia runtime; whether it gives GPUs a start will tell",
                "install nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`, restart the "
                "engine and this node",
            )

    def machine(self) -> Machine:
        """Return what the machine has for workspaces."""
        facts, limits = self.facts, self._limits
        return Machine(
            runs_images=not self.problem,
            cpus=min(float(facts.cpus), limits.cpus or float(facts.cpus)),
            memory_bytes=min(facts.memory_bytes, limits.memory_bytes or facts.memory_bytes),
            # without the runtime a hook on the engine's own path may do: only a start would tell
            gives_gpus=facts.product != "Podman" and not self._gpu_problem,
            gives_egress=self._networks.offers_egress,
            image_bytes_free=self._images.room(),
        )

    def images(self) -> list[dict[str, Any]]:
        """Return the images this node knows, for the owner (`Images.listed`)."""
        return self._images.listed()

    @asynccontextmanager
    async def log_of(self, deployment: Deployment, lines: int, *, follow: bool) -> AsyncIterator[Log]:
        """Yield the end of *deployment*'s log and, where it runs and *follow* is asked for, what comes after.

        Raises:
            EngineUnavailable, EngineFailed: it cannot be read now.
        """
        run = self._runs.get(deployment)
        if run is None or run.container is None:
            yield Log(_last_lines(run.last_log if run is not None else b"", lines), None)
        elif follow:
            async with self._engine.log_stream(run.container.id, lines) as more:
                yield Log(b"", more)
        else:
            try:
                found = await self._engine.log_tail(run.container.id, lines, LOG_BYTES)
            except EngineFailed:
                found = _last_lines(run.last_log, lines)  # it is just being removed
            yield Log(found, None)

    # -- GPUs ----------------------------------------------------------------------------------------------------------

    def gpus_of(self, deployment: Deployment) -> tuple[str, ...]:
        """Return the UUIDs of the devices *deployment* holds."""
        grant = self._room.of(deployment.key)
        return grant.gpus if grant else ()

    async def lost_gpus(self, run: Run) -> str:
        """Return which of its devices the container does not see, and why; empty when it has them all."""
        uuids = self.gpus_of(run.deployment)
        if not uuids or run.container is None or trio.current_time() - run.looked_at_gpus_s < GPU_LOOK_INTERVAL_S:
            return ""
        exit_code, output = await self._engine.execute(run.container.id, GPU_COMMAND, timeout_s=GPU_LOOK_TIMEOUT_S)
        run.looked_at_gpus_s = trio.current_time()
        if could_tell(exit_code):
            return lost_inside(exit_code, output, uuids)
        view, here = await trio.to_thread.run_sync(_look_from_outside, run.container.pid)
        return lost_outside(view, {gpu.uuid: gpu.minor for gpu in self._gpus() if gpu.uuid in uuids}, here)

    async def _check_gpus(self, run: Run) -> None:
        """See that a new container really has its devices.

        Raises:
            DeploymentImpossible: it has not.
        """
        if not self.gpus_of(run.deployment):
            return
        if self.facts.product == "Podman":
            # It takes requests for GPUs and starts without any (4.3); what says otherwise is the container itself.
            assert run.container is not None
            exit_code, _ = await self._engine.execute(run.container.id, GPU_COMMAND, timeout_s=GPU_LOOK_TIMEOUT_S)
            view, _ = await trio.to_thread.run_sync(_look_from_outside, run.container.pid)
            if exit_code != 0 and not view.told:
                raise GpusNotGiven(
                    "Podman did not give the container its GPUs: use Docker with nvidia-container-toolkit"
                )
        run.looked_at_gpus_s = float("-inf")
        if reason := await self.lost_gpus(run):
            raise GpusNotGiven(f"the container did not get its GPUs: {reason}")

    # -- activities (`run`) --------------------------------------------------------------------------------------------

    async def fetch(self, run: Run, say: Callable[[str, str], None]) -> LocalImage:
        """Have the image of a deployment on the engine, and keep it there until the deployment is gone.

        Raises:
            ImageProblem: it cannot be had.
        """
        deployment = run.deployment

        def progress(now: Progress) -> None:
            deployment.progress = now
            if now.percent < 100:
                say(now.sentence(str(wish)), now.reason)

        wish = ImageWish.of(deployment.service, deployment.spec, self.secrets_of(deployment))
        return await self._images.ensure(wish, progress)

    async def put_in_place(self, run: Run) -> Event:
        """Adopt the container of an earlier run, or take room and start one."""
        deployment = run.deployment
        assert run.image is not None
        name = self._name(deployment)
        self._starting.add(name)
        try:
            container = await self._adopt(run, name, run.image)
            if container is None:
                taken = self._room.take(deployment.key, self._need(deployment.spec), self._gpus())
                if isinstance(taken, Lack):
                    await self._write_down(deployment.key)
                    return NoRoom(taken.reason, taken.ever)
                await self._write_down(deployment.key)
                container = await self._engine.start(await self._plan(deployment, name, run.image, taken))
            run.container = container
        except GpusNotGiven as error:
            self._gpu_problem = str(error)  # the next one would fare no better: bootstraps are told
            raise
        finally:
            self._starting.discard(name)
        held = set(self.gpus_of(deployment))
        deployment.gpus = tuple(gpu.id for gpu in self._gpus() if gpu.uuid in held)
        deployment.image_digest = run.image.digest
        if container.id in self._early and (ended := await self._how_it_ended(run, container.id)) is not None:
            return ended
        await self._check_gpus(run)
        run.reach(self._places(deployment, container))
        return Up(min(deployment.spec.readiness_timeout_s, self._settings.start_timeout_s))

    async def _adopt(self, run: Run, name: str, image: LocalImage) -> ContainerState | None:
        """Return a container of an earlier run that is exactly what is wanted; remove one that is not."""
        for listed in await self._engine.listed():
            if listed.name != name:
                continue
            found = await self._engine.look_at(listed.id)
            if found is not None and found.running and found.image == image.id and self._is_wanted(run, found):
                # The last run may have ended before an engine, a packet filter or an owner who thinks otherwise now.
                await self._networks.place(egress=run.deployment.spec.egress)
                log.info("container_adopted", container=name, workspace=run.deployment.spec.id)
                await self._write_down(run.deployment.key)
                return found
            log.info("container_removed", container=name, reason="left by an earlier run, and not what is wanted")
            await self._engine.remove(listed.id)
        return None

    def _is_wanted(self, run: Run, found: ContainerState) -> bool:
        deployment = run.deployment
        if found.labels.get(LABEL_SPECIFICATION) != self._specification_mark(deployment):
            return False
        uuids = tuple(filter(None, found.labels.get(LABEL_GPUS, "").split(",")))
        if any(self.reason_against(uuid) for uuid in uuids):
            return False
        need = self._need(deployment.spec)
        return self._room.hold(deployment.key, Grant(need.memory_bytes, need.cpus, uuids))

    async def _plan(self, deployment: Deployment, name: str, image: LocalImage, grant: Grant) -> ContainerPlan:
        spec, settings = deployment.spec, self._settings
        place = await self._networks.place(egress=spec.egress)
        secrets = self.secrets_of(deployment)
        if missing := [name for name in spec.secret_env if name not in secrets.env]:
            raise DeploymentImpossible(f"the bootstrap sent no value of the secret variable {missing[0]}")
        owner = {LABEL_NODE: self._node, LABEL_SERVICE: deployment.service, LABEL_WORKSPACE: spec.id}
        if full := self._full.get(deployment.key):
            raise VolumeFull(full)
        volumes = {}
        for volume in spec.volumes:
            volumes[volume.path] = self._volume_name(deployment, volume.name)
            await self._engine.ensure_volume(volumes[volume.path], {**owner, LABEL_VOLUME: volume.name}, image=image.id)
        return ContainerPlan(
            name=name,
            image=image.id,
            command=tuple(spec.command),
            env={**spec.env, **{name: secrets.env[name] for name in spec.secret_env}},
            ports=tuple(spec.ports),
            labels={
                **owner,
                LABEL_REVISION: str(spec.revision),
                LABEL_SPECIFICATION: self._specification_mark(deployment),
                LABEL_GPUS: ",".join(grant.gpus),
            },
            memory_bytes=grant.memory_bytes,
            cpus=grant.cpus,
            pids=settings.pids,
            network=place.network,
            publish=place.publish,
            name_servers=place.name_servers,
            gpu_uuids=grant.gpus,
            shm_bytes=spec.shm_bytes,
            volumes=volumes,
            log_bytes=settings.log_bytes,
        )

    def secrets_of(self, deployment: Deployment) -> WorkspaceSecrets:
        """Return what was confided to this node for *deployment*.

        Raises:
            DeploymentImpossible: it cannot be read.
        """
        if not deployment.sealed:
            return NO_SECRETS
        try:
            return WorkspaceSecrets.decode(
                open_sealed(
                    deployment.sealed,
                    self._account,
                    workspace=deployment.spec.id,
                    revision=deployment.spec.revision,
                )
            )
        except MalformedError as error:
            raise DeploymentImpossible(f"the workspace's secrets cannot be read here: {error}") from error

    def _places(self, deployment: Deployment, container: ContainerState) -> dict[int, tuple[str, int]]:
        places: dict[int, tuple[str, int]] = {}
        for port in deployment.spec.ports:
            if container.published.get(port):
                places[port] = ("127.0.0.1", container.published[port])
            elif container.address is not None and self._networks.is_internal:
                places[port] = (container.address, port)
        return places

    async def take_away(self, run: Run) -> None:
        """Remove the container of *run*, and then what it held.

        Raises:
            EngineUnavailable, EngineFailed: it may be there still.
        """
        deployment = run.deployment
        if run.container is not None:
            await self._engine.remove(run.container.id)
            run.container = None
        elif deployment.key in self._room:
            # a start that was cut off: whatever there is has our name
            name = self._name(deployment)
            for listed in await self._engine.listed():
                if listed.name == name:
                    await self._engine.remove(listed.id)
        deployment.gpus = ()
        await self._give_back(deployment.key)

    # -- books ---------------------------------------------------------------------------------------------------------

    def _need(self, spec: WorkspaceSpec) -> Need:
        return Need(
            memory_bytes=spec.memory_bytes or self._settings.memory_bytes,
            cpus=spec.cpus or self._settings.cpus,
            gpu_count=spec.gpu_count,
            gpu_types=tuple(spec.gpu_types),
            gpu_memory_bytes=spec.min_gpu_memory_bytes,
        )

    async def _write_down(self, holder: str) -> None:
        if self._books is not None:
            await self._books.keep_holding(holder, self._room.of(holder))

    async def _give_back(self, holder: str) -> None:
        if self._room.give_back(holder):
            await self._write_down(holder)
            self._post_to_all(RoomChanged())

    # -- names ---------------------------------------------------------------------------------------------------------

    def _name(self, deployment: Deployment) -> str:
        return f"{self._prefix(deployment)}-{deployment.spec.revision}"

    def _volume_name(self, deployment: Deployment, volume: str) -> str:
        return f"{self._prefix(deployment)}-{volume}"

    def _prefix(self, deployment: Deployment) -> str:
        service = hashlib.sha256(deployment.service.encode()).hexdigest()[:8]
        return f"ngpu-{self._mark}-{service}-{deployment.spec.id}"

    def _specification_mark(self, deployment: Deployment) -> str:
        """Return what tells whether a running container is what is wanted: a hash of all that goes into making it."""
        settings = self._settings
        owners = [settings.memory_bytes, settings.cpus, settings.pids, settings.log_bytes, settings.name_servers]
        secrets = hashlib.sha256(json.dumps(self.secrets_of(deployment).env, sort_keys=True).encode()).hexdigest()
        # A hash of short secrets could be guessed from the label: keyed with what nobody else has.
        key = hashlib.sha256(b"specification mark" + self._account.key_bytes).digest()
        material = [PLAN_VERSION, specification_material(deployment.spec), owners, secrets]
        return hashlib.blake2b(json.dumps(material, sort_keys=True).encode(), key=key, digest_size=32).hexdigest()


def specification_material(spec: WorkspaceSpec) -> dict[str, object]:
    """Return what of *spec* goes into making its container."""
    fields = {
        "image", "image_url", "command", "env", "ports", "memory_bytes", "cpus", "gpu_count", "gpu_types",
        "min_gpu_memory_bytes", "shm_bytes", "volumes", "egress", "secret_env",
    }  # fmt: skip
    return spec.model_dump(mode="json", include=fields)


def _look_from_outside(pid: int) -> tuple[Outside, frozenset[str]]:
    """Return what is seen of a container's GPUs, and this machine's own device nodes."""
    return look_outside(pid), nodes_in(Path("/dev"))


def _last_lines(log_: bytes, lines: int) -> bytes:
    """Return the last *lines* of *log_*."""
    return b"".join(log_.splitlines(keepends=True)[-lines:]) if lines else b""
