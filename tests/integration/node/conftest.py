"""What the tests of containers share: one image for all of them, a node's account for each."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import docker
import pytest

from ngpu_node.engine.confinement import LABEL_NODE
from ngpu_protocol.identity import Account
from tests.integration.node import workspace_image


@pytest.fixture(scope="session")
def image() -> Iterator[str]:
    reference = f"ngpu-test-{secrets.token_hex(4)}:1"
    workspace_image.build(reference)
    yield reference
    client = docker.from_env()
    client.images.remove(reference, force=True)
    client.close()


@pytest.fixture(scope="session")
def bare_image() -> Iterator[str]:
    """The same without an `nvidia-smi`."""
    reference = f"ngpu-test-{secrets.token_hex(4)}:1"
    workspace_image.build(reference, with_nvidia_smi=False)
    yield reference
    client = docker.from_env()
    client.images.remove(reference, force=True)
    client.close()


@pytest.fixture
def account() -> Iterator[Account]:
    """A node of its own for each test; what it left on the engine goes with it."""
    fresh = Account.from_key(secrets.token_bytes(32))
    yield fresh
    remove_all_of(fresh)


def remove_all_of(account: Account) -> None:
    """Remove what the node of *account* left on the engine."""
    client = docker.from_env()
    mine = {"label": f"{LABEL_NODE}={account.address}"}
    for container in client.containers.list(all=True, filters=mine):
        container.remove(force=True)
    for volume in client.volumes.list(filters=mine):
        volume.remove(force=True)
    for network in client.networks.list(filters=mine):
        network.remove()
    client.close()
