"""Images given as URLs: what a strange server answers stays with the workspace that named it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import httpx
import trio
from trio.testing import trio_test

from ngpu_bootstrap.registry.archives import ArchiveLimits, Archives
from ngpu_protocol.workspaces import WorkspaceSpec


class OneWorkspace(list[Any]):
    """What `Archives` asks of the workspaces."""

    async def url_of(self, spec: WorkspaceSpec) -> str:
        return spec.image_url or ""

    def get(self, workspace_id: str) -> None:
        return None


@trio_test
async def test_a_server_that_nobody_foresaw_ends_no_daemon() -> None:
    def strange(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Length": "many"}, content=b"x")

    spec = WorkspaceSpec(id="1", revision=1, name="a", image_url="https://example.org/i.tar", ports=[80])
    workspace = SimpleNamespace(id="1", wanted=spec, is_rolling=False)
    archives = Archives(
        cast(Any, OneWorkspace([workspace])),
        transport=lambda: httpx.MockTransport(strange),
        limits=ArchiveLimits(1 << 20, 10.0),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(archives.run)
        with trio.fail_after(5):
            while True:
                if "cannot be read" in archives.hindrance(spec).detail:
                    break
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
