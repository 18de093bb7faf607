"""A whole network of real processes on loopback, and a workspace in the test's own.

Started as operators start them, by their commands with configuration files, killed as the world kills them. Only
processes started here are ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import trio

from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_protocol.http1 import Client, Exchange, Headers, serve_tcp, tcp_opener
from ngpu_protocol.identity import Account
from tests.integration.whole_path.workspace import Workspace

ROOT = Path(__file__).parents[3]
START_S = 90.0


@dataclass
class Answered:
    status: int
    headers: Headers
    body: bytes
    trailers: Headers

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def task_id(self) -> str:
        return (self.header(b"ngpu-task-id") or b"").decode()


@dataclass
class Daemon:
    """One process with its folder."""

    module: str
    folder: Path
    runtime_file: str
    within: tuple[str, ...] = ()  # a command that runs it somewhere else, such as `nsenter`
    process: trio.Process | None = None
    where: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    async def start(self) -> None:
        """Run it and wait until it says where it listens."""
        path = self.folder / "data" / self.runtime_file
        path.unlink(missing_ok=True)
        log = (self.folder / "log").open("ab")
        command = [*self.within, sys.executable, "-m", self.module, "run", "--config", str(self.folder / "config.toml")]
        self.process = await trio.lowlevel.open_process(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **self.environment}
        )
        log.close()
        with trio.move_on_after(START_S):
            while not path.exists():
                if self.process.poll() is not None:
                    break
                await trio.sleep(0.05)
            else:
                self.where = json.loads(path.read_text())
                return
        raise AssertionError(f"{self.module} did not start:\n{self.log[-3000:]}")

    async def kill(self) -> None:
        """End it as `kill -9` does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def terminate(self) -> int:
        """End it as systemd does; return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    def peak_rss_mb(self) -> float:
        """Return the most memory the process ever had, in MB."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000


@dataclass
class Network:
    """A bootstrap, its nodes, and one workspace that is ready on all of them."""

    bootstrap: Daemon
    nodes: list[Daemon]
    workspace_port: int
    workspace: str = ""
    token: str = ""
    client: Client | None = None

    async def call(
        self, method: str, target: str, body: Any = b"", headers: Headers | None = None, *, token: str | None = ""
    ) -> Answered:
        async with self.stream(method, target, body, headers, token=token) as response:
            return Answered(response.status, response.headers, await response.read(1 << 28), response.trailers)

    def stream(
        self, method: str, target: str, body: Any = b"", headers: Headers | None = None, *, token: str | None = ""
    ) -> Any:
        fields = list(headers or [])
        if token is not None:
            fields.append((b"authorization", f"Bearer {token or self.token}".encode()))
        assert self.client is not None
        return self.client.request(method, target, fields, body)

    async def connect_client(self) -> None:
        """Open clients' connections to the bootstrap as it runs now."""
        host, _, port = self.bootstrap.where["http"][0].removeprefix("http://").rpartition(":")
        self.client = Client(tcp_opener(host, int(port)), authority=f"{host}:{port}", max_connections=256)

    async def task(
        self,
        task_id: str,
        holds: Callable[[dict[str, Any]], bool] = lambda view: view["state"] >= 3,
        within_s: float = 60,
    ) -> dict[str, Any]:
        """Return the task as the API shows it once *holds*."""
        view: dict[str, Any] = {}
        with trio.move_on_after(within_s):
            while True:
                answer = await self.call("GET", f"/api/v1/tasks/{task_id}", token=None)
                view = answer.document
                if answer.status == 200 and holds(view):
                    return view
                await trio.sleep(0.05)
        raise AssertionError(f"the task is still {view}")

    async def poll(self, task_id: str, within_s: float = 60) -> dict[str, Any]:
        """Poll as clients do until there is a result."""
        document: dict[str, Any] = {}
        with trio.move_on_after(within_s):
            while True:
                answer = await self.call("GET", f"/user/queryTask?taskID={task_id}", token=None)
                document = answer.document
                if document["result_size"]:
                    return document
                await trio.sleep(0.05)
        raise AssertionError(f"no result: {document}")

    async def ready(self, nodes: int | None = None, within_s: float = 60) -> None:
        """Return once the workspace is ready on *nodes* nodes, all of them by default."""
        wanted = len(self.nodes) if nodes is None else nodes
        found: Any = None
        with trio.move_on_after(within_s):
            while True:
                found = (await self.call("GET", f"/api/v1/workspaces/{self.workspace}")).document
                if sum(one["state"] == "ready" for one in found.get("deployments", ())) == wanted:
                    return
                await trio.sleep(0.05)
        raise AssertionError(f"not ready: {found}\n{self.nodes[0].log[-2000:]}")

    async def register(self, node: Daemon, model: str = "test") -> None:
        """Register the workspace's server with *node*, as a model server does."""
        host, _, port = node.where["models"].removeprefix("http://").rpartition(":")
        client = Client(tcp_opener(host, int(port)), authority=f"{host}:{port}")
        api = f"http://127.0.0.1:{self.workspace_port}"
        wanted = {"project": "demo", "model": model, "api": api, "type": 0, "cid": "", "paths": ["/"]}
        body = json.dumps(wanted).encode()
        fields = [(b"content-type", b"application/json")]
        async with client.request("POST", "/api/v0/ai/model/register", fields, body) as response:
            said = await response.read(10_000)
            assert response.status == 200, said
        await client.aclose()


SPEC = {
    "name": "test",
    "service": "demo/test",
    "ports": [8080],
    "concurrency": 64,
    "request_timeout_s": 60,
    "readiness_path": "/",
    "apis": [
        {"name": "draw", "mode": "sync", "port": 8080, "path": "/echo"},
        {"name": "train", "mode": "async", "port": 8080, "path": "/slow"},
    ],
}


