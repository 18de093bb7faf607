"""A workspace's image from a real registry: pulled by the daemon, pinned, shown as it comes, named in receipts."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import secrets
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import trio

from ngpu_node.config import ImageSettings
from ngpu_protocol.control import DeploymentPhase, Desired, encode_message
from ngpu_protocol.identity import Account
from ngpu_protocol.p2p import send_frame
from ngpu_protocol.sealing import seal
from ngpu_protocol.workspace_secrets import RegistryCredentials, WorkspaceSecrets
from tests.integration.images.rig import Engine, fresh
from tests.integration.node import workspace_image
from tests.integration.node.places import spec
from tests.integration.node.scripted_bootstrap import a_bootstrap, a_node, settings
from tests.support.fake_registry import MadeImage, a_registry
from tests.support.real_registry import a_real_registry

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_gcc]


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine()
    before = running.ids()
    yield running
    running.clear(before)
    running.close()


def the_workspace(host: str, name: str) -> str:
    """Push the tests' workspace image to the registry with the engine's own `docker push`; return its digest."""
    reference = f"{host}/{name}:1"
    workspace_image.build(reference)
    client = docker.from_env()
    try:
        client.images.push(f"{host}/{name}", tag="1")
        digest = next(d for d in client.images.get(reference).attrs["RepoDigests"] if d.startswith(f"{host}/{name}@"))
        client.images.remove(reference, force=True)
        return str(digest).partition("@")[2]
    finally:
        client.close()


@pytest.mark.needs_registry
def test_from_a_real_registry_to_a_receipt_that_names_the_registrys_digest(tmp_path: Path, engine: Engine) -> None:
    account = Account.from_key(secrets.token_bytes(32))

    async def main(host: str, name: str, digest: str) -> None:
        async with a_bootstrap() as bootstrap:
            images = ImageSettings(registries=[host], disk_reserve_bytes=0)
            async with a_node(settings(tmp_path, bootstrap, engine="docker", images=images), account):
                await bootstrap.wish(spec(f"{host}/{name}:1"))
                await bootstrap.until_ready()
                states = [state for beat in bootstrap.heartbeats for state in beat.deployments]
                ready = states[-1]
                assert "sha256:" + ready.image_digest.hex() == digest
                assert (ready.progress, ready.reason) == (100, "")
                assert ready.bytes_done == ready.bytes_total > 0
                for before, after in itertools.pairwise(states):
                    assert after.progress >= before.progress
                assert DeploymentPhase.PULLING in {state.state for state in states}
                answer = await bootstrap.send(bootstrap.order(target="/echo"), b"hello", node=account)
                assert answer.receipt is not None
                assert "sha256:" + answer.receipt.receipt.image_digest.hex() == digest
                # a later word pins what runs already: nothing is fetched, nothing starts again
                bootstrap.heartbeats.clear()
                await bootstrap.wish(spec(f"{host}/{name}:1", image_digest=digest))
                await bootstrap.until_ready()
                assert {d.state for beat in bootstrap.heartbeats for d in beat.deployments} == {DeploymentPhase.READY}

    with a_real_registry() as registry:
        name = fresh("workspace")
        digest = the_workspace(registry.host, name)
        trio.run(main, registry.host, name, digest)


def test_credentials_come_sealed_and_open_the_registry_on_the_node(
    tmp_path: Path, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    account = Account.from_key(secrets.token_bytes(32))
    login = ("acme", f"word-{secrets.token_hex(8)}")
    confided = WorkspaceSecrets(registry=RegistryCredentials(username=login[0], password=login[1]))

    async def main(host: str, reference: str, digest: str) -> None:
        async with a_bootstrap() as bootstrap:
            images = ImageSettings(registries=[host], disk_reserve_bytes=0)
            async with a_node(settings(tmp_path, bootstrap, engine="docker", images=images), account):
                wanted = spec(reference, has_registry_credentials=True)
                ephemeral = secrets.token_bytes(32)
                box = seal(confided.encode(), account.public_key, workspace="7", revision=1, ephemeral_key=ephemeral)
                await bootstrap.wish()
                assert bootstrap.control is not None
                await send_frame(bootstrap.control, encode_message(Desired((wanted,), {"7": box})))
                await bootstrap.until_ready()
                assert "sha256:" + bootstrap.heartbeats[-1].deployments[0].image_digest.hex() == digest

    with a_registry() as registry:
        made = the_workspace_as_blobs()
        reference = registry.push(made, fresh("private"), "1")
        registry.login = login
        trio.run(main, registry.host, reference, made.digest)
        assert registry.authorizations
    out, err = capfd.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert login[1] not in out + err
    assert login[1].encode() not in kept


def the_workspace_as_blobs() -> MadeImage:
    """Return the tests' workspace image as a registry holds it; it is not on the engine afterwards."""
    name = fresh("blobs")
    workspace_image.build(f"{name}:1")
    client = docker.from_env()
    try:
        data = b"".join(client.images.get(f"{name}:1").save())
        client.images.remove(f"{name}:1", force=True)
    finally:
        client.close()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = {member.name: file.read() for member in tar if member.isreg() and (file := tar.extractfile(member))}
    (saved,) = json.loads(read["manifest.json"])
    config = read[saved["Config"]]
    layers = [gzip.compress(read[layer], mtime=0) for layer in saved["Layers"]]
    return MadeImage.of(config, layers)
