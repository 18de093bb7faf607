"""Hosts for the tests of this folder: quick to make, on loopback, each with a key of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial

import trio
from libp2p import new_host
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from multiaddr import Multiaddr

from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.p2p import Host, HostLimits, P2PStream, StreamHandler, open_host
from ngpu_protocol.p2p.events import EventFan
from ngpu_protocol.p2p.host import parse_multiaddr
from ngpu_protocol.p2p.listener import tcp_endpoint
from ngpu_protocol.p2p.noise import NoiseChannel
from ngpu_protocol.p2p.swarm import SafeSwarm
from ngpu_protocol.p2p.yamux import Muxer

ECHO = "/test/echo/1.0.0"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LOCAL = network_named("local")


async def echo(stream: P2PStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def account() -> Account:
    return Account.from_key(os.urandom(32))


@contextlib.asynccontextmanager
async def host(
    handlers: dict[str, StreamHandler] | None = None,
    *,
    listen: tuple[str, ...] = (LOOPBACK,),
    limits: HostLimits | None = None,
    key: Account | None = None,
) -> AsyncIterator[Host]:
    handlers = {ECHO: echo} if handlers is None else handlers
    async with open_host(key or account(), listen=listen, network=LOCAL, limits=limits, handlers=handlers) as running:
        yield running


@contextlib.asynccontextmanager
async def two_hosts(
    handlers: dict[str, StreamHandler] | None = None, *, limits: HostLimits | None = None
) -> AsyncIterator[tuple[Host, Host]]:
    """Yield a host that serves, and one connected to it that does not listen."""
    async with host(handlers, limits=limits) as server, host({}, listen=(), limits=limits) as client:
        await client.connect(server.addresses[0], timeout_s=30)
        yield server, client


async def receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        data = await stream.receive_some(count - len(got))
        assert data, f"ended {count - len(got)} bytes short"
        got += data
    return bytes(got)


async def echoes(running: Host, peer_id: str) -> bool:
    """Whether a stream to *peer_id* works, end to end."""
    stream = await running.open_stream(peer_id, ECHO, timeout_s=30)
    try:
        with trio.fail_after(60):
            await stream.send_all(b"are you there")
            return await receive_exactly(stream, 13) == b"are you there"
    finally:
        await stream.aclose()


async def eventually(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait until *condition* is true."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110  any condition, of code that has no event for it
            await trio.sleep(0.01)


async def serve_tcp(nursery: trio.Nursery, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> int:
    """Serve plain TCP on loopback and return the port."""
    listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
    port: int = listeners[0].socket.getsockname()[1]
    return port


def muxer_of(running: Host, peer_id: str) -> Muxer:
    """The muxer of the newest connection to *peer_id*, to look at, or to misbehave with."""
    return running._swarm.usable_connections(parse_multiaddr(f"/p2p/{peer_id}")[1])[0].muxed_conn


@contextlib.asynccontextmanager
async def rogue_channel(address: str) -> AsyncIterator[NoiseChannel]:
    """Yield a channel to the host at *address* whose handshake is done and on which any bytes can be sent.

    Nothing reads it unless the test does.
    """
    multiaddr, peer_id = parse_multiaddr(address)
    endpoint = tcp_endpoint(multiaddr)
    assert endpoint is not None
    async with trio.open_nursery() as nursery:
        swarm = SafeSwarm(account(), nursery, HostLimits(), EventFan())
        stream = await trio.open_tcp_stream(*endpoint)
        raw = RawConnection(TrioTCPStream(stream), True)
        muxer = await swarm.upgrader.upgrade_connection(
            await swarm.upgrader.upgrade_security(raw, True, peer_id), peer_id
        )
        assert isinstance(muxer, Muxer)
        channel = muxer.secured_conn
        assert isinstance(channel, NoiseChannel)
        try:
            yield channel
        finally:
            stream.socket.close()
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def library_host(security: object = None) -> AsyncIterator[object]:
    """Yield a host of py-libp2p as it comes, with the security transports given."""
    key_pair = create_new_key_pair(os.urandom(32))
    running = new_host(key_pair=key_pair, sec_opt=security(key_pair) if callable(security) else None)
    async with running.run([Multiaddr(LOOPBACK)]):
        try:
            yield running
        finally:
            with trio.move_on_after(5, shield=True):
                await running.close()


@dataclass
class PeerProcess:
    process: subprocess.Popen[str]
    address: str

    @property
    def peer_id(self) -> str:
        return self.address.rpartition("/")[2]


@contextlib.contextmanager
def peer_process() -> Iterator[PeerProcess]:
    """Run `peer_process.py` as a process of its own, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.p2p.peer_process"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield PeerProcess(process, process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