def free_port() -> int:
    """Return a TCP port on loopback that was free a moment ago, and that the kernel gives to nobody by itself.

    One of those it gives away was taken by another test's connection before a slow daemon listened on it.
    """
    while True:
        port = 12_000 + secrets.randbelow(20_000)  # below `net.ipv4.ip_local_port_range`
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def prepare(folder: Path, lines: list[str]) -> str:
    """Make a daemon's folder with its key and configuration; return its PeerId."""
    data = folder / "data"
    data.mkdir(parents=True, mode=0o700)
    account = Account.from_key(secrets.token_bytes(32))
    write_keystore(data / "keystore.json", account, "pw", Kdf.LIGHT)
    passphrase = folder / "passphrase"
    passphrase.write_text("pw\n")
    passphrase.chmod(0o600)
    common = [
        f"data_dir = {json.dumps(str(data))}",
        f"passphrase_file = {json.dumps(str(passphrase))}",
        'network = "local"',
    ]
    (folder / "config.toml").write_text("\n".join([*common, *lines]) + "\n")
    return account.peer_id


@asynccontextmanager
async def network(
    tmp_path: Path,
    handler: Callable[[Exchange], Awaitable[None]],
    *,
    nodes: int = 1,
    spec: dict[str, Any] | None = None,
    bootstrap_lines: tuple[str, ...] = (),
    bootstrap_module: str = "ngpu_bootstrap",
    node_module: str = "ngpu_node.cli",
    engine: str = "none",
    node_lines: tuple[str, ...] = (),
    node_environments: Sequence[Mapping[str, str]] = (),
    slots: int = 64,
) -> AsyncIterator[Network]:
    """Run a network whose workspace is served by *handler* in this process, or as *spec* has it."""
    port = free_port()
    boot_folder = tmp_path / "bootstrap"
    peer_id = prepare(
        boot_folder,
        [
            f'listen = ["/ip4/127.0.0.1/tcp/{port}"]',
            f'http_listen = "127.0.0.1:{free_port()}"',
            "drain_s = 3",
            *bootstrap_lines,
        ],
    )
    multiaddr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}"
    node_daemons = []
    for number in range(nodes):
        folder = tmp_path / f"node{number}"
        lines = [
            'listen = ["/ip4/127.0.0.1/tcp/0"]',
            'model_listen = "127.0.0.1:0"',
            f'engine = "{engine}"',
            "drain_s = 3",
        ]
        lines += [
            f"slots = {slots}",
            "[[bootstraps]]",
            f"multiaddrs = [{json.dumps(multiaddr)}]",
            'service = "test"',
            *node_lines,
        ]
        prepare(folder, lines)
        more = dict(node_environments[number]) if number < len(node_environments) else {}
        node_daemons.append(Daemon(node_module, folder, "node.json", environment=more))
    bootstrap = Daemon(bootstrap_module, boot_folder, "bootstrap.json")
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(partial(serve_tcp, handler, host="127.0.0.1", port=0))
        net = Network(bootstrap, node_daemons, bound[0].port)
        try:
            async with trio.open_nursery() as starting:
                for daemon in (bootstrap, *node_daemons):
                    starting.start_soon(daemon.start)
            await net.connect_client()
            net.workspace, net.token = await add_workspace(bootstrap, spec)
            for node in node_daemons:
                await net.register(node)
            await net.ready()
            yield net
        finally:
            with trio.CancelScope(shield=True):
                for daemon in (*node_daemons, bootstrap):
                    if daemon.process is not None and daemon.process.poll() is None:
                        await daemon.kill()
        nursery.cancel_scope.cancel()


class SharedNetwork:
    """One network for many tests: it runs in a thread of its own, and each test runs its part on it.

    Starting three processes costs more than everything most tests do.
    """

    def __init__(self, tmp_path: Path, *, workspace: Workspace | None = None, **arguments: Any) -> None:
        self.workspace = workspace or Workspace()
        self._tmp_path = tmp_path
        self._arguments = arguments
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed
        return self

    def __exit__(self, *_: object) -> None:
        trio.from_thread.run_sync(self._done.set, trio_token=self._token)
        self._thread.join()

    def run(self, part: Callable[[Network, Workspace], Awaitable[None]], within_s: float = 100.0) -> None:
        """Run *part* on the network, with a workspace that remembers nothing."""

        async def bounded() -> None:
            self.workspace.forget()
            with trio.fail_after(within_s):
                await part(self._net, self.workspace)

        trio.from_thread.run(bounded, trio_token=self._token)

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._failed = error
            self._ready.set()

    async def _serve(self) -> None:
        async with network(self._tmp_path, self.workspace, **self._arguments) as net:
            self._net = net
            self._done = trio.Event()
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await self._done.wait()


async def add_workspace(bootstrap: Daemon, spec: dict[str, Any] | None = None) -> tuple[str, str]:
    """Add the test's workspace, with what *spec* changes; return its id and its token."""
    file = bootstrap.folder / "workspace.json"
    wanted = {**SPEC, **(spec or {})}
    file.write_text(json.dumps({name: value for name, value in wanted.items() if value is not None}))
    command = [sys.executable, "-m", "ngpu_bootstrap", "workspace", "add", "--file", str(file), "--json"]
    command += ["--config", str(bootstrap.folder / "config.toml")]
    done = await trio.run_process(command, cwd=ROOT, capture_stdout=True)
    made = json.loads(done.stdout)
    return made["id"], made["token"]
