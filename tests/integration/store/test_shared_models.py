"""Shared models on either database: two bootstraps that make the same ones at once, and nodes that offer too many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from ngpu_bootstrap.registry.confided import Confided
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.shared_models import TRY_AGAIN_S, UNUSED_S, Models, shared_id
from ngpu_bootstrap.registry.workspaces import REVIVE_AFTER_MS, NewWorkspace, Workspaces
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.control import DeploymentState, Heartbeat, ServiceOffer
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Address
from tests.unit.store.builders import BOOTSTRAP, a_store, database_of


class Side:
    """What one bootstrap knows: workspaces, nodes, models."""

    def __init__(self, store: Store, *, limit: int = 1000) -> None:
        self.store = store
        self.nodes = Nodes(now_ms=lambda: 0, queue_limit=4)
        confided = Confided(store, lambda: pytest.fail("nothing is confided"), [])
        self.now_ms = 1
        self.workspaces = Workspaces(store, confided=confided, now_ms=lambda: self.now_ms, on_change=self._changed)
        self.models = Models(
            self.workspaces, self.nodes, share=True, projects=(), limit=limit, concurrency=4, timeout_s=60
        )

    def _changed(self) -> None:
        self.models.refresh()

    def offer(self, number: int, names: Iterable[str], *, ready: bool = False) -> None:
        """Have node *number* offer models of the project `P`."""
        services = tuple(ServiceOffer("P", name, "text-to-text", 1) for name in names)
        deployments = tuple(
            DeploymentState(shared_id(f"P/{one.model}"), 1, "ready", slots_free=1) for one in services if ready
        )
        made = NodeSession(
            node=Address(f"0x{number:040x}"), peer_id=f"peer{number}", session=bytes(32), software="test", gpus=(),
            slots=8, admitted=True, connected_at_ms=0, heard_at_ms=0, requests=Client(_no_connection),
        )  # fmt: skip
        made.assign({one.workspace: (1,) for one in deployments})
        made.hear(Heartbeat(at_ms=0, slots_free=8, deployments=deployments, services=services), 0)
        self.nodes.attach(made)

    def shared(self) -> dict[str, str]:
        """Return the id of each shared model."""
        return {one.spec.service or "": one.id for one in self.workspaces if one.spec.service}


async def _no_connection() -> trio.abc.Stream:
    raise OSError("not in this test")


@asynccontextmanager
async def two_sides(directory: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Two bootstraps on one database; on SQLite, which has one process, two memories over one store."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(a_store(directory, bootstrap=BOOTSTRAP))
        two = one
        if isinstance(database_of(directory), str):
            two = await stack.enter_async_context(a_store(directory, bootstrap=Address("0x" + "22" * 20)))
        yield Side(one), Side(two)


def test_two_bootstraps_that_see_the_same_models_at_once_make_one_workspace_of_each(directory: Path) -> None:
    async def main() -> None:
        names = [f"m{number}" for number in range(30)]
        async with two_sides(directory) as (one, two):
            one.offer(1, names)
            two.offer(1, [*names[5:], "only-two"])
            async with trio.open_nursery() as nursery:
                for side in (one, two):
                    nursery.start_soon(side.models.look, 0.0)
            for side in (one, two):
                await side.workspaces.load()  # as the next beat does
            expected = {f"P/{name}": shared_id(f"P/{name}") for name in [*names, "only-two"]}
            assert one.shared() == two.shared() == expected
            stored = await one.store.list_workspaces(removed=True)
            assert sorted(row.id for row in stored) == sorted(expected.values())

    trio.run(main)


def test_a_model_an_operator_removed_while_it_is_offered_comes_back_once_under_another_id(directory: Path) -> None:
    async def main() -> None:
        async with two_sides(directory) as (one, two):
            for side in (one, two):
                side.offer(1, ["m"])
                await side.models.look(0.0)
            await one.workspaces.remove(shared_id("P/m"))
            await two.workspaces.load()
            async with trio.open_nursery() as nursery:
                for side in (one, two):
                    nursery.start_soon(side.models.look, 1.0)
            for side in (one, two):
                await side.workspaces.load()
            assert one.shared() == two.shared() == {"P/m": shared_id("P/m", 1)}

    trio.run(main)


def test_a_model_removed_as_often_as_it_has_ids_rests_an_hour_and_comes_back(directory: Path) -> None:
    async def main() -> None:
        async with a_store(directory) as store:
            side = Side(store)
            side.offer(1, ["m"])
            for _ in range(8):
                await side.models.look(0.0)
                (removed,) = side.shared().values()
                await side.workspaces.remove(removed)
            for now_s in (1.0, TRY_AGAIN_S + 2):
                await side.models.look(now_s)
                assert side.shared() == {}
            side.now_ms += REVIVE_AFTER_MS
            await side.models.look(2 * TRY_AGAIN_S + 3)
            assert side.shared() == {"P/m": removed}
            assert len(await store.list_workspaces(removed=True)) == 8

    trio.run(main)


def test_a_node_that_offers_too_many_models_leaves_room_for_others(directory: Path) -> None:
    async def main() -> None:
        async with a_store(directory) as store:
            side = Side(store, limit=10)
            side.offer(1, [f"greedy{number}" for number in range(50)])
            await side.models.look(0.0)
            assert len(side.shared()) == 5
            side.offer(2, ["a", "b"])
            await side.models.look(1.0)
            assert {"P/a", "P/b"} <= side.shared().keys()
            # names that change with every beat make no workspaces without end: what is gone keeps its place for a while
            for beat in range(5):
                side.offer(1, [f"other{beat}.{number}" for number in range(50)])
                await side.models.look(2.0 + beat)
            assert len(side.shared()) <= 10
            assert len(await store.list_workspaces(removed=True)) <= 10
            # later it makes room, and not what is offered all the time
            side.offer(3, ["late"])
            await side.models.look(10.0 + UNUSED_S)
            assert {"P/a", "P/b", "P/late"} <= side.shared().keys()
            assert "P/greedy0" not in side.shared()

    trio.run(main)


def test_a_name_that_no_workspace_can_have_keeps_nothing_else_out(directory: Path) -> None:
    async def main() -> None:
        async with a_store(directory) as store:
            side = Side(store)
            side.offer(1, ["with space", "", "x" * 300, "fine"])
            await side.models.look(0.0)
            assert side.shared().keys() == {"P/fine"}

    trio.run(main)


def test_models_are_listed_once_however_many_nodes_serve_them_and_only_while_one_does(directory: Path) -> None:
    async def main() -> None:
        async with a_store(directory) as store:
            side = Side(store)
            for number in (1, 2, 3):
                side.offer(number, ["m", "n"], ready=number < 3)
            side.offer(3, ["m", "asleep"])
            await side.models.look(0.0)
            caller, _ = await side.workspaces.add(NewWorkspace(name="caller", service="x/y", ports=[80]))
            listed = side.models.listed(caller)
            assert [(one.project, one.name, one.kind) for one in listed] == [
                ("P", "m", "text-to-text"),
                ("P", "n", "text-to-text"),
            ]
            assert side.models.listed(caller, "nobody") == []

    trio.run(main)
