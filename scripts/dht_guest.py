"""A short-lived peer for `scripts/dht` and `scripts/ping`: a key of its own, a client of the DHT, gone when done."""

import argparse
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog
import trio

from ngpu_protocol.errors import NetworkNameError
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.p2p import Host, P2PError, open_host
from ngpu_protocol.p2p.circuits import attach_circuits
from ngpu_protocol.p2p.dht import Dht, DhtSettings, open_dht
from ngpu_protocol.p2p.hole_punch import attach_hole_punching

CONNECT_S = 5.0


class NobodyThere(Exception):
    """No peer given answers, or none of them takes part in the DHT."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every such program needs to know."""
    parser.add_argument(
        "--peer",
        action="append",
        required=True,
        metavar="MULTIADDR",
        help="a peer to start from, ending in /p2p/<PeerId>; may be given several times",
    )
    parser.add_argument("--network", default="main", help="the network's name (default main)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@asynccontextmanager
async def guest(network: str, peers: Sequence[str]) -> AsyncIterator[tuple[Host, Dht]]:
    """Yield a host and its DHT, connected to at least one of *peers*.

    Raises:
        NobodyThere: none of them answers as a DHT server.
    """
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        known = network_named(network)
    except NetworkNameError as error:
        raise NobodyThere(str(error)) from None
    reasons = []
    async with open_host(Account.from_key(os.urandom(32)), listen=[], network=known) as host:
        attach_circuits(host)
        attach_hole_punching(host)
        for peer in peers:
            try:
                await host.connect(peer, timeout_s=CONNECT_S)
            except P2PError as error:
                reasons.append(str(error))
        if len(reasons) == len(peers):
            raise NobodyThere("; ".join(reasons))
        async with open_dht(host, DhtSettings(server=False)) as dht:
            with trio.move_on_after(CONNECT_S):
                await dht.wait_seeded()
            if not len(dht.table):
                raise NobodyThere(f"connected, but no peer given keeps the DHT of network {network}")
            yield host, dht
