"""Tasks that were run again, in the store: what is read back, and what is let go of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.store import recheck_rows
from ngpu_bootstrap.store.recheck_rows import RecheckRow
from ngpu_protocol.identity import Address
from tests.unit.store.builders import a_store

CHEAT = Address("0x" + "0c" * 20)
AGREED = RecheckRow("0xb", "1001", 1, "task", 5, "agreed", "0x1", "0x2")
LOST = replace(AGREED, task_id="lost", at_ms=7, outcome="first_lost", third_node="0x3", loser=CHEAT)


@trio_test
async def test_the_last_of_each_workspace_are_kept_and_whatever_was_lost(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recheck_rows, "KEPT_OF_WORKSPACE", 5)
    async with a_store(directory) as store:
        for row in (LOST, *(replace(AGREED, at_ms=at_ms) for at_ms in range(10, 20)), replace(AGREED, workspace="2")):
            await store.chore(lambda connection, row=row: recheck_rows.add(connection, row))  # type: ignore[misc]
        kept = await store.look_up(lambda connection: recheck_rows.of_workspace(connection, "1001", 100))
        assert [row.at_ms for row in kept] == [19, 18, 17, 16, 15, 7]
        assert kept[-1] == LOST
        assert await store.look_up(lambda connection: recheck_rows.lost_by(connection, CHEAT, 9)) == [LOST]
        assert await store.look_up(lambda connection: recheck_rows.counts(connection, "1001")) == {
            "agreed": 5,
            "first_lost": 1,
        }
        assert await store.look_over(lambda connection: recheck_rows.since(connection, 0)) == [LOST]
        assert await store.look_over(lambda connection: recheck_rows.since(connection, 8)) == []
