"""Daemons in the DHT for the tests: processes of their own, and a third peer that looks for them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import trio

from ngpu_node.admin import ask_status
from ngpu_protocol.capabilities import Capability
from ngpu_protocol.p2p import Host
from ngpu_protocol.p2p.circuits import attach_circuits
from ngpu_protocol.p2p.dht import Dht, DhtSettings, open_dht
from ngpu_protocol.p2p.directory import Directory
from tests.integration.p2p.peers import host
from tests.integration.whole_path.rig import Daemon, free_port, prepare


def bootstrap_at(folder: Path, *lines: str, port: int | None = None, at: str = "127.0.0.1") -> tuple[Daemon, str]:
    """Prepare a bootstrap; return it, and the multiaddr it will listen on."""
    port = port or free_port()
    own = [f'listen = ["/ip4/{at}/tcp/{port}"]', f'http_listen = "127.0.0.1:{free_port()}"', "drain_s = 1", *lines]
    peer_id = prepare(folder, own)
    return Daemon("ngpu_bootstrap", folder, "bootstrap.json"), f"/ip4/{at}/tcp/{port}/p2p/{peer_id}"


def node_of(folder: Path, *bootstraps: str, lines: tuple[str, ...] = (), tables: tuple[str, ...] = ()) -> Daemon:
    own = ['model_listen = "127.0.0.1:0"', 'engine = "none"', "drain_s = 1", *lines]
    if not any(line.startswith("listen") for line in lines):
        own.append('listen = ["/ip4/127.0.0.1/tcp/0"]')
    for multiaddr in bootstraps:
        own += ["[[bootstraps]]", f"multiaddrs = [{json.dumps(multiaddr)}]"]
    prepare(folder, [*own, *tables])
    return Daemon("ngpu_node.cli", folder, "node.json")


@contextlib.asynccontextmanager
async def running(*daemons: Daemon) -> AsyncIterator[None]:
    try:
        async with trio.open_nursery() as nursery:
            for daemon in daemons:
                nursery.start_soon(daemon.start)
        yield
    finally:
        with trio.CancelScope(shield=True):
            for daemon in daemons:
                if daemon.process is not None and daemon.process.poll() is None:
                    await daemon.kill()


@contextlib.asynccontextmanager
async def third_peer(*seeds: str) -> AsyncIterator[tuple[Host, Dht, Directory]]:
    """Yield a peer that knows *seeds* and nobody else, and does not listen."""
    async with host({}, listen=()) as own:
        attach_circuits(own)
        async with open_dht(own, DhtSettings(server=False, seeds=seeds)) as dht:
            yield own, dht, Directory(own, dht)


async def found(
    directory: Directory, wanted: str, nodes: set[str], within_s: float = 60, *, check_alive: bool = False
) -> None:
    """Wait until exactly *nodes* are found by *wanted*."""
    seen: Any = None
    with trio.move_on_after(within_s):
        while True:
            answer = await directory.find(Capability.parse(wanted), check_alive=check_alive)
            seen = {str(one.node) for one in answer}
            if seen == nodes:
                return
            await trio.sleep(0.2)
    raise AssertionError(f"found {seen}, expected {nodes}")


async def whole_status(daemon: Daemon) -> dict[str, Any]:
    """Return what the daemon says of itself, asked over its admin socket."""
    return await ask_status(daemon.folder / "data" / "admin.sock")


async def status(daemon: Daemon) -> dict[str, Any]:
    """Return what it says of its discovery."""
    shown: dict[str, Any] = (await whole_status(daemon))["discovery"]
    return shown


async def becomes(daemon: Daemon, holds: Callable[[dict[str, Any]], object], within_s: float = 60) -> dict[str, Any]:
    """Return the daemon's status of its discovery once *holds*."""
    shown: dict[str, Any] = {}
    with trio.move_on_after(within_s):
        while not holds(shown := await status(daemon)):  # noqa: ASYNC110  another process's news
            await trio.sleep(0.1)
        return shown
    raise AssertionError(f"it stays {shown}\n{daemon.log[-3000:]}")


async def linked(node: Daemon, count: int, at: str = "", within_s: float = 90) -> None:
    """Wait until *count* bootstraps have welcomed *node*, one of them at *at*."""
    shown: Any = None
    with trio.move_on_after(within_s):
        while True:
            shown = (await whole_status(node))["bootstraps"]
            up = [entry for entry in shown if entry["connected"]]
            if len(up) == count and any(at in entry["multiaddr"] for entry in up):
                return
            await trio.sleep(0.1)
    raise AssertionError(f"{shown}\n{node.log[-3000:]}")
