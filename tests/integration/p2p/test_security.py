"""Nobody connects without proving the PeerId they claim, and nothing on the wire can be changed unnoticed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.secio import transport as secio
from multiaddr import Multiaddr
from trio.testing import trio_test

from ngpu_protocol.p2p import DialError
from tests.integration.p2p.peers import ECHO, account, echoes, host, library_host, receive_exactly, serve_tcp


def plaintext(key_pair: Any) -> dict[Any, Any]:
    return {PLAINTEXT_PROTOCOL_ID: InsecureTransport(key_pair)}


def old_secio(key_pair: Any) -> dict[Any, Any]:
    return {secio.ID: secio.Transport(key_pair)}


@pytest.mark.parametrize("security", [plaintext, old_secio])
@trio_test
async def test_a_dial_without_noise_is_refused(security: Any) -> None:
    async with host() as ours, library_host(security) as theirs:
        with trio.fail_after(60), pytest.raises(Exception, match=r"(?i)unable to connect|negotiat|upgrade|fail"):
            await theirs.connect(info_from_p2p_addr(Multiaddr(ours.addresses[0])))
        assert ours.peers() == []


@pytest.mark.parametrize("security", [plaintext, old_secio])
@trio_test
async def test_a_peer_that_speaks_no_noise_is_not_dialled(security: Any) -> None:
    async with host({}, listen=()) as ours, library_host(security) as theirs:
        with pytest.raises(DialError):
            await ours.connect(str(theirs.get_addrs()[0]), timeout_s=30)
        assert ours.peers() == []


@trio_test
async def test_a_plaintext_greeting_on_the_wire_gets_na() -> None:
    async with host() as ours:
        port = int(ours.addresses[0].split("/")[4])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(b"\x13/multistream/1.0.0\n")
            await stream.send_all(b"\x11/plaintext/2.0.0\n")
            with trio.fail_after(60):
                assert await receive_exactly(stream, 20) == b"\x13/multistream/1.0.0\n"
                assert await receive_exactly(stream, 4) == b"\x03na\n"


@trio_test
async def test_somebody_else_at_the_address_is_not_taken_for_the_peer() -> None:
    async with host() as server, host({}, listen=()) as client:
        wanted = account().peer_id
        address = server.addresses[0].rpartition("/p2p/")[0] + f"/p2p/{wanted}"
        with pytest.raises(DialError):
            await client.connect(address, timeout_s=30)
        assert client.peers() == []


@trio_test
async def test_a_flipped_bit_breaks_the_connection_and_never_reaches_a_reader() -> None:
    flip = trio.Event()

    async def pipe(source: trio.SocketStream, sink: trio.SocketStream, tamper: bool) -> None:
        try:
            async for data in source:
                if tamper and flip.is_set():
                    data = data[:-1] + bytes((data[-1] ^ 1,))
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with host() as server, host({}, listen=()) as client, trio.open_nursery() as nursery:
        port = int(server.addresses[0].split("/")[4])

        async def middle(inner: trio.SocketStream) -> None:
            outer = await trio.open_tcp_stream("127.0.0.1", port)
            async with inner, outer, trio.open_nursery() as pipes:
                pipes.start_soon(pipe, inner, outer, False)
                pipes.start_soon(pipe, outer, inner, True)

        fake_port = await serve_tcp(nursery, middle)
        await client.connect(f"/ip4/127.0.0.1/tcp/{fake_port}/p2p/{server.peer_id}", timeout_s=30)
        assert await echoes(client, server.peer_id)
        stream = await client.open_stream(server.peer_id, ECHO, timeout_s=30)
        flip.set()
        await stream.send_all(os.urandom(64))
        with trio.fail_after(60), pytest.raises(trio.BrokenResourceError, match="authenticate"):
            await stream.receive_some()
        nursery.cancel_scope.cancel()
