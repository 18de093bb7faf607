"""Engine and daemon killed in the middle of a pull, and a disk that is really full: where it ends, and what is left."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_node.errors import EngineUnavailable
from ngpu_node.images.problems import OutOfSpace
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account
from tests.integration.images.rig import Engine, a_node_of_images, a_wish, fresh
from tests.integration.node.own_engine import OwnEngine, own_engine
from tests.integration.node.places import spec
from tests.integration.node.rig import eventually
from tests.integration.node.scripted_bootstrap import a_bootstrap
from tests.integration.node.test_process import a_process, prepared
from tests.support.fake_registry import FakeRegistry, a_registry, make_image

pytestmark = pytest.mark.needs_docker

MB = 1000 * 1000


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with a_registry() as running:
        yield running


@pytest.fixture
def engine() -> Iterator[Engine]:
    running = Engine()
    before = running.ids()
    yield running
    running.clear(before)
    running.close()


@pytest.fixture
def killed() -> Iterator[OwnEngine]:
    """The engine of the tests, running again afterwards whatever happened."""
    ours = own_engine()
    yield ours
    ours.ensure()


@contextmanager
def a_small_disk(ours: OwnEngine, megabytes: int) -> Iterator[None]:
    """Run the engine on a disk of its own of that size."""
    place = ours.directory / "data"
    ours.kill()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place], check=True, timeout=20)
    try:
        ours.start()
        yield
    finally:
        ours.kill()
        subprocess.run(["umount", "-l", place], check=True, timeout=20)
        ours.start()


def test_an_engine_killed_in_the_middle_of_a_pull_is_told_and_the_next_try_has_the_image(
    registry: FakeRegistry, killed: OwnEngine, tmp_path: Path
) -> None:
    made = make_image([2 * MB], secrets.token_hex(4))
    reference = registry.push(made, fresh("app"), "1")
    registry.bytes_per_s = MB

    async def main() -> None:
        async with a_node_of_images(registry, tmp_path / "images.json") as images:
            async with trio.open_nursery() as nursery:

                async def kill() -> None:
                    await trio.to_thread.run_sync(registry.wait_for_downloads, 1)
                    await trio.to_thread.run_sync(killed.kill)

                nursery.start_soon(kill)
                with pytest.raises(EngineUnavailable):
                    await images.ensure(a_wish(reference))
            await trio.to_thread.run_sync(killed.start)
            registry.bytes_per_s = None
            wish = a_wish(reference)
            assert (await images.ensure(wish)).id == made.config
            (entry,) = images.listed()
            assert (entry["id"], entry["borrowed"]) == (made.config, False)

    trio.run(main)
    running = Engine()
    running.remove(made.config)
    running.close()


def test_a_disk_that_is_really_full_ends_the_pull_with_its_cause_and_leaves_the_disk_as_it_was(
    registry: FakeRegistry, killed: OwnEngine
) -> None:
    made = make_image([30 * MB], "full", base=[bytes(60 * MB)])
    small = make_image([100_000], "small")
    references = [registry.push(image, fresh("disk"), "1") for image in (made, small)]

    async def main() -> None:
        async with a_node_of_images(registry) as images:
            free = images.disk.free_bytes()
            assert free is not None
            with pytest.raises(OutOfSpace, match=r"no space left"):
                await images.ensure(a_wish(references[0]))
            assert images.listed() == []
            await eventually(lambda: (images.disk.free_bytes() or 0) > free - MB)
            assert (await images.ensure(a_wish(references[1]))).id == small.config

    # The estimate says that about 91 MB will do: 30 of them come compressed, 60 are nothing until they are unpacked.
    with a_small_disk(killed, 98):
        trio.run(main)


def test_a_daemon_killed_in_the_middle_of_a_pull_knows_afterwards_that_the_image_is_its_own(
    registry: FakeRegistry, engine: Engine, tmp_path: Path
) -> None:
    made = make_image([2 * MB], secrets.token_hex(4))
    reference = registry.push(made, fresh("app"), "1")
    registry.bytes_per_s = MB
    account = Account.from_key(secrets.token_bytes(32))

    async def main() -> None:
        async with a_bootstrap() as bootstrap:
            config = prepared(tmp_path, bootstrap.multiaddr)
            directory = DataDirectory(tmp_path / "data")
            directory.keystore.unlink()
            write_keystore(directory.keystore, account, "secret", Kdf.LIGHT)
            limits = f'\n[images]\nregistries = ["{registry.host}"]\ndisk_reserve_bytes = 0\n'
            config.write_text(config.read_text().replace('engine = "none"', 'engine = "docker"') + limits)
            listing = directory.path / "images.json"
            async with a_process(config) as node:
                await bootstrap.wish(spec(reference))
                await trio.to_thread.run_sync(registry.wait_for_downloads, 1)
                (entry,) = json.loads(listing.read_text())["images"]
                assert entry["id"] == ""
                states = [state for beat in bootstrap.heartbeats for state in beat.deployments]
                node.kill()
                await node.process.wait()
            # nobody wants it any more: the engine stops, and nothing is left
            await trio.to_thread.run_sync(registry.wait_for_downloads, 0)
            assert not engine.has(made.config)
            assert all(state.progress < 100 for state in states)
            registry.bytes_per_s = None
            bootstrap.heartbeats.clear()
            async with a_process(config):
                # it has no program that could start; that its image came is what counts here
                await eventually(lambda: bootstrap.heartbeats and _has_come(bootstrap.heartbeats[-1]))
            (entry,) = json.loads(listing.read_text())["images"]
            assert (entry["id"], entry["borrowed"]) == (made.config, False)

    trio.run(main)


def _has_come(beat: object) -> bool:
    deployments = getattr(beat, "deployments", ())
    return any(state.progress == 100 and state.state != DeploymentPhase.PULLING for state in deployments)
