"""What goes wrong with containers, the engine and the daemon, at every stage; where it ends, and that nothing is left.

Engine and daemon are killed for real; the bootstrap is scripted, so that every receipt is seen.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
import trio
from docker.models.containers import Container

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_node.engine import docker_engine, late
from ngpu_node.engine.confinement import LABEL_NODE
from ngpu_node.engine.docker_engine import DockerEngine
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.http1 import HttpError
from ngpu_protocol.identity import Account
from ngpu_protocol.receipts import Outcome
from tests.integration.node.own_engine import own_engine
from tests.integration.node.places import a_place, spec
from tests.integration.node.rig import Answer, eventually
from tests.integration.node.scripted_bootstrap import ScriptedBootstrap, a_bootstrap, a_node, settings
from tests.integration.node.test_process import a_process, prepared

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]


def ours(account: Account) -> list[dict[str, Any]]:
    """Return every container of the node's, in any state."""
    client = docker.from_env()
    try:
        found: list[dict[str, Any]] = client.api.containers(
            all=True, filters={"label": f"{LABEL_NODE}={account.address}"}
        )
        return found
    finally:
        client.close()


@contextmanager
def a_foreign_container(image: str) -> Iterator[Container]:
    """A container that is not this node's: it must live through everything."""
    client = docker.from_env()
    container = client.containers.run(image, detach=True, name=f"somebody-{secrets.token_hex(4)}")
    try:
        yield container
        container.reload()
        assert container.status == "running"
    finally:
        container.remove(force=True)
        client.close()


# -- the container -----------------------------------------------------------------------------------------------------


def test_one_that_answers_500_is_given_up_and_says_so(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image, command=["sick"], readiness_timeout_s=0.5))
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.reason == "never_answered"
            assert "not ready within 0.5 s: port 8080 answers 500" in failed.detail
            assert await place.engine.containers() == []

    trio.run(main)


def test_one_that_leaks_until_it_is_killed_is_given_up_and_says_so(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image, command=["leak"], memory_bytes=48 << 20))
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.reason == "out_of_memory"
            assert "given up after 2 starts: the container ended (out of memory)" in failed.detail
            assert await place.engine.containers() == []

    trio.run(main)


def test_one_that_ignores_sigterm_goes_all_the_same(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "STOP_TIMEOUT_S", 1)

    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image, command=["stubborn"]))
            await place.until(DeploymentPhase.READY)
            place.wish()
            await eventually(lambda: not list(place.deployments))
            assert await place.engine.containers() == []

    trio.run(main)


