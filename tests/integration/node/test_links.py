"""Where a node's link to a bootstrap says that it stands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio

from ngpu_node.links import Link
from ngpu_node.trust import TrustedBootstrap
from tests.integration.p2p.peers import account, host


def test_a_link_over_a_connection_that_was_there_says_where_that_goes_not_which_address_was_asked_for() -> None:
    """As when the DHT met a bootstrap that moved before its link had given up the old address."""

    async def main() -> None:
        key = account()
        async with host({}, key=key) as bootstrap, host({}, listen=()) as node:
            now_at = bootstrap.addresses[0]
            before = f"/ip4/127.0.0.1/tcp/9/p2p/{bootstrap.peer_id}"
            parts = cast(Any, SimpleNamespace(host=node))
            link = Link(TrustedBootstrap(key.address, (before,), key.address), parts)
            await node.connect(now_at, timeout_s=60)
            assert await link._dial() == bootstrap.peer_id
            assert link.status.multiaddr == now_at
            await node.disconnect(bootstrap.peer_id)

            # dialled by the link itself, it is as it was configured: a name stays a name
            named = now_at.replace("/ip4/127.0.0.1/", "/dns4/localhost/")
            link = Link(TrustedBootstrap(key.address, (named,), key.address), parts)
            assert await link._dial() == bootstrap.peer_id
            assert link.status.multiaddr == named

    trio.run(main)
