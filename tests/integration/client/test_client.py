"""The client against a real bootstrap and node: everything a program does with it, in both forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from ngpu_client import (
    AnswerCut,
    ApiError,
    AsyncClient,
    BootstrapUnreachable,
    Client,
    NotFinished,
    Options,
    Progress,
    Result,
    TaskFailed,
)
from tests.integration.whole_path.rig import ROOT, Network, SharedNetwork, free_port
from tests.integration.whole_path.workspace import Workspace

T = TypeVar("T")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    with SharedNetwork(tmp_path_factory.mktemp("client")) as network:
        yield network


def url_of(net: Network) -> str:
    return str(net.bootstrap.where["http"][0])


def with_client(shared: SharedNetwork, use: Callable[[Client], T]) -> T:
    """Return what *use* does with a client, which blocks, in a thread of its own."""
    found: list[T] = []

    async def part(net: Network, workspace: Workspace) -> None:
        workspace.gate.set()

        def main() -> T:
            with Client(url_of(net), net.token) as client:
                return use(client)

        found.append(await trio.to_thread.run_sync(main))

    shared.run(part)
    return found[0]


def test_a_synchronous_call_is_answered_and_its_receipt_holds_against_the_bytes_seen(shared: SharedNetwork) -> None:
    def use(client: Client) -> None:
        result = client.call("draw", {"prompt": "a red bicycle"})
        assert result.json() == {"prompt": "a red bicycle"}
        checked = client.check(result)
        assert (checked.holds, checked.broken) == (True, ())
        other = Result(result.task_id, b"another answer", request=result.request)
        assert "response_bytes" in client.check(other).broken
        assert (
            "request_hash"
            in client.check(Result(result.task_id, result.content, request=b"x" * len(result.request or b""))).broken
        )

    with_client(shared, use)


def test_a_task_is_submitted_waited_for_with_progress_and_listed(shared: SharedNetwork) -> None:
    told: list[Progress] = []

    async def part(net: Network, workspace: Workspace) -> None:
        def main() -> None:
            with Client(url_of(net), net.token) as client:
                task_id = client.submit_named("train", "{}", key="once")
                assert client.submit_named("train", "{}", key="once") == task_id
                with pytest.raises(NotFinished) as late:
                    client.wait(task_id, within_s=0.5, on_progress=told.append)
                assert late.value.task_id == task_id
                trio.from_thread.run_sync(workspace.gate.set)
                result = client.wait(task_id, within_s=20)
                assert client.poll(task_id) == result
                assert client.details(task_id)["state_name"] == "finished"
                ids = list(client.tasks())
                assert task_id in ids
                assert list(client.tasks(limit=1)) == ids[:1]
                assert list(client.tasks(since="2090-01-01")) == []
                assert task_id in client.tasks(node=net.nodes[0].where["node"])
                (deployment,) = client.deployments()
                assert (deployment.state, deployment.node_addr) == ("ready", net.nodes[0].where["node"])

        await trio.to_thread.run_sync(main)

    shared.run(part)
    assert told
    assert told[0].state in (0, 1, 2)


def test_run_is_submitting_and_waiting(shared: SharedNetwork) -> None:
    def use(client: Client) -> None:
        result = client.run("echo", "plain text", port=8080, options=Options(timeout_s=30, priority=3), within_s=20)
        assert result.text == "plain text"
        assert client.check(result).holds

    with_client(shared, use)


def test_a_cancelled_task_says_so(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        def main() -> None:
            with Client(url_of(net), net.token) as client:
                task_id = client.submit("slow", "{}")
                trio.from_thread.run(workspace.begun.wait)
                assert client.cancel(task_id)["state_name"] == "cancelled"
                with pytest.raises(TaskFailed) as ended:
                    client.wait(task_id, within_s=10)
                assert ended.value.reason == "cancelled"

        await trio.to_thread.run_sync(main)

    shared.run(part)


def test_an_error_of_the_workspace_is_the_tasks_and_keeps_its_words(shared: SharedNetwork) -> None:
    def use(client: Client) -> None:
        with pytest.raises(TaskFailed) as failed:
            client.run("nothing-here", "{}", within_s=20)
        assert (failed.value.result_code, failed.value.data) == (404, "no such page")
        with client.stream("GET", "nothing-here", port=8080) as answer:
            assert (answer.status, b"".join(answer.bytes())) == (404, b"no such page")

    with_client(shared, use)


def test_events_arrive_one_by_one(shared: SharedNetwork) -> None:
    def use(client: Client) -> None:
        with client.stream("GET", "events", port=8080) as answer:
            assert answer.task_id
            events = list(answer.events())
        assert len(events) > 1
        assert client.check(answer.task_id).holds

    with_client(shared, use)


@pytest.mark.parametrize(
    ("use", "status", "reason"),
    [
        (lambda c: c.call("unknown", "{}"), 404, "api_unknown"),
        (lambda c: c.submit("../up", "{}"), 400, None),
        (lambda c: c.submit("echo", "{}", port=1), 404, None),
        (lambda c: c.poll("20260101_00_00_00_00000000000000000000"), 404, "task_unknown"),
        (lambda c: c.details("nonsense"), 400, "bad_task_id"),
        (lambda c: list(c.tasks(since="never")), 400, None),
        (lambda c: c.stream("GET", "echo", port=1).__enter__(), None, None),
    ],
)
def test_a_refusal_says_what_to_change(
    shared: SharedNetwork, use: Callable[[Client], Any], status: int | None, reason: str | None
) -> None:
    def part(client: Client) -> None:
        with pytest.raises(ApiError) as refused:
            use(client)
        assert status is None or refused.value.status == status
        assert reason is None or refused.value.reason == reason
        assert refused.value.message

    with_client(shared, part)


def test_another_token_is_refused_and_no_bootstrap_is_told_apart(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        def main() -> None:
            with Client(url_of(net), "1-wrong") as client, pytest.raises(ApiError) as refused:
                client.call("draw", "{}")
            assert refused.value.status == 401
            with (
                Client(f"http://127.0.0.1:{free_port()}", net.token) as client,
                pytest.raises(BootstrapUnreachable, match="does not answer"),
            ):
                client.poll("20260101_00_00_00_00000000000000000000")

        await trio.to_thread.run_sync(main)

    shared.run(part)


def test_the_asynchronous_client_does_the_same(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        workspace.gate.set()
        async with AsyncClient(url_of(net), net.token) as client:
            result = await client.run("echo", {"n": 1}, within_s=20)
            assert result.json() == {"n": 1}
            assert (await client.check(result)).holds
            assert (await client.call("draw", "x")).text == "x"
            async with client.stream("GET", "events", port=8080) as answer:
                assert len([event async for event in answer.events()]) > 1
            assert [task_id async for task_id in client.tasks(limit=2)]
            assert len(await client.deployments()) == 1
            with pytest.raises(ApiError):
                await client.call("unknown", "{}")

    shared.run(part)


def test_a_stream_that_is_cut_is_not_taken_for_whole(shared: SharedNetwork) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        async with AsyncClient(url_of(net), net.token) as client, client.stream("GET", "break", port=8080) as answer:
            pieces: list[bytes] = []

            async def read() -> None:
                async for piece in answer.bytes():
                    pieces.append(piece)

            with pytest.raises(AnswerCut):
                await read()
            assert b"".join(pieces) == b"half"

    shared.run(part)


def test_the_shell_command_runs_a_task_and_checks_its_receipt(shared: SharedNetwork, tmp_path: Path) -> None:
    async def part(net: Network, workspace: Workspace) -> None:
        workspace.gate.set()
        token = tmp_path / "token"
        token.write_text(net.token + "\n")

        async def command(*words: str, stdin: bytes = b"") -> Any:
            script = str(ROOT / "scripts" / "ngpu-task")
            return await trio.run_process(
                [script, "--url", url_of(net), "--token-file", str(token), *words],
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )

        done = await command("run", "echo", "--data", '{"a": 1}', "--check")
        assert (done.returncode, json.loads(done.stdout)) == (0, {"a": 1}), done.stderr
        assert b"every rule holds" in done.stderr
        done = await command("run", "echo", "--data", "-", "--json", stdin=b"from a pipe")
        assert json.loads(done.stdout)["data"] == "from a pipe"
        task_id = json.loads(done.stdout)["task_id"]
        done = await command("list", "--limit", "1")
        assert done.stdout.decode().split() == [task_id]
        done = await command("show", task_id, "--json")
        assert json.loads(done.stdout)["verdict"] == "verified"
        done = await command("run", "nothing-here", "--data", "{}")
        assert (done.returncode, b"404" in done.stderr) == (1, True)
        done = await command("show", "nonsense")
        assert (done.returncode, done.stderr.startswith(b"error: 400 bad_task_id")) == (1, True), done.stderr

    shared.run(part)
