"""The peers a daemon remembers, and the addresses its machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ngpu_daemon.interfaces import interface_addresses, reachable_listeners
from ngpu_daemon.known_peers import MAX_PEERS, KnownPeers

ONE = "/ip4/192.0.2.1/tcp/4911/p2p/16Uiu2HAm1"
TWO = "/dns4/peer.example/tcp/4911/p2p/16Uiu2HAm2"


def test_what_was_known_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    known = KnownPeers(path)
    assert known.multiaddrs == ()
    known.remember([ONE, TWO, ONE, "nonsense", "/ip4/192.0.2.1/tcp/1"])
    assert KnownPeers(path).multiaddrs == (ONE, TWO)


def test_who_lost_everybody_forgets_nobody(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "peers.json")
    known.remember([ONE])
    known.remember([])
    assert KnownPeers(tmp_path / "peers.json").multiaddrs == (ONE,)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1}', "[1, null, [2]]", '["/x/p2p/' + "y" * 500 + '"]'])
def test_a_file_of_rubbish_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "peers.json").write_text(text)
    assert KnownPeers(tmp_path / "peers.json").multiaddrs == ()


def test_no_more_than_so_many_are_kept_and_a_full_disk_is_no_fault(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "peers.json")
    known.remember([f"/ip4/192.0.2.1/tcp/{n}/p2p/x{n}" for n in range(MAX_PEERS * 2)])
    assert len(json.loads((tmp_path / "peers.json").read_text())) == MAX_PEERS
    KnownPeers(tmp_path / "gone" / "peers.json").remember([ONE])


def test_a_wildcard_is_replaced_by_the_addresses_of_its_kind() -> None:
    own = ["192.0.2.7", "2001:db8::7"]
    listening = ["/ip4/0.0.0.0/tcp/4911/p2p/16U", "/ip6/::/tcp/4911/p2p/16U", "/ip4/127.0.0.1/tcp/5/p2p/16U"]
    assert reachable_listeners(listening, own) == [
        "/ip4/192.0.2.7/tcp/4911",
        "/ip6/2001:db8::7/tcp/4911",
        "/ip4/127.0.0.1/tcp/5",
    ]
    assert not any(text.startswith(("127.", "169.254.", "fe80:")) for text in interface_addresses())
