"""The Docker engine behind a small asynchronous face.

The SDK blocks, so each call runs in a thread (0.16 ms more), of which there are `THREADS`. Calls that only look are
abandoned when cancelled; those that change something are awaited, so that nobody has to guess whether a container
exists.

Images are asked for and fetched by `images.engine_images`, programs inside containers run by `programs`: neither needs
threads, so nothing that hangs or lasts can use these up.

Foreign errors end here: what the caller sees is `EngineUnavailable`, `EngineFailed` and `GpusNotGiven`, each
with words for the owner.
"""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import tarfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import docker
import requests
import structlog
import trio
import urllib3
from docker.errors import APIError, DockerException, NotFound
from docker.models.containers import Container
from docker.types import Mount

from ngpu_node.engine.confinement import LABEL_NODE, WORKSPACE_UID, WORKSPACE_USER, ContainerPlan, options
from ngpu_node.engine.programs import Programs
from ngpu_node.engine.transport import engine_client
from ngpu_node.errors import EngineFailed, EngineUnavailable, GpusNotGiven

log = structlog.get_logger(__name__)

THREADS = 32
CALL_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10
LOG_TAIL_LINES = 10
LOG_PIECE_BYTES = 64 * 1024
EVENTS_HELD = 1000

#: What the SDK lets through when the engine ends in the middle of a log or of a program's output.
_BROKEN_OFF = (urllib3.exceptions.HTTPError, struct.error)

#: What an end is called: Podman takes its own words in a filter, and says Docker's.
_ENDS = ("die", "died", "destroy", "remove")
#: What comes of reading an answer that is not of the form the engine's API describes.
_NOT_AS_DESCRIBED = (LookupError, TypeError, ValueError, AttributeError)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ContainerState:
    """One look at a container.

    Attributes:
        address: its own IP address on the node's network, None when it has none.
        published: the loopback ports of its ports, where they are published.
        pid: its first process, as the engine's machine counts; 0 where it has none.
    """

    id: str
    name: str
    labels: Mapping[str, str]
    image: str
    running: bool
    exit_code: int
    oom_killed: bool
    address: str | None
    published: Mapping[int, int]
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Listed:
    """A container in a list: what one call tells of all of them."""

    id: str
    name: str
    labels: Mapping[str, str]
    image: str
    running: bool


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says about itself.

    Attributes:
        runtimes: names of the runtimes it can start containers with.
        security: its security options, such as `rootless`, `userns`, `seccomp`.
        cpus, memory_bytes: of the machine it runs on.
    """

    version: str = ""
    product: str = "Docker"
    runtimes: tuple[str, ...] = ()
    security: tuple[str, ...] = ()
    cpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """Something that happened to a container of ours; *action* is the engine's word: `die`, `oom`, `destroy`."""

    id: str
    action: str


@dataclass(frozen=True, slots=True)
class Network:
    """The node's own network; `routable` when containers on it can be reached from here by their addresses."""

    name: str
    routable: bool


