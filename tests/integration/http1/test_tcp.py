"""The server and client over real sockets: both families, TLS, large bodies, clients that vanish, full listeners,
draining, and clients and servers not written here."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import resource
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from trio.testing import trio_test

from ngpu_protocol.http1 import (
    BoundAddress,
    Client,
    Draining,
    Exchange,
    Handler,
    Limits,
    NotSentError,
    serve_tcp,
    tcp_opener,
    tls_opener,
)

MEGABYTE = 1_000_000


class Listening:
    """A server that runs, and the clients made for it."""

    def __init__(self, addresses: list[BoundAddress]) -> None:
        self.addresses = addresses
        self.port = addresses[0].port
        self.clients: list[Client] = []

    def client(self, host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None, **options: Any) -> Client:
        opener = tcp_opener(host, self.port) if tls is None else tls_opener(host, self.port, tls)
        self.clients.append(Client(opener, **options))
        return self.clients[-1]


@asynccontextmanager
async def listening(handler: Handler, **options: Any) -> AsyncIterator[Listening]:
    async with trio.open_nursery() as nursery:
        running = Listening(await nursery.start(partial(serve_tcp, handler, **options)))
        yield running
        for client in running.clients:
            await client.aclose()
        nursery.cancel_scope.cancel()


async def echo(exchange: Exchange) -> None:
    await exchange.respond(200, [], await exchange.receive_all(MEGABYTE))


async def mirror(exchange: Exchange) -> None:
    await exchange.send_head(200, [])
    while data := await exchange.receive():
        await exchange.send(data)
    await exchange.end(exchange.trailers)


async def get(client: Client, target: str = "/") -> bytes:
    async with client.request("GET", target) as response:
        return await response.read(MEGABYTE)


# -- listening ---------------------------------------------------------------------------------------------------------


@trio_test
async def test_loopback_listens_in_both_families_on_one_port() -> None:
    async with listening(echo, host="127.0.0.1") as server:
        assert [address.host for address in server.addresses] == ["127.0.0.1", "::1"]
        assert {address.port for address in server.addresses} == {server.port}
        assert str(server.addresses[1]) == f"[::1]:{server.port}"
        for address in server.addresses:
            assert await get(server.client(address.host)) == b""


@trio_test
async def test_port_in_use_is_an_error_before_it_serves() -> None:
    async with listening(echo) as server:
        with pytest.raises(OSError, match="in use"):
            await serve_tcp(echo, port=server.port)


@trio_test
async def test_handler_sees_who_asks() -> None:
    async def who(exchange: Exchange) -> None:
        await exchange.respond(200, [], exchange.remote.host.encode())

    async with listening(who) as server:
        assert await get(server.client()) == b"127.0.0.1"
        assert await get(server.client("::1")) == b"::1"


@trio_test
async def test_full_listener_gives_up_its_longest_idle_connection() -> None:
    async with listening(echo, limits=Limits(max_connections=2, idle_timeout_s=60)) as server:
        first, second, third = server.client(), server.client(), server.client()
        await get(first)
        await trio.sleep(0.4)
        await get(second)
        await trio.sleep(0.8)
        (link_of_first, _), (link_of_second, _) = first.pool._idle[0], second.pool._idle[0]
        await get(third)
        with trio.fail_after(60):
            while link_of_first.is_usable():  # noqa: ASYNC110  nothing tells that a kept connection ended
                await trio.sleep(0.01)
        await get(second)
        assert second.pool._idle[0][0] is link_of_second  # not given up: it carried another request


@trio_test
async def test_full_and_busy_listener_says_so() -> None:
    begun, go_on = [trio.Event(), trio.Event()], trio.Event()

    async def slow(exchange: Exchange) -> None:
        begun[begun[0].is_set()].set()
        await go_on.wait()
        await exchange.respond(200, [], b"")

    async with listening(slow, limits=Limits(max_connections=2)) as server, trio.open_nursery() as nursery:
        for event in begun:
            nursery.start_soon(get, server.client())
            await event.wait()
        client = server.client()
        async with client.request("GET", "/") as response:
            assert response.status == 503
            assert b"too_many_connections" in await response.read(1000)
        assert client.pool.open == 0
        go_on.set()


@trio_test
async def test_draining_stops_accepting_finishes_and_returns() -> None:
    begun, go_on = trio.Event(), trio.Event()

    async def slow(exchange: Exchange) -> None:
        begun.set()
        await go_on.wait()
        await exchange.respond(200, [], b"done")

    draining = Draining()
    answers: list[bytes] = []
    async with trio.open_nursery() as nursery:
        server = Listening(await nursery.start(partial(serve_tcp, slow, draining=draining)))
        idle, busy = server.client(), server.client()
        go_on.set()
        await get(idle)
        begun, go_on = trio.Event(), trio.Event()

        async def ask() -> None:
            answers.append(await get(busy))

        nursery.start_soon(ask)
        await begun.wait()
        draining.start()
        await trio.sleep(0.1)
        assert answers == []
        go_on.set()
        with trio.fail_after(60):
            await draining.wait_finished()
        with pytest.raises(NotSentError):
            await get(idle)
        await busy.aclose()
    assert answers == [b"done"]


# -- large bodies and clients that vanish ------------------------------------------------------------------------------


@trio_test
async def test_a_hundred_megabytes_each_way_in_constant_memory() -> None:
    size = 100 * MEGABYTE
    piece = bytes(range(256)) * 400

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // len(piece)):
            yield piece

    async with listening(mirror) as server:
        client = server.client()
        sent, received, count = hashlib.sha256(), hashlib.sha256(), 0
        for _ in range(size // len(piece)):
            sent.update(piece)
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        async with client.request("POST", "/", body=pieces(), trailers=[(b"x-last", b"1")]) as response:
            async for data in response.body():
                received.update(data)
                count += len(data)
            assert response.trailers == [(b"x-last", b"1")]
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        assert count == size // len(piece) * len(piece)
        assert received.digest() == sent.digest()
        assert grown_kb < 20_000
        assert client.pool.idle == 1


@trio_test
async def test_sender_waits_for_a_reader_that_does_not_read() -> None:
    sent = 0

    async def endless(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send_head(200, [])
        while True:
            await exchange.send(bytes(65536))
            sent += 65536

    async with listening(endless) as server, server.client().request("GET", "/") as response:
        await response.receive()
        await trio.sleep(0.3)
        before = sent
        await trio.sleep(0.3)
        assert sent == before < 50 * MEGABYTE


@pytest.mark.parametrize("how", ["close", "reset", "half close"])
def test_handler_is_cancelled_within_a_second_of_its_client_leaving(how: str) -> None:
    async def check() -> float:
        gone = trio.Event()
        started = trio.Event()

        async def wait(exchange: Exchange) -> None:
            started.set()
            try:
                await trio.sleep(20)
            finally:
                assert exchange.client_gone
                gone.set()

        async with listening(wait) as server:
            stream = await trio.open_tcp_stream("127.0.0.1", server.port)
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            await started.wait()
            if how == "half close":
                await stream.send_eof()
            else:
                if how == "reset":
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                stream.socket.close()
            left_s = trio.current_time()
            with trio.fail_after(15):
                await gone.wait()
            stream.socket.close()
            return trio.current_time() - left_s

    # again, where the machine stood still for a time
    assert any(trio.run(check) < 1 for _ in range(3))


@trio_test
async def test_cut_answer_is_a_reset_on_the_wire() -> None:
    async def cut(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        await exchange.send(b"half")
        raise RuntimeError

    async with listening(cut) as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")  # where only the end of the connection ends the body
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
            while await stream.receive_some():
                pass


@trio_test
async def test_answer_to_an_unread_upload_arrives() -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.respond(403, [], b"no uploads")

    async with listening(refuse) as server:
        for _ in range(5):
            async with server.client().request("POST", "/", body=bytes(3 * MEGABYTE)) as response:
                assert (response.status, await response.read(100)) == (403, b"no uploads")


@trio_test
async def test_connection_the_server_closed_is_not_used_again() -> None:
    async with listening(echo, limits=Limits(idle_timeout_s=0.2)) as server:
        client = server.client()
        for _ in range(3):
            assert await get(client) == b""
            await trio.sleep(0.6)
        assert client.pool.open == 1


@trio_test
async def test_many_at_once() -> None:
    async with listening(echo) as server:
        client = server.client(max_connections=20)

        async def ask(number: int) -> None:
            async with client.request("POST", f"/{number}", body=b"%d" % number) as response:
                assert await response.read(100) == b"%d" % number

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(ask, number)
        assert client.pool.open == client.pool.idle == 20


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ngpu test")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        built.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def test_tls_carries_the_same(certificate: Path) -> None:
    @trio_test
    async def check() -> None:
        serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        serving.load_cert_chain(certificate)
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with listening(mirror, tls=serving) as server:
            client = server.client(tls=trusting)
            for body in (b"abc", bytes(2 * MEGABYTE), b"z"):
                async with client.request("POST", "/", body=body) as response:
                    assert await response.read(3 * MEGABYTE) == body
            assert client.pool.open == 1
            # Who speaks no TLS is closed on, and nobody else notices.
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
            await get(client)
            await client.aclose()

    check()


def test_client_that_leaves_tls_cancels_its_handler(certificate: Path) -> None:
    @trio_test
    async def check() -> None:
        serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        serving.load_cert_chain(certificate)
        begun, gone = trio.Event(), trio.Event()

        async def wait(exchange: Exchange) -> None:
            begun.set()
            try:
                await trio.sleep(20)
            finally:
                if exchange.client_gone:
                    gone.set()

        async with listening(wait, tls=serving) as server:
            trusting = ssl.create_default_context(cafile=str(certificate))
            client = server.client(tls=trusting)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(get, client)
                await begun.wait()
                nursery.cancel_scope.cancel()
            with trio.fail_after(15):
                await gone.wait()

    check()


# -- clients and servers not written here ------------------------------------------------------------------------------


@trio_test
async def test_httpx_speaks_with_the_server() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(10_000)

    async with (
        listening(echo) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client,
    ):
        for _ in range(3):
            answer = await client.post("/a?b=c", content=b"abc")
            assert (answer.status_code, answer.content) == (200, b"abc")
        assert len((await client.put("/", content=pieces())).content) == MEGABYTE
        assert (await client.head("/")).content == b""


class StandardLibrary(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/until-close":
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")
            return
        self.wfile.write(b"abc")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@trio_test
async def test_client_speaks_with_the_standard_librarys_server() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandardLibrary)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        client = Client(tcp_opener("127.0.0.1", server.server_address[1]))
        async with client.request("GET", "/chunked") as response:
            assert await response.read(10) == b"abc"
            assert response.trailers == [(b"x-sum", b"1")]
        async with client.request("POST", "/", body=bytes(MEGABYTE), expect_continue=True) as response:
            assert (response.status, await response.read(MEGABYTE)) == (201, bytes(MEGABYTE))
        assert client.pool.open == 1
        assert await get(client, "/until-close") == b"abc"
        assert client.pool.open == 0
        await client.aclose()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
