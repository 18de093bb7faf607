"""A whole bootstrap in this process, on loopback, with its clients and scripted nodes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ngpu_bootstrap.admin_socket import ask_daemon
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.daemon import run_daemon
from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_protocol.http1 import Client, Headers, Response, tcp_opener
from ngpu_protocol.identity import Account

WORKSPACE = {
    "name": "echo",
    "service": "demo/echo",
    "ports": [8080, 9000],
    "concurrency": 64,
    "request_timeout_s": 20,
    "apis": [
        {"name": "draw", "mode": "sync", "port": 8080, "path": "/draw?size=1"},
        {"name": "train", "mode": "async", "port": 9000, "path": "/train"},
    ],
}


@dataclass
class Answered:
    status: int
    headers: Headers
    body: bytes
    trailers: Headers

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


@dataclass
class Bootstrap:
    """A running bootstrap with one workspace."""

    where: dict[str, Any]
    data_dir: Path
    client: Client
    workspace: str
    token: str

    @property
    def port(self) -> int:
        return int(self.where["http"][0].rpartition(":")[2])

    @property
    def multiaddr(self) -> str:
        return str(self.where["multiaddrs"][0])

    async def admin(self, method: str, target: str, document: Any = None) -> Any:
        return await trio.to_thread.run_sync(
            ask_daemon, self.data_dir / "admin.sock", method, target, document, abandon_on_cancel=True
        )

    async def call(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        headers: Headers | None = None,
        *,
        token: str | None = "",
    ) -> Answered:
        """Make a call; with the workspace's token unless another or None is given."""
        fields = list(headers or [])
        if token is not None:
            fields.append((b"authorization", f"Bearer {token or self.token}".encode()))
        async with self.client.request(method, target, fields, body) as response:
            return Answered(response.status, response.headers, await response.read(1 << 28), response.trailers)

    def stream(self, method: str, target: str, body: Any = b"", headers: Headers | None = None) -> Any:
        fields = [(b"authorization", f"Bearer {self.token}".encode()), *(headers or [])]
        return self.client.request(method, target, fields, body)


def settings_for(data_dir: Path, **changes: Any) -> BootstrapSettings:
    passphrase = data_dir.parent / "passphrase"
    if not passphrase.exists():
        passphrase.write_text("pw\n")
        passphrase.chmod(0o600)
    if not (data_dir / "keystore.json").exists():
        data_dir.mkdir(mode=0o700, exist_ok=True)
        account = Account.from_key(secrets.token_bytes(32))
        write_keystore(data_dir / "keystore.json", account, "pw", Kdf.LIGHT)
    values: dict[str, Any] = {
        "data_dir": data_dir,
        "passphrase_file": passphrase,
        "network": "local",
        "listen": ("/ip4/127.0.0.1/tcp/0",),
        "http_listen": "127.0.0.1:0",
        "drain_s": 1.0,
    }
    # what scripted nodes offer is for the test's own workspace; `tests/integration/profiles` shares models
    values["models"] = {"share": "none"}
    return BootstrapSettings(**(values | changes))


@asynccontextmanager
async def running(
    settings: BootstrapSettings, *, workspace: dict[str, Any] | None = None, known: tuple[str, str] | None = None
) -> AsyncIterator[Bootstrap]:
    """Run a bootstrap; make *workspace* in it, or go on with the *known* one (id, token) of a run before."""
    async with trio.open_nursery() as nursery:
        where = await nursery.start(run_daemon, settings)
        host, _, port = where["http"][0].removeprefix("http://").rpartition(":")
        client = Client(tcp_opener(host, int(port)), authority=f"{host}:{port}", max_connections=128)
        bootstrap = Bootstrap(where, settings.data_dir, client, "", "")
        if known is None:
            made = await bootstrap.admin("POST", "/api/v1/workspaces", workspace or WORKSPACE)
            bootstrap.workspace, bootstrap.token = made["workspace"]["spec"]["id"], made["token"]
        else:
            bootstrap.workspace, bootstrap.token = known
        try:
            yield bootstrap
        finally:
            await client.aclose()
            nursery.cancel_scope.cancel()


async def wait_ready(bootstrap: Bootstrap, nodes: int = 1) -> None:
    """Return when *nodes* nodes have the workspace ready."""
    with trio.fail_after(60):
        while True:
            view = await bootstrap.admin("GET", f"/api/v1/workspaces/{bootstrap.workspace}")
            if sum(one["state"] == "ready" for one in view["deployments"]) >= nodes:
                return
            await trio.sleep(0.02)


async def task_when(bootstrap: Bootstrap, task_id: str, holds: Any, timeout_s: float = 60.0) -> dict[str, Any]:
    """Return the task once *holds(view)*."""
    with trio.fail_after(timeout_s):
        while True:
            view: dict[str, Any] = await bootstrap.admin("GET", f"/api/v1/tasks/{task_id}")
            if "task_id" in view and holds(view):
                return view
            await trio.sleep(0.02)


__all__ = ["Answered", "Bootstrap", "Response", "running", "settings_for", "task_when", "wait_ready"]
