"""HTTP to hosts that a stranger named, without letting the stranger into this machine's own network.

A client names registries and URLs of images, and this machine fetches from there. Without a filter `http://10.0.0.1/`
would make it a way into its owner's network, and `http://169.254.169.254/` into its cloud account. Owns the judgement
of addresses and an httpx transport that resolves a name once, judges each address, and connects to exactly one that
passed: a name that resolves otherwise the second time gains nothing. Redirects pass through it hop by hop. No proxy is
used, since a proxy would connect in this machine's place.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable

import httpx
import trio

from ngpu_daemon.addresses import IpAddress, is_public

Judge = Callable[[str, IpAddress], bool]
"""Tells whether a host, by its name and this address of it, may be connected to."""

MAX_ADDRESSES = 8


class AddressRefused(httpx.TransportError):
    """A host's addresses are all ones that may not be connected to."""

    def __init__(self, host: str) -> None:
        super().__init__(f"{host} leads to an address of this machine or its network")
        self.host = host


def public_only(host: str, address: IpAddress) -> bool:
    """Judge by the address alone."""
    return is_public(address)


def without_query(url: str) -> str:
    """Return *url* as it may be shown and logged: a query often is a signature that opens the file."""
    return url.partition("?")[0]


async def resolve(host: str, port: int) -> list[IpAddress]:
    """Return the addresses of *host*, at most `MAX_ADDRESSES`, in the order to try them.

    Raises:
        OSError: there are none, or *host* is no name.
    """
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label is empty or has more than 63 characters
        raise OSError(f"it is no name of a host: {error}") from None
    addresses = dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)
    return list(addresses)[:MAX_ADDRESSES]


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects to addresses that *judge* lets pass, and raises `AddressRefused` where none does."""

    def __init__(self, judge: Judge = public_only, *, verify: ssl.SSLContext | bool = True) -> None:
        self._judge = judge
        self._inner = httpx.AsyncHTTPTransport(verify=verify, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send *request* to the first address of its host that passes and answers."""
        host = request.url.host
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        try:
            addresses = await resolve(host, port)
        except OSError as error:
            raise httpx.ConnectError(f"{host}: {error}", request=request) from error
        allowed = [address for address in addresses if self._judge(host, address)]
        if not allowed:
            raise AddressRefused(host)
        for number, address in enumerate(allowed, 1):
            aimed = httpx.Request(
                method=request.method,
                url=request.url.copy_with(host=str(address)),
                headers=request.headers,  # they name the host already
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await self._inner.handle_async_request(aimed)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(allowed):
                    raise
        raise AssertionError("unreachable")

    async def aclose(self) -> None:
        """Close what is open."""
        await self._inner.aclose()
