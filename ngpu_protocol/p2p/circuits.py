"""Using relays: reserving a place at one, being reached through it, and reaching others through theirs.

A relayed connection is a stream to the relay with a whole connection in it: noise and yamux between the two ends, so
who is there is proven end to end and the relay reads nothing. It is short and small (`RelayLimits` of the relay): good
for asking and for agreeing on a direct connection (`hole_punch`), which new streams then prefer.

`attach_circuits` makes a host able to dial ``<relay>/p2p-circuit/p2p/<PeerId>`` like any other multiaddr.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog
import trio
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.errors import P2PError, StreamOpenError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.kad_messages import MAX_ADDRESS_BYTES, peer_id_bytes, peer_id_text
from ngpu_protocol.p2p.relay_messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    PeerId,
    Status,
    StopMessage,
    receive_hop,
    receive_stop,
    send_message,
    status_name,
)
from ngpu_protocol.p2p.stream import P2PStream
from ngpu_protocol.p2p.yamux import Muxer

__all__ = ["CIRCUIT", "Circuits", "RelayPlace", "attach_circuits"]

_log = structlog.get_logger(__name__)

CIRCUIT = "/p2p-circuit"
_ANSWER_S = 10.0
_MAX_INBOUND = 64
_MAX_INBOUND_PER_PEER = 4
_MAX_PLACE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class RelayPlace:
    """A reservation.

    Attributes:
        lasts_s: from when it was made.
        addresses: multiaddrs through which others reach this host, as the relay states its own, ``/p2p-circuit`` last.
    """

    lasts_s: float
    addresses: tuple[str, ...]


class RelayedConnection(IRawConnection):
    """The stream to the relay, in the shape of a connection the library secures."""

    def __init__(self, stream: P2PStream, where: str, *, is_initiator: bool) -> None:
        self.is_initiator = is_initiator
        self._stream = stream
        self._where = where

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(n or None))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        # An end behind what was sent, so that the goodbye still arrives; the relay passes it on, then ends the rest.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            await self._stream.send_eof()
        self._stream.close_nowait()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [Multiaddr(self._where)]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.RELAYED


class Circuits:
    """A host's use of relays. Made by `attach_circuits`."""

    def __init__(self, host: Host, reached: Callable[[str], Awaitable[None]] | None) -> None:
        self._host = host
        self._reached = reached
        self._relays: dict[str, float] = {}  # PeerId, and until when it may bring others here
        self._inbound: Counter[str] = Counter()

    async def reserve(self, relay: str) -> RelayPlace:
        """Reserve a place at the connected peer *relay*, or renew it.

        Raises:
            P2PError: it is no relay, refuses, or does not answer.
        """
        stream = await self._host.open_stream(relay, HOP_PROTOCOL, timeout_s=_ANSWER_S)
        try:
            with trio.fail_after(_ANSWER_S):
                await send_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = await receive_hop(stream)
        except (trio.TooSlowError, trio.BrokenResourceError, MalformedError) as error:
            raise StreamOpenError(relay, HOP_PROTOCOL, "no sensible answer") from error
        finally:
            stream.reset_nowait()
        if answer.type != HopMessage.STATUS or answer.status != Status.OK:
            raise StreamOpenError(relay, HOP_PROTOCOL, status_name(answer.status))
        lasts_s = min(max(30.0, answer.reservation.expire - time.time()), _MAX_PLACE_S)
        self._relays[relay] = trio.current_time() + lasts_s
        stated = [
            text
            for raw in answer.reservation.addrs[:8]
            if len(raw) <= MAX_ADDRESS_BYTES and (text := _relay_text(raw, relay)) is not None
        ]
        return RelayPlace(lasts_s, tuple(text + CIRCUIT for text in stated))

    def forget(self, relay: str) -> None:
        """Accept nobody through *relay* any more."""
        self._relays.pop(relay, None)

    # Reaching others.

    async def dial(self, multiaddr: str, target: ID) -> IRawConnection:
        """Return a raw connection to *target* through the relay *multiaddr* names; bound it with a cancel scope.

        Raises:
            SwarmException: the relay cannot be reached, or did not connect us.
        """
        head, _, _ = multiaddr.partition(CIRCUIT)
        if not head or CIRCUIT in multiaddr[len(head) + len(CIRCUIT) :]:
            raise SwarmException(f"{multiaddr} does not name one relay")
        try:
            relay = await self._host.connect(head, timeout_s=_ANSWER_S)
            stream = await self._host.open_stream(relay, HOP_PROTOCOL, timeout_s=_ANSWER_S)
        except P2PError as error:
            raise SwarmException(f"relay: {error}") from error
        agreed = False
        try:
            await send_message(stream, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=target.to_bytes())))
            answer = await receive_hop(stream)
            if answer.type != HopMessage.STATUS or answer.status != Status.OK:
                raise SwarmException(f"the relay refused: {status_name(answer.status)}")
            agreed = True
        except (MalformedError, trio.BrokenResourceError) as error:
            raise SwarmException(f"relay: {error}") from error
        finally:
            if not agreed:
                stream.reset_nowait()
        return RelayedConnection(stream, head + CIRCUIT, is_initiator=True)

    # Being reached.

    async def serve(self, stream: P2PStream) -> None:
        """Take in whom a relay brings; returns when that connection ends."""
        relay = stream.remote_peer
        try:
            with trio.fail_after(_ANSWER_S):
                message = await receive_stop(stream)
                refusal = self._judge(relay, message)
                status = Status.OK if refusal is None else refusal
                await send_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
        except (MalformedError, trio.TooSlowError):
            stream.reset_nowait()
            return
        if refusal is not None:
            return
        source = peer_id_text(message.peer.id)
        self._inbound[source] += 1
        try:
            await self._take_in(stream, relay, source)
        finally:
            self._inbound[source] -= 1
            if not self._inbound[source]:
                del self._inbound[source]

    def _judge(self, relay: str, message: StopMessage) -> Status.ValueType | None:
        """Return why nobody is taken in, None when somebody is."""
        if message.type != StopMessage.CONNECT:
            return Status.UNEXPECTED_MESSAGE
        if self._relays.get(relay, 0.0) < trio.current_time():
            return Status.PERMISSION_DENIED  # not a relay we asked
        if not 2 <= len(message.peer.id) <= 64 or message.peer.id == peer_id_bytes(self._host.peer_id):
            return Status.MALFORMED_MESSAGE
        source = peer_id_text(message.peer.id)
        if self._inbound.total() >= _MAX_INBOUND or self._inbound[source] >= _MAX_INBOUND_PER_PEER:
            return Status.RESOURCE_LIMIT_EXCEEDED
        return None

    async def _take_in(self, stream: P2PStream, relay: str, source: str) -> None:
        raw = RelayedConnection(stream, f"/p2p/{relay}{CIRCUIT}", is_initiator=False)
        try:
            muxer = await self._host.upgrade_relayed(raw)
        except Exception as error:  # the library's handshakes raise from many families
            _log.info("relayed_connection_refused", relay=relay, peer=source, reason=str(error)[:200])
            stream.reset_nowait()
            return
        if muxer.peer_text != source:
            muxer.close_nowait("the relay named somebody else")
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, source)
            await _ended(muxer)
            nursery.cancel_scope.cancel()

    async def _tell(self, source: str) -> None:
        if self._reached is not None:
            await self._reached(source)


async def _ended(muxer: Muxer) -> None:
    await muxer.event_closed.wait()


def _relay_text(raw: bytes, relay: str) -> str | None:
    """Return a relay's own multiaddr with its PeerId at the end; None if it is none, or another's."""
    try:
        text = str(Multiaddr(raw))
    except Exception:  # the library raises dozens of kinds
        return None
    head, separator, peer = text.rpartition("/p2p/")
    if not separator:
        return f"{text}/p2p/{relay}"
    return text if peer == relay and CIRCUIT not in head else None


def attach_circuits(host: Host, *, reached: Callable[[str], Awaitable[None]] | None = None) -> Circuits:
    """Return *host*'s use of relays, from now on.

    Args:
        reached: run for each peer that came through a relay, in a task cancelled when its connection ends.
    """
    circuits = Circuits(host, reached)
    host.handle(STOP_PROTOCOL, circuits.serve)
    host.dial_relayed_with(circuits.dial)
    return circuits
