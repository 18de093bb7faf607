"""A host that keeps itself connected comes back, to wherever the peer is now."""

from __future__ import annotations

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.p2p import BackOff, BadMultiaddrError, keep_connected
from tests.integration.p2p.peers import account, echoes, eventually, host

QUICK = BackOff(initial_s=0.02, max_s=0.1, stable_s=0.2)


async def keep(client: object, addresses: object) -> None:
    await keep_connected(client, addresses, back_off=QUICK, dial_timeout_s=1)


@trio_test
async def test_a_peer_that_restarts_is_found_again() -> None:
    key = account()
    async with host({}, listen=()) as client, trio.open_nursery() as nursery:
        async with host(key=key) as first:
            address = first.addresses[0]
            nursery.start_soon(keep, client, address)
            await eventually(lambda: client.is_connected(key.peer_id))
        await eventually(lambda: not client.is_connected(key.peer_id))
        await trio.sleep(0.3)  # a few attempts fail
        async with host(key=key, listen=(address.rpartition("/p2p/")[0],)):
            await eventually(lambda: client.is_connected(key.peer_id))
            assert await echoes(client, key.peer_id)
            nursery.cancel_scope.cancel()


@trio_test
async def test_a_peer_that_moved_is_found_at_its_fresh_address() -> None:
    key = account()
    async with host({}, listen=()) as client, trio.open_nursery() as nursery:
        addresses: list[str] = []
        async with host(key=key) as first:
            addresses[:] = [first.addresses[0]]
            nursery.start_soon(keep, client, lambda: list(addresses))
            await eventually(lambda: client.is_connected(key.peer_id))
        await trio.sleep(0.1)
        async with host(key=key) as second:
            addresses.append(second.addresses[0])  # behind the dead one, which is tried first
            await eventually(lambda: client.is_connected(key.peer_id))
            nursery.cancel_scope.cancel()


@trio_test
async def test_a_connection_closed_by_the_peer_is_made_again() -> None:
    async with host() as server, host({}, listen=()) as client, trio.open_nursery() as nursery:
        nursery.start_soon(keep, client, server.addresses[0])
        for _ in range(3):
            await eventually(lambda: server.is_connected(client.peer_id))
            await server.disconnect(client.peer_id)
            await eventually(lambda: not client.is_connected(server.peer_id))
        await eventually(lambda: client.is_connected(server.peer_id))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("addresses", [[], ["/ip4/127.0.0.1/tcp/1"], "nonsense"])
@trio_test
async def test_what_waiting_cannot_mend_is_raised(addresses: object) -> None:
    async with host({}, listen=()) as client:
        with trio.fail_after(1), pytest.raises(BadMultiaddrError):
            await keep(client, addresses)
