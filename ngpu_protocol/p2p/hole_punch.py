"""From a relayed connection to a direct one (libp2p specification *relay/DCUtR*), through the NATs of both ends.

Who was reached through a relay asks the other for the addresses it is seen at, measures the round trip over the relay,
says "now" and dials half a round trip later, while the other dials when it hears "now": so both SYNs leave their NATs
before either arrives, each NAT takes the other's for an answer, and TCP joins the two into one connection
(simultaneous open, RFC 9293, section 3.5). It plays the handshake's client, the other its server.

What others see as this host's address must be true for the dial, so with `attach_hole_punching` the host dials from
one port of its own, always the same (with another where that one is not free towards a peer), and asks the relay where
it sees it. Works through NATs that map a port alike for all destinations, as most do; where they do not, or TCP ports
change, the connection stays relayed. IPv4 only: in IPv6 there is no NAT to speak of.

The library's own (0.8.1) dials neither from a port of its own nor at a moment agreed on, so it can only find
addresses that anybody could dial.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable, Sequence

import structlog
import trio
from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.circuits import CIRCUIT
from ngpu_protocol.p2p.delimited import delimited, receive_delimited
from ngpu_protocol.p2p.errors import P2PError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.identify import identify
from ngpu_protocol.p2p.kad_messages import MAX_ADDRESS_BYTES, multiaddr_bytes, multiaddr_text
from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["DCUTR_PROTOCOL", "HolePuncher", "attach_hole_punching"]

_log = structlog.get_logger(__name__)

DCUTR_PROTOCOL = "/libp2p/dcutr"
TRIES = 3
_MAX_BYTES = 4096
_MAX_ADDRESSES = 2
_TALK_S = 5.0
_DIAL_S = 3.0
_AGAIN_S = 0.05
_TRIES_PER_ADDRESS = 8
_AT_ONCE = 16
_PACE_S = 2.0
_MAX_PACED = 4096
# A peer names what we dial, so nothing on this machine or its own networks is: a NAT's outside is never there.
_NEVER = (
    ipaddress.IPv4Network("0.0.0.0/8"),
    ipaddress.IPv4Network("10.0.0.0/8"),
    ipaddress.IPv4Network("100.64.0.0/10"),
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv4Network("169.254.0.0/16"),
    ipaddress.IPv4Network("172.16.0.0/12"),
    ipaddress.IPv4Network("192.168.0.0/16"),
    ipaddress.IPv4Network("224.0.0.0/3"),
)


class HolePuncher:
    """One host's part. Made by `attach_hole_punching`.

    Attributes:
        opened: direct connections that came about this way.
    """

    def __init__(self, host: Host, direct: Callable[[], Sequence[str]]) -> None:
        self._host = host
        self._direct = direct
        self._room = trio.CapacityLimiter(_AT_ONCE)
        self._paced: dict[str, float] = {}  # until when a peer must wait with its next attempt
        self.opened = 0

    async def reach(self, peer: str) -> bool:
        """Try to connect directly to *peer*, which reached us through a relay; True if that came about."""
        async with self._room:
            for attempt in range(TRIES):
                if self._host.is_directly_connected(peer):
                    return True
                if attempt:
                    await trio.sleep(_PACE_S)
                try:
                    with trio.fail_after(_TALK_S + _DIAL_S):
                        if await self._try(peer):
                            self.opened += 1
                            _log.info("hole_punched", peer=peer, attempts=attempt + 1)
                            return True
                except (P2PError, MalformedError, trio.BrokenResourceError, trio.TooSlowError) as error:
                    _log.debug("hole_not_punched", peer=peer, reason=str(error))
                    if not self._host.is_connected(peer):
                        break
        return False

    async def _try(self, peer: str) -> bool:
        stream = await self._host.open_stream(peer, DCUTR_PROTOCOL, timeout_s=_TALK_S)
        try:
            own = await self._seen_at(peer)
            began_s = trio.current_time()
            await _send(stream, HolePunch.CONNECT, own)
            said = await _receive(stream, HolePunch.CONNECT)
            round_trip_s = trio.current_time() - began_s
            theirs = _endpoints(said)
            if not theirs:
                return False
            await _send(stream, HolePunch.SYNC, [])
            await trio.sleep(round_trip_s / 2)
            return await self._dial(peer, theirs, is_client=True)
        finally:
            stream.close_nowait()

    async def serve(self, stream: P2PStream) -> None:
        """Take part in an attempt of the other end."""
        peer = stream.remote_peer
        if self._host.is_directly_connected(peer) or self._room.available_tokens < 1 or not self._may_ask(peer):
            stream.reset_nowait()
            return
        async with self._room:
            try:
                with trio.fail_after(_TALK_S):
                    theirs = _endpoints(await _receive(stream, HolePunch.CONNECT))
                    await _send(stream, HolePunch.CONNECT, await self._seen_at(peer))
                    await _receive(stream, HolePunch.SYNC)
                if await self._dial(peer, theirs, is_client=False):
                    self.opened += 1
            except (P2PError, MalformedError, trio.TooSlowError) as error:
                _log.debug("hole_not_punched", peer=peer, reason=str(error))

    def _may_ask(self, peer: str) -> bool:
        now_s = trio.current_time()
        if len(self._paced) >= _MAX_PACED:
            self._paced = {other: until_s for other, until_s in self._paced.items() if until_s > now_s}
        if self._paced.get(peer, 0.0) > now_s or len(self._paced) >= _MAX_PACED:
            return False
        self._paced[peer] = now_s + _PACE_S
        return True

    async def _seen_at(self, peer: str) -> list[str]:
        """Return multiaddrs at which *peer* may find us: where we can be dialled, and where its relay sees us."""
        found = list(self._direct())
        for info in self._host.peers():
            relay = _relay_of(info.remote) if info.peer_id == peer else ""
            if relay and self._host.is_connected(relay):
                try:
                    found.append((await identify(self._host, relay, timeout_s=_TALK_S)).observed)
                except P2PError as error:
                    _log.debug("relay_does_not_say_where_we_are", relay=relay, reason=str(error))
        return [text for text in dict.fromkeys(found) if text][:_MAX_ADDRESSES]

    async def _dial(self, peer: str, endpoints: Sequence[tuple[str, int]], *, is_client: bool) -> bool:
        """Dial all *endpoints* from our port until one answers, for a few seconds."""
        won = False
        async with trio.open_nursery() as nursery:

            async def dial(endpoint: tuple[str, int]) -> None:
                nonlocal won
                for _ in range(_TRIES_PER_ADDRESS):
                    try:
                        await self._host.punch(endpoint, peer, is_client=is_client)
                    except OSError as error:
                        # Refused: our SYN came before theirs, to a NAT that says so.
                        if error.errno not in (errno.ECONNREFUSED, errno.ECONNRESET):
                            return
                    except Exception as error:  # the library's handshakes raise from many families
                        _log.debug("hole_not_punched", peer=peer, reason=str(error)[:200])
                    else:
                        won = True
                        nursery.cancel_scope.cancel()
                        return
                    await trio.sleep(_AGAIN_S)

            nursery.cancel_scope.deadline = trio.current_time() + _DIAL_S
            for endpoint in endpoints:
                nursery.start_soon(dial, endpoint)
        return won or self._host.is_directly_connected(peer)


def _relay_of(remote: str) -> str:
    """Return the PeerId of the relay in a relayed connection's address, empty for a direct one."""
    head, separator, _ = remote.partition(CIRCUIT)
    return head.rpartition("/p2p/")[2] if separator else ""


