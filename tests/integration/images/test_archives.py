"""Images from URLs on a real engine: through the checksum into the engine, or nowhere."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import trio

from ngpu_node.images import retrying
from ngpu_node.images.images import ARCHIVE_NAME, ImageWish
from ngpu_node.images.problems import (
    AddressNotAllowed,
    BadArchive,
    ImageMissing,
    ImageProblem,
    NoPin,
    RegistryNotAllowed,
    TooLarge,
    WrongChecksum,
)
from tests.integration.images.rig import Engine, Heard, a_node_of_images, fresh
from tests.support.fake_registry import FakeRegistry, a_registry

pytestmark = pytest.mark.needs_docker


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of files and the URL it is served at."""
    folder = tmp_path / "files"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAITS_S", (0.05,))


@pytest.fixture(scope="module")
def saved() -> tuple[bytes, str]:
    """What `docker save` writes for an image with a tag, and its id; the image itself is gone again."""
    client = docker.from_env()
    tag = f"{fresh('saved')}:1"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        entry = tarfile.TarInfo("hello")
        entry.size = 300_000
        tar.addfile(entry, io.BytesIO(bytes(300_000)))
    client.api.import_image_from_data(packed.getvalue(), repository=tag.split(":")[0], tag="1")
    image = client.images.get(tag)
    data = b"".join(image.save(named=True))
    client.images.remove(tag)
    client.close()
    return data, str(image.id)


def a_tar_wish(url: str, data: bytes) -> ImageWish:
    return ImageWish("acme/7/1", "acme/7", url=url, sha256=hashlib.sha256(data).hexdigest())


def names_in(engine: Engine) -> set[str]:
    return {str(tag) for image in engine._client.images.list(all=True) for tag in image.tags}


@pytest.mark.parametrize("packed", [False, True])
def test_a_saved_image_is_loaded_under_our_name_only_and_its_id_is_its_digest(
    registry: FakeRegistry,
    engine: Engine,
    shelf: tuple[Path, str],
    saved: tuple[bytes, str],
    packed: bool,
    tmp_path: Path,
) -> None:
    data, image_id = saved
    data = gzip.compress(data) if packed else data
    (shelf[0] / "image.tar").write_bytes(data)
    signed = f"{shelf[1]}/image.tar?signature=s3cret"
    wish, heard, before = a_tar_wish(signed, data), Heard(), names_in(engine)

    async def main() -> None:
        async with a_node_of_images(registry, tmp_path / "images.json", private_addresses=True) as images:
            image = await images.ensure(wish, heard)
            assert (image.id, "sha256:" + image.digest.hex()) == (image_id, image_id)
            (shelf[0] / "image.tar").unlink()
            assert await images.ensure(wish) == image

    trio.run(main)
    heard.check()
    assert heard.all[-1].bytes_total == len(data)
    assert names_in(engine) - before == {f"{ARCHIVE_NAME}:{wish.sha256}"}
    kept = (tmp_path / "images.json").read_text()
    assert f"{shelf[1]}/image.tar" in kept
    assert "s3cret" not in kept


def fails(
    registry: FakeRegistry, engine: Engine, wish: ImageWish, problem: type[ImageProblem], **chosen: object
) -> ImageProblem:
    before, names = engine.ids(), names_in(engine)
    caught: list[ImageProblem] = []

    async def main() -> None:
        async with a_node_of_images(registry, **{"private_addresses": True, **chosen}) as images:  # type: ignore[arg-type]
            with pytest.raises(problem) as raised:
                await images.ensure(wish)
            caught.append(raised.value)
            assert images.listed() == []

    trio.run(main)
    assert (engine.ids(), names_in(engine)) == (before, names)
    return caught[0]


def test_another_file_than_was_meant_is_never_loaded(
    registry: FakeRegistry, engine: Engine, shelf: tuple[Path, str], saved: tuple[bytes, str]
) -> None:
    data, _ = saved
    (shelf[0] / "image.tar").write_bytes(data)
    error = fails(registry, engine, a_tar_wish(f"{shelf[1]}/image.tar", data + b"x"), WrongChecksum)
    assert hashlib.sha256(data).hexdigest() in str(error)


@pytest.mark.parametrize("length", [0, 511, 5000, -1])
def test_a_file_that_is_cut_or_no_tar_is_refused(
    registry: FakeRegistry, engine: Engine, shelf: tuple[Path, str], saved: tuple[bytes, str], length: int
) -> None:
    data = saved[0][:length] if length >= 0 else b"<html>not found</html>" * 100
    (shelf[0] / "image.tar").write_bytes(data)
    fails(registry, engine, a_tar_wish(f"{shelf[1]}/image.tar", data), BadArchive)


def test_a_tar_that_the_engine_cannot_use_is_refused_with_its_words(
    registry: FakeRegistry, engine: Engine, shelf: tuple[Path, str]
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        manifest = json.dumps([{"Config": "config.json", "RepoTags": None, "Layers": ["layer.tar"]}]).encode()
        for name, content in (("config.json", b"{}"), ("layer.tar", b"nothing"), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (shelf[0] / "image.tar").write_bytes(packed.getvalue())
    error = fails(registry, engine, a_tar_wish(f"{shelf[1]}/image.tar", packed.getvalue()), BadArchive)
    assert "engine" in str(error)


def test_what_the_owner_does_not_allow_is_not_fetched(
    registry: FakeRegistry, engine: Engine, shelf: tuple[Path, str], saved: tuple[bytes, str]
) -> None:
    data, _ = saved
    (shelf[0] / "image.tar").write_bytes(data)
    wish = a_tar_wish(f"{shelf[1]}/image.tar", data)
    fails(registry, engine, wish, AddressNotAllowed, private_addresses=False)
    fails(registry, engine, wish, RegistryNotAllowed, tar_images=False)
    fails(registry, engine, wish, TooLarge, max_image_bytes=len(data) - 1)
    fails(registry, engine, ImageWish("a/1/1", "a/1", url=wish.url), NoPin)
    fails(registry, engine, a_tar_wish(f"{shelf[1]}/other.tar", data), ImageMissing)
