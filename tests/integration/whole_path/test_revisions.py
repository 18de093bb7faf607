"""New revisions on three real nodes with real containers: one at a time, no call lost, and back when one fails."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import trio

from ngpu_bootstrap.admin_socket import ask_daemon
from ngpu_protocol.http1 import Exchange
from tests.integration.node import workspace_image
from tests.integration.whole_path.rig import Network, network

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]

NO_ARCHIVE = b"this is no image" * 1000
NODE_LINES = ("[images]", "private_addresses = true")


@pytest.fixture
def image() -> Iterator[str]:
    reference = f"ngpu-test-{secrets.token_hex(4)}:1"
    workspace_image.build(reference)
    yield reference
    client = docker.from_env()
    client.images.remove(reference, force=True)
    client.close()


async def no_archive(exchange: Exchange) -> None:
    await exchange.respond(200, [(b"content-type", b"application/x-tar")], NO_ARCHIVE)


async def patch(net: Network, changes: dict[str, Any]) -> dict[str, Any]:
    socket = net.bootstrap.folder / "data" / "admin.sock"
    view: dict[str, Any] = await trio.to_thread.run_sync(
        ask_daemon, socket, "PATCH", f"/api/v1/workspaces/{net.workspace}", changes
    )
    return view


async def deployments_when(net: Network, holds: Callable[[dict[str, Any]], bool], within_s: float) -> dict[str, Any]:
    view: dict[str, Any] = {}
    with trio.move_on_after(within_s):
        while True:
            view = (await net.call("GET", f"/api/v1/workspaces/{net.workspace}/deployments")).document
            if holds(view):
                return view
            await trio.sleep(0.1)
    raise AssertionError(f"still {json.dumps(view, indent=1)}")


def ready_revisions(view: dict[str, Any]) -> list[int]:
    return sorted(one["revision"] for one in view["deployments"] if one["state"] == "ready")


def test_a_good_revision_replaces_the_old_one_and_a_bad_one_does_not_and_no_call_fails(
    tmp_path: Path, image: str
) -> None:
    async def main() -> None:
        spec = {"service": None, "image": image, "env": {"WORD": "one"}, "memory_bytes": 64 << 20, "apis": []}
        async with (
            network(tmp_path, no_archive, nodes=3, spec=spec, engine="docker", node_lines=NODE_LINES) as net,
            trio.open_nursery() as nursery,
        ):
            answers: list[tuple[int, bytes]] = []

            async def keep_calling() -> None:
                while True:
                    answer = await net.call("GET", "/proxy/8080/")
                    answers.append((answer.status, answer.body))
                    await trio.sleep(0.02)

            nursery.start_soon(keep_calling)
            view = await deployments_when(net, lambda view: ready_revisions(view) == [1, 1, 1], 30)
            digests = {one["image_digest"] for one in view["deployments"]}
            assert len(digests) == 1

            most_at_once = 0
            await patch(net, {"env": {"WORD": "two"}})

            def rolled_out(view: dict[str, Any]) -> bool:
                nonlocal most_at_once
                coming = sum(one["revision"] == 2 and one["state"] != "ready" for one in view["deployments"])
                most_at_once = max(most_at_once, coming)
                return view["revision"] == 2 and ready_revisions(view) == [2, 2, 2]

            await deployments_when(net, rolled_out, 60)
            assert most_at_once <= 1
            assert (await net.call("GET", "/proxy/8080/")).body == b"ok two"

            url = f"http://127.0.0.1:{net.workspace_port}/image.tar"
            await patch(net, {"image_url": url, "image_sha256": hashlib.sha256(NO_ARCHIVE).hexdigest()})
            view = await deployments_when(
                net, lambda view: view["rollout"] is not None and view["rollout"]["state"] == "failed", 60
            )
            assert view["rollout"]["reason"].startswith("image_"), view["rollout"]
            assert view["rollout"]["node"]
            view = await deployments_when(net, lambda view: len(view["deployments"]) == 3, 30)
            assert ready_revisions(view) == [2, 2, 2]

            nursery.cancel_scope.cancel()
            assert {status for status, _ in answers} == {200}
            assert {body for _, body in answers} == {b"ok one", b"ok two"}

    trio.run(main)
