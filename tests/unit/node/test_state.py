"""What a node knows again after a restart."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from trio.testing import trio_test

from ngpu_node.deployments import KeptDeployment
from ngpu_node.engine.room import Grant
from ngpu_node.errors import NodeConfigurationError, StateUnavailable
from ngpu_node.state import open_state
from ngpu_protocol.workspaces import WorkspaceSpec

SPEC = WorkspaceSpec(id="7", name="c", image="c:1", ports=[8080], env={"A": "b"})


@trio_test
async def test_everything_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "workspaces.db"
    kept = [
        KeptDeployment("acme", SPEC, is_wished=False, sealed=b"box"),
        KeptDeployment("acme", SPEC.model_copy(update={"revision": 2})),
        KeptDeployment("other", SPEC),
    ]
    async with open_state(path) as state:
        await state.keep_deployments([KeptDeployment("acme", SPEC.model_copy(update={"revision": 9}))])
        await state.keep_deployments(kept)
        await state.keep_holding("acme/7/1", Grant(1 << 30, 1.5, ("GPU-1", "GPU-2")))
        await state.keep_holding("acme/7/2", Grant(1, 1.0))
        await state.keep_holding("acme/7/2", None)
        await state.keep_owners_word("hold", "paused")
        await state.keep_owners_word("hold", "drained")
    async with open_state(path) as state:
        assert await state.deployments() == kept
        assert await state.holdings() == {"acme/7/1": Grant(1 << 30, 1.5, ("GPU-1", "GPU-2"))}
        assert await state.owners_word("hold") == "drained"
        assert await state.owners_word("other") == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@trio_test
async def test_a_disk_that_fails_is_an_error_of_ours_and_says_so(tmp_path: Path) -> None:
    async with open_state(tmp_path / "workspaces.db") as state:
        state._connection.execute("PRAGMA query_only = ON")  # as a disk that takes nothing more
        with pytest.raises(StateUnavailable, match="is the disk full"):
            await state.keep_holding("acme/7/1", Grant(1, 1.0))
        assert await state.holdings() == {}
        state._connection.execute("PRAGMA query_only = OFF")
        await state.keep_holding("acme/7/1", Grant(1, 1.0))


@trio_test
async def test_a_file_that_is_something_else_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "workspaces.db"
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(NodeConfigurationError, match="cannot be used"):
        async with open_state(path):
            raise AssertionError
