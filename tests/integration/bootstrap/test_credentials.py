"""Tokens are rotated without a failed call, keys do what their scopes say, and whoever goes too fast is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from ngpu_bootstrap.credentials import reveal
from ngpu_bootstrap.operator_keys import FILE_NAME, OperatorKeys, Scope
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

JSON = [(b"content-type", b"application/json")]


def run(tmp_path: Path, test: Any, script: Any = None, **changes: Any) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        if script is not None:
            node.script = script
        async with (
            running(settings_for(tmp_path / "bootstrap", **changes)) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            await test(bootstrap, node)

    trio.run(main)


async def status(bootstrap: Bootstrap, token: str) -> int:
    return (await bootstrap.call("POST", "/proxy/8080/", b"x", token=token)).status


def test_a_rotated_token_overlaps_with_the_one_before_and_then_stands_alone(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        target = f"/api/v1/workspaces/{bootstrap.workspace}/tokens"
        first = bootstrap.token
        second = (await bootstrap.admin("POST", target, {"overlap_s": 3600}))["token"]
        assert [await status(bootstrap, token) for token in (first, second)] == [200, 200]
        # the owner rotates with their own token; no overlap ends the ones before at once
        answer = await bootstrap.call("POST", target, b'{"overlap_s": 0}', JSON, token=second)
        made = json.loads(answer.body)
        assert (answer.status, made["label"]) == (201, f"{bootstrap.workspace}.3")
        assert [await status(bootstrap, token) for token in (first, second, made["token"])] == [401, 401, 200]
        # what a token could do is done under its public name
        listed = await bootstrap.call("GET", "/user/queryTaskList", token=made["token"])
        detail = await bootstrap.call("GET", f"/user/getDetailed?taskID={json.loads(listed.body)['taskIds'][0]}")
        assert json.loads(detail.body)["reason"] == "token_unknown"  # the rig's own token has ended
        for wrong in (b'{"overlap_s": -1}', b'{"overlap_s": 1e12}', b'{"overlap": 1}', b"[]"):
            assert (await bootstrap.call("POST", target, wrong, JSON, token=made["token"])).status == 422
        foreign = (await bootstrap.admin("POST", "/api/v1/workspaces", WORKSPACE))["token"]
        assert (await bootstrap.call("POST", target, b"{}", JSON, token=foreign)).status == 403

    run(tmp_path, test)


def test_rotated_tokens_are_there_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        settings = settings_for(tmp_path / "bootstrap")
        async with running(settings) as bootstrap:
            target = f"/api/v1/workspaces/{bootstrap.workspace}/tokens"
            second = (await bootstrap.admin("POST", target, {"overlap_s": 0}))["token"]
            known = (bootstrap.workspace, bootstrap.token)
        async with running(settings, known=known) as bootstrap:
            assert await status(bootstrap, bootstrap.token) == 401
            assert await status(bootstrap, second) == 503  # right, and no node

    trio.run(main)


def test_an_operator_key_does_what_its_scopes_say(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        keys = OperatorKeys(bootstrap.data_dir)
        reader = reveal(keys.add("reader", scopes=[Scope.READ]))
        gone = reveal(keys.add("gone", expires_in_s=0))
        everything = reveal(keys.add("everything"))
        document = json.dumps(WORKSPACE).encode()

        async def ask(method: str, key: str, body: bytes = b"") -> tuple[int, str]:
            answer = await bootstrap.call(method, "/api/v1/workspaces", body, JSON, token=key)
            return answer.status, json.loads(answer.body).get("reason", "")

        assert await ask("GET", reader) == (200, "")
        assert await ask("POST", reader, document) == (403, "key_scope")
        assert await ask("GET", gone) == (401, "key_expired")
        assert await ask("POST", everything, document) == (201, "")
        (bootstrap.data_dir / FILE_NAME).write_text("{")
        assert await ask("GET", reader) == (503, "keys_unavailable")

    run(tmp_path, test)


def test_an_operators_key_reads_a_task_as_no_credential_does(tmp_path: Path) -> None:
    """An id needs no credential; one that is shown is judged, and a key that may read is not worse than none."""

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        keys = OperatorKeys(bootstrap.data_dir)
        reader = reveal(keys.add("reader", scopes=[Scope.READ]))
        other = reveal(keys.add("other", scopes=[Scope.ACCOUNTS]))
        gone = reveal(keys.add("gone", expires_in_s=0))
        made = await bootstrap.call("POST", "/user/draw", b'{"data": "x"}')
        task_id = json.loads(made.body)["taskId"]
        foreign = (await bootstrap.admin("POST", "/api/v1/workspaces", WORKSPACE))["token"]
        for target in (
            f"/api/v1/tasks/{task_id}",
            f"/api/v1/tasks/{task_id}/placement",
            f"/api/v1/tasks/{task_id}/receipt",
            f"/user/queryTask?taskID={task_id}",
            f"/user/getDetailed?taskID={task_id}",
            f"/user/draw?taskID={task_id}",
        ):
            shown = [
                (await bootstrap.call("GET", target, token=token)).status
                for token in (None, bootstrap.token, reader, other, gone, "op_nobody-" + "a" * 48, foreign)
            ]
            assert shown == [200, 200, 200, 403, 401, 401, 403], target
        path = bootstrap.data_dir / FILE_NAME
        path.unlink()
        path.symlink_to(path)  # it is there, and cannot be looked at
        for target in (f"/api/v1/tasks/{task_id}", f"/user/queryTask?taskID={task_id}"):
            answer = await bootstrap.call("GET", target, token=reader)
            assert (answer.status, json.loads(answer.body)["reason"]) == (503, "keys_unavailable")

    run(tmp_path, test)


def test_unknown_credentials_are_slowed_and_right_ones_are_not(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        unknown = "123456789-" + "a" * 48
        seen = [await status(bootstrap, unknown) for _ in range(25)]
        assert seen[:20] == [401] * 20
        assert 429 in seen
        answer = await bootstrap.call("GET", "/user/queryTaskList", token=unknown)
        assert (answer.status, json.loads(answer.body)["reason"]) == (429, "too_many_tries")
        assert int(answer.header(b"retry-after") or b"0") >= 1
        # the same for keys, on the other server; and whoever is right goes on
        key = "op_nobody-" + "a" * 48
        assert (await bootstrap.call("GET", "/api/v1/workspaces", token=key)).status == 429
        assert await status(bootstrap, bootstrap.token) == 200

    run(tmp_path, test)


def test_a_token_over_its_rate_gets_429_and_is_told_when_to_come_again(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        seen = [await status(bootstrap, bootstrap.token) for _ in range(5)]
        assert seen == [200, 200, 200, 429, 429]
        answer = await bootstrap.call("GET", "/user/queryTaskList")
        document = json.loads(answer.body)
        assert (answer.status, document["result_code"], document["reason"]) == (429, 429, "too_many_calls")
        assert int(answer.header(b"retry-after") or b"0") >= 1
        # each token has its own
        other = (await bootstrap.admin("POST", f"/api/v1/workspaces/{bootstrap.workspace}/tokens", {}))["token"]
        assert await status(bootstrap, other) == 200

    run(tmp_path, test, limits={"token_calls_per_s": 0.01, "token_burst": 3})


def test_a_token_runs_so_many_calls_at_once(tmp_path: Path) -> None:
    held = trio.Event()
    release = trio.Event()

    async def hold(asked: Asked) -> None:
        body = await asked.read()
        held.set()
        await release.wait()
        await asked.answer(200, body)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(status, bootstrap, bootstrap.token)
            with trio.fail_after(60):
                await held.wait()
            answer = await bootstrap.call("POST", "/user/draw", b"{}", JSON)
            assert (answer.status, json.loads(answer.body)["reason"]) == (429, "too_many_calls_at_once")
            release.set()
        assert await status(bootstrap, bootstrap.token) == 200

    run(tmp_path, test, script=hold, limits={"token_calls_at_once": 1})
