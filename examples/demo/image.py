"""The example workspace's image, built on the engine that answers: its base pulled, or packed from this machine.

Owns the images it makes: `remove` deletes exactly those. Uses the Docker SDK, whose calls block, so callers run these
functions in a thread.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import docker
from docker.errors import APIError, BuildError, DockerException, ImageNotFound

from . import packed_base

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_BASE = "python:3.12-slim"
DOCKERFILE = "examples/chat/Dockerfile"
LABEL = "ngpu.demo"
_CONTEXT = ("README.md", "docs", "examples/chat/Dockerfile", "examples/chat/ngram_chat")
_PULL_TIMEOUT_S = 60
_CALL_TIMEOUT_S = 180

Say = Callable[[str], None]


class ImageError(Exception):
    """The image could not be built; the message says why."""


@dataclass(slots=True)
class BuiltImages:
    """What was made on the engine for one demonstration.

    Attributes:
        reference: the workspace's image.
        base: what it was built on.
        made: every image to remove again.
        docker_host: the engine's address, where it is not the environment's.
    """

    reference: str
    base: str
    made: list[str] = field(default_factory=list)
    docker_host: str = ""

    def remove(self) -> None:
        """Remove the images made here, also when a container still names one; a missing one is no error."""
        with closing(_client(docker_host=self.docker_host)) as client:
            for name in reversed(self.made):
                try:
                    client.images.remove(name, force=True)
                except ImageNotFound:
                    pass
                except DockerException as error:
                    raise ImageError(f"the image {name} could not be removed: {error}") from error


def engine_answers() -> str | None:
    """Return the engine's version, or None where none answers (``DOCKER_HOST`` respected)."""
    try:
        with closing(_client(timeout_s=5)) as client:
            return str(client.version().get("Version", "unknown"))
    except (DockerException, OSError):
        return None


def build_chat_image(run_id: str, base: str | None, say: Say) -> BuiltImages:
    """Build the chat workspace's image and return what was made.

    *base* None takes `DEFAULT_BASE` where the engine has it or can pull it, and otherwise packs the running
    interpreter. A base named by the caller is used or fails: it is never replaced.

    Raises:
        ImageError: no base, or the build failed. What was made until then is removed.
    """
    images = BuiltImages(reference=f"ngpu-demo-chat:{run_id}", base=base or DEFAULT_BASE)
    try:
        with closing(_client()) as client:
            if base is None and not _has_or_pulls(client, DEFAULT_BASE, say):
                images.base = f"ngpu-demo-base:{run_id}"
                say("packing the running Python as base image")
                _import_packed(client, images, say)
            say(f"building the workspace's image on {images.base}")
            _build(client, images, _context(REPOSITORY_ROOT, _CONTEXT), DOCKERFILE, run_id)
    except (DockerException, packed_base.PackError, OSError) as error:
        images.remove()
        raise ImageError(f"the image could not be built on {images.base}: {_reason(error)}") from error
    return images


def build_example(folder: Path, reference: str, base: str, run_id: str) -> BuiltImages:
    """Build the image of an example that is a build context of its own, on a base that the engine has or can pull.

    Raises:
        ImageError: the build failed. What was made until then is removed.
    """
    images = BuiltImages(reference=reference, base=base)
    try:
        with closing(_client()) as client:
            context = _context(folder, sorted(path.name for path in folder.iterdir()))
            _build(client, images, context, "Dockerfile", run_id)
    except (DockerException, OSError) as error:
        images.remove()
        raise ImageError(f"the image of {folder.name} could not be built on {base}: {_reason(error)}") from error
    return images


def _build(client: docker.DockerClient, images: BuiltImages, context: io.BytesIO, dockerfile: str, run_id: str) -> None:
    images.made.append(images.reference)
    client.images.build(
        fileobj=context, custom_context=True, dockerfile=dockerfile, tag=images.reference,
        buildargs={"BASE": images.base}, labels={LABEL: run_id}, rm=True, forcerm=True, network_mode="none",
    )  # fmt: skip


def docker_host() -> str:
    """Return the engine's address as the environment has it, empty for the default."""
    return os.environ.get("DOCKER_HOST", "")


def _client(*, timeout_s: int = _CALL_TIMEOUT_S, docker_host: str = "") -> docker.DockerClient:
    environment = {**os.environ, **({"DOCKER_HOST": docker_host} if docker_host else {})}
    return docker.DockerClient.from_env(timeout=timeout_s, environment=environment)


def _has_or_pulls(client: docker.DockerClient, name: str, say: Say) -> bool:
    try:
        client.images.get(name)
        return True
    except ImageNotFound:
        say(f"pulling {name}")
    try:
        with closing(_client(timeout_s=_PULL_TIMEOUT_S)) as patient:
            patient.images.pull(name)
        return True
    except (DockerException, OSError) as error:
        say(f"{name} cannot be pulled here ({_reason(error)})")
        return False


def _import_packed(client: docker.DockerClient, images: BuiltImages, say: Say) -> None:
    with tempfile.TemporaryDirectory(prefix="ngpu-demo-base-") as folder:
        tar = Path(folder) / "base.tar"
        size = packed_base.pack_interpreter(tar)
        say(f"importing {size / 1e6:.0f} MB as {images.base}")
        repository, _, tag = images.base.rpartition(":")
        images.made.append(images.base)
        changes = [*packed_base.IMAGE_CHANGES, f"LABEL {LABEL}={tag}"]
        with tar.open("rb") as data:
            client.api.import_image_from_data(data, repository=repository, tag=tag, changes=changes)


def _context(folder: Path, names: Iterable[str]) -> io.BytesIO:
    """Return the build context as a tar: a few hundred kilobytes of this repository."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            tar.add(folder / name, arcname=name, filter=_plain)
    buffer.seek(0)
    return buffer


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in entry.name:
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _reason(error: Exception) -> str:
    """Return one line a person can act on."""
    if isinstance(error, BuildError):
        lines = [str(part.get("stream") or part.get("error") or "").strip() for part in error.build_log]
        return " / ".join([line for line in lines if line][-4:])
    text = error.explanation if isinstance(error, APIError) and error.explanation else str(error)
    return " ".join(str(text).split())[:300]
