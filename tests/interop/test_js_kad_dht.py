"""js-libp2p's kad-dht on our network: it finds a node by capability, reads its record; we find what it provides."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_protocol.capabilities import Capability, capabilities_of, capability_key, epoch_at
from ngpu_protocol.node_records import RecordGpu, record_key
from ngpu_protocol.p2p.directory import Directory
from ngpu_protocol.p2p.kad_messages import multiaddr_text, peer_id_text
from tests.integration.p2p.dht_peers import KAD, dht_network, now_ms
from tests.integration.p2p.peers import LOCAL, eventually
from tests.interop import npm
from tests.interop.test_js_libp2p import JsPeer

FOLDER = Path(__file__).parent / "js_libp2p"

pytestmark = pytest.mark.needs_node


@pytest.mark.timeout_s(300)  # the packages may have to be installed first
@trio_test
async def test_js_kad_dht_finds_a_node_by_capability_and_we_find_what_it_provides() -> None:
    await trio.to_thread.run_sync(npm.install, FOLDER)
    async with dht_network(5) as peers:
        node = peers[1]
        signed = node.record(3, gpus=(RecordGpu(id=bytes(32), model="RTX4090", memory_bytes=24 << 30),))
        await node.dht.put(signed)
        await Directory(node.host, node.dht).announce(capabilities_of(signed.record))
        process = await trio.lowlevel.open_process(
            [npm.node_binary(), "dht_peer.mjs"], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            with trio.fail_after(90):
                js = JsPeer(process)
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
                # And what it put under a namespace of its own, nobody kept.
                assert all(peer.dht.server.refused["foreign_key"] >= 1 for peer in peers)
                assert all(peer.dht.store.record_count <= 1 for peer in peers)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
