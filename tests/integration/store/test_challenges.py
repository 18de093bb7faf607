"""Challenges in the store: what is read back, and what is let go of."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
import trio
from trio.testing import trio_test

from ngpu_bootstrap.store import challenge_rows, tables
from ngpu_bootstrap.store.challenge_rows import KEPT_OF_NODE, ChallengeRow
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.identity import Address
from tests.unit.store.builders import a_store

BOOTSTRAP, SIBLING, ONE, OTHER = (Address("0x" + byte * 20) for byte in ("0b", "0c", "01", "02"))


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


@trio_test
async def test_a_node_is_challenged_by_one_bootstrap_at_a_time(directory: Path) -> None:
    hour_ms = 3_600_000
    async with a_store(directory, bootstrap=BOOTSTRAP) as store, a_store(directory, bootstrap=SIBLING) as beside:

        async def claim(of: Store, own: Address, *nodes: Address, for_ms: int = hour_ms) -> frozenset[Address]:
            return await of.chore(lambda connection: challenge_rows.claim(connection, own, nodes, for_ms))

        assert await claim(store, BOOTSTRAP, ONE) == {ONE}
        assert await claim(beside, SIBLING, OTHER, ONE) == {OTHER}, "one of them is the other's"
        assert await claim(store, BOOTSTRAP, ONE, OTHER) == {ONE}, "it may claim again what is its own"
        await store.chore(lambda connection: challenge_rows.release(connection, BOOTSTRAP, [ONE, OTHER]))
        assert await claim(beside, SIBLING, ONE) == {ONE}
        assert await claim(store, BOOTSTRAP, OTHER) == frozenset(), "nobody gives up another's"
        # a claim that was not given up ends by itself, and with the lease of a bootstrap that died
        assert await claim(beside, SIBLING, ONE, for_ms=-1) == {ONE}
        assert await claim(store, BOOTSTRAP, ONE) == {ONE}
        lease = {"address": SIBLING, "lease_until_ms": 1, "started_at_ms": 1, "about": "{}"}
        await beside.chore(lambda connection: connection.execute(sa.insert(tables.bootstraps), [lease]))
        assert await claim(store, BOOTSTRAP, OTHER) == {OTHER}


@trio_test
async def test_of_two_that_claim_at_the_same_moment_one_has_it(directory: Path) -> None:
    nodes = [Address(f"0x{number:040x}") for number in range(1, 9)]
    async with a_store(directory, bootstrap=BOOTSTRAP) as store, a_store(directory, bootstrap=SIBLING) as beside:
        found: dict[Address, frozenset[Address]] = {}

        async def claim(of: Store, own: Address) -> None:
            found[own] = await of.chore(lambda connection: challenge_rows.claim(connection, own, nodes, 3_600_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim, store, BOOTSTRAP)
            nursery.start_soon(claim, beside, SIBLING)
        assert found[BOOTSTRAP] | found[SIBLING] == set(nodes)
        assert not found[BOOTSTRAP] & found[SIBLING]
