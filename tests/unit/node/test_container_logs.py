"""So many may follow a workspace's log, so many all of them, and clients never shut the owner out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import trio
from trio.testing import trio_test

from ngpu_node.container_logs import MAX_FOLLOWERS, MAX_FOLLOWERS_EACH, OWNERS_FOLLOWERS, ContainerLogs
from ngpu_node.deployments import Deployment
from ngpu_node.engine.outlook import Log
from ngpu_protocol.http1 import Exchange
from ngpu_protocol.workspaces import WorkspaceSpec


class Asked:
    """An exchange that asks to follow; it notes how it was answered."""

    head_sent = False

    def __init__(self) -> None:
        self.request = SimpleNamespace(target="/logs?follow=1")
        self.status = 0

    async def respond_json(self, status: int, document: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.status = status
        assert document["reason"] == "too_many_readers"

    async def send_head(self, status: int, fields: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.status = status


@trio_test
async def test_a_workspace_has_so_many_readers_all_have_so_many_and_the_owner_has_his_own() -> None:
    @asynccontextmanager
    async def endless(deployment: Deployment, lines: int, follow: bool) -> AsyncIterator[Log]:
        send, receive = trio.open_memory_channel[bytes](0)
        with send, receive:
            yield Log(b"", receive)

    logs = ContainerLogs(endless)

    async def follow(nursery: trio.Nursery, workspace: int, *, is_owner: bool = False) -> int:
        spec = WorkspaceSpec(id=str(workspace), name="c", image="c:1", ports=[8000])
        asked = Asked()
        deployment = Deployment("acme", spec)

        async def ask() -> None:
            await logs.answer(cast(Exchange, asked), [deployment], spec.id, is_owner=is_owner)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        return asked.status

    async with trio.open_nursery() as nursery:
        many = MAX_FOLLOWERS // MAX_FOLLOWERS_EACH
        for workspace in range(1, many + 1):
            assert [await follow(nursery, workspace) for _ in range(MAX_FOLLOWERS_EACH)] == [200] * MAX_FOLLOWERS_EACH
            assert await follow(nursery, workspace) == 429
        assert await follow(nursery, many + 1) == 429
        for _ in range(OWNERS_FOLLOWERS):
            assert await follow(nursery, 1, is_owner=True) == 200
        assert await follow(nursery, 1, is_owner=True) == 429
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        assert await follow(nursery, 1) == 200, "who left counts no more"
        nursery.cancel_scope.cancel()