class DockerEngine:
    """One engine; made by `connect`, closed by `aclose`."""

    def __init__(self, client: docker.DockerClient, node: str, programs: Programs | None = None) -> None:
        self._client = client
        self._programs = programs
        self._node = node
        self._threads = trio.CapacityLimiter(THREADS)

    @classmethod
    async def connect(cls, node: str) -> DockerEngine:
        """Return the engine DOCKER_HOST (or the default socket) leads to; *node* marks what is ours on it.

        Raises:
            EngineUnavailable: nobody answers there.
        """

        def open_client() -> docker.DockerClient:
            client = docker.from_env(timeout=CALL_TIMEOUT_S, max_pool_size=THREADS)
            try:
                client.ping()
            except BaseException:
                client.close()
                raise
            return client

        try:
            client = await trio.to_thread.run_sync(open_client, abandon_on_cancel=True)
        except (DockerException, requests.RequestException, OSError) as error:
            raise EngineUnavailable(f"no container engine answers: {_first_line(error)}") from error
        return cls(client, node, Programs(engine_client()))

    async def aclose(self) -> None:
        """Close the connections to the engine."""
        if self._programs is not None:
            await self._programs.aclose()
        await trio.to_thread.run_sync(self._client.close)

    async def version(self) -> str:
        """Return the engine's own version."""
        answer: dict[str, Any] = await self._look(self._client.version)
        return str(answer.get("Version", "unknown"))

    async def facts(self) -> EngineFacts:
        """Return what the engine says about itself; also shows that it answers."""

        def ask() -> EngineFacts:
            info, version = self._client.info(), self._client.version()
            names = [str(one.get("Name", "")) for one in version.get("Components") or []]
            options = [option for text in info.get("SecurityOptions") or [] for option in text.split(",")]
            return EngineFacts(
                version=str(version.get("Version", "unknown")),
                product="Podman" if any("podman" in name.lower() for name in names) else "Docker",
                runtimes=tuple(info.get("Runtimes") or {}),
                security=tuple(option.removeprefix("name=") for option in options if option.startswith("name=")),
                cpus=int(info.get("NCPU") or 0),
                memory_bytes=int(info.get("MemTotal") or 0),
            )

        return await self._look(ask)

    # -- what happens there --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def events(self) -> AsyncIterator[trio.MemoryReceiveChannel[ContainerEvent]]:
        """Yield a channel of what happens to our containers from now on; it ends when the engine does.

        Raises:
            EngineUnavailable: nobody answers.
        """
        filters = {"type": "container", "label": f"{LABEL_NODE}={self._node}", "event": list(_ENDS)}
        token = trio.lowlevel.current_trio_token()
        send, receive = trio.open_memory_channel[ContainerEvent](EVENTS_HELD)

        def opened() -> Any:
            return self._client.api.events(filters=filters, decode=True)

        def tell(event: ContainerEvent) -> None:
            # A reader that is so far behind starts afresh: it looks at everything then.
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                send.close()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

        def follow(stream: Any) -> None:
            try:
                for event in stream:
                    token.run_sync_soon(tell, ContainerEvent(str(event.get("id")), str(event.get("Action"))))
            except (*_BROKEN_OFF, DockerException, requests.RequestException, OSError, ValueError, AttributeError):
                return  # closed under it, by the engine's end or by ours
            finally:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(send.close)

        stream = await self._look(opened)
        thread = threading.Thread(target=follow, args=(stream,), name="engine events", daemon=True)
        thread.start()
        try:
            yield receive
        finally:
            with contextlib.suppress(DockerException, OSError, ValueError, AttributeError):
                stream.close()
            receive.close()

    # -- networks ------------------------------------------------------------------------------------------------------

    async def ensure_network(
        self, name: str, bridge: str, *, internal: bool = True, masquerade: bool = True
    ) -> Network:
        """Return a network of this node, made if it is missing, without traffic between its containers.

        Args:
            bridge: name of the interface on the host, at most 15 characters.
            internal: without a way out.
            masquerade: what goes out bears the engine's address; without, the outside cannot answer.
        """

        def ensure() -> Network:
            for network in self._client.networks.list(names=[name]):
                if network.name == name and network.attrs.get("Labels", {}).get(LABEL_NODE) == self._node:
                    network.reload()
                    return Network(name, _is_routable(network.attrs))
            network = self._client.networks.create(
                name,
                driver="bridge",
                internal=internal,
                labels={LABEL_NODE: self._node},
                options={
                    "com.docker.network.bridge.name": bridge,
                    "com.docker.network.bridge.enable_icc": "false",
                    **({} if masquerade else {"com.docker.network.bridge.enable_ip_masquerade": "false"}),
                },
            )
            network.reload()
            return Network(name, _is_routable(network.attrs))

        return await self._change(ensure)

    async def remove_network(self, name: str) -> None:
        """Remove a network of this node if it is there and nothing is on it."""

        def remove() -> None:
            for network in self._client.networks.list(names=[name]):
                if network.name == name and network.attrs.get("Labels", {}).get(LABEL_NODE) == self._node:
                    network.remove()

        await self._change(remove)

    # -- volumes -------------------------------------------------------------------------------------------------------

    async def volumes(self) -> dict[str, Mapping[str, str]]:
        """Return the labels of every volume this node made, by name."""

        def ours() -> dict[str, Mapping[str, str]]:
            answer = self._client.api.volumes(filters={"label": f"{LABEL_NODE}={self._node}"})
            return {str(one["Name"]): one.get("Labels") or {} for one in answer.get("Volumes") or []}

        return await self._look(ours)

    async def volume_places(self) -> dict[str, str]:
        """Return where each volume this node made lies on the engine's machine, by name."""

        def ours() -> dict[str, str]:
            answer = self._client.api.volumes(filters={"label": f"{LABEL_NODE}={self._node}"})
            return {str(one["Name"]): str(one["Mountpoint"]) for one in answer.get("Volumes") or []}

        return await self._look(ours)

    async def volume_sizes(self) -> dict[str, int]:
        """Return what each volume this node made takes, as the engine counts; costs it seconds where there is much."""

        def ours() -> dict[str, int]:
            found = {}
            for one in self._client.api.df().get("Volumes") or []:
                if (one.get("Labels") or {}).get(LABEL_NODE) == self._node:
                    found[str(one["Name"])] = max(0, int((one.get("UsageData") or {}).get("Size") or 0))
            return found

        return await self._look(ours)

    async def ensure_volume(self, name: str, labels: Mapping[str, str], *, image: str) -> None:
        """Have a volume of this node that the workspace's user can write to.

        A new volume belongs to root, and nothing in a confined container may change that. So a container that is
        never started has it mounted, and the engine unpacks an empty folder of the right owner over it.

        Args:
            image: any image that is on the engine; nothing of it runs.

        Raises:
            EngineFailed: a volume of that name is somebody else's.
        """

        def ensure() -> None:
            try:
                found = self._client.api.inspect_volume(name)
            except NotFound:
                pass
            else:
                if (found.get("Labels") or {}).get(LABEL_NODE) != self._node:
                    raise EngineFailed(f"the volume {name} is there and not this node's: rename or remove it")
                return
            helper = None
            self._client.volumes.create(name, labels={LABEL_NODE: self._node, **labels})
            try:
                helper = self._client.containers.create(
                    image,
                    command=["none"],
                    labels={LABEL_NODE: self._node},
                    mounts=[Mount("/ngpu-volume/folder", name, type="volume", no_copy=True)],
                    network_mode="none",
                )
                if not helper.put_archive("/ngpu-volume", _owned_folder("folder")):
                    raise EngineFailed(f"the engine would not give the volume {name} its owner")
            except BaseException:
                # or it would be found next time, and be of no use
                if helper is not None:
                    with contextlib.suppress(NotFound):
                        helper.remove(force=True)
                self._client.api.remove_volume(name)
                raise
            helper.remove(force=True)

        await self._change(ensure)

    async def remove_volume(self, name: str) -> None:
        """Remove a volume of this node with all that is in it. One that is gone is fine."""

        def remove() -> None:
            try:
                self._client.api.remove_volume(name)
            except NotFound:
                return

        await self._change(remove)

    # -- containers ----------------------------------------------------------------------------------------------------

    async def listed(self) -> list[Listed]:
        """Return every container this node made, running or not, by one call."""

        def ours() -> list[Listed]:
            found = self._client.api.containers(all=True, filters={"label": f"{LABEL_NODE}={self._node}"})
            return [
                Listed(
                    id=str(one["Id"]),
                    name=str((one.get("Names") or ["?"])[0]).removeprefix("/"),
                    labels=one.get("Labels") or {},
                    image=str(one.get("ImageID", "")),
                    running=one.get("State") == "running",
                )
                for one in found
            ]

        return await self._look(ours)

    async def containers(self) -> list[ContainerState]:
        """Return the state of every container this node made, by one call for each."""

        def ours() -> list[ContainerState]:
            found = self._client.containers.list(
                all=True, filters={"label": f"{LABEL_NODE}={self._node}"}, ignore_removed=True
            )
            return [_state(container) for container in found]

        return await self._look(ours)

    async def start(self, plan: ContainerPlan) -> ContainerState:
        """Make and start a container; nothing is left behind when it does not start.

        Raises:
            GpusNotGiven: this engine cannot run it at all.
        """

        def begin(chosen: dict[str, Any]) -> ContainerState:
            container = self._client.containers.create(**chosen)
            try:
                container.start()
                container.reload()
            except BaseException:
                # a failed start leaves the container behind in the state `created`
                container.remove(force=True)
                raise
            return _state(container)

        def begin_within_the_engines_limits() -> ContainerState:
            chosen = options(plan)
            try:
                return begin(chosen)
            except APIError as error:
                # An engine that is itself in a container may not set them at all; then its own hold, which are lower.
                if "setting rlimit" not in str(error):
                    raise
            del chosen["ulimits"]
            return begin(chosen)

        try:
            return await self._change(begin_within_the_engines_limits)
        except EngineFailed as error:
            if "could not select device driver" in str(error):
                raise GpusNotGiven(
                    "the container engine cannot hand out NVIDIA GPUs: install nvidia-container-toolkit, run "
                    "`nvidia-ctk runtime configure --runtime=docker`, and restart the engine"
                ) from error
            raise

    async def look_at(self, container_id: str) -> ContainerState | None:
        """Return how a container stands; None when it is gone."""

        def inspect() -> ContainerState | None:
            try:
                return _state(self._client.containers.get(container_id))
            except NotFound:
                return None

        return await self._look(inspect)

    async def execute(self, container_id: str, command: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        """Run a program inside a container; see `programs.Programs.run`."""
        assert self._programs is not None
        return await self._programs.run(container_id, command, user=WORKSPACE_USER, timeout_s=timeout_s)

    async def log_tail(self, container_id: str, lines: int, max_bytes: int) -> bytes:
        """Return the last *lines* of a container's log, of these the last *max_bytes*; empty when it is gone."""

        def read() -> bytes:
            kept = b""
            try:
                stream = self._client.api.logs(container_id, tail=lines, stream=True, follow=False)
                for piece in stream:
                    kept = bytes(kept + piece)[-max_bytes:]
            except NotFound:
                return b""
            return kept

        return await self._look(read)

    @asynccontextmanager
    async def log_stream(self, container_id: str, lines: int) -> AsyncIterator[trio.MemoryReceiveChannel[bytes]]:
        """Yield a channel of a container's log, from its last *lines* on; it ends when the container does.

        A reader that is slow holds the engine back, and nothing is kept for it here.

        Raises:
            EngineFailed: there is no such container.
        """
        token = trio.lowlevel.current_trio_token()
        send, receive = trio.open_memory_channel[bytes](0)

        def opened() -> Any:
            return self._client.api.logs(container_id, tail=lines, stream=True, follow=True)

        def follow(stream: Any) -> None:
            try:
                for piece in stream:
                    for start in range(0, len(piece), LOG_PIECE_BYTES):
                        trio.from_thread.run(send.send, piece[start : start + LOG_PIECE_BYTES], trio_token=token)
            except (
                trio.BrokenResourceError,
                trio.ClosedResourceError,
                trio.Cancelled,
                trio.RunFinishedError,
                DockerException,
                requests.RequestException,
                *_BROKEN_OFF,
                OSError,
                ValueError,
                AttributeError,
            ):
                return  # the reader left, or the engine did
            finally:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(send.close)

        stream = await self._look(opened)
        thread = threading.Thread(target=follow, args=(stream,), name="container log", daemon=True)
        thread.start()
        try:
            yield receive
        finally:
            receive.close()
            with contextlib.suppress(DockerException, OSError, ValueError, AttributeError):
                stream.close()

    async def last_words(self, container_id: str) -> str:
        """Return the end of a container's log, for a reason a person can act on."""

        def read() -> str:
            try:
                raw: bytes = self._client.containers.get(container_id).logs(tail=LOG_TAIL_LINES)
            except NotFound:
                return ""
            return raw.decode(errors="replace").strip()[-600:]

        return await self._look(read)

    async def remove(self, container_id: str) -> None:
        """Stop a container, by force if it does not listen, and remove it. One that is gone is fine."""

        def end() -> None:
            try:
                container = self._client.containers.get(container_id)
                container.stop(timeout=STOP_TIMEOUT_S)
                container.remove(force=True, v=True)
            except NotFound:
                return
            except APIError as error:
                if error.status_code != 409:  # its removal is under way already
                    raise

        await self._change(end)

    # -- threads -------------------------------------------------------------------------------------------------------

    async def _look(self, call: Callable[[], T]) -> T:
        return await self._in_thread(call, abandon=True)

    async def _change(self, call: Callable[[], T]) -> T:
        return await self._in_thread(call, abandon=False)

    async def _in_thread(self, call: Callable[[], T], *, abandon: bool) -> T:
        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon, limiter=self._threads)
        except APIError as error:
            raise EngineFailed(f"the container engine says: {_first_line(error.explanation or error)}") from error
        except (*_BROKEN_OFF, DockerException, requests.RequestException, OSError) as error:
            raise EngineUnavailable(f"the container engine does not answer: {_first_line(error)}") from error
        except _NOT_AS_DESCRIBED as error:
            # Another engine, or a version of one, that answers in its own way; or a fault of ours, said loudly.
            log.exception("engine_answer_not_understood")
            raise EngineFailed(
                f"the container engine's answer was not understood ({type(error).__name__}: {_first_line(error)})"
            ) from error


