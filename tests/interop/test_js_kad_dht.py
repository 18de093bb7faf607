"""js-libp2p's kad-dht on our network: it finds a node by capability, reads its record; we find what it provides.

And js-libp2p's circuit relay client at our relay, as the one that is reached and as the one that comes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.capabilities import Capability, capabilities_of, capability_key, epoch_at
from ngpu_protocol.identity import address_of_peer_id
from ngpu_protocol.node_records import RecordGpu, record_key
from ngpu_protocol.p2p.directory import Directory
from ngpu_protocol.p2p.identify import ping
from ngpu_protocol.p2p.kad_messages import multiaddr_text, peer_id_text
from tests.integration.daemons.discovery_rig import becomes, bootstrap_at, found, node_of, running, third_peer
from tests.integration.p2p.dht_peers import KAD, dht_network, now_ms
from tests.integration.p2p.peers import LOCAL, eventually
from tests.integration.p2p.test_relay import hidden_host, relay_host, third
from tests.interop import npm
from tests.interop.test_js_libp2p import JsPeer

FOLDER = Path(__file__).parent / "js_libp2p"

pytestmark = pytest.mark.needs_node


@contextlib.asynccontextmanager
async def js_peer(program: str) -> AsyncIterator[JsPeer]:
    await trio.to_thread.run_sync(npm.install, FOLDER)
    process = await trio.lowlevel.open_process(
        [npm.node_binary(), program], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        with trio.fail_after(90):
            yield JsPeer(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.mark.timeout_s(300)  # the packages may have to be installed first
@trio_test
async def test_js_kad_dht_finds_a_node_by_capability_and_we_find_what_it_provides() -> None:
    async with dht_network(5) as peers:
        node = peers[1]
        signed = node.record(3, gpus=(RecordGpu(id=bytes(32), model="RTX4090", memory_bytes=24 << 30),))
        await node.dht.put(signed)
        await Directory(node.host, node.dht).announce(capabilities_of(signed.record))
        async with js_peer("dht_peer.mjs") as js:
            provided = b"\x12\x20" + os.urandom(32)
            await js.tell(
                address=peers[4].host.addresses[0],
                protocol=KAD,
                chainId=LOCAL.chain_id,
                capability=capability_key(Capability.parse("gpu:RTX4090"), LOCAL, epoch_at(now_ms())).hex(),
                recordKey=record_key(node.account.address).decode(),
                provide=provided.hex(),
            )
            hello = await js.says()
            found = await js.says()
            assert found["providers"] == [node.host.peer_id]
            assert found["record"] == {
                "peerId": node.host.peer_id,
                "gpus": ["RTX4090"],
                "addresses": list(signed.record.addresses),
            }
            assert found["sequence"] == 3
            assert await js.says() == {"provided": True}

            (provider,) = (await peers[2].dht.providers(provided)).providers
            assert peer_id_text(provider.id) == hello["peer"]
            assert f"{multiaddr_text(provider.addresses[0])}/p2p/{hello['peer']}" == hello["address"]
            # It is a server that can be dialled, so it is one of ours: known, and asked like any other.
            await eventually(lambda: provider.id in peers[4].dht.table)
            assert await peers[4].dht.find_peer(hello["peer"]) == [hello["address"]]
            # And what it put under a namespace of its own, nobody kept. Whom it asks is its choice.
            await eventually(lambda: any(peer.dht.server.refused["foreign_key"] >= 1 for peer in peers))
            assert all(peer.dht.store.record_count <= 1 for peer in peers)


@pytest.mark.timeout_s(300)
@trio_test
async def test_js_kad_dht_finds_a_running_node_through_a_running_bootstrap(tmp_path: Path) -> None:
    bootstrap, multiaddr = bootstrap_at(tmp_path / "b")
    node = node_of(tmp_path / "n", multiaddr, lines=('region = "eu-js"',))
    async with running(bootstrap, node), third_peer(multiaddr) as (_, dht, directory), js_peer("dht_peer.mjs") as js:
        address = node.where["node"]
        await becomes(node, lambda shown: shown["server"])
        await found(directory, "region:eu-js", {address})
        provided = b"\x12\x20" + os.urandom(32)
        await js.tell(
            address=multiaddr,
            protocol=KAD,
            chainId=LOCAL.chain_id,
            capability=capability_key(Capability.parse("region:eu-js"), LOCAL, epoch_at(now_ms())).hex(),
            recordKey=record_key(address_of_peer_id(node.where["peer_id"])).decode(),
            provide=provided.hex(),
        )
        hello = await js.says()
        said = await js.says()
        assert said["providers"] == [node.where["peer_id"]]
        assert said["record"]["peerId"] == node.where["peer_id"]
        assert said["record"]["addresses"][0] == node.where["multiaddrs"][0].partition("/p2p/")[0]
        assert await js.says() == {"provided": True}
        (provider,) = (await dht.providers(provided)).providers
        assert peer_id_text(provider.id) == hello["peer"]


@pytest.mark.timeout_s(300)
@trio_test
async def test_js_comes_through_our_relay_and_is_reached_through_it() -> None:
    async with (
        relay_host() as (relay, served),
        hidden_host(relay) as (hidden, _, where),
        third() as caller,
        js_peer("relay_peer.mjs") as js,
    ):
        await js.tell(relay=relay.addresses[0], target=where)
        hello = await js.says()
        assert hello["address"] == f"{relay.addresses[0]}/p2p-circuit/p2p/{hello['peer']}"
        said = await js.says()
        assert (said["reached"], said["relayed"], len(said["pings"])) == (hidden.peer_id, True, 3)
        assert await caller.connect(hello["address"], timeout_s=30) == hello["peer"]
        assert await ping(caller, hello["peer"], timeout_s=5) < 5
        assert not caller.is_directly_connected(hello["peer"])
        # whose connection broke has no place until it is back
        await eventually(lambda: served.reservations == 2)
