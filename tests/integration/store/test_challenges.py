"""Challenges in the store: what is read back, and what is let go of."""

from __future__ import annotations

from pathlib import Path

from trio.testing import trio_test

from ngpu_bootstrap.store import challenge_rows
from ngpu_bootstrap.store.challenge_rows import KEPT_OF_NODE, ChallengeRow
from ngpu_protocol.identity import Address
from tests.unit.store.builders import a_store

BOOTSTRAP, ONE, OTHER = (Address("0x" + byte * 20) for byte in ("0b", "01", "02"))


def row(node: Address, at_ms: int, gpu: bytes = bytes(32)) -> ChallengeRow:
    return ChallengeRow(BOOTSTRAP, node, gpu, at_ms, "H200", 1 << 37, "good", "", 7160, 9700, 680, 1000, "task")


@trio_test
async def test_the_last_challenges_of_each_node_are_kept(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.chore(lambda connection: challenge_rows.add(connection, row(OTHER, 5)))
        for at_ms in range(1, KEPT_OF_NODE + 11):
            kept = row(ONE, at_ms, bytes([at_ms % 2]) * 32)
            await store.chore(lambda connection, kept=kept: challenge_rows.add(connection, kept))  # type: ignore[misc]
        found = await store.look_up(lambda connection: challenge_rows.of_node(connection, ONE))
        assert [one.at_ms for one in found] == list(range(KEPT_OF_NODE + 10, 10, -1))
        assert await store.look_up(lambda connection: challenge_rows.of_node(connection, OTHER)) == [row(OTHER, 5)]
        all_of_them = await store.look_over(challenge_rows.findings)
        assert all_of_them[0] == (OTHER, bytes(32), "good", 5)
        assert len(all_of_them) == KEPT_OF_NODE + 1
