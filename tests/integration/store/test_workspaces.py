"""Workspaces in the store: revisions, tokens, removal."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.store.errors import UnknownWorkspace, WorkspaceConflict
from ngpu_bootstrap.store.records import WorkspaceToken
from tests.unit.store.builders import WORKSPACE, a_store, a_workspace


@trio_test
async def test_workspaces_survive_and_keep_every_revision(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.add_workspace(a_workspace())
        await store.add_workspace(a_workspace("2", created_at_ms=1_800_000_000_000, owner="ann"))
        await store.revise_workspace(WORKSPACE, 2, name="paint 2", spec={"image": "paint:2", "ä": [1]}, at_ms=5)
    async with a_store(directory) as store:
        first, second = await store.list_workspaces()
        assert first == a_workspace(name="paint 2", revision=2, spec={"image": "paint:2", "ä": [1]}, updated_at_ms=5)
        assert (second.id, second.owner) == ("2", "ann")
        assert await store.workspace_spec(WORKSPACE, 1) == {"image": "paint:1", "ports": [8080]}
        assert await store.workspace_spec(WORKSPACE, 3) is None
        with pytest.raises(WorkspaceConflict):
            await store.revise_workspace(WORKSPACE, 2, name="late", spec={}, at_ms=6)
        with pytest.raises(UnknownWorkspace):
            await store.revise_workspace("3", 2, name="none", spec={}, at_ms=6)


@trio_test
async def test_a_taken_id_or_token_is_a_conflict(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.add_workspace(a_workspace())
        with pytest.raises(WorkspaceConflict):
            await store.add_workspace(a_workspace(tokens=()))
        with pytest.raises(WorkspaceConflict):
            await store.add_workspace(a_workspace("2", tokens=a_workspace().tokens))
        assert [row.id for row in await store.list_workspaces()] == [WORKSPACE]


@trio_test
async def test_a_removed_workspace_has_no_tokens_and_stays_on_record(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.add_workspace(a_workspace())
        await store.remove_workspace(WORKSPACE, 99)
        assert await store.list_workspaces() == []
        [removed] = await store.list_workspaces(removed=True)
        assert (removed.removed_at_ms, removed.tokens) == (99, ())
        assert await store.workspace_spec(WORKSPACE, 1) is not None
        with pytest.raises(UnknownWorkspace):
            await store.remove_workspace(WORKSPACE, 100)


@trio_test
async def test_tokens_rotate_with_an_overlap(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.add_workspace(a_workspace())
        old = a_workspace().tokens[0]
        new = WorkspaceToken("second", b"n" * 32, old.created_at_ms + 1)
        await store.replace_token(WORKSPACE, new, expire=[old.label], at_ms=500)
        [row] = await store.list_workspaces()
        assert row.tokens == (WorkspaceToken(old.label, old.hash, old.created_at_ms, 500), new)
        with pytest.raises(WorkspaceConflict):
            await store.replace_token(WORKSPACE, new, at_ms=500)
        with pytest.raises(WorkspaceConflict):
            await store.replace_token(WORKSPACE, WorkspaceToken("3", b"3" * 32, 1), expire=["none"], at_ms=500)
        [row] = await store.list_workspaces()
        assert len(row.tokens) == 2


def test_hashes_of_tokens_are_not_shown() -> None:
    assert "hhh" not in repr(a_workspace())
