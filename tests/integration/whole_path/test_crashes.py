"""Daemons killed and stopped in the middle of work: nothing promised is lost, nothing forbidden runs twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from ngpu_protocol.http1 import HttpError
from tests.integration.whole_path.rig import Network, SharedNetwork
from tests.integration.whole_path.workspace import Workspace

JSON = [(b"content-type", b"application/json")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    with SharedNetwork(tmp_path_factory.mktemp("net"), nodes=2, spec={"concurrency": 1}) as network:
        yield network


async def submit(net: Network, data: str) -> str:
    answer = await net.call("POST", "/user/train", b'{"data": "%b"}' % data.encode(), JSON)
    assert answer.status == 200, answer.body
    return str(answer.document["taskId"])


@pytest.mark.timeout_s(240)
def test_kill_9_of_the_bootstrap_loses_no_task_and_runs_none_twice(shared: SharedNetwork) -> None:
    """Two detached tasks run, or one and an attached call; the others wait. All at once, the bootstrap dies."""

    async def part(net: Network, workspace: Workspace) -> None:
        attached: list[str] = []

        async def attached_call() -> None:
            async with net.stream("POST", "/proxy/8080/hang", b"x") as response:
                attached.append(next(v for n, v in response.headers if n == b"ngpu-task-id").decode())
                with pytest.raises(HttpError):
                    await response.read(1000)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attached_call)
            await workspace.begun.wait()
            workspace.begun = trio.Event()
            tasks = [await submit(net, f"t{number}") for number in range(5)]
            await workspace.begun.wait()
            await net.bootstrap.kill()
        with trio.fail_after(60):
            await workspace.left.wait()
        await net.bootstrap.start()
        await net.connect_client()
        workspace.gate.set()

        for number, task_id in enumerate(tasks):
            document = await net.poll(task_id, within_s=60)
            assert (document["result_code"], document["data"]) == (200, f"t{number}")
            view = await net.task(task_id, lambda view: view["verdict"] != "")
            assert (view["verdict"], len(view["attempts"])) == ("verified", 1)
        assert sorted(workspace.bodies) == [b"t%d" % number for number in range(5)]

        view = await net.task(attached[0])
        assert (view["state"], view["reason"]) == (4, "bootstrap_lost")
        # its node says what it did once it is connected again
        view = await net.task(attached[0], lambda view: view["verdict"] != "")
        assert (view["verdict"], view["receipts"][0]["outcome"]) == ("verified", "client_gone")
        assert [target for _, target in workspace.calls].count("/hang") == 1

    shared.run(part, within_s=200)


@pytest.mark.timeout_s(240)
def test_kill_9_of_a_node_fails_its_task_and_the_other_node_goes_on(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        before = (await net.call("POST", "/proxy/8080/echo", b"x")).task_id
        lost = await submit(net, "lost")
        await workspace.begun.wait()
        address = (await net.task(lost, lambda view: view["node_addr"]))["node_addr"]
        node = next(daemon for daemon in net.nodes if daemon.where["node"] == address)
        await node.kill()
        statuses = [(await net.call("GET", "/proxy/8080/echo")).status for _ in range(20)]
        assert statuses == [200] * 20
        await node.start()
        await net.ready()
        view = await net.task(lost)
        assert (view["state"], view["reason"]) == (4, "node_lost")
        assert workspace.bodies.count(b"lost") == 1
        assert (await net.task(before))["verdict"] == "verified"

    shared.run(part, within_s=200)


def test_sigterm_lets_running_calls_end_and_takes_no_new_ones(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        port = int(net.bootstrap.where["http"][0].rpartition(":")[2])
        answers: list[int] = []
        codes: list[int] = []

        async def call() -> None:
            answers.append((await net.call("POST", "/proxy/8080/slow", b"{}")).status)

        async def terminate() -> None:
            codes.append(await net.bootstrap.terminate())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await workspace.begun.wait()
            nursery.start_soon(terminate)
            with trio.fail_after(60), pytest.raises(OSError):  # noqa: PT011, PT012  refused is all there is to say
                while True:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    await trio.sleep(0.05)
            workspace.gate.set()
        assert (answers, codes) == ([200], [0])
        assert '"drained"' in net.bootstrap.log

    shared.run(part)
