"""The owner's configuration: what is refused, and what the trusted bootstraps come to."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ngpu_node.config import NodeSettings, split_listen
from tests.unit.node.builders import BOOTSTRAP, SIBLING, STRANGER

ADDRESS = f"/ip4/192.0.2.1/tcp/4910/p2p/{BOOTSTRAP.peer_id}"
OTHER = f"/ip4/192.0.2.2/tcp/4910/p2p/{SIBLING.peer_id}"


def test_a_bootstrap_is_known_by_its_multiaddr_alone() -> None:
    settings = NodeSettings(bootstraps=[{"multiaddrs": [ADDRESS]}])
    (bootstrap,) = settings.trust()
    assert bootstrap.address == BOOTSTRAP.address
    assert bootstrap.service == BOOTSTRAP.address


def test_bootstraps_of_one_word_are_one_service() -> None:
    entries = [{"multiaddrs": [ADDRESS], "service": "acme"}, {"multiaddrs": [OTHER], "service": "acme"}]
    trust = NodeSettings(bootstraps=entries).trust()
    assert trust.same_service(BOOTSTRAP.address, SIBLING.address)
    assert trust.members("acme") == (BOOTSTRAP.address, SIBLING.address)
    assert not trust.same_service(BOOTSTRAP.address, STRANGER.address)
    assert not trust.same_service(STRANGER.address, STRANGER.address)
    assert trust.service_of(STRANGER.address) is None
    alone = NodeSettings(bootstraps=[{"multiaddrs": [ADDRESS]}, {"multiaddrs": [OTHER]}]).trust()
    assert not alone.same_service(BOOTSTRAP.address, SIBLING.address)


@pytest.mark.parametrize(
    "values",
    [
        {"bootstraps": [{"multiaddrs": []}]},
        {"bootstraps": [{"multiaddrs": ["/ip4/192.0.2.1/tcp/4910"]}]},
        {"bootstraps": [{"multiaddrs": [ADDRESS, OTHER]}]},
        {"bootstraps": [{"multiaddrs": [ADDRESS], "address": STRANGER.address}]},
        {"bootstraps": [{"multiaddrs": [ADDRESS], "address": "0x12"}]},
        {"bootstraps": [{"multiaddrs": [ADDRESS]}, {"multiaddrs": [ADDRESS]}]},
        {"bootstraps": [{"multiaddrs": ["/ip4/192.0.2.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"]}]},
        {"listen": ["0.0.0.0:4911"]},
        {"model_listen": "192.0.2.1:4912"},
        {"model_listen": "4912"},
        {"model_listen": "127.0.0.1:99999"},
        {"metrics_listen": "[::]:1"},
        {"network": "No Such"},
        {"slots": 0},
        {"drain_s": -1},
        {"engine": "podman"},
        {"nonsense": 1},
        {"limits": {"nonsense": 1}},
    ],
)
def test_values_that_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NodeSettings(**values)


def test_listen_addresses() -> None:
    assert split_listen("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_listen("localhost:0") == ("127.0.0.1", 0)
    assert split_listen("[::1]:80") == ("::1", 80)
    assert NodeSettings(model_listen="[::1]:80").model_listen == "[::1]:80"
