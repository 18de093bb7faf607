"""Which node a task goes to, as operators and clients see it: placement, standing, the queue, keys that stick."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import trio

from ngpu_protocol import control
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, echo, new_account, now_ms

ROOT = Path(__file__).parents[3]

SMALL = {
    "name": "echo",
    "service": "demo/echo",
    "ports": [8080, 9000],
    "concurrency": 1,
    "request_timeout_s": 20,
    "apis": [
        {"name": "train", "mode": "async", "port": 9000, "path": "/train"},
        {"name": "ask", "mode": "sync", "port": 8080, "path": "/ask"},
    ],
}


def whole(
    tmp_path: Path,
    test: Callable[[Bootstrap, list[ScriptedNode]], Awaitable[None]],
    *,
    nodes: list[ScriptedNode] | None = None,
    workspace: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    async def main() -> None:
        scripted = nodes if nodes is not None else [ScriptedNode(new_account())]
        async with AsyncExitStack() as stack:
            bootstrap = await stack.enter_async_context(
                running(settings_for(tmp_path / "data", **settings), workspace=workspace)
            )
            for node in scripted:
                await stack.enter_async_context(connected(node, bootstrap.multiaddr))
            await wait_ready(bootstrap, len(scripted))
            await test(bootstrap, scripted)

    trio.run(main)


def test_the_placement_of_a_task_names_every_candidate_and_why_not(tmp_path: Path) -> None:
    nodes = [ScriptedNode(new_account()) for _ in range(3)]

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        async def serve(*numbers: int) -> None:
            """Let these nodes take tasks and the others none, and wait until the bootstrap has heard it."""
            for number, node in enumerate(nodes):
                node.draining = number not in numbers
                await node.report()
            wanted = {nodes[number].account.address for number in numbers}
            with trio.fail_after(60):
                while wanted != {  # noqa: ASYNC110  another one's news
                    one["node_addr"] for one in (await bootstrap.admin("GET", "/api/v1/nodes?state=serving"))["nodes"]
                }:
                    await trio.sleep(0.02)

        async def refuses(asked: Asked) -> None:
            await serve(0, 1)
            await asked.refuse(425, "workspace_not_ready")

        nodes[0].script = refuses
        await serve(0)  # so that it is asked first
        answer = await bootstrap.call("POST", "/proxy/8080/x", b"1")
        assert answer.status == 200
        task_id = (answer.header(b"ngpu-task-id") or b"").decode()
        placement = await bootstrap.admin("GET", f"/api/v1/tasks/{task_id}/placement")
        first, second = placement["placements"]
        assert (first["attempt"], first["node_addr"]) == (1, nodes[0].account.address)
        assert (second["attempt"], second["node_addr"]) == (2, nodes[1].account.address)
        chosen = second["candidates"][0]
        assert chosen["chosen"]
        assert chosen["compared"]
        assert not chosen["excluded"]
        assert chosen["slots"] == 64
        assert chosen["expected_s"] > 0
        with trio.fail_after(60):  # the candidates are noted a moment after the first choice
            while len(second["candidates"]) < 3:
                await trio.sleep(0.05)
                placement = await bootstrap.admin("GET", f"/api/v1/tasks/{placement['task_id']}/placement")
                second = placement["placements"][1]
        why = {one["node_addr"]: one["excluded"] for one in second["candidates"]}
        assert why[nodes[0].account.address] == "tried"
        assert why[nodes[2].account.address] == "draining"

    whole(tmp_path, test, nodes=nodes)


def test_a_placement_is_known_after_a_restart_and_said_to_be_gone_when_it_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        settings, node = settings_for(tmp_path / "data"), ScriptedNode(new_account())
        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            answer = await bootstrap.call("GET", "/proxy/8080/")
            task_id = (answer.header(b"ngpu-task-id") or b"").decode()
            before = await bootstrap.admin("GET", f"/api/v1/tasks/{task_id}/placement")
            with trio.fail_after(60), closing(sqlite3.connect(tmp_path / "data" / "bootstrap.db")) as database:
                while not database.execute("SELECT * FROM placements").fetchall():  # noqa: ASYNC110  the file has no event
                    await trio.sleep(0.1)
        async with running(settings, known=(bootstrap.workspace, bootstrap.token)) as again:
            after = await again.admin("GET", f"/api/v1/tasks/{task_id}/placement")
        (was,), (kept,) = before["placements"], after["placements"]
        assert (kept["node_addr"], kept["why"]) == (was["node_addr"], was["why"])
        assert [one["node_addr"] for one in kept["candidates"]] == [node.account.address]
        assert kept["candidates"][0]["chosen"]
        with closing(sqlite3.connect(tmp_path / "data" / "bootstrap.db")) as database, database:
            database.execute("DELETE FROM placements")
        async with running(settings, known=(bootstrap.workspace, bootstrap.token)) as again:
            gone = await again.call("GET", f"/api/v1/tasks/{task_id}/placement")
            assert gone.status == 404
            assert json.loads(gone.body)["reason"] == "placement_gone"

    trio.run(main)


def test_disputed_receipts_lower_a_nodes_standing_until_it_gets_nothing_and_a_restart_remembers(tmp_path: Path) -> None:
    async def lies(asked: Asked) -> None:
        await asked.read()
        await asked.answer(200, b"answer", change={"busy_gpu_ms": 7})

    async def main() -> None:
        settings, node = settings_for(tmp_path / "data"), ScriptedNode(new_account())
        address = node.account.address
        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            for _ in range(3):
                assert (await bootstrap.call("GET", "/proxy/8080/")).status == 200
            node.script = lies
            for _ in range(2):
                await bootstrap.call("GET", "/proxy/8080/")
            answer = await bootstrap.call("GET", "/proxy/8080/")
            assert answer.status == 503
            assert "1 distrusted" in json.loads(answer.body)["message"]
        async with running(settings, known=(bootstrap.workspace, bootstrap.token)) as again:
            detail = await again.admin("GET", f"/api/v1/nodes/{address}")
            assert detail["state"] == "away"
            standing = detail["standing"]
            assert (standing["verified"], standing["disputed"], list(standing["rules"].values())) == (3, 2, [2])
            assert 0.3 < standing["score"] < 0.5
            assert 0 < standing["trusted_again_in_s"] <= 24 * 3600
            assert any(f"2 disputed (2 {standing['last_rule']}" in sentence for sentence in detail["why"])
            node.script, node.session = echo, b"\2" * 32
            async with connected(node, again.multiaddr):
                await wait_ready(again)
                assert (await again.call("GET", "/proxy/8080/")).status == 503
                (listed,) = (await again.admin("GET", "/api/v1/nodes?state=distrusted"))["nodes"]
                assert listed["node_addr"] == address
                assert (await again.admin("GET", "/api/v1/nodes?state=serving"))["nodes"] == []

    trio.run(main)


def test_a_node_that_loses_connections_is_set_aside_and_shown_so(tmp_path: Path) -> None:
    async def breaks(asked: Asked) -> None:
        await asked.exchange.abort()

    nodes = [ScriptedNode(new_account(), script=breaks), ScriptedNode(new_account())]

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        nodes[1].draining = True
        await nodes[1].report()
        with trio.fail_after(60):
            while not (found := (await bootstrap.admin("GET", "/api/v1/nodes?state=set_aside"))["nodes"]):
                await bootstrap.call("GET", "/proxy/8080/")
        nodes[1].draining = False
        await nodes[1].report()
        assert found[0]["node_addr"] == nodes[0].account.address
        asked = len(nodes[0].orders)
        assert found[0]["failure_rate"] > 0.5
        with trio.fail_after(60):
            while not nodes[1].orders:
                await bootstrap.call("POST", "/proxy/8080/", b"x")
        nodes[0].script = echo
        with trio.fail_after(60):  # probed back
            while len(nodes[0].orders) == asked:
                assert (await bootstrap.call("GET", "/proxy/8080/")).status == 200
                await trio.sleep(0.02)

    whole(tmp_path, test, nodes=nodes)


def test_the_place_in_the_queue_is_in_the_task_the_poll_and_a_header(tmp_path: Path) -> None:
    released = trio.Event()

    async def slow(asked: Asked) -> None:
        await asked.read()
        await released.wait()
        await asked.answer(200, b"done")

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        ids = []
        for _ in range(4):
            answer = await bootstrap.call("POST", "/user/train", b"{}")
            ids.append(json.loads(answer.body)["taskID"])
            await trio.sleep(0.05)
        await task_when(bootstrap, ids[3], lambda view: view["queue_position"] == 2)
        poll = await bootstrap.call("GET", f"/user/queryTask?taskID={ids[2]}", token=None)
        assert poll.header(b"ngpu-queue-position") == b"1"
        assert "1 before it" in json.loads(poll.body)["msg"]
        assert (await bootstrap.admin("GET", f"/api/v1/tasks/{ids[0]}"))["queue_position"] is None
        waiting = await bootstrap.admin("GET", f"/api/v1/tasks/{ids[1]}/placement")
        assert (waiting["queue_position"], waiting["placements"]) == (0, [])
        refused = await bootstrap.call("GET", "/proxy/8080/")
        assert refused.status == 429
        assert int(refused.header(b"retry-after") or b"0") >= 1
        assert refused.header(b"ngpu-queue-length") == b"3"
        released.set()
        for task_id in ids:
            await task_when(bootstrap, task_id, lambda view: view["state"] == 3)

    limits = {"queued_calls": 0}
    node = ScriptedNode(new_account(), script=slow)
    whole(tmp_path, test, nodes=[node], workspace=SMALL, limits=limits)


def test_a_client_that_waits_on_its_connection_hears_its_place_if_it_asks(tmp_path: Path) -> None:
    released = trio.Event()

    async def slow(asked: Asked) -> None:
        await asked.read()
        await released.wait()
        await asked.answer(200, b"done")

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        async def asks(target: str, *fields: str) -> tuple[trio.SocketStream, Callable[[bytes], Awaitable[bytes]]]:
            stream = await trio.open_tcp_stream("127.0.0.1", bootstrap.port)
            head = [f"POST {target} HTTP/1.1", "Host: x", f"Authorization: Bearer {bootstrap.token}", *fields]
            await stream.send_all(
                "\r\n".join([*head, "Content-Length: 13", "Connection: close", "", '{"data": "x"}']).encode()
            )
            read = b""

            async def until(mark: bytes) -> bytes:
                nonlocal read
                while mark not in read:
                    more = await stream.receive_some()
                    assert more, read
                    read += more
                return read

            return stream, until

        with trio.fail_after(60):
            streams = [await asks("/proxy/8080/")]
            while not nodes[0].orders:  # noqa: ASYNC110  a scripted node has no event
                await trio.sleep(0.02)
            for target, fields in (
                ("/proxy/8080/", ["Ngpu-Queue-Updates: yes"]),
                ("/user/ask", ["Ngpu-Queue-Updates: yes"]),
                ("/proxy/8080/", []),
            ):
                streams.append(await asks(target, *fields))
                await trio.sleep(0.1)
            told = await streams[1][1](b"\r\n\r\n")
            assert told.startswith(b"HTTP/1.1 102 Processing\r\n"), told
            assert b"ngpu-queue-position: 0\r\n" in told.lower()
            assert b"ngpu-task-id: " in told.lower()
            told = await streams[2][1](b"\r\n\r\n")
            assert told.startswith(b"HTTP/1.1 102 Processing\r\n"), told
            assert b"ngpu-queue-position: 1\r\n" in told.lower()
            released.set()
            whole = [await until(b"done") for _, until in streams]
            assert [text.count(b"HTTP/1.1 200 OK\r\n") for text in whole] == [1, 1, 1, 1]
            assert [text.count(b"HTTP/1.1 102 ") > 0 for text in whole] == [False, True, True, False]
            for stream, _ in streams:
                await stream.aclose()

    whole(tmp_path, test, nodes=[ScriptedNode(new_account(), script=slow)], workspace=SMALL)


def test_a_wait_that_was_too_long_says_how_many_were_before(tmp_path: Path) -> None:
    async def stuck(asked: Asked) -> None:
        await asked.read()
        await trio.sleep_forever()

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(bootstrap.call, "GET", "/proxy/8080/")
                await trio.sleep(0.2)
            refused = await bootstrap.call("GET", "/proxy/8080/")
            nursery.cancel_scope.cancel()
        assert refused.status == 429
        assert refused.header(b"ngpu-queue-position") in (b"0", b"1")  # the one before it leaves at about the same time
        assert int(refused.header(b"retry-after") or b"0") >= 1

    limits = {"queue_wait_s": 0.5}
    whole(tmp_path, test, nodes=[ScriptedNode(new_account(), script=stuck)], workspace=SMALL, limits=limits)


def test_calls_with_one_key_stay_on_one_node_while_it_is_there(tmp_path: Path) -> None:
    nodes = [ScriptedNode(new_account()) for _ in range(3)]

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        async def called(key: bytes) -> str:
            answer = await bootstrap.call("GET", "/proxy/8080/", headers=[(b"ngpu-affinity", key)])
            assert answer.status == 200
            return (answer.header(b"ngpu-task-id") or b"").decode()

        async def ran_on(task_id: str) -> str:
            return str((await bootstrap.admin("GET", f"/api/v1/tasks/{task_id}"))["node_addr"])

        async def where(key: bytes) -> str:
            return await ran_on(await called(key))

        home = await where(b"session-1")
        assert {await where(b"session-1") for _ in range(12)} == {home}
        tasks: list[str] = []

        async def elsewhere(number: int) -> None:
            tasks.append(await called(b"key-%d" % number))

        async with trio.open_nursery() as nursery:  # at once: one after the other, the fastest node may get them all
            answering, before = trio.Event(), sum(len(node.orders) for node in nodes)

            async def held(asked: Asked) -> None:
                await answering.wait()
                await echo(asked)

            for node in nodes:
                node.script = held
            for number in range(30):
                nursery.start_soon(elsewhere, number)
            with trio.fail_after(60):
                while sum(len(node.orders) for node in nodes) < before + 30:  # noqa: ASYNC110  nodes have no event
                    await trio.sleep(0.02)
            answering.set()
        assert len({await ran_on(task_id) for task_id in tasks}) > 1
        leaving = next(node for node in nodes if node.account.address == home)
        leaving.draining = True
        await leaving.report()
        with trio.fail_after(60):
            while (moved := await where(b"session-1")) == home:
                pass
        assert {await where(b"session-1") for _ in range(12)} == {moved}
        too_long = await bootstrap.call("GET", "/proxy/8080/", headers=[(b"ngpu-affinity", b"k" * 129)])
        assert too_long.status == 400

    whole(tmp_path, test, nodes=nodes)


def test_a_task_that_a_restart_takes_up_again_keeps_its_key(tmp_path: Path) -> None:
    async def main() -> None:
        settings = settings_for(tmp_path / "data")
        key = [(b"ngpu-affinity", b"caf\xe9 1")]

        async def stuck(asked: Asked) -> None:
            await asked.read()
            await trio.sleep_forever()

        ids = []
        async with (
            running(settings, workspace=SMALL) as bootstrap,
            connected(ScriptedNode(new_account(), script=stuck), bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            for number in range(8):  # the first runs; some may be sent after it as its node goes; the rest wait
                fields = key if number else None
                answer = await bootstrap.call("POST", "/user/train", b"{}", headers=fields)
                ids.append(json.loads(answer.body)["taskID"])
        nodes = [ScriptedNode(new_account()) for _ in range(3)]
        async with AsyncExitStack() as stack:
            again = await stack.enter_async_context(running(settings, known=(bootstrap.workspace, bootstrap.token)))
            for node in nodes:
                await stack.enter_async_context(connected(node, again.multiaddr))
            done: list[dict[str, Any]] = []
            with trio.fail_after(60):
                while len(done) < 3:
                    views = [await again.admin("GET", f"/api/v1/tasks/{task_id}") for task_id in ids[1:]]
                    done = [view for view in views if view["state"] == 3]
            assert len({view["node_addr"] for view in done}) == 1
            (kept,) = (await again.admin("GET", f"/api/v1/tasks/{done[-1]['task_id']}/placement"))["placements"]
            assert kept["why"] == "affinity"

    trio.run(main)


def test_nodes_are_filtered_and_come_in_pages(tmp_path: Path) -> None:
    class Located(ScriptedNode):
        area = ""

        def heartbeat(self) -> control.Heartbeat:
            beat = super().heartbeat()
            gpu = control.GpuOffer(b"\1" * 32, "NVIDIA GeForce RTX 4090", 24 << 30)
            return control.Heartbeat(
                at_ms=beat.at_ms,
                slots_free=beat.slots_free,
                deployments=beat.deployments,
                services=beat.services,
                gpus=(gpu,) if self.area else (),
                host=control.HostOffer(engine=False, area=self.area),
            )

    nodes: list[ScriptedNode] = [Located(new_account()) for _ in range(5)]
    for node in nodes[:2]:
        node.area = "eu-central"  # type: ignore[attr-defined]

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        async def listed(query: str) -> dict[str, Any]:
            answer = await bootstrap.call("GET", f"/api/v1/nodes{query}", token=None)
            assert answer.status == 200, answer.body
            document: dict[str, Any] = json.loads(answer.body)
            return document

        everyone = [one["node_addr"] for one in (await listed(""))["nodes"]]
        assert len(everyone) == 5
        pages, after = [], ""
        while True:
            page = await listed(f"?limit=2&after={after}")
            pages.append([one["node_addr"] for one in page["nodes"]])
            after = page["cursor"]
            if not after:
                break
        assert [len(page) for page in pages] == [2, 2, 1]
        assert [one for page in pages for one in page] == everyone
        here = sorted(node.account.address.lower() for node in nodes[:2])
        for query in ("?region=EU-Central", "?gpu=rtx4090", "?gpu=RTX%204090&region=eu-central"):
            assert [one["node_addr"].lower() for one in (await listed(query))["nodes"]] == here
        assert len((await listed(f"?workspace={bootstrap.workspace}"))["nodes"]) == 5
        assert (await listed("?workspace=1"))["nodes"] == []
        assert (await listed("?gpu=H100"))["nodes"] == []
        assert len((await listed("?state=serving"))["nodes"]) == 5
        for wrong in ("?state=happy", "?limit=0"):
            assert (await bootstrap.call("GET", f"/api/v1/nodes{wrong}", token=None)).status == 422
        unknown = await bootstrap.call("GET", f"/api/v1/nodes/{new_account().address}", token=None)
        assert unknown.status == 404
        assert (await bootstrap.call("GET", "/api/v1/nodes/0x12", token=None)).status == 400
        with trio.fail_after(60):
            while any(one["round_trip_ms"] is None for one in (await listed(""))["nodes"]):
                pass

    whole(tmp_path, test, nodes=nodes)


async def peers(bootstrap: Bootstrap, *arguments: str) -> subprocess.CompletedProcess[str]:
    url = bootstrap.where["http"][0]
    command = [sys.executable, str(ROOT / "scripts" / "peers.py"), "--url", url, *arguments]
    return await trio.to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    )


def test_the_peers_script_lists_filters_and_explains(tmp_path: Path) -> None:
    async def lies(asked: Asked) -> None:
        await asked.read()
        await asked.answer(200, b"answer", change={"busy_gpu_ms": 7})

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        address = nodes[0].account.address
        for _ in range(2):
            await bootstrap.call("GET", "/proxy/8080/")
        shown = await peers(bootstrap, "--why", address)
        assert shown.returncode == 0, shown.stderr
        assert "distrusted" in shown.stdout
        assert "2 disputed" in shown.stdout
        assert f"workspace {bootstrap.workspace}: no task now: distrusted" in shown.stdout
        table = await peers(bootstrap, "--state", "distrusted")
        assert address in table.stdout
        assert "2 disputed" in table.stdout
        assert (await peers(bootstrap, "--gpu", "H100")).stdout == "no connected node fits the filters\n"
        (one,) = json.loads((await peers(bootstrap, "--workspace", bootstrap.workspace, "--json")).stdout)["nodes"]
        assert one["node_addr"] == address
        unknown = await peers(bootstrap, "--why", new_account().address)
        assert unknown.returncode == 1
        assert "was ever here" in unknown.stderr

    whole(tmp_path, test, nodes=[ScriptedNode(new_account(), script=lies)])


def test_the_peers_script_watches_until_it_is_told_to_stop(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        address = nodes[0].account.address
        command = [sys.executable, str(ROOT / "scripts" / "peers.py"), "--url", bootstrap.where["http"][0], "--watch"]
        with trio.fail_after(60):
            process = await trio.lowlevel.open_process([*command, "--json"], stdout=subprocess.PIPE)
            assert process.stdout is not None
            seen, nodes[0].draining = b"", False

            async def shown(state: str) -> None:
                nonlocal seen
                while f'"state": "{state}"'.encode() not in seen:
                    more = await process.stdout.receive_some()
                    assert more
                    seen += more

            await shown("serving")
            nodes[0].draining = True
            await nodes[0].report()
            await shown("draining")  # a line each time, with what is so now
            assert len(seen.splitlines()) >= 2
            assert json.loads(seen.splitlines()[0])["nodes"][0]["node_addr"] == address
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0

            # on a terminal: one table, drawn anew
            terminal, line = os.openpty()
            environment = os.environ | {"TERM": "xterm", "COLUMNS": "240", "LINES": "50"}
            process = await trio.lowlevel.open_process(command, stdin=line, stdout=line, env=environment)
            os.close(line)
            drawn = b""
            while drawn.count(address.encode()) < 2:
                await trio.lowlevel.wait_readable(terminal)
                drawn += os.read(terminal, 65536)
            assert b"draining" in drawn
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
            os.close(terminal)

    whole(tmp_path, test)


def test_a_node_gets_tasks_within_two_seconds_of_being_ready(tmp_path: Path) -> None:
    """From its report that the workspace is ready to the first order, with calls that wait all the while."""

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        class Starting(ScriptedNode):
            ready_at_ms = 0

            async def report(self) -> None:
                if self.desired and not self.ready_at_ms:
                    self.ready_at_ms = now_ms()
                await super().report()

        nodes[0].draining = True  # while it may be chosen, a call one at a time may find it the nearer, every time
        await nodes[0].report()
        for _ in range(3):  # another, where the machine stood still for a time
            late = Starting(new_account())
            async with connected(late, bootstrap.multiaddr):
                with trio.fail_after(30):
                    while not late.orders:
                        await bootstrap.call("GET", "/proxy/8080/")
            took_ms = late.orders[0].order.issued_at_ms - late.ready_at_ms
            if took_ms < 2000:
                break
        assert took_ms < 2000

    whole(tmp_path, test)


def test_a_node_that_fell_silent_is_out_of_scheduling_within_ten_seconds(tmp_path: Path) -> None:
    class Frozen(ScriptedNode):
        silent = False

        async def report(self) -> None:
            if not self.silent:
                await super().report()

    nodes: list[ScriptedNode] = [Frozen(new_account()), ScriptedNode(new_account())]

    async def test(bootstrap: Bootstrap, nodes: list[ScriptedNode]) -> None:
        nodes[0].silent = True  # type: ignore[attr-defined]
        began = time.monotonic()
        while True:
            asked_s = time.monotonic() - began
            if (await bootstrap.admin("GET", "/api/v1/nodes?state=silent"))["nodes"]:
                break
            assert asked_s < 10, "asked for after ten seconds"
            await trio.sleep(0.02)
        before = len(nodes[0].orders)
        for _ in range(20):
            assert (await bootstrap.call("GET", "/proxy/8080/")).status == 200
        assert len(nodes[0].orders) == before

    whole(tmp_path, test, nodes=nodes)
