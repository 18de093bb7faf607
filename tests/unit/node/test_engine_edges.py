"""What the engine does in the middle of things: races of the sweep, broken answers. The engine is scripted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, cast

import pytest
import structlog
import trio
import urllib3
from docker.errors import NotFound
from trio.testing import trio_test

from ngpu_node.changes import Changes
from ngpu_node.config import ContainerSettings
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.engine.confinement import LABEL_NODE, LABEL_SERVICE, LABEL_SPECIFICATION, LABEL_VOLUME, LABEL_WORKSPACE
from ngpu_node.engine.containers import Containers
from ngpu_node.engine.docker_engine import ContainerState, DockerEngine, Listed, Network
from ngpu_node.engine.firewall import Firewall, FirewallUnavailable
from ngpu_node.engine.lifecycle import Ended, Life, Policy
from ngpu_node.engine.networks import Networks
from ngpu_node.engine.room import Grant
from ngpu_node.engine.run import Run
from ngpu_node.errors import DeploymentImpossible, EngineFailed, EngineUnavailable
from ngpu_node.images.download import Download
from ngpu_node.images.images import Images, ImageWish, LocalImage
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_protocol.workspaces import Volume, WorkspaceSpec
from tests.unit.node.builders import BOOTSTRAP, NODE

TRUST = Trust([TrustedBootstrap(BOOTSTRAP.address, ("/ip4/127.0.0.1/tcp/1",), "acme")])
SPEC = WorkspaceSpec(id="7", revision=1, name="chat", image="example.org/chat:1", ports=[8000])


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


class ScriptedEngine:
    """As much of `DockerEngine` as sweeping and looking take; *meanwhile* happens while it is asked for its volumes."""

    def __init__(self) -> None:
        self.here: list[Listed] = []
        self.shelves: dict[str, Mapping[str, str]] = {}
        self.removed: list[str] = []
        self.meanwhile: Callable[[], Awaitable[None]] = nothing

    async def listed(self) -> list[Listed]:
        return self.here

    async def volumes(self) -> dict[str, Mapping[str, str]]:
        await self.meanwhile()
        return self.shelves

    async def remove(self, container_id: str) -> None:
        self.removed.append(container_id)

    async def remove_volume(self, name: str) -> None:
        self.removed.append(name)

    async def look_at(self, container_id: str) -> ContainerState:
        return ContainerState(container_id, "x", {}, "image", False, 3, False, None, {})

    async def log_tail(self, container_id: str, lines: int, max_bytes: int) -> bytes:
        raise EngineFailed("the log is damaged")


class Books:
    """Books whose every entry lets *meanwhile* happen."""

    def __init__(self, held: dict[str, Grant]) -> None:
        self.held = held
        self.meanwhile: Callable[[], None] = lambda: None

    async def holdings(self) -> dict[str, Grant]:
        return self.held

    async def keep_holding(self, holder: str, grant: Grant | None) -> None:
        self.meanwhile()


def containers(
    engine: ScriptedEngine, deployments: Deployments, books: Books | None = None, *, egress: bool = True
) -> Containers:
    return Containers(
        cast(DockerEngine, engine),
        ContainerSettings(egress=egress),
        deployments,
        account=NODE,
        images=cast(Images, None),
        trust=TRUST,
        gpus=list,
        books=books,
    )


class Wanted(Deployments):
    """A table that nobody serves: `want` puts a wish on it."""

    def __init__(self) -> None:
        super().__init__(Changes())
        self._wished["acme"] = {}

    def want(self, spec: WorkspaceSpec) -> Deployment:
        deployment = Deployment("acme", spec)
        self._table[("acme", spec.id)] = {spec.revision: deployment}
        return deployment


@trio_test
async def test_a_volume_whose_workspace_is_wished_for_while_the_engine_is_asked_stays() -> None:
    engine, table = ScriptedEngine(), Wanted()
    engine.shelves = {
        f"{workspace}-{name}": {LABEL_SERVICE: "acme", LABEL_WORKSPACE: workspace, LABEL_VOLUME: name}
        for workspace, name in (("7", "cache"), ("8", "cache"), ("7", "old"))
    }

    async def wish() -> None:
        table.want(SPEC.model_copy(update={"volumes": [Volume(name="cache", path="/cache")]}))

    engine.meanwhile = wish
    await containers(engine, table).sweep()
    assert engine.removed == ["8-cache", "7-old"], "what no revision names any more goes too"


@trio_test
async def test_what_a_deployment_holds_that_comes_during_a_sweep_stays_its_own() -> None:
    engine, table = ScriptedEngine(), Wanted()
    books = Books({"acme/6/1": Grant(1, 1.0, ("GPU-6",)), "acme/7/1": Grant(1, 1.0, ("GPU-7",))})
    backend = containers(engine, table, books)
    backend._room = type(backend._room)(backend._limits, await books.holdings())

    def come() -> None:
        deployment = table.want(SPEC)
        backend._runs[deployment] = Run(deployment, backend, Life(Policy()))

    books.meanwhile = come
    await backend.sweep()
    assert backend.held() == ["GPU-7"]


@trio_test
async def test_a_helper_at_work_for_a_start_is_left_alone() -> None:
    engine = ScriptedEngine()
    engine.here = [Listed("1", "helper", {LABEL_NODE: NODE.address}, "image", False)]
    backend = containers(engine, Wanted())
    backend._starting.add("chat")
    await backend.sweep()
    assert engine.removed == []
    backend._starting.clear()
    await backend.sweep()
    assert engine.removed == ["1"]


@trio_test
async def test_an_end_counts_where_the_log_cannot_be_read() -> None:
    backend = containers(ScriptedEngine(), Wanted())
    run = Run(Deployment("acme", SPEC), backend, Life(Policy()))
    assert await backend._how_it_ended(run, "1") == Ended("the container ended (exit code 3)", word="exited")


# -- networks ----------------------------------------------------------------------------------------------------------


class BusyFirewall(Firewall):
    """Rules another program is in the way of, *times* times."""

    def __init__(self, times: int) -> None:
        super().__init__("12345678")
        self.times = times

    async def apply(self, closed: str, open_: str | None) -> None:
        self.times -= 1
        if self.times >= 0:
            raise FirewallUnavailable("another app is holding the xtables lock")


class NetworkMaker:
    async def ensure_network(self, name: str, bridge: str, *, internal: bool = True) -> Network:
        return Network(name, True)


@trio_test
async def test_egress_is_had_once_the_packet_filter_can_be_told() -> None:
    networks = Networks(cast(DockerEngine, NetworkMaker()), ContainerSettings(), "12345678")
    networks._is_internal = True
    networks._firewall = BusyFirewall(1)
    with pytest.raises(DeploymentImpossible, match="xtables lock"):
        await networks.place(egress=True)
    assert (await networks.place(egress=True)).network == "ngpu-12345678-out"


@trio_test
async def test_the_end_takes_what_an_earlier_run_left_for_egress() -> None:
    removed: list[str] = []

    class Engine(NetworkMaker):
        async def remove_network(self, name: str) -> None:
            removed.append(name)

    class Rules(BusyFirewall):
        async def remove(self, closed: str, open_: str) -> None:
            removed.extend([closed, open_])

    networks = Networks(cast(DockerEngine, Engine()), ContainerSettings(), "12345678")
    networks._firewall = Rules(0)
    await networks.prepare()
    await networks.finish()
    assert removed == ["ngpu-12345678", "ngpu-12345678-out", "ngpu12345678", "ngpu12345678o"]


@trio_test
async def test_a_container_with_egress_is_not_adopted_where_the_owner_allows_none_any_more() -> None:
    class Engine(ScriptedEngine):
        async def look_at(self, container_id: str) -> ContainerState:
            labels = {LABEL_SPECIFICATION: backend._specification_mark(deployment)}
            return ContainerState(container_id, "x", labels, "image", True, 0, False, "172.20.0.2", {})

    engine, table = Engine(), Wanted()
    backend = containers(engine, table, egress=False)
    deployment = table.want(SPEC.model_copy(update={"egress": True}))
    engine.here = [Listed("1", backend._name(deployment), {}, "image", True)]
    run = Run(deployment, backend, Life(Policy()), image=LocalImage("image", bytes(32)))
    with pytest.raises(DeploymentImpossible, match="egress"):
        await backend.put_in_place(run)
    await backend.take_away(run)
    assert engine.removed == ["1"]


# -- the SDK's edges ---------------------------------------------------------------------------------------------------


class Sdk:
    """A client of the SDK's, as far as these tests go: *calls* are answered by name."""

    def __init__(self, **calls: Any) -> None:
        self.__dict__.update(calls)


