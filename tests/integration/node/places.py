"""A table of deployments over a real engine, for the tests of what a node does with containers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from ngpu_node.changes import Changes
from ngpu_node.config import ContainerSettings, ImageSettings
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.engine.backend import NoEngine
from ngpu_node.engine.containers import Containers
from ngpu_node.engine.docker_engine import DockerEngine
from ngpu_node.engine.lifecycle import Policy
from ngpu_node.engine.run import Run
from ngpu_node.gpus.choice import UsableGpu
from ngpu_node.images.images import Images
from ngpu_node.state import NodeState
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.integration.node.rig import eventually
from tests.unit.node.builders import BOOTSTRAP

TRUST = Trust([TrustedBootstrap(BOOTSTRAP.address, ("/ip4/127.0.0.1/tcp/1",), "acme")])


QUICK = Policy(health_interval_s=0.2, doubt_interval_s=0.2, restart_waits_s=(0.1, 0.2), max_deaths=2, stop_grace_s=2.0)


class Place:
    """A table of deployments over a real engine."""

    def __init__(self, deployments: Deployments, containers: Containers, engine: DockerEngine) -> None:
        self.deployments = deployments
        self.containers = containers
        self.engine = engine
        self.scope = trio.CancelScope()

    def wish(self, *specs: WorkspaceSpec) -> None:
        self.deployments.wish("acme", specs)

    def only(self) -> Deployment:
        (deployment,) = self.deployments.of_service("acme")
        return deployment

    def revision(self, number: int) -> Deployment:
        return self.deployments.revisions("acme", "7")[number]

    async def until(self, phase: DeploymentPhase, timeout_s: float = 60) -> Deployment:
        deployment = self.only()
        try:
            await eventually(lambda: deployment.phase is phase, timeout_s=timeout_s)
        except trio.TooSlowError:
            raise AssertionError(f"{deployment} is not {phase}: {deployment.detail}") from None
        return deployment


@asynccontextmanager
async def a_place(
    account: Account,
    *,
    state: NodeState | None = None,
    gpus: Sequence[UsableGpu] = (),
    sick: Mapping[str, str] | None = None,
    shares_per_gpu: int = 1,
    **chosen: Any,
) -> AsyncIterator[Place]:
    """Run a table of deployments for the duration of the context.

    Args:
        sick: which of *gpus* must not be used, and why; may be changed while it runs.
    """
    against = sick if sick is not None else {}
    engine = await DockerEngine.connect(account.address)
    deployments = Deployments(Changes())
    images = await Images.open(ImageSettings(registries=["127.0.0.1:1"]), None)
    containers = Containers(
        engine,
        ContainerSettings(**chosen),
        deployments,
        account=account,
        images=images,
        trust=TRUST,
        gpus=lambda: [gpu for gpu in gpus if gpu.uuid not in against],
        reason_against=lambda uuid: against.get(uuid, ""),
        shares_per_gpu=shares_per_gpu,
        books=state,
        policy=QUICK,
    )
    await containers.prepare()
    place = Place(deployments, containers, engine)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(deployments.run, images=containers, models=NoEngine(deployments, ""), keeper=state))
        nursery.start_soon(containers.run)
        with trio.fail_after(60):
            yield place
        nursery.cancel_scope.cancel()
    await images.aclose()
    await engine.aclose()


def forget_all(place: Place) -> None:
    """Leave what a crash leaves: the containers, and nobody who takes them down."""

    async def leave(run: Run) -> None:
        run.container = None

    place.containers.take_away = leave  # type: ignore[method-assign]


async def eventually_only(place: Place, *ids: str) -> None:
    """Wait until these containers are all there are: another sweep may be at the others too."""
    with trio.fail_after(60):
        while {state.id for state in await place.engine.containers()} != set(ids):  # noqa: ASYNC110
            await trio.sleep(0.05)


def spec(image: str, **changes: Any) -> WorkspaceSpec:
    values: dict[str, Any] = {"id": "7", "name": "c", "image": image, "ports": [8080], "env": {"WORD": "hello"}}
    return WorkspaceSpec(**{**values, **changes})


async def get(deployment: Deployment, path: str) -> bytes:
    upstream = deployment.upstream(8080)
    assert upstream is not None
    async with upstream.client.request("GET", path) as response:
        return await response.read(10_000)
