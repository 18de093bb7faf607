"""Challenges by image, the whole way: `examples/challenge` from a real registry, on a real engine, NumPy inside.

The engine gives containers the GPU of the fake driver (`tests/integration/node/own_engine`); everything else is what an
operator has: two daemons, a registry, the example's own Dockerfile on a base with NumPy.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest
import trio

from examples.demo import packed_base
from ngpu_bootstrap.admin_socket import AdminSocketError, ask_daemon
from ngpu_protocol.http1 import Exchange, serve_tcp
from tests.integration.node import workspace_image
from tests.integration.node.own_engine import own_engine
from tests.integration.whole_path.rig import Daemon, Network, add_workspace, free_port, prepare
from tests.support.fake_nvml import FakeNvml
from tests.support.real_registry import a_real_registry

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_registry, pytest.mark.needs_gcc, pytest.mark.timeout_s(300)]

ROOT = Path(__file__).parents[3]
MEMORY_BYTES = 24 << 20
SETTINGS = """
[challenges]
workspaces = ["{workspace}"]
automatic = false
depth = 512
steps = 512
idle_wait_s = 60

[[challenges.speeds]]
model = "Test Card"
tflops = 0.002
gbytes_per_s = 1.0
"""
# As `examples/challenge/workspace.toml` has it, within what a test's machine has.
SPEC = {
    "name": "challenge",
    "service": None,
    "ports": [8000],
    "concurrency": 8,
    "request_timeout_s": 60,
    "readiness_path": "/health",
    "memory_bytes": 512 << 20,
    "gpu_count": 1,
    "apis": [],
}
WORK = {"name": "work", "ports": [8080], "gpu_count": 1, "memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    own_engine()
    client = docker.from_env()
    before = {image.id for image in client.images.list(all=True)}
    yield client
    for image in client.images.list(all=True):
        if image.id not in before:
            with contextlib.suppress(docker.errors.APIError):
                client.images.remove(image.id, force=True)
    client.close()


@pytest.fixture(scope="module")
def registry(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A registry that has the example's image and one for other work: the references, and the example's digest there.

    The engine has neither any more.
    """
    tag = secrets.token_hex(4)
    base = f"ngpu-test-challenge-base:{tag}"
    tar = tmp_path_factory.mktemp("base") / "base.tar"
    packed_base.pack_interpreter(tar, ["numpy"])
    with tar.open("rb") as data:
        engine.api.import_image_from_data(
            data, repository=base.partition(":")[0], tag=tag, changes=packed_base.IMAGE_CHANGES
        )
    tar.unlink()
    with a_real_registry() as served:
        name = f"{served.host}/challenge-{tag}"
        engine.images.build(
            path=str(ROOT / "examples" / "challenge"), tag=f"{name}:1", buildargs={"BASE": base}, network_mode="none"
        )
        engine.images.push(name, tag="1")
        digests = engine.images.get(f"{name}:1").attrs["RepoDigests"]
        digest = next(one for one in digests if one.startswith(f"{name}@")).partition("@")[2]
        work = f"{served.host}/work-{tag}"
        workspace_image.build(f"{work}:1")
        engine.images.push(work, tag="1")
        for reference in (f"{name}:1", f"{work}:1", base):
            engine.images.remove(reference, force=True)
        yield f"{name}:1", f"{work}:1", digest


