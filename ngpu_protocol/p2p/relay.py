"""Being a relay: peers that cannot be dialled reserve a place, others reach them through this host.

Who may reserve is the daemon's to say (`may_reserve`): a bootstrap lets the nodes it admits. Anybody may connect to
one that reserved, within `RelayLimits`; what passes is a noise handshake and ciphertext between the two ends, which
this host can cut but neither read nor forge. Nothing is dialled for anybody: the far end must be connected already.

Against abuse: a reservation only for peers that are known and connected, directly; a circuit is bounded in bytes, time
and number, per source, per target and in all; opening is paced. A relay that is used up by many made-up PeerIds still
serves its own nodes, since those need no circuit: orders go over the connection they dialled.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import structlog
import trio

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.errors import P2PError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.kad_messages import multiaddr_bytes, peer_id_bytes, peer_id_text
from ngpu_protocol.p2p.relay_messages import (
    STOP_PROTOCOL,
    HopMessage,
    Limit,
    PeerId,
    RelayLimits,
    Reservation,
    Status,
    StopMessage,
    receive_hop,
    receive_stop,
    send_message,
    status_name,
)
from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["Relay"]

_log = structlog.get_logger(__name__)

_CHUNK_BYTES = 16 * 1024
_MAX_SOURCES = 8192
_MAX_STATED_ADDRESSES = 8


class _Refused(Exception):
    def __init__(self, status: Status.ValueType) -> None:
        super().__init__(status_name(status))
        self.status = status


class Relay:
    """The relay of one host; register `serve` for `HOP_PROTOCOL`.

    Attributes:
        refused: how often what was refused, by the status that said so.
        relayed_bytes: over all circuits, both ways.
        opened: circuits since the start.
    """

    def __init__(
        self,
        host: Host,
        *,
        may_reserve: Callable[[str], bool],
        addresses: Callable[[], Sequence[str]] | None = None,
        limits: RelayLimits | None = None,
    ) -> None:
        """Tie the parts together.

        Args:
            may_reserve: whether the peer with this PeerId may be reached through here, now.
            addresses: multiaddrs at which others reach this host; left out: those it listens on.
        """
        self._host = host
        self._may_reserve = may_reserve
        self._addresses = addresses or (lambda: host.addresses)
        self._limits = limits or RelayLimits()
        self._reserved_until_s: dict[str, float] = {}
        self._circuits: Counter[str] = Counter()  # by source
        self._to: Counter[str] = Counter()
        self._paced: dict[str, tuple[float, float]] = {}  # opens left, and when that was
        self.refused: Counter[str] = Counter()
        self.relayed_bytes = 0
        self.opened = 0

    @property
    def reservations(self) -> int:
        """Peers with a reservation."""
        return len(self._reserved_until_s)

    @property
    def circuits(self) -> int:
        """Circuits standing now."""
        return self._circuits.total()

    async def serve(self, stream: P2PStream) -> None:
        """Answer one request, and carry what follows."""
        try:
            with trio.fail_after(self._limits.patience_s):
                message = await receive_hop(stream)
                if message.type == HopMessage.RESERVE:
                    await send_message(stream, self._reserve(stream))
                    return
                if message.type != HopMessage.CONNECT:
                    raise _Refused(Status.UNEXPECTED_MESSAGE)
                far = await self._open_far_end(stream, message)
        except _Refused as error:
            self.refused[str(error)] += 1
            _log.debug("relay_refused", peer=stream.remote_peer, reason=str(error))
            with trio.move_on_after(self._limits.patience_s):
                await send_message(stream, HopMessage(type=HopMessage.STATUS, status=error.status))
        except (MalformedError, trio.TooSlowError):
            self.refused["malformed message"] += 1
            stream.reset_nowait()
        else:
            await self._carry(stream, *far)

    # Reservations.

    def _reserve(self, stream: P2PStream) -> HopMessage:
        peer, now_s = stream.remote_peer, trio.current_time()
        if stream.remote_endpoint is None or not self._may_reserve(peer):
            raise _Refused(Status.PERMISSION_DENIED)
        if peer not in self._reserved_until_s and len(self._reserved_until_s) >= self._limits.reservations:
            self._drop_lapsed(now_s)
            if len(self._reserved_until_s) >= self._limits.reservations:
                raise _Refused(Status.RESERVATION_REFUSED)
        if peer not in self._reserved_until_s:
            _log.info("relay_reserved", peer=peer, reservations=len(self._reserved_until_s) + 1)
        self._reserved_until_s[peer] = now_s + self._limits.reservation_s
        return HopMessage(
            type=HopMessage.STATUS,
            status=Status.OK,
            reservation=Reservation(
                expire=int(time.time()) + self._limits.reservation_s,
                addrs=[multiaddr_bytes(text) for text in self._stated()],
            ),
            limit=self._limit(),
        )

    def _stated(self) -> list[str]:
        own = f"/p2p/{self._host.peer_id}"
        return [text if text.endswith(own) else text + own for text in self._addresses()][:_MAX_STATED_ADDRESSES]

    def _limit(self) -> Limit:
        return Limit(duration=self._limits.circuit_s, data=self._limits.circuit_bytes)

    def _drop_lapsed(self, now_s: float) -> None:
        for peer, until_s in list(self._reserved_until_s.items()):
            if until_s <= now_s or not self._host.is_connected(peer):
                del self._reserved_until_s[peer]

    def _is_reserved(self, peer: str) -> bool:
        """Whether circuits may lead to *peer* now: it asked, is still one that may, and is connected."""
        until_s = self._reserved_until_s.get(peer)
        if until_s is None:
            return False
        if until_s <= trio.current_time() or not self._host.is_connected(peer) or not self._may_reserve(peer):
            del self._reserved_until_s[peer]
            return False
        return True

    # Circuits.

    async def _open_far_end(self, stream: P2PStream, message: HopMessage) -> tuple[P2PStream, str]:
        source, limits = stream.remote_peer, self._limits
        if not 2 <= len(message.peer.id) <= 64:
            raise _Refused(Status.MALFORMED_MESSAGE)
        target = peer_id_text(message.peer.id)
        if stream.remote_endpoint is None or target == source:
            raise _Refused(Status.PERMISSION_DENIED)
        if not self._is_reserved(target):
            raise _Refused(Status.NO_RESERVATION)
        if (
            self._circuits.total() >= limits.circuits
            or self._circuits[source] >= limits.circuits_per_source
            or self._to[target] >= limits.circuits_per_target
            or not self._may_open(source)
        ):
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        self._count(source, target, 1)
        far: P2PStream | None = None
        agreed = False
        try:
            far = await self._host.open_stream(target, STOP_PROTOCOL, timeout_s=limits.patience_s)
            await send_message(
                far,
                StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=peer_id_bytes(source)), limit=self._limit()),
            )
            answer = await receive_stop(far)
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise _Refused(Status.CONNECTION_FAILED)
            await send_message(stream, HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit()))
            agreed = True
        except (P2PError, MalformedError, trio.BrokenResourceError) as error:
            raise _Refused(Status.CONNECTION_FAILED) from error
        finally:
            if not agreed:
                self._count(source, target, -1)
                if far is not None:
                    far.reset_nowait()
        return far, target

    def _may_open(self, source: str) -> bool:
        now_s, most = trio.current_time(), float(self._limits.opens_per_minute)
        left, then_s = self._paced.get(source, (most, now_s))
        left = min(most, left + (now_s - then_s) * most / 60)
        if len(self._paced) >= _MAX_SOURCES:
            self._paced = {peer: entry for peer, entry in self._paced.items() if now_s - entry[1] < 60}
            if len(self._paced) >= _MAX_SOURCES:
                return False  # that many new peers in a minute are nobody's
        self._paced[source] = (max(0.0, left - 1), now_s)
        return left >= 1

    def _count(self, source: str, target: str, change: int) -> None:
        for counter, peer in ((self._circuits, source), (self._to, target)):
            counter[peer] += change
            if counter[peer] <= 0:
                del counter[peer]

    async def _carry(self, near: P2PStream, far: P2PStream, target: str) -> None:
        """Pass bytes both ways until both ends are done, one breaks off, or the limits are reached."""
        self.opened += 1
        whole = False
        try:
            with trio.move_on_after(self._limits.circuit_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass, near, far, nursery.cancel_scope)
                    nursery.start_soon(self._pass, far, near, nursery.cancel_scope)
                whole = not nursery.cancel_scope.cancel_called
        finally:
            self._count(near.remote_peer, target, -1)
            for stream in (near, far):
                if whole:
                    stream.close_nowait()
                else:
                    stream.reset_nowait()

    async def _pass(self, from_: P2PStream, to: P2PStream, circuit: trio.CancelScope) -> None:
        left = self._limits.circuit_bytes
        try:
            while data := await from_.receive_some(_CHUNK_BYTES):
                left -= len(data)
                if left < 0:
                    _log.info("relay_circuit_used_up", source=from_.remote_peer, target=to.remote_peer)
                    circuit.cancel()
                    return
                self.relayed_bytes += len(data)
                await to.send_all(data)
            await to.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            circuit.cancel()
