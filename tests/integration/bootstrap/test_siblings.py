"""Several bootstraps on one PostgreSQL database: where workspaces run, and who can read what clients confided."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import trio

from ngpu_bootstrap import membership
from ngpu_bootstrap.registry import control
from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.database import open_engine
from ngpu_daemon.keystore import open_keystore
from ngpu_protocol.control import HostOffer
from ngpu_protocol.sealing import open_sealed
from ngpu_protocol.workspace_secrets import WorkspaceSecrets
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account
from tests.support.postgres import new_database

pytestmark = pytest.mark.needs_postgres

IMAGE: dict[str, Any] = {
    **{key: value for key, value in WORKSPACE.items() if key != "service"},
    "image": "registry.example/echo:1",
    "replicas": 1,
}
SECRET = {"secrets": {"env": {"PASSWORD": "open sesame"}}}


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(control, "TICK_S", 0.1)
    monkeypatch.setattr(control, "SECRETS_AGAIN_S", 0.1)
    monkeypatch.setattr(membership, "BEAT_S", 0.1)
    with new_database() as url:
        yield url


def node() -> ScriptedNode:
    return ScriptedNode(new_account(), services=())


def address_of(folder: Path, name: str) -> str:
    """Return the address of a bootstrap that may not have run yet."""
    settings = settings_for(folder / name)
    return open_keystore(settings.data_dir / "keystore.json", "pw").address


@asynccontextmanager
async def pair(
    folder: Path, database: str, workspace: dict[str, Any], **settings: Any
) -> AsyncIterator[tuple[Bootstrap, Bootstrap]]:
    """Run two bootstraps; the workspace is made at the first, before the second begins."""
    async with running(settings_for(folder / "one", store=database, **settings), workspace=workspace) as one:
        known = one.workspace, one.token
        async with running(settings_for(folder / "two", store=database, **settings), known=known) as two:
            yield one, two


async def holds(check: Callable[[], Awaitable[bool] | bool], what: str) -> None:
    with trio.move_on_after(60):
        while True:
            answer = check()
            if answer if isinstance(answer, bool) else await answer:
                return
            await trio.sleep(0.02)
    raise AssertionError(what)


def test_a_node_that_one_bootstrap_has_lost_and_another_has_keeps_its_place(tmp_path: Path, database: str) -> None:
    async def main() -> None:
        first, second = node(), node()
        async with pair(tmp_path, database, IMAGE, replace_node_after_s=0.3) as (one, two):
            async with AsyncExitStack() as held:
                await held.enter_async_context(connected(first, one.multiaddr))
                await wait_ready(one)
                await held.enter_async_context(connected(second, two.multiaddr))
                # told by the first alone, seen by the second in the table alone: far beyond the 0.3 s
                with trio.move_on_after(2):
                    while True:
                        assert [len(first.told), len(second.told)] == [1, 0]
                        await trio.sleep(0.02)
                view = await two.admin("GET", f"/api/v1/workspaces/{one.workspace}/deployments")
                assert [shown["reason"] for shown in view["deployments"]] == ["node_elsewhere"]
            async with connected(second, two.multiaddr):  # the first is lost to both now: the other gets it
                await wait_ready(two)
                assert len(second.told) == 1

    trio.run(main)


def test_secrets_taken_by_one_bootstrap_reach_a_node_of_another_that_came_later(tmp_path: Path, database: str) -> None:
    siblings = [address_of(tmp_path, "one"), address_of(tmp_path, "two")]

    async def main() -> None:
        there = node()
        async with (
            pair(tmp_path, database, {**IMAGE, **SECRET}, siblings=siblings) as (one, two),
            connected(there, two.multiaddr),
        ):
            await wait_ready(two)
            assert opened(there, one.workspace, 1) == {"PASSWORD": "open sesame"}
            # and a change at the second, which names the secret and does not give it again, is read there
            changed = await two.admin("PATCH", f"/api/v1/workspaces/{one.workspace}", {"env": {"A": "1"}})
            assert changed["target"]["revision"] == 2
            await holds(lambda: there.told[0].revision == 2, "the revision did not come")
            assert opened(there, one.workspace, 2) == {"PASSWORD": "open sesame"}
            # now that both are known, what one takes is sealed to both at once
            made = await two.admin("POST", "/api/v1/workspaces", {**IMAGE, **SECRET})
            assert boxes(database)[made["workspace"]["spec"]["id"], 1] == set(siblings)
        assert b"open sesame" not in dumped(database)

    trio.run(main)


def test_secrets_are_not_sealed_to_a_bootstrap_that_no_operator_named(tmp_path: Path, database: str) -> None:
    """It may have written itself into the database. Its nodes are told nothing that would fail for want of secrets."""

    async def main() -> None:
        there = node()
        async with pair(tmp_path, database, {**IMAGE, **SECRET}) as (one, two), connected(there, two.multiaddr):
            await holds(lambda: refused(two), "the second did not try")
            assert there.told == ()
            assert boxes(database) == {(one.workspace, 1): {address_of(tmp_path, "one")}}

    async def refused(bootstrap: Bootstrap) -> bool:
        view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}/deployments")
        return [one["state"] for one in view["deployments"]] == ["queued"]

    trio.run(main)


def test_what_a_later_version_wrote_ends_no_older_bootstrap_and_moves_nothing(tmp_path: Path, database: str) -> None:
    async def main() -> None:
        here, model_server = node(), ScriptedNode(new_account(), host=HostOffer(engine=False))
        async with (
            pair(tmp_path, database, IMAGE) as (one, two),
            connected(here, one.multiaddr),
            connected(model_server, two.multiaddr),
        ):
            await wait_ready(one)
            later = await one.admin("POST", "/api/v1/workspaces", {**IMAGE, "name": "later"})
            strange = later["workspace"]["spec"]["id"]
            await holds(lambda: len(here.told) == 2, "it was not told")
            written_by_a_later_version(database, strange)
            made = await two.admin("POST", "/api/v1/workspaces", WORKSPACE)  # both read everything again
            await holds(lambda: served(two, made["token"]), "the second serves no more")
            assert (await one.call("POST", "/proxy/8080/", b"x")).body == b"x"
            assert len(here.told) == 2
        assert placed(database, strange)

    async def served(bootstrap: Bootstrap, token: str) -> bool:
        return (await bootstrap.call("POST", "/proxy/8080/", b"x", token=token)).status == 200

    trio.run(main)


def opened(there: ScriptedNode, workspace: str, revision: int) -> dict[str, str]:
    document = open_sealed(there.sealed[workspace], there.account, workspace=workspace, revision=revision)
    return dict(WorkspaceSecrets.decode(document).env)


def boxes(database: str) -> dict[tuple[str, int], set[str]]:
    """Return who can read which secrets."""
    found: dict[tuple[str, int], set[str]] = {}
    b = tables.workspace_secret_boxes
    with open_engine(database).connect() as connection:
        for row in connection.execute(sa.select(b)):
            found.setdefault((row.workspace, row.revision), set()).add(row.bootstrap)
    return found


def dumped(database: str) -> bytes:
    found = b""
    with open_engine(database).connect() as connection:
        for table in tables.metadata.sorted_tables:
            for row in connection.execute(sa.select(table)):
                found += b"".join(one if isinstance(one, bytes) else str(one).encode() for one in row)
    return found


def written_by_a_later_version(database: str, workspace: str) -> None:
    w, v = tables.workspaces, tables.workspace_revisions
    with open_engine(database).begin() as connection:
        spec = json.loads(connection.execute(sa.select(v.c.spec).where(v.c.workspace == workspace)).scalar_one())
        spec["apis"] = "kept elsewhere since version 9"
        connection.execute(sa.update(v).where(v.c.workspace == workspace).values(spec=json.dumps(spec)))
        connection.execute(sa.update(w).where(w.c.id == workspace).values(updated_at_ms=w.c.updated_at_ms + 1))
    p = tables.brc20_policies
    with open_engine(database).begin() as connection:
        connection.execute(sa.insert(p).values(workspace=workspace, policy='{"mode": "auction"}'))


def placed(database: str, workspace: str) -> bool:
    d = tables.deployments
    with open_engine(database).connect() as connection:
        return connection.execute(sa.select(d.c.node).where(d.c.workspace == workspace)).scalar() is not None