def _owned_folder(name: str) -> bytes:
    """Return a tar file with one empty folder, which belongs to the workspaces' user."""
    folder = tarfile.TarInfo(name)
    folder.type, folder.mode = tarfile.DIRTYPE, 0o700
    folder.uid = folder.gid = WORKSPACE_UID
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(folder)
    return archive.getvalue()


def _state(container: Container) -> ContainerState:
    attrs = container.attrs
    state, settings = attrs["State"], attrs["NetworkSettings"]
    addresses = [n.get("IPAddress") for n in (settings.get("Networks") or {}).values() if n.get("IPAddress")]
    published = {
        int(port.partition("/")[0]): int(bindings[0]["HostPort"])
        for port, bindings in (settings.get("Ports") or {}).items()
        if bindings and port.endswith("/tcp")
    }
    return ContainerState(
        id=str(container.id),
        name=str(container.name),
        labels=container.labels,
        image=str(attrs["Image"]),
        running=bool(state["Running"]),
        exit_code=int(state["ExitCode"]),
        oom_killed=bool(state["OOMKilled"]),
        address=addresses[0] if addresses else None,
        published=published,
        pid=int(state.get("Pid") or 0),
    )


def _is_routable(attrs: Mapping[str, Any]) -> bool:
    """Tell whether the network's bridge is on this machine: its gateway's address can be bound here.

    It cannot where the engine runs elsewhere, in a virtual machine or a network namespace of its own.
    """
    for config in (attrs.get("IPAM") or {}).get("Config") or []:
        gateway = config.get("Gateway")
        if not gateway:
            continue
        gateway = gateway.partition("/")[0]
        family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as test:
                test.bind((gateway, 0))
            return True
        except OSError:
            continue
    return False


def _first_line(error: object) -> str:
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]
