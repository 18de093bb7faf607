"""Peers on the local network, by multicast DNS (libp2p specification *discovery/mdns*). Off unless turned on.

Announces where this peer listens and reports who announces itself, under libp2p's own service name, so that any libp2p
peer on the network sees this one; ours say their NGPU network besides. What is heard is a hint by somebody on the same
wire: only addresses of private networks are taken, only so many, and the handshake proves who is there.

`zeroconf` runs threads of its own; nothing of it is loaded or bound while this is off.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import structlog
import trio

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

__all__ = ["dnsaddrs_of", "run_mdns", "txt_record"]

log = structlog.get_logger(__name__)

SERVICE = "_p2p._udp.local."
MAX_PEERS = 64
MAX_ADDRESSES = 8
RESOLVE_MS = 2000
END_S = 3.0
_QUEUE = 64
_ADDRESS = b"dnsaddr="
_NETWORK = b"ngpu="


def txt_record(network: str, multiaddrs: Iterable[str]) -> bytes:
    """Return the TXT record of a peer of *network* at *multiaddrs*; what does not fit into a string is left out."""
    entries = [_NETWORK + network.encode(), *(_ADDRESS + text.encode() for text in multiaddrs)]
    return b"".join(bytes((len(entry),)) + entry for entry in entries if len(entry) < 256)


def dnsaddrs_of(txt: bytes, network: str) -> list[str]:
    """Return the multiaddrs in a TXT record of *network* that lie on private networks; none for any other record."""
    entries: list[bytes] = []
    at = 0
    while at < len(txt) and len(entries) < 2 * MAX_ADDRESSES:
        size = txt[at]
        entries.append(txt[at + 1 : at + 1 + size])
        at += 1 + size
    if _NETWORK + network.encode() not in entries:
        return []
    found = [entry[len(_ADDRESS) :].decode("ascii", "replace") for entry in entries if entry.startswith(_ADDRESS)]
    return [text for text in found if _is_local(text)][:MAX_ADDRESSES]


def _is_local(multiaddr: str) -> bool:
    parts = multiaddr.split("/")
    if len(parts) != 7 or parts[0] or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp" or parts[5] != "p2p":
        return False
    try:
        address = ipaddress.ip_address(parts[2])
    except ValueError:
        return False
    return address.is_private and not (address.is_unspecified or address.is_multicast)


async def run_mdns(
    network: str,
    multiaddrs: Callable[[], Sequence[str]],
    found: Callable[[list[str]], object],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Announce and listen until cancelled. A machine where that cannot be done is told so once, and left alone.

    Args:
        multiaddrs: returns where this peer listens, each ending in ``/p2p/<PeerId>``; asked once.
        found: told of each peer's multiaddrs.
    """
    heard, send = _listener()
    try:
        service = await trio.to_thread.run_sync(_Service, network, list(multiaddrs()), send)
    except OSError as error:
        log.warning("mdns_not_available", reason=error.strerror or str(error))
        task_status.started()
        await trio.sleep_forever()
    task_status.started()
    try:
        async for addresses in heard:
            found(addresses)
    finally:
        with trio.move_on_after(END_S, shield=True):
            await trio.to_thread.run_sync(service.close, abandon_on_cancel=True)
    raise AssertionError("the channel does not end")


def _listener() -> tuple[trio.MemoryReceiveChannel[list[str]], Callable[[list[str]], None]]:
    """Return a channel, and how another thread puts something into it without waiting."""
    send, receive = trio.open_memory_channel[list[str]](_QUEUE)
    token = trio.lowlevel.current_trio_token()

    def put(addresses: list[str]) -> None:
        with suppress(trio.WouldBlock, trio.BrokenResourceError):  # it is announced again
            send.send_nowait(addresses)

    def from_thread(addresses: list[str]) -> None:
        with suppress(trio.RunFinishedError):  # the daemon has ended
            token.run_sync_soon(put, addresses)

    return receive, from_thread


class _Service:
    """The threads' side."""

    def __init__(self, network: str, multiaddrs: list[str], put: Callable[[list[str]], None]) -> None:
        from zeroconf import InterfaceChoice, IPVersion, ServiceBrowser, ServiceInfo, Zeroconf

        self._network = network
        self._put = put
        self._known: set[str] = set()
        self._name = f"{secrets.token_hex(16)}.{SERVICE}"
        self._zeroconf = Zeroconf(interfaces=InterfaceChoice.All, ip_version=IPVersion.V4Only)
        try:
            local = [text for text in multiaddrs if _is_local(text)][:MAX_ADDRESSES]
            if local:
                self._zeroconf.register_service(self._info(ServiceInfo, local), cooperating_responders=True)
            self._browser = ServiceBrowser(self._zeroconf, SERVICE, listener=self)  # type: ignore[arg-type]  # no base class of its own
        except BaseException:
            self._zeroconf.close()
            raise
        log.info("mdns_started", announced=local)

    def _info(self, kind: type[ServiceInfo], local: list[str]) -> ServiceInfo:
        parts = [text.split("/") for text in local]
        return kind(
            SERVICE,
            self._name,
            port=int(parts[0][4]),
            addresses=[socket.inet_aton(part[2]) for part in parts if part[1] == "ip4"],
            properties=txt_record(self._network, local),
            server=f"{self._name.partition('.')[0]}.local.",
        )

    def add_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
        """Told by the browser of somebody; runs in its thread."""
        if name == self._name or len(self._known) >= MAX_PEERS:
            return
        info = zeroconf.get_service_info(kind, name, timeout=RESOLVE_MS)
        addresses = dnsaddrs_of(info.text, self._network) if info is not None and info.text else []
        if addresses:
            self._known.add(name)
            self._put(addresses)

    def update_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
        """Told that somebody's record is another now."""
        self._known.discard(name)
        self.add_service(zeroconf, kind, name)

    def remove_service(self, zeroconf: Zeroconf, kind: str, name: str) -> None:
        """Told that somebody left; whom we know is the DHT's to judge."""
        self._known.discard(name)

    def close(self) -> None:
        """Take the announcement back and end the threads."""
        self._zeroconf.close()