@trio_test
async def test_an_engine_that_ends_in_the_middle_of_a_log_is_one_that_does_not_answer() -> None:
    def logs(*_: object, **__: object) -> Iterator[bytes]:
        yield b"beginning"
        raise urllib3.exceptions.ProtocolError("Connection broken")

    engine = DockerEngine(cast(Any, Sdk(api=Sdk(logs=logs))), NODE.address)
    with pytest.raises(EngineUnavailable, match="Connection broken"):
        await engine.log_tail("1", 10, 1000)


@trio_test
async def test_a_volume_that_did_not_get_its_owner_goes_even_where_its_helper_is_gone() -> None:
    removed: list[str] = []

    def missing(*_: object, **__: object) -> None:
        raise NotFound("gone")

    api = Sdk(inspect_volume=missing, remove_volume=removed.append)
    helper = Sdk(put_archive=missing, remove=missing)
    sdk = Sdk(api=api, volumes=Sdk(create=lambda *_, **__: None), containers=Sdk(create=lambda *_, **__: helper))
    engine = DockerEngine(cast(Any, sdk), NODE.address)
    with pytest.raises(EngineFailed):
        await engine.ensure_volume("data", {}, image="1")
    assert removed == ["data"]


def test_a_urls_query_which_may_open_the_file_is_not_shown() -> None:
    url = "https://files.example.org/chat.tar?signature=s3cret"
    wish = ImageWish("acme/7/1", "acme/7", url=url, sha256="0" * 64)
    assert str(wish) == "https://files.example.org/chat.tar"
    download = Download(url, limit=None, answer_timeout_s=1.0, allow_private=lambda host: False)
    assert "s3cret" not in str(download._unreachable(OSError("refused")))


