"""Connections to hosts that strangers name: public addresses only, judged where the connection is made."""

from __future__ import annotations

import functools
import ipaddress
import socket
from typing import Any

import httpx
import pytest
import trio
from trio.testing import trio_test

from ngpu_daemon import outbound
from ngpu_daemon.addresses import is_public
from ngpu_daemon.outbound import AddressRefused, GuardedTransport, resolve


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "fd12::1",
        "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1",
        "2002:7f00:1::", "::ffff:0:0", "::10.0.0.1", "::1.1.1.1", "64:ff9b:1::a00:1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_of_this_machine_and_its_networks_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"]
)
def test_the_internets_addresses_are(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


async def one_answer(listeners: list[trio.SocketListener], seen: list[bytes], answer: bytes) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        seen.append(await stream.receive_some(4096))
        await stream.send_all(answer)
        await stream.aclose()

    await trio.serve_listeners(handle, listeners)


def ok(body: bytes = b"hello") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


def names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Have every name resolve to *answers*, one after the other; return what was asked."""
    asked: list[str] = []
    really = trio.socket.getaddrinfo

    async def getaddrinfo(host: str, port: int, *rest: Any, **more: Any) -> list[Any]:
        if not host.endswith(".example"):
            return await really(host, port, *rest, **more)
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_that_leads_inside_is_refused_and_nothing_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["127.0.0.1", "10.0.0.1"])

    async def main() -> None:
        async with httpx.AsyncClient(transport=GuardedTransport()) as client:
            for url in ("http://inside.example:1/", "http://127.0.0.1:1/", "http://[::1]:1/", "http://0x7f.1:1/"):
                with pytest.raises((AddressRefused, httpx.ConnectError)):
                    await client.get(url)

    trio.run(main)


def test_the_address_that_was_judged_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # the second answer would lead inside; it is never asked for
    asked = names(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])

    async def main() -> None:
        seen: list[bytes] = []
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(functools.partial(one_answer, listeners, seen, ok()))
            judged: list[str] = []

            def judge(host: str, address: outbound.IpAddress) -> bool:
                judged.append(f"{host} {address}")
                return True

            async with httpx.AsyncClient(transport=GuardedTransport(judge)) as client:
                assert (await client.get(f"http://files.example:{port}/a")).text == "hello"
            nursery.cancel_scope.cancel()
        assert asked == ["files.example"]
        assert judged == ["files.example 127.0.0.1"]
        assert f"Host: files.example:{port}".encode() in seen[0]

    trio.run(main)


def test_of_several_addresses_only_those_that_pass_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["127.0.0.2", "127.0.0.1"])

    async def main() -> None:
        seen: list[bytes] = []
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(functools.partial(one_answer, listeners, seen, ok()))
            transport = GuardedTransport(lambda host, address: str(address) in ("127.0.0.1", "127.0.0.3"))
            async with httpx.AsyncClient(transport=transport) as client:
                assert (await client.get(f"http://files.example:{port}/")).text == "hello"
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_redirect_inside_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["127.0.0.1"])
    redirect = b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(functools.partial(one_answer, listeners, [], redirect))
            transport = GuardedTransport(lambda host, address: is_public(address) or host == "files.example")
            async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
                with pytest.raises(AddressRefused, match=r"10\.0\.0\.1"):
                    await client.get(f"http://files.example:{port}/")
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_name_that_does_not_exist_is_a_connect_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)

    async def main() -> None:
        async with httpx.AsyncClient(transport=GuardedTransport()) as client:
            with pytest.raises(httpx.ConnectError, match=r"nowhere\.example"):
                await client.get("http://nowhere.example/")

    trio.run(main)


@pytest.mark.parametrize("host", ["a..example", "a" * 64 + ".example"])
@trio_test
async def test_what_is_no_name_of_a_host_has_no_address(host: str) -> None:
    with pytest.raises(OSError, match="no name"):
        await resolve(host, 443)
