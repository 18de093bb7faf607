"""What a profile's call may say of where it runs: the GPUs a route prefers, and images that answer for models."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from ngpu_protocol.control import GpuOffer
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account

JSON = [(b"content-type", b"application/json")]
PICTURES = "/v1/images/generations"

PREFERRING = """
name = "mine"
[[routes]]
path = "/mine/large"
gpu_types = ["H100", "NVIDIA A100 80GB PCIe"]
[[routes]]
path = "/mine/small"
gpu_types = ["rtx 4090", "A100"]
[[routes]]
path = "/mine/none"
gpu_types = ["B200"]
"""


def with_gpu(model: str) -> ScriptedNode:
    node = ScriptedNode(new_account())
    node.gpus = (GpuOffer(id=b"\x01" * 32, model=model, memory_bytes=24 << 30),)
    return node


def test_each_route_prefers_its_own_gpus_and_takes_others_where_there_are_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(PREFERRING)
    models = ("NVIDIA GeForce RTX 4090", "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3")

    async def main() -> None:
        nodes = [with_gpu(model) for model in models]
        settings = settings_for(tmp_path / "bootstrap", profiles={"files": [file], "enabled": ["mine"]})
        async with AsyncExitStack() as stack:
            bootstrap = await stack.enter_async_context(running(settings))
            for node in nodes:
                await stack.enter_async_context(connected(node, bootstrap.multiaddr))
            await wait_ready(bootstrap, 3)

            async def took(path: str) -> list[int]:
                before = [len(node.orders) for node in nodes]
                for _ in range(6):
                    assert (await bootstrap.call("POST", path, b"{}", JSON)).status == 200
                return [len(node.orders) - many for node, many in zip(nodes, before, strict=True)]

            assert await took("/mine/large") == [0, 0, 6]
            assert await took("/mine/small") == [6, 0, 0]
            assert sum(await took("/mine/none")) == 6
            # the best of those that may get tasks: the first choice drains
            nodes[2].draining = True
            await nodes[2].report()
            with trio.fail_after(60):
                while await took("/mine/large") != [0, 6, 0]:
                    pass

    trio.run(main)


def test_an_image_answers_for_the_models_it_lists_to_its_own_token_and_its_owners(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        async with running(settings_for(tmp_path / "bootstrap")) as bootstrap:

            async def add(**fields: Any) -> tuple[str, str]:
                made = await bootstrap.admin("POST", "/api/v1/workspaces", {"ports": [8000], **fields})
                assert "token" in made, made
                return made["workspace"]["spec"]["id"], made["token"]

            models = [{"name": "sdxl", "project": "studio"}, {"name": "flux", "project": "studio"}]
            painting, own = await add(name="paint", image="registry.example/paint:1", owner="anna", models=models)
            _, same_owner = await add(name="chat", service="demo/other", owner="anna")
            _, stranger = await add(name="other", service="demo/third", owner="berta")
            bootstrap.workspace = painting
            async with connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                for token in (own, same_owner):
                    listed = await models_of(bootstrap, token)
                    assert {(one["id"], one["project"]) for one in listed} == {("sdxl", "studio"), ("flux", "studio")}
                    for body in ({"model": "sdxl"}, {"model": "flux", "project": "studio"}, {"model": "studio/sdxl"}):
                        answer = await bootstrap.call("POST", PICTURES, json.dumps(body).encode(), JSON, token=token)
                        assert answer.status == 200, answer.body
                        assert json.loads(answer.body) == body
                        order = node.orders[-1].order
                        assert (order.workspace, order.port, order.target) == (painting, 8000, PICTURES)
                assert await models_of(bootstrap, stranger) == []
                many = len(node.orders)
                for token, body in ((stranger, {"model": "sdxl"}), (own, {"model": "sdxl", "project": "other"})):
                    answer = await bootstrap.call("POST", PICTURES, json.dumps(body).encode(), JSON, token=token)
                    assert (answer.status, json.loads(answer.body)["reason"]) == (404, "model_unknown")
                assert len(node.orders) == many

    trio.run(main)


async def models_of(bootstrap: Bootstrap, token: str) -> list[dict[str, Any]]:
    answer = await bootstrap.call("GET", "/v1/models", token=token)
    assert answer.status == 200
    data: list[dict[str, Any]] = json.loads(answer.body)["data"]
    return data


def test_a_list_of_models_is_refused_without_a_token_though_calls_carry_theirs_in_the_body(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nworkspace = "model"\ncredentials = [{ in = "json", pointer = "/token" }]\n'
        '[[routes]]\nmethod = "GET"\npath = "/mine/models"\nmode = "models"\n'
    )

    async def main() -> None:
        settings = settings_for(tmp_path / "bootstrap", profiles={"files": [file], "enabled": ["mine"]})
        async with running(settings) as bootstrap:
            answer = await bootstrap.call("GET", "/mine/models", token=None)
            assert (answer.status, json.loads(answer.body)["reason"]) == (401, "token_missing")
            headers = [(b"ngpu-token", bootstrap.token.encode())]
            answer = await bootstrap.call("GET", "/mine/models", headers=headers, token=None)
            assert answer.status == 200

    trio.run(main)
