"""`Images` over a real engine and a registry that can go wrong, and the engine's own view of what is there."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker
import trio
from docker.errors import APIError, ImageNotFound

from ngpu_node.config import ImageSettings
from ngpu_node.images.images import Images, ImageWish
from ngpu_node.images.progress import Progress
from ngpu_protocol.image_references import parse_image_reference
from ngpu_protocol.workspace_secrets import RegistryCredentials
from tests.support.fake_registry import FakeRegistry

_numbers = itertools.count(1)


@asynccontextmanager
async def a_node_of_images(
    registry: FakeRegistry,
    path: Path | None = None,
    *,
    free_bytes: Callable[[], int | None] | None = None,
    **chosen: Any,
) -> AsyncIterator[Images]:
    """Yield running `Images`; what it fetched stays on the engine, as after a daemon's end."""
    values: dict[str, Any] = {"registries": [registry.host], "disk_reserve_bytes": 0, "stall_timeout_s": 10.0}
    images = await Images.open(ImageSettings(**{**values, **chosen}), path)
    if free_bytes is not None:
        images.disk.free_bytes = free_bytes
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(images.run)
            with trio.fail_after(90):
                yield images
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await images.aclose()


def a_wish(
    reference: str, *, workspace: str = "acme/7", digest: bytes | None = None, login: tuple[str, str] | None = None
) -> ImageWish:
    """Return a wish of a holder of its own."""
    return ImageWish(
        holder=f"{workspace}/{next(_numbers)}",
        workspace=workspace,
        reference=parse_image_reference(reference),
        digest=digest,
        credentials=RegistryCredentials(username=login[0], password=login[1]) if login else None,
    )


class Heard:
    """What was told of progress."""

    def __init__(self) -> None:
        self.all: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.all.append(progress)

    def reasons(self) -> set[str]:
        return {progress.reason for progress in self.all if progress.reason}

    def check(self) -> None:
        """See that it never went back, and came to 100 exactly at the end."""
        for before, after in itertools.pairwise(self.all):
            assert after.percent >= before.percent
            assert after.bytes_done >= before.bytes_done
        assert [progress.percent for progress in self.all].count(100) == 1
        assert self.all[-1].percent == 100


class Engine:
    """The engine as anybody sees it."""

    def __init__(self) -> None:
        self._client = docker.from_env()

    def has(self, reference: str) -> bool:
        try:
            self._client.images.get(reference)
        except ImageNotFound:
            return False
        return True

    def ids(self) -> set[str]:
        return {str(image.id) for image in self._client.images.list(all=True)}

    def image_id(self, reference: str) -> str:
        return str(self._client.images.get(reference).id)

    def pull(self, reference: str) -> None:
        self._client.images.pull(reference)

    def remove(self, *references: str) -> None:
        for reference in references:
            try:
                self._client.images.remove(reference, force=True)
            except ImageNotFound:
                continue

    def container_of(self, image: str) -> Any:
        return self._client.containers.create(image, command=["/nothing"])

    def clear(self, before: set[str]) -> None:
        """Remove every image that was not there *before*."""
        for image_id in self.ids() - before:
            try:
                self._client.images.remove(image_id, force=True)
            except (ImageNotFound, APIError):
                continue

    def close(self) -> None:
        self._client.close()


def fresh(word: str) -> str:
    """Return a repository name no other test has."""
    return f"{word}-{secrets.token_hex(4)}"