def _endpoints(message: HolePunch) -> list[tuple[str, int]]:
    """Return the IPv4 addresses and ports in *message* that can be dialled from another host."""
    found: list[tuple[str, int]] = []
    for raw in message.ObsAddrs[:_MAX_ADDRESSES]:
        parts = (multiaddr_text(raw) or "").split("/") if len(raw) <= MAX_ADDRESS_BYTES else []
        if len(parts) != 5 or parts[1] != "ip4" or parts[3] != "tcp":
            continue
        address = ipaddress.IPv4Address(parts[2])
        if not any(address in network for network in _NEVER) and int(parts[4]) > 0:
            found.append((parts[2], int(parts[4])))
    return found


async def _send(stream: P2PStream, kind: HolePunch.Type.ValueType, addresses: Sequence[str]) -> None:
    message = HolePunch(type=kind, ObsAddrs=[multiaddr_bytes(text) for text in addresses])
    await stream.send_all(delimited(message.SerializeToString()))


async def _receive(stream: P2PStream, kind: HolePunch.Type.ValueType) -> HolePunch:
    try:
        message = HolePunch.FromString(await receive_delimited(stream, max_bytes=_MAX_BYTES))
    except DecodeError as error:
        raise MalformedError("hole punching message", "not one") from error
    if message.type != kind:
        raise MalformedError("hole punching message", "out of order")
    return message


def attach_hole_punching(host: Host, *, direct: Callable[[], Sequence[str]] = lambda: ()) -> HolePuncher:
    """Return *host*'s part, from now on; call it before anybody is dialled.

    Args:
        direct: multiaddrs at which it can be dialled, if there are any.
    """
    puncher = HolePuncher(host, direct)
    host.handle(DCUTR_PROTOCOL, puncher.serve)
    host.dial_from_one_port()
    return puncher