def test_one_that_somebody_else_removes_is_made_again(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            deployment = await place.until(DeploymentPhase.READY)
            (before,) = ours(account)
            client = docker.from_env()
            client.api.remove_container(before["Id"], force=True)
            client.close()
            await eventually(lambda: deployment.phase is not DeploymentPhase.READY)
            await place.until(DeploymentPhase.READY)
            (after,) = ours(account)
            assert after["Id"] != before["Id"]

    trio.run(main)


def test_in_a_steady_state_the_engine_is_not_asked_for_anything(
    account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    in_thread = DockerEngine._in_thread

    async def counted(self: DockerEngine, call: Any, *, abandon: bool) -> Any:
        calls.append(call.__qualname__)
        return await in_thread(self, call, abandon=abandon)

    monkeypatch.setattr(DockerEngine, "_in_thread", counted)

    async def main() -> None:
        async with a_place(account) as place:
            place.wish(*[spec(image, id=str(number)) for number in range(7, 11)])
            await eventually(lambda: all(d.is_ready for d in place.deployments))
            await trio.sleep(0.5)  # the last start's own calls
            calls.clear()
            await trio.sleep(3)  # fifteen rounds of health checks, at the pace of these tests
            assert calls == []

    trio.run(main)


# -- the engine --------------------------------------------------------------------------------------------------------


async def until(bootstrap: ScriptedBootstrap, *states: str) -> None:
    """Wait until the node's next word on its deployments is *states*."""
    bootstrap.heartbeats.clear()

    def holds() -> bool:
        return bool(bootstrap.heartbeats) and [s.state for s in bootstrap.heartbeats[-1].deployments] == [*states]

    await eventually(holds)


@pytest.mark.timeout_s(180)
def test_an_engine_killed_during_a_task_costs_that_task_alone_with_a_receipt(
    tmp_path: Path, account: Account, image: str
) -> None:
    engine = own_engine()
    answers: list[Answer] = []

    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            async with a_node(settings(tmp_path, bootstrap, engine="docker"), account):
                await bootstrap.wish(spec(image))
                await bootstrap.until_ready()
                (before,) = ours(account)

                async def hang() -> None:
                    order = bootstrap.order(target="/hang", deadline_ms=int(time.time() * 1000) + 90_000)
                    answers.append(await bootstrap.send(order, node=account))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(hang)
                    await trio.sleep(0.3)
                    # its containers run on until it is back, and end then
                    await trio.to_thread.run_sync(engine.kill)
                    await trio.sleep(0.3)
                    await trio.to_thread.run_sync(engine.start)
                (answer,) = answers
                assert (answer.status, answer.field("ngpu-error")) == (502, "workspace_broke")
                assert answer.receipt is not None
                assert answer.receipt.receipt.outcome == Outcome.WORKSPACE_BROKE
                await until(bootstrap, "ready")
                again = await bootstrap.send(bootstrap.order(), b"again", node=account)
                assert again.body == b"again"
                (after,) = ours(account)
                assert after["Id"] != before["Id"]
            assert ours(account) == []

    try:
        trio.run(main)
    finally:
        engine.ensure()


@pytest.mark.timeout_s(180)
def test_an_engine_killed_during_a_start_is_waited_for_and_nothing_is_left_twice(
    tmp_path: Path, account: Account, image: str
) -> None:
    engine = own_engine()

    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            async with a_node(settings(tmp_path, bootstrap, engine="docker"), account):
                await bootstrap.wish(spec(image), spec(image, id="8"), spec(image, id="9"))
                await eventually(lambda: len(ours(account)) > 0)
                await trio.to_thread.run_sync(engine.kill)
                bootstrap.heartbeats.clear()

                def waits() -> bool:
                    states = bootstrap.heartbeats[-1].deployments if bootstrap.heartbeats else ()
                    return any(state.reason == "engine_away" for state in states)

                await eventually(waits)
                host = bootstrap.heartbeats[-1].host
                assert host is not None
                await eventually(lambda: not bootstrap.heartbeats[-1].host.engine)  # type: ignore[union-attr]
                await trio.to_thread.run_sync(engine.start)
                await until(bootstrap, "ready", "ready", "ready")
                assert sorted(one["State"] for one in ours(account)) == ["running"] * 3
            assert ours(account) == []

    try:
        trio.run(main)
    finally:
        engine.ensure()


@pytest.mark.timeout_s(180)
def test_an_engine_that_was_not_there_at_the_start_is_taken_up_when_it_comes(
    tmp_path: Path, account: Account, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "LOOK_INTERVAL_S", 0.3)
    engine = own_engine()

    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            await trio.to_thread.run_sync(engine.kill)
            async with a_node(settings(tmp_path, bootstrap, engine="auto"), account):
                await bootstrap.wish(spec(image), spec(image, id="8"))
                await until(bootstrap, "failed", "failed")
                assert {one.reason for one in bootstrap.heartbeats[-1].deployments} == {"no_engine"}
                host = bootstrap.heartbeats[-1].host
                assert host is not None
                assert not host.engine
                # one that nobody wants any more is not waited with
                await bootstrap.wish(spec(image))
                await until(bootstrap, "failed")
                await trio.to_thread.run_sync(engine.start)
                await until(bootstrap, "ready")
                host = bootstrap.heartbeats[-1].host
                assert host is not None
                assert host.engine
                answer = await bootstrap.send(bootstrap.order(), b"late", node=account)
                assert answer.body == b"late"
                assert len(ours(account)) == 1
            assert ours(account) == []

    try:
        trio.run(main)
    finally:
        engine.ensure()


# -- the daemon --------------------------------------------------------------------------------------------------------


def a_configuration(folder: Path, account: Account, multiaddr: str) -> Path:
    """Write a node's configuration and keystore; return the former."""
    directory = DataDirectory(folder / "data")
    directory.prepare()
    write_keystore(directory.keystore, account, "secret", Kdf.LIGHT)
    config = prepared(folder, multiaddr)
    config.write_text(config.read_text().replace('engine = "none"', 'engine = "docker"'))
    return config


@pytest.mark.timeout_s(180)
def test_a_killed_daemon_leaves_its_containers_serving_and_the_next_one_adopts_them(
    tmp_path: Path, account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            config = a_configuration(tmp_path, account, bootstrap.multiaddr)
            async with a_process(config) as node:
                await bootstrap.wish(spec(image), spec(image, id="8"))
                await until(bootstrap, "ready", "ready")
                before = {one["Id"] for one in ours(account)}
                async with trio.open_nursery() as nursery:

                    async def lost() -> None:
                        with pytest.raises(HttpError):
                            await bootstrap.send(bootstrap.order(target="/slow"), node=account)

                    nursery.start_soon(lost)
                    await trio.sleep(0.1)
                    node.kill()  # during a task
                await node.process.wait()
            assert {one["Id"] for one in ours(account)} == before
            began_s = time.monotonic()
            async with a_process(config) as node:
                # without a word from the bootstrap, but that it is there
                await until(bootstrap, "ready", "ready")
                took_s = time.monotonic() - began_s
                assert {one["Id"] for one in ours(account)} == before
                answer = await bootstrap.send(bootstrap.order(), b"again", node=account)
                assert answer.body == b"again"
                # 5 s on a machine with nothing else to do; `tests.bench.workspaces` measures it
                assert took_s < 20, took_s
                await bootstrap.wish(spec(image))
                await until(bootstrap, "ready")
                await eventually(lambda: len(ours(account)) == 1)
                node.process.terminate()
                with trio.fail_after(60):
                    await node.process.wait()
            assert ours(account) == []

    with a_foreign_container(image):
        trio.run(main)


@pytest.mark.timeout_s(180)
def test_a_daemon_killed_during_a_start_leaves_nothing_twice(tmp_path: Path, account: Account, image: str) -> None:
    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            config = a_configuration(tmp_path, account, bootstrap.multiaddr)
            async with a_process(config) as node:
                await bootstrap.wish(*[spec(image, id=str(number)) for number in range(7, 11)])
                await eventually(lambda: len(ours(account)) >= 2)
                node.kill()
                await node.process.wait()
            # and one that was made and never started, as a crash between the two leaves it
            client = docker.from_env()
            client.api.create_container(
                image, labels={LABEL_NODE: account.address}, name=f"ngpu-left-{secrets.token_hex(4)}"
            )
            client.close()
            async with a_process(config) as node:
                await until(bootstrap, "ready", "ready", "ready", "ready")
                await eventually(lambda: len(ours(account)) == 4)
                assert all(one["State"] == "running" for one in ours(account))
                node.process.terminate()
                with trio.fail_after(60):
                    await node.process.wait()
            assert ours(account) == []

    with a_foreign_container(image):
        trio.run(main)


def test_a_task_that_outlasts_the_grace_of_a_replaced_revision_ends_with_a_receipt(
    tmp_path: Path, account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            chosen = settings(tmp_path, bootstrap, engine="docker", drain_s=0.2)
            async with a_node(chosen, account):
                await bootstrap.wish(spec(image))
                await bootstrap.until_ready()
                answers: list[Answer] = []

                async def hang() -> None:
                    answers.append(await bootstrap.send(bootstrap.order(target="/hang"), node=account))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(hang)
                    await trio.sleep(0.2)
                    await bootstrap.wish(spec(image, revision=2))
                (answer,) = answers
                assert answer.receipt is not None
                assert answer.receipt.receipt.outcome == Outcome.NODE_STOPPING
                await until(bootstrap, "ready")
                assert bootstrap.heartbeats[-1].deployments[0].revision == 2

    trio.run(main)
