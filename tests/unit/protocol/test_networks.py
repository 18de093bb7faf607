"""Names decide chain ids and DHT prefixes."""

from __future__ import annotations

import pytest

from ngpu_protocol.errors import NetworkNameError
from ngpu_protocol.networks import network_named


def test_networks_differ_in_everything() -> None:
    networks = [network_named(name) for name in ("main", "test", "local", "acme-lab")]
    assert len({network.chain_id for network in networks}) == 4
    assert len({network.kad_prefix for network in networks}) == 4
    assert networks[0].kad_protocol == "/ngpu/main/kad/1.0.0"


@pytest.mark.parametrize("name", ["main", "test", "local", "x", "a" * 32])
def test_chain_id_stays_exact_in_a_javascript_number(name: str) -> None:
    assert 0 < network_named(name).chain_id < 2**48


@pytest.mark.parametrize("name", ["", "Main", "1st", "a b", "a/b", "a" * 33, "main\n", "-a", "é"])
def test_unusable_name_is_refused(name: str) -> None:
    with pytest.raises(NetworkNameError):
        network_named(name)