@trio_test
async def test_an_answer_of_another_form_is_the_engines_failure_and_said_loudly() -> None:
    engine = DockerEngine(cast(Any, Sdk(api=Sdk(containers=lambda *_, **__: [{"Identifier": "1"}]))), NODE.address)
    with structlog.testing.capture_logs() as said, pytest.raises(EngineFailed, match="not understood"):
        await engine.listed()
    assert [line["log_level"] for line in said] == ["error"]


def test_a_fault_of_our_own_stops_neither_the_sweep_nor_the_daemon_and_is_said_loudly() -> None:
    sweeps = 0

    class Engine(ScriptedEngine):
        async def listed(self) -> list[Listed]:
            nonlocal sweeps
            sweeps += 1
            raise ZeroDivisionError("a bug")

        async def look_at(self, container_id: str) -> ContainerState:
            raise ZeroDivisionError("a bug")

    backend = containers(Engine(), Wanted())
    run = Run(Deployment("acme", SPEC), backend, Life(Policy()))
    run.container = ContainerState("1", "x", {}, "image", True, 0, False, None, {})

    async def main() -> None:
        with trio.move_on_after(100):
            await backend._keep_sweeping()
        await backend._autopsy(run, "1")

    with structlog.testing.capture_logs() as said:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sweeps > 2
    assert {line["event"] for line in said if line["log_level"] == "error"} == {"sweep_crashed", "autopsy_crashed"}
