"""Shared models at a whole bootstrap, with scripted nodes: who is served when, and whose a receipt is for good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_bootstrap import retention
from ngpu_protocol import control
from tests.integration.bootstrap.rig import WORKSPACE, Answered, Bootstrap, running, settings_for
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

JSON = [(b"content-type", b"application/json")]
MODEL = (control.ServiceOffer("Demo", "m", "text-to-text", 1),)
CHAT = "/v1/chat/completions"


async def add_caller(bootstrap: Bootstrap, name: str) -> str:
    """Make a workspace that runs nowhere, to call models with; return its token."""
    made = await bootstrap.admin("POST", "/api/v1/workspaces", {**WORKSPACE, "name": name, "service": f"none/{name}"})
    return str(made["token"])


async def chat(bootstrap: Bootstrap, token: str, *headers: tuple[bytes, bytes]) -> Answered:
    return await bootstrap.call("POST", CHAT, b'{"model":"m"}', [*JSON, *headers], token=token)


async def is_listed(bootstrap: Bootstrap) -> None:
    with trio.fail_after(60):
        while not json.loads((await bootstrap.call("GET", "/v1/models")).body)["data"]:  # noqa: ASYNC110
            await trio.sleep(0.02)


def test_a_receipt_is_its_callers_after_the_task_was_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "EVERY_S", 0.2)
    settings = settings_for(tmp_path / "data", models={"share": "registered"}, retention={"days": 2 / 86_400})

    async def main() -> None:
        node = ScriptedNode(new_account(), services=MODEL)
        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await is_listed(bootstrap)
            caller, other = await add_caller(bootstrap, "caller"), await add_caller(bootstrap, "other")
            answer = await chat(bootstrap, caller)
            assert answer.status == 200, answer.body
            task_id = (answer.header(b"ngpu-task-id") or b"").decode()
            path = f"/api/v1/tasks/{task_id}/receipt"

            async def receipt(token: str) -> tuple[int, dict[str, Any]]:
                found = await bootstrap.call("GET", path, token=token)
                return found.status, json.loads(found.body)

            async def judge() -> dict[str, Any]:
                status, file = await receipt(caller)
                assert status == 200, file
                for foreign in (other, bootstrap.token):
                    status, refusal = await receipt(foreign)
                    assert (status, refusal["reason"]) == (403, "token_foreign")
                assert (await bootstrap.admin("GET", path)) == file  # the operator's own
                return file

            with trio.fail_after(60):
                while (await receipt(caller))[0] == 404:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            before = await judge()
            with trio.fail_after(60):
                while (await bootstrap.call("GET", f"/api/v1/tasks/{task_id}", token=caller)).status != 404:  # noqa: ASYNC110
                    await trio.sleep(0.1)
            assert await judge() == before

    trio.run(main)


def test_a_caller_that_floods_a_shared_model_is_told_so_and_others_keep_getting_in(tmp_path: Path) -> None:
    """One slot, and a queue of twelve. What each is told is in the dialect of the calls."""
    settings = settings_for(
        tmp_path / "data",
        models={"share": "registered", "concurrency": 1},
        limits={"queued_calls": 12, "queue_wait_s": 60},
    )
    go_on = trio.Event()

    async def slowly(asked: Asked) -> None:
        await asked.read()
        await go_on.wait()
        await asked.answer(200, b"{}")

    async def main() -> None:
        node = ScriptedNode(new_account(), services=MODEL, script=slowly)
        ended: list[str] = []
        refused: list[Answered] = []

        async def call(name: str, token: str, *headers: tuple[bytes, bytes]) -> None:
            answer = await chat(bootstrap, token, *headers)
            if answer.status == 200:
                ended.append(name)
            else:
                refused.append(answer)

        async with running(settings) as bootstrap, connected(node, bootstrap.multiaddr):
            await is_listed(bootstrap)
            greedy, *modest = [await add_caller(bootstrap, name) for name in ("greedy", "a", "b", "c")]
            named = (b"ngpu-node", node.account.address.encode())
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(40):  # by naming the node too, which passes no queue
                        nursery.start_soon(call, "greedy", greedy, *([named] if number % 2 else []))
                    while len(refused) < 40 - 1 - 6:  # noqa: ASYNC110 - one runs, half of the queue waits
                        await trio.sleep(0.02)
                    for name, token in zip("abc", modest, strict=True):
                        nursery.start_soon(call, name, token)
                    while (await queued(bootstrap, greedy)) < 6 + 3:  # noqa: ASYNC110
                        await trio.sleep(0.02)
                    go_on.set()
        assert len(ended) == 1 + 6 + 3
        # the one that ran and the one whose turn it was came first; then everybody once, before the rest of the flood
        assert sorted(ended[2:5]) == ["a", "b", "c"] or sorted(ended[1:4]) == ["a", "b", "c"], ended
        assert {answer.status for answer in refused} == {429}
        for answer in refused:
            error = json.loads(answer.body)["error"]
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error"), error
            assert int(answer.header(b"retry-after") or b"0") >= 1

    async def queued(bootstrap: Bootstrap, token: str) -> int:
        """Return how many wait, as one more call of the flood is told."""
        answer = await chat(bootstrap, token)
        assert answer.status == 429
        return int(answer.header(b"ngpu-queue-length") or b"0")

    trio.run(main)
