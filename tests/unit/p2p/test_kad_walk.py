"""Lookups: they find the closest, and nobody's silence holds them up."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Sequence

import trio
from trio.testing import MockClock

from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position
from ngpu_protocol.p2p.kad_walk import CallFailed, walk

OWN = os.urandom(39)
TARGET = kad_position(b"target")


class Network:
    """Peers that each know some others, and answer like Kademlia's."""

    def __init__(self, size: int, known: int = 40) -> None:
        chance = random.Random(1)
        self.peers = [KadPeer(chance.randbytes(39)) for _ in range(size)]
        self.knows = {peer.id: self._acquaintances(peer, known, chance) for peer in self.peers}
        self.asked: list[bytes] = []
        self.under_way = self.most_under_way = 0
        self.dead: set[bytes] = set()
        self.hung: set[bytes] = set()

    def _acquaintances(self, peer: KadPeer, known: int, chance: random.Random) -> list[KadPeer]:
        near = sorted(self.peers, key=lambda other: kad_position(other.id) ^ kad_position(peer.id))[1 : known // 2]
        return near + chance.sample(self.peers, min(known // 2, len(self.peers)))

    def closest(self, count: int) -> list[KadPeer]:
        return sorted(self.peers, key=lambda peer: kad_position(peer.id) ^ TARGET)[:count]

    async def ask(self, peer: KadPeer) -> Sequence[KadPeer]:
        self.asked.append(peer.id)
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            if peer.id in self.hung:
                await trio.sleep(2)
                raise CallFailed("silent")
            await trio.sleep(0.05)
            if peer.id in self.dead:
                raise CallFailed("dead")
            return sorted(self.knows[peer.id], key=lambda other: kad_position(other.id) ^ TARGET)[:20]
        finally:
            self.under_way -= 1


def on_virtual_clock(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))


async def find(network: Network, enough: Callable[[], bool] = lambda: False) -> list[KadPeer]:
    start = network.peers[:3]
    return await walk(TARGET, start, network.ask, own_id=OWN, width=8, parallel=6, patience_s=0.4, enough=enough)


def test_it_finds_the_closest_of_a_thousand_and_asks_few() -> None:
    async def main() -> None:
        network = Network(1000)
        assert await find(network) == network.closest(8)
        assert len(network.asked) == len(set(network.asked)) < 60
        assert network.most_under_way <= 6

    on_virtual_clock(main)


def test_dead_peers_are_passed_over() -> None:
    async def main() -> None:
        network = Network(300)
        network.dead = {peer.id for peer in network.closest(9)[::2]}
        alive = [peer for peer in network.closest(40) if peer.id not in network.dead]
        assert await find(network) == alive[:8]

    on_virtual_clock(main)


def test_hung_peers_cost_their_patience_once_and_not_their_time_limit() -> None:
    async def main() -> None:
        network = Network(300)
        network.hung = {peer.id for peer in network.closest(30)[::3]}
        answering = [peer for peer in network.closest(60) if peer.id not in network.hung]
        began = trio.current_time()
        assert await find(network) == answering[:8]
        assert trio.current_time() - began < 1.5
        assert network.under_way == 0, "questions still open are cancelled"

    on_virtual_clock(main)


def test_it_ends_as_soon_as_the_caller_has_enough() -> None:
    async def main() -> None:
        network = Network(300)
        await find(network, enough=lambda: len(network.asked) >= 5)
        assert len(network.asked) <= 11

    on_virtual_clock(main)


def test_alone_it_finds_nobody_and_a_liar_gains_little() -> None:
    async def main() -> None:
        async def nobody(peer: KadPeer) -> Sequence[KadPeer]:
            raise CallFailed("nobody")

        arguments = {"own_id": OWN, "width": 8, "parallel": 6, "patience_s": 0.4}
        assert await walk(TARGET, [], nobody, **arguments) == []  # type: ignore[arg-type]
        assert await walk(TARGET, [KadPeer(OWN)], nobody, **arguments) == []  # type: ignore[arg-type]

        made_up = 0

        async def liar(peer: KadPeer) -> Sequence[KadPeer]:
            nonlocal made_up
            made_up += 20
            return [KadPeer(os.urandom(39)) for _ in range(20)]

        with trio.move_on_after(60):
            await walk(TARGET, [KadPeer(os.urandom(39))], liar, **arguments)  # type: ignore[arg-type]
        assert made_up < 2000

    on_virtual_clock(main)
