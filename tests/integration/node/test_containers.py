"""Deployments on a real engine: up, confined, healed, adopted after a crash, taken down; and nothing else touched."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import docker
import pytest
import structlog
import trio

from ngpu_node.engine.confinement import LABEL_NODE
from ngpu_node.trust import Trust, TrustedBootstrap
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account
from tests.integration.node.places import a_place, eventually_only, forget_all, get, spec
from tests.integration.node.rig import eventually
from tests.integration.node.scripted_bootstrap import a_bootstrap, a_node, settings
from tests.unit.node.builders import BOOTSTRAP

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]

TRUST = Trust([TrustedBootstrap(BOOTSTRAP.address, ("/ip4/127.0.0.1/tcp/1",), "acme")])


@pytest.mark.parametrize("network", ["auto", "published"])
def test_a_workspace_comes_up_confined_and_goes_without_a_trace(account: Account, image: str, network: str) -> None:
    async def main() -> None:
        async with a_place(account, network=network) as place:
            place.wish(spec(image))
            deployment = await place.until(DeploymentPhase.READY)
            assert await get(deployment, "/") == b"ok hello"
            found = dict(line.split("=", 1) for line in (await get(deployment, "/whoami")).decode().split("\n") if line)
            assert found["uid"] == "65534"
            assert "Read-only" in found["root"]
            assert found["tmp"] == "written"
            assert "Permission denied" in found["exec"]
            assert int(found["caps"], 16) == 0
            (state,) = await place.engine.containers()
            assert deployment.image_digest.hex() == state.image.removeprefix("sha256:")
            place.wish()
            await eventually(lambda: place.deployments.of_service("acme") == [])
            assert deployment.phase is DeploymentPhase.GONE
            assert await place.engine.containers() == []

    trio.run(main)


def test_limits_are_really_set(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, pids=64, memory_bytes=64 << 20, cpus=0.5) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            (state,) = await place.engine.containers()
            client = docker.from_env()
            host = client.containers.get(state.id).attrs["HostConfig"]
            networks = client.containers.get(state.id).attrs["NetworkSettings"]["Networks"]
            client.close()
            assert (host["PidsLimit"], host["Memory"], host["MemorySwap"]) == (64, 64 << 20, 64 << 20)
            assert host["NanoCpus"] == 500_000_000
            assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
            assert host["SecurityOpt"] == ["no-new-privileges"]
            assert (host["ReadonlyRootfs"], host["Init"], host["IpcMode"]) == (True, True, "private")
            assert host["RestartPolicy"]["Name"] == "no"
            assert list(networks) != ["host"]

    trio.run(main)


def test_a_container_that_dies_is_started_again_and_one_that_keeps_dying_is_given_up(
    account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            deployment = await place.until(DeploymentPhase.READY)
            (before,) = await place.engine.containers()
            with pytest.raises(Exception, match=r"connection|answer"):
                await get(deployment, "/die")
            place.containers.doubt(deployment, "refused")
            await eventually(lambda: deployment.phase is not DeploymentPhase.READY)
            await place.until(DeploymentPhase.READY)
            (after,) = await place.engine.containers()
            assert after.id != before.id
            place.wish(spec(image, id="8", command=["exit"]))
            await eventually(lambda: [d.spec.id for d in place.deployments.of_service("acme")] == ["8"])
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.reason == "exited"
            assert "exit code 3" in failed.detail
            assert "I would rather not" in failed.detail
            assert await place.engine.containers() == []

    # its client is told what it last said; in the node's own log it stands at the lowest level alone
    with structlog.testing.capture_logs() as said:
        trio.run(main)
    assert [line for line in said if line.get("state") == "failed"]
    assert {line["log_level"] for line in said if "I would rather not" in str(line)} == {"debug"}


def test_a_new_revision_takes_over_when_it_is_ready_and_one_that_fails_leaves_the_old_one_serving(
    account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            first = await place.until(DeploymentPhase.READY)
            place.wish(spec(image, revision=2, command=["exit"]))
            second = place.revision(2)
            await eventually(lambda: second.phase is DeploymentPhase.FAILED)
            assert first.is_ready
            assert await get(first, "/") == b"ok hello"
            place.wish(spec(image, revision=3, env={"WORD": "new"}))
            third = place.revision(3)
            while not third.is_ready:
                assert first.is_ready
                await trio.sleep(0.01)
            await eventually(lambda: [d.spec.revision for d in place.deployments] == [3])
            assert (first.phase, second.phase) == (DeploymentPhase.GONE, DeploymentPhase.GONE)
            assert await get(third, "/") == b"ok new"
            assert len(await place.engine.containers()) == 1

    trio.run(main)


def test_where_two_revisions_do_not_fit_the_old_one_makes_room_and_comes_back_if_the_new_one_fails(
    account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_place(account, total_cpus=1.5) as place:
            place.wish(spec(image, cpus=1.0))
            first = await place.until(DeploymentPhase.READY)
            place.wish(spec(image, cpus=1.0, revision=2, command=["exit"]))
            second = place.revision(2)
            await eventually(lambda: first.reason == "made_room")
            assert first.phase is DeploymentPhase.QUEUED
            await eventually(lambda: second.phase is DeploymentPhase.FAILED)
            await eventually(lambda: first.is_ready)
            place.wish(spec(image, cpus=1.0, revision=3))
            third = place.revision(3)
            await eventually(lambda: third.is_ready)
            await eventually(lambda: [d.spec.revision for d in place.deployments] == [3])
            place.wish(spec(image, cpus=1.0, revision=3), spec(image, cpus=1.0, id="8"))
            (_, other) = place.deployments.of_service("acme")
            await eventually(lambda: other.reason == "no_room")
            assert other.phase is DeploymentPhase.QUEUED
            assert other.detail == "needs 1 CPUs; free of the 1.5 this node's owner allows: 0.5"
            place.wish(spec(image, cpus=1.0, id="8"))
            await eventually(lambda: other.is_ready)

    trio.run(main)


def test_one_that_hangs_takes_no_tasks_and_one_that_never_listens_is_given_up(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account, start_timeout_s=1) as place:
            place.wish(spec(image))
            deployment = await place.until(DeploymentPhase.READY)
            with trio.move_on_after(0.2):
                await get(deployment, "/hang")
            await place.until(DeploymentPhase.UNHEALTHY)
            place.wish(spec(image, id="8", command=["deaf"]))
            await eventually(lambda: [d.spec.id for d in place.deployments.of_service("acme")] == ["8"])
            failed = await place.until(DeploymentPhase.FAILED)
            assert "not ready within 1 s" in failed.detail

    trio.run(main)


def test_a_registry_that_is_down_is_named_and_asked_again(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec("127.0.0.1:1/nobody/nothing:1"))
            deployment = place.only()
            await eventually(lambda: deployment.reason == "registry_unavailable")
            assert deployment.phase is DeploymentPhase.PULLING
            assert "127.0.0.1:1" in deployment.detail
            assert "trying again in" in deployment.detail

    trio.run(main)


def test_gpus_that_are_not_there_fail_with_the_numbers(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image, gpu_count=2, gpu_types=["RTX4090"]))
            failed = await place.until(DeploymentPhase.FAILED)
            assert failed.detail == "needs 2 free GPUs of type RTX4090; free on this node: none"

    trio.run(main)


def test_a_crashed_daemons_container_is_adopted_and_one_nobody_wants_removed(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image), spec(image, id="8"))
            await eventually(lambda: all(d.is_ready for d in place.deployments.of_service("acme")))
            before = {state.name: state.id for state in await place.engine.containers()}
            forget_all(place)
        async with a_place(account) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            (kept,) = [s for s in await place.engine.containers() if s.name.endswith("-7-1")]
            assert before[kept.name] == kept.id
            await place.containers.sweep()
            await eventually_only(place, kept.id)

    trio.run(main)


def test_a_crashed_daemons_container_of_another_specification_is_replaced(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            (before,) = await place.engine.containers()
            forget_all(place)
        async with a_place(account) as place:
            place.wish(spec(image, env={"WORD": "changed"}))
            deployment = await place.until(DeploymentPhase.READY)
            (after,) = await place.engine.containers()
            assert after.id != before.id
            assert await get(deployment, "/") == b"ok changed"

    trio.run(main)


def test_before_a_service_has_said_what_it_wants_nothing_of_its_is_removed(account: Account, image: str) -> None:
    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            forget_all(place)
        async with a_place(account) as place:
            await place.containers.sweep()
            assert len(await place.engine.containers()) == 1
            place.wish()
            await place.containers.sweep()
            await eventually_only(place)

    trio.run(main)


def test_what_is_not_this_nodes_is_not_touched(account: Account, image: str) -> None:
    other = Account.from_key(secrets.token_bytes(32))
    client = docker.from_env()
    mine = client.containers.run(image, detach=True, name=f"somebody-{secrets.token_hex(4)}")
    labels = {LABEL_NODE: other.address}
    neighbours = client.containers.run(image, detach=True, labels=labels)

    async def main() -> None:
        async with a_place(account) as place:
            place.wish(spec(image))
            await place.until(DeploymentPhase.READY)
            await place.containers.sweep()
            place.wish()
            await eventually(lambda: place.deployments.of_service("acme") == [])

    try:
        trio.run(main)
        for container in (mine, neighbours):
            container.reload()
            assert container.status == "running"
    finally:
        for container in (mine, neighbours):
            container.remove(force=True)
        client.close()


def test_a_task_on_a_container_is_receipted_with_its_image_and_ends_well_when_it_dies(
    tmp_path: Path, account: Account, image: str
) -> None:
    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            chosen = settings(tmp_path, bootstrap, engine="docker")
            async with a_node(chosen, account):
                await bootstrap.wish(spec(image))
                await bootstrap.until_ready()
                state = bootstrap.heartbeats[-1].deployments[0]
                for body in (b"", b"hello", b"x" * 50_000):
                    signed = bootstrap.order(target="/echo")
                    answer = await bootstrap.send(signed, body, node=account)
                    assert answer.receipt is not None
                    assert answer.verdict is not None
                    assert answer.body == body
                    assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
                    assert answer.receipt.receipt.image_digest == state.image_digest != bytes(32)
                died = await bootstrap.send(bootstrap.order(target="/die"), node=account)
                assert (died.status, died.field("ngpu-error")) == (502, "workspace_broke")
                bootstrap.heartbeats.clear()
                await bootstrap.until_ready()
                answer = await bootstrap.send(bootstrap.order(target="/echo"), b"again", node=account)
                assert answer.body == b"again"
            client = docker.from_env()
            mine = {"label": f"{LABEL_NODE}={account.address}"}
            assert client.containers.list(all=True, filters=mine) == []
            assert client.networks.list(filters=mine) == []
            client.close()

    trio.run(main)


def test_the_engine_is_asked_about_a_container_at_most_once_in_ten_seconds(account: Account, image: str) -> None:
    """Counted at the engine's own door, in a window in which nothing happens: a third of that, and once at most."""
    asked: list[str] = []

    async def main() -> None:
        async with a_place(account) as place:
            place.wish(*(spec(image, id=str(number)) for number in (11, 12, 13)))
            with trio.fail_after(60):
                while [one.phase for one in place.deployments] != [DeploymentPhase.READY] * 3:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            session = place.engine._client.api
            whole = session.send

            def counted(request: Any, **options: Any) -> Any:
                asked.append(f"{request.method} {request.path_url}")
                return whole(request, **options)

            session.send = counted
            await trio.sleep(10 / 3)
            quiet = list(asked)
            ids = {state.id for state in await place.engine.containers()}
            assert len(asked) > len(quiet), "nothing is counted"
            session.send = whole
            assert len(ids) == 3
            of_one = [sum(one in path for path in quiet) for one in ids]
            assert max(of_one) <= 1, quiet
            # beside those, one list of all of them may come into the window, and a look at the networks
            assert len(quiet) - sum(of_one) <= 2, quiet
            forget_all(place)

    trio.run(main)