class Here:
    """A bootstrap and one node with one GPU and the engine."""

    def __init__(self, net: Network, machine: FakeNvml, engine: Any) -> None:
        self.net, self.machine, self.engine = net, machine, engine

    @property
    def node(self) -> str:
        return str(self.net.nodes[0].where["node"])

    async def admin(self, method: str, target: str, document: Any = None) -> Any:
        socket = self.net.bootstrap.folder / "data" / "admin.sock"
        return await trio.to_thread.run_sync(ask_daemon, socket, method, target, document, abandon_on_cancel=True)

    async def containers(self, workspace: str) -> list[Any]:
        """Return the containers of a workspace, running or not."""
        listed = await trio.to_thread.run_sync(partial(self.engine.containers.list, all=True))
        return [container for container in listed if f"-{workspace}-" in container.name]

    async def begin(self) -> str:
        (run,) = (await self.admin("POST", "/api/v1/challenges", {"nodes": [self.node]}))["runs"]
        return str(run["id"])

    async def run(self, name: str, *phases: str) -> dict[str, Any]:
        """Return the run once it is in one of *phases*, or over."""
        while True:
            run: dict[str, Any] = await self.admin("GET", f"/api/v1/challenges/{name}")
            if run["phase"] in (*phases, "done"):
                return run
            await trio.sleep(0.02)

    async def detail(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.admin("GET", f"/api/v1/nodes/{self.node}")
        return found

    async def until_ready(self, workspace: str) -> None:
        while True:
            view = await self.admin("GET", f"/api/v1/workspaces/{workspace}")
            if [one["state"] for one in view["deployments"]] == ["ready"]:
                return
            await trio.sleep(0.05)


@asynccontextmanager
async def running(tmp_path: Path, image: str, engine: Any, within_s: float = 200) -> AsyncIterator[Here]:
    port = free_port()
    folder, at = tmp_path / "bootstrap", tmp_path / "node"
    lines = [f'listen = ["/ip4/127.0.0.1/tcp/{port}"]', f'http_listen = "127.0.0.1:{free_port()}"', "drain_s = 1"]
    peer_id = prepare(folder, lines)
    bootstrap = Daemon("ngpu_bootstrap", folder, "bootstrap.json")
    workspace, token = await add_workspace(bootstrap, {**SPEC, "image": image})
    config = folder / "config.toml"
    config.write_text(config.read_text() + SETTINGS.format(workspace=workspace))
    multiaddr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"
    node_lines = [
        'listen = ["/ip4/127.0.0.1/tcp/0"]',
        'model_listen = "127.0.0.1:0"',
        'engine = "docker"',
        "drain_s = 1",
        "[[bootstraps]]",
        f"multiaddrs = [{json.dumps(multiaddr)}]",
        "[images]",
        "disk_reserve_bytes = 0",
        f"registries = [{json.dumps(image.partition('/')[0])}]",
    ]
    prepare(at, node_lines)
    machine = FakeNvml(at / "nvml", gpus=0)
    machine.add_gpu(f"GPU-{1:08x}-0000-0000-0000-000000000000", name="Test Card", memory_total=MEMORY_BYTES)
    node = Daemon("ngpu_node.cli", at, "node.json", environment=machine.environment())
    net = Network(bootstrap, [node], 0, workspace=workspace, token=token)
    try:
        with trio.fail_after(within_s):
            await bootstrap.start()
            await node.start()
            await net.connect_client()
            here = Here(net, machine, engine)
            while True:
                nodes = (await here.admin("GET", "/api/v1/nodes"))["nodes"]
                if nodes and nodes[0]["gpus"]:
                    break
                await trio.sleep(0.05)
            yield here
    finally:
        with trio.CancelScope(shield=True):
            for daemon in (node, bootstrap):
                if daemon.process is not None and daemon.process.poll() is None:
                    await daemon.terminate()
            for container in await trio.to_thread.run_sync(partial(engine.containers.list, all=True)):
                with contextlib.suppress(docker.errors.APIError):
                    container.remove(force=True)


def test_a_node_pulls_the_challenge_answers_it_and_has_its_gpu_back(
    tmp_path: Path, engine: Any, registry: tuple[str, str, str]
) -> None:
    image, work_image, digest = registry

    async def main() -> None:
        async with running(tmp_path, image, engine) as here:
            workspace = here.net.workspace
            assert (await here.detail())["challenges"] == [], "nobody asked it yet"
            assert await here.containers(workspace) == [], "and it visits no node before"
            name = await here.begin()
            run = await here.run(name, "product")
            assert run["phase"] == "product", run
            (container,) = await here.containers(workspace)
            environment = dict(one.split("=", 1) for one in container.attrs["Config"]["Env"])
            given = container.attrs["HostConfig"]["DeviceRequests"][0]["DeviceIDs"]
            assert given == [here.machine.gpus[0]["uuid"]], environment
            here.machine.set(0, memory_used=20 << 20)  # what the driver shows while the product is there
            assert (await here.detail())["state"] == "challenged"
            run = await here.run(name)
            here.machine.set(0, memory_used=0)
            assert run["problem"] == "", here.net.nodes[0].log[-2000:]
            (found,) = run["challenges"]
            assert found["finding"] == "good", found
            assert 0 < found["product_ms"] < found["product_limit_ms"]
            detail = await here.detail()
            assert detail["challenges"] == [found]
            assert detail["node"]["last_challenge"] == "good"
            assert (detail["standing"]["score"], detail["standing"]["disputed"]) == (1.0, 0)
            # its parts were tasks with verified receipts, of the image as the registry has it
            task = await here.admin("GET", f"/api/v1/tasks/{found['task_id']}")
            assert (task["api"], task["receipts"][0]["verdict"]) == ("challenge", "verified")
            file = await here.admin("GET", f"/api/v1/tasks/{found['task_id']}/receipt")
            assert "sha256:" + file["receipt"]["imageDigest"].removeprefix("0x") == digest
            # the visit is over: the container is gone, and the GPU is anybody's
            while await here.containers(workspace):  # noqa: ASYNC110
                await trio.sleep(0.05)
            made = await here.admin("POST", "/api/v1/workspaces", {**WORK, "image": work_image})
            work, token = made["workspace"]["spec"]["id"], made["token"]
            await here.until_ready(work)
            (worker,) = await here.containers(work)
            assert worker.attrs["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == given
            assert (await here.net.call("GET", "/proxy/8080/", token=token)).status == 200
            assert (await here.detail())["node"]["gpus"], "memory came back in time: the device is not called sick"
            # with the GPU at work it is not challenged, and the work is not touched
            run = await here.run(await here.begin())
            assert "GPUs are taken by other workspaces" in run["problem"], run
            assert run["challenges"] == []
            (after,) = await here.containers(work)
            assert (after.id, after.status) == (worker.id, "running")
            assert (await here.net.call("GET", "/proxy/8080/", token=token)).status == 200
            assert await here.containers(workspace) == []

    trio.run(main)


def test_what_runs_on_a_node_ends_before_it_is_challenged_and_what_comes_waits(
    tmp_path: Path, engine: Any, registry: tuple[str, str, str]
) -> None:
    image, _, _ = registry
    arrived, go_on = trio.Event(), trio.Event()

    async def model_server(exchange: Exchange) -> None:
        if exchange.request.path == "/long":
            arrived.set()
            await go_on.wait()
        await exchange.respond(200, [], b"done")

    async def main() -> None:
        async with trio.open_nursery() as nursery, running(tmp_path, image, engine) as here:
            bound = await nursery.start(partial(serve_tcp, model_server, host="127.0.0.1", port=0))
            here.net.workspace_port = bound[0].port
            made = await here.admin(
                "POST",
                "/api/v1/workspaces",
                {"name": "served", "service": "demo/test", "ports": [8080], "readiness_path": "/", "concurrency": 4},
            )
            token = made["token"]
            await here.net.register(here.net.nodes[0])
            await here.until_ready(made["workspace"]["spec"]["id"])
            answers: list[tuple[str, int]] = []

            async def call(path: str) -> None:
                answers.append((path, (await here.net.call("GET", f"/proxy/8080{path}", token=token)).status))

            nursery.start_soon(call, "/long")
            await arrived.wait()
            name = await here.begin()
            run = await here.run(name, "idle")
            assert run["phase"] == "idle", run
            nursery.start_soon(call, "/later")
            await trio.sleep(0.5)
            assert (await here.run(name, "idle"))["phase"] == "idle", "it waits for what runs"
            assert answers == [], "and who comes meanwhile waits for it"
            with pytest.raises(AdminSocketError, match="is being challenged already"):
                await here.begin()
            go_on.set()
            run = await here.run(name)
            assert [one["finding"] for one in run["challenges"]] == ["good"], run
            while len(answers) < 2:  # noqa: ASYNC110
                await trio.sleep(0.02)
            assert answers == [("/long", 200), ("/later", 200)]
            nursery.cancel_scope.cancel()

    trio.run(main)
