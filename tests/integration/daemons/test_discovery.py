"""Both daemons in the DHT: a node is found by what it offers, by anybody, with every bootstrap it started from gone."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import trio_test

from ngpu_daemon.known_peers import KnownPeers
from ngpu_protocol.capabilities import Capability
from ngpu_protocol.p2p.directory import Directory
from tests.integration.daemons.discovery_rig import (
    becomes,
    bootstrap_at,
    found,
    linked,
    node_of,
    running,
    status,
    third_peer,
)
from tests.integration.whole_path.rig import Daemon, free_port

pytestmark = pytest.mark.timeout_s(240)


@trio_test
async def test_a_node_is_found_by_region_and_role_and_its_record_is_true_and_withdrawn_at_its_end(
    tmp_path: Path,
) -> None:
    bootstrap, multiaddr = bootstrap_at(tmp_path / "b", 'region = "lab"')
    node = node_of(
        tmp_path / "n", multiaddr, lines=('region = "eu-central"', 'terms = "https://terms.example"', "slots = 7")
    )
    async with running(bootstrap, node), third_peer(multiaddr) as (own, dht, directory):
        address = node.where["node"]
        await found(directory, "region:eu-central", {address})
        await found(directory, "role:bootstrap", {bootstrap.where["address"]})
        await becomes(node, lambda shown: shown["dialable"] and shown["server"])
        signed = await dht.get(address)
        assert signed is not None
        record = signed.record
        assert (record.region, record.terms, record.slots, record.slots_free) == (
            "eu-central",
            "https://terms.example",
            7,
            7,
        )
        assert record.software.startswith("ngpu-node/")
        assert record.cpus > 0
        assert record.memory_bytes > 1 << 28
        assert record.disk_free_bytes > 0
        assert await directory.is_alive(signed)
        before = record.sequence
        await node.terminate()
        gone = await dht.get(address)
        assert gone is not None
        assert gone.record.withdrawn
        assert await Directory(own, dht).find(Capability.parse("region:eu-central")) == []
        await node.start()
        await found(Directory(own, dht), "region:eu-central", {address})
        again = await dht.get(address)
        assert again is not None
        assert again.record.sequence > before + 1, "the withdrawal was in between"


async def spread(daemon: Daemon, holds: Callable[[dict[str, Any]], object]) -> None:
    """Return once *holds*; a daemon is content with two copies, so where peers stood still it starts anew."""
    for _ in range(3):
        with contextlib.suppress(AssertionError):
            await becomes(daemon, holds, within_s=25)
            return
        await daemon.terminate()
        await daemon.start()
    await becomes(daemon, holds, within_s=25)


@trio_test
async def test_peers_and_bootstraps_find_each_other_with_all_they_started_from_gone(tmp_path: Path) -> None:
    first, first_at = bootstrap_at(tmp_path / "first")
    joining = f"[discovery]\npeers = [{json.dumps(first_at)}]"
    second, second_at = bootstrap_at(tmp_path / "second", joining)
    third, _ = bootstrap_at(tmp_path / "third", joining)
    node = node_of(tmp_path / "n", first_at, lines=('region = "eu"',))
    async with running(first, second, third, node):
        await becomes(node, lambda shown: shown["server"])
        for daemon in (second, third):
            await spread(daemon, lambda shown: shown["peers_known"] >= 3 and shown["record_copies"] >= 3)
        await spread(node, lambda shown: shown["record_copies"] >= 4)
        await first.kill()
        # The second is restarted too: of what it was configured with, nobody is left.
        await second.terminate()
        assert any("/p2p/" in text for text in KnownPeers(second.folder / "data" / "peers.json").multiaddrs)
        await second.start()
        async with third_peer(second_at) as (_, _, directory):
            await found(directory, "region:eu", {node.where["node"]})
            others = {second.where["address"], third.where["address"]}
            # The record of the one that was killed lives on for ten minutes; it does not.
            await found(directory, "role:bootstrap", others, check_alive=True)


@trio_test
async def test_a_bootstrap_that_moved_is_found_again_by_its_record(tmp_path: Path) -> None:
    steady, steady_at = bootstrap_at(tmp_path / "steady")
    moving, moving_at = bootstrap_at(tmp_path / "moving", f"[discovery]\npeers = [{json.dumps(steady_at)}]")
    # It does not listen, so the bootstrap cannot come to it either.
    node = node_of(tmp_path / "n", steady_at, moving_at, lines=("listen = []",))
    async with running(steady, moving, node):
        await linked(node, 2)
        await moving.kill()
        config = moving.folder / "config.toml"
        old_port = moving_at.split("/")[4]
        config.write_text(config.read_text().replace(f"/tcp/{old_port}", f"/tcp/{free_port()}"))
        await moving.start()
        await linked(node, 2, at=moving.where["multiaddrs"][0].split("/")[4])


@trio_test
async def test_a_node_that_cannot_be_dialled_is_a_client_and_reached_through_its_bootstrap(tmp_path: Path) -> None:
    bootstrap, multiaddr = bootstrap_at(tmp_path / "b")
    node = node_of(tmp_path / "n", multiaddr, lines=("listen = []", 'region = "behind-nat"'))
    async with running(bootstrap, node), third_peer(multiaddr) as (own, dht, directory):
        shown = await becomes(node, lambda shown: shown["dialable"] is False and shown["relayed"])
        await found(directory, "region:behind-nat", {node.where["node"]})
        assert (await status(bootstrap))["relay_reservations"] == 1
        assert shown["direct"] == []
        with trio.fail_after(60):
            while True:
                signed = await dht.get(node.where["node"])
                if signed is not None and signed.record.addresses:
                    break
                await trio.sleep(0.1)
        assert all("/p2p-circuit" in text for text in signed.record.addresses)
        assert await directory.is_alive(signed)
        nodes = await directory.find(Capability.parse("region:behind-nat"), check_alive=True)
        assert [str(one.node) for one in nodes] == [node.where["node"]]
        await node.kill()
        await trio.lowlevel.checkpoint()
        assert not await directory.is_alive(signed)
        assert await directory.find(Capability.parse("region:behind-nat"), check_alive=True) == []
        assert own.peer_id


@trio_test
async def test_a_node_a_bootstrap_does_not_admit_gets_no_place_at_its_relay(tmp_path: Path) -> None:
    someone = "0x" + secrets.token_hex(20)
    bootstrap, multiaddr = bootstrap_at(tmp_path / "b", f'[admission]\nmode = "approved"\napproved = ["{someone}"]')
    node = node_of(tmp_path / "n", multiaddr, lines=("listen = []",))
    async with running(bootstrap, node):
        shown = await becomes(node, lambda shown: shown.get("relay_problems"))
        assert "permission denied" in next(iter(shown["relay_problems"].values()))
        assert shown["relayed"] == []
        assert (await status(bootstrap))["relay_reservations"] == 0


@trio_test
async def test_discovery_turned_off_leaves_a_node_that_serves_its_bootstraps(tmp_path: Path) -> None:
    bootstrap, multiaddr = bootstrap_at(tmp_path / "b")
    node = node_of(tmp_path / "n", multiaddr, tables=("[discovery]", "enabled = false"))
    async with running(bootstrap, node):
        await linked(node, 1)
        assert await status(node) == {"enabled": False}
        assert not (tmp_path / "n" / "data" / "peers.json").exists()
