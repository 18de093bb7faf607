"""A network whose nodes have model servers, and what tests ask of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import trio

from ngpu_protocol.http1 import Client, tcp_opener
from tests.integration.whole_path.rig import Daemon, Network

PROJECT = "DecentralGPT"


async def register(node: Daemon, port: int, models: Iterable[tuple[str, str, int]], paths: Sequence[str] = ()) -> None:
    """Register models with a node, as their server does: project, model, type; *paths* that may be called besides."""
    host, _, own = node.where["models"].removeprefix("http://").rpartition(":")
    client = Client(tcp_opener(host, int(own)), authority=f"{host}:{own}")
    for project, model, kind in models:
        api = f"http://127.0.0.1:{port}/v1/chat/completions"
        wanted = {"project": project, "model": model, "api": api, "type": kind, "cid": "", "paths": list(paths)}
        body = json.dumps(wanted).encode()
        async with client.request(
            "POST", "/api/v0/ai/model/register", [(b"content-type", b"application/json")], body
        ) as response:
            said = await response.read(10_000)
            assert response.status == 200, said
    await client.aclose()


async def listed(net: Network, *names: str, within_s: float = 60.0) -> list[dict[str, Any]]:
    """Return the list of models once it has *names*."""
    document: Any = None
    with trio.move_on_after(within_s):
        while True:
            document = (await net.call("GET", "/v1/models")).document
            if set(names) <= {one["id"] for one in document["data"]}:
                data: list[dict[str, Any]] = document["data"]
                return data
            await trio.sleep(0.05)
    raise AssertionError(f"not listed: {document}")


async def receipt_of(net: Network, task_id: str, within_s: float = 60.0) -> dict[str, Any]:
    """Return the verified receipt of a task, as its caller's token gets it."""
    view = await net.task(task_id, lambda one: bool(one["verdict"]), within_s)
    assert view["verdict"] == "verified", view
    answer = await net.call("GET", f"/api/v1/tasks/{task_id}/receipt")
    assert answer.status == 200, answer.body
    document: dict[str, Any] = answer.document
    return document
