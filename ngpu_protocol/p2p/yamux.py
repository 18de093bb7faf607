"""Yamux: many streams over one secured connection (specification: hashicorp/yamux, spec.md; libp2p yamux).

Owns one connection from the end of its handshake: frames, credit, liveness, and its end. What a stream means to its
user is `stream.py`; which handler a new one gets is the host's.

Every frame is a 12-byte header: version, type, flags, stream id, length, big-endian. Streams of the side that dialled
have odd ids. SYN opens a stream, FIN ends one direction, RST both. Each direction of a stream begins with 256 KiB of
credit; the receiver gives more with WINDOW_UPDATE.

This is our own muxer and not the library's, because what is wrong there is in its frame loop, where no subclass gets
at it, and because of what it costs:

- its write gives up, and resets, after 5 s without credit; while it waits it polls every 10 ms;
- its read side does not enforce the window (a sender that ignored it made a host buffer 204 MB);
- it turns resets and lost connections into ends of stream;
- a 1 KiB echo costs both ends together 0.5 to 0.8 ms of processor time there; here 0.11 to 0.16 ms alone, 0.02 ms
  among 16 or more (tests/bench/p2p_stream.py): whole reads are decrypted and parsed at once, no log lines are
  formatted, and what all streams send in one turn of the event loop is one message and one system call.

Rules the code keeps:

- The read loop never waits for a stream's user or for the socket to take what it answers. So liveness can be judged by
  bytes received, and no two hosts can block each other.
- What a peer can make this side queue is bounded: data by the senders' own waiting (`has_room`), answers to its
  frames by `_MAX_QUEUE_BYTES`, above which a peer that does not read what it asked for is dropped.
- A peer that breaks the protocol loses the connection, since nothing it sends afterwards can be trusted.
- All state is changed without awaiting, so it is consistent wherever a task is cancelled.
- The writer task writes what one turn of the loop queued, together. (Writing small frames at once from the sender's own
  task was tried: 9 us less for a lone echo, 10 us more for each of 16, where every frame became a message and a system
  call.) A turn that lasts longer than `_HELD_S` writes in between, or the peer would stand idle for all of it: two
  daemons under load passed all their requests back and forth in one wave.
- For the same reason the read loop wakes `_WOKEN_AT_ONCE` readers and lets them run before it looks further: the first
  are on their way when the last begin. At 16 clients, on a machine that others used too, a bootstrap was idle for 18 to
  21 % of the time without this, 14 to 19 % with four at once, 5 to 10 % with two and 3 to 7 % with one; the turns that
  two add cost 4 % of processor time, those of one 8 %.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

import structlog
import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from ngpu_protocol.p2p.limits import HostLimits
from ngpu_protocol.p2p.links import LinkClosedError
from ngpu_protocol.p2p.noise import MAX_PLAINTEXT_BYTES, NoiseChannel
from ngpu_protocol.p2p.stream import INITIAL_WINDOW_BYTES, P2PStream

__all__ = ["PROTOCOL", "Muxer", "PeerQuota"]

_log = structlog.get_logger(__name__)

PROTOCOL = TProtocol("/yamux/1.0.0")

_HEADER = struct.Struct("!BBHII")
_HEADER_BYTES = 12
_pack = _HEADER.pack
_unpack_from = _HEADER.unpack_from

_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_GO_AWAY_NORMAL, _GO_AWAY_PROTOCOL_ERROR = 0, 1
_MAX_STREAM_ID = 2**32 - 2

_ROOM_BYTES = 256 * 1024  # senders wait while more than this is queued for the socket
_MAX_QUEUE_BYTES = 1024 * 1024
_WOKEN_AT_ONCE = 2  # readers woken by what came, before they get a turn of the loop
_HELD_S = 0.00025  # how long the first frame of a busy turn of the loop waits for others
_MEASURE_S = 15.0  # how often the round trip is measured while there is traffic
_MIN_RTT_S = 0.005  # a window that lasted less than four of these was too small, however near the peer is


class PeerQuota:
    """What the streams of one peer share, over all its connections."""

    def __init__(self, limits: HostLimits, *, known: bool = True) -> None:
        self.streams_left = limits.streams_per_peer if known else limits.streams_per_stranger
        self.growth_left = limits.window_growth_bytes_per_peer if known else 0


class ProtocolViolationError(Exception):
    """The peer sent what yamux does not allow."""


class Muxer(IMuxedConn):
    """One live connection to one peer.

    Attributes:
        peer_id: the peer, as the library names it.
        peer_text: the same as base58 text.
        event_closed: set once nothing more will come or go.
        close_reason: why, in one line; empty while open.
        rtt_s: smoothed round-trip time, None until measured.
    """

    max_payload = MAX_PLAINTEXT_BYTES - _HEADER_BYTES  # a data frame and its header fill one noise message

    def __init__(self, channel: NoiseChannel, peer_id: ID, limits: HostLimits) -> None:
        self.secured_conn = channel
        self.peer_id = peer_id
        self.peer_text = peer_id.to_base58()
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.close_reason = ""
        self.rtt_s: float | None = None
        self.has_room = True
        self._limits = limits
        self._channel = channel
        self._link = channel.link
        self._quota = PeerQuota(limits)
        self._accept: Callable[[P2PStream], None] = self._refuse
        self._on_close: Callable[[], None] = lambda: None
        self._initiator = channel.is_initiator
        self._next_id = 1 if self._initiator else 2
        self._last_remote_id = 0
        self._streams: dict[int, P2PStream] = {}
        self._lingering: dict[int, P2PStream] = {}
        self._going_away = False
        self._scope = trio.CancelScope()
        # Sending: frames not yet sealed, sealed bytes the socket did not take, and who waits for either to go.
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._unsent: list[bytes] = []
        self._room = trio.lowlevel.ParkingLot()
        self._queued_s = 0.0  # when the first frame of the outbox came
        self._writer: trio.lowlevel.Task | None = None
        # Receiving: a header cut by the end of a message, frames to come, and the data frame that is being received.
        self._partial = b""
        self._held_back = b""  # frames that wait for a turn of the loop
        self._body_left = 0
        self._body_stream: P2PStream | None = None
        self._body_flags = 0
        self._last_received = 0.0
        self._ping_id = 0
        self._ping_sent = 0.0

    def attach(self, quota: PeerQuota, accept: Callable[[P2PStream], None], on_close: Callable[[], None]) -> None:
        """Say what the peer's connections share, who takes its streams, and who hears of the end; before `run`.

        Whoever takes a stream calls `served` once, when its handler has ended.
        """
        self._quota = quota
        self._accept = accept
        self._on_close = on_close

    # Life.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connection until it ends. Never raises: the end is `close_reason`."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._write_loop)
                nursery.start_soon(self._watch)
                self._last_received = trio.current_time()
                self.event_started.set()
                task_status.started()
                await self._read_loop()
                # Closed before this began, the connection had no tasks yet that its end could stop.
                nursery.cancel_scope.cancel()
        except Exception:
            # One connection's failure stays its own; in this nursery it would be the host's.
            _log.exception("connection_failed", peer=self.peer_text)
            self.close_nowait("failed here")
        finally:
            self.close_nowait("closed here")

    async def start(self) -> None:
        """The library's name for `run`."""
        await self.run()

    async def _read_loop(self) -> None:
        channel = self._channel
        try:
            if early := channel.take_unread():
                self._feed(early)
            while messages := await channel.receive():
                self._last_received = trio.current_time()
                for message in messages:
                    self._feed(message)
                    while self._held_back:
                        await trio.lowlevel.checkpoint()
                        self._feed(b"")
            self.close_nowait("closed by the peer")
        except LinkClosedError as error:
            self.close_nowait(str(error))
        except ProtocolViolationError as error:
            self.close_nowait(f"the peer broke the protocol: {error}", _GO_AWAY_PROTOCOL_ERROR)

    async def _watch(self) -> None:
        """Ask for a sign of life after silence, and close when none comes (a frozen peer's kernel still acks TCP)."""
        interval, timeout = self._limits.health_interval_s, self._limits.health_timeout_s
        tick = min(interval, timeout)
        seen, silent_ticks = self._last_received, 0
        self._ping()  # also the first measure of the round trip
        measured = trio.current_time()
        while True:
            await trio.sleep(tick)
            if trio.current_time() - measured >= _MEASURE_S:
                measured = trio.current_time()
                self._ping()
            self._end_lingering(trio.current_time())
            if self._last_received != seen:
                seen, silent_ticks = self._last_received, 0
                continue
            # Ticks and not the clock: while this process itself stood still, the peer may have answered.
            silent_ticks += 1
            if silent_ticks * tick >= interval + timeout:
                self.close_nowait(f"frozen: silent for {trio.current_time() - seen:.1f} s")
                return
            if silent_ticks * tick >= interval > (silent_ticks - 1) * tick:
                self._ping()

    def _ping(self) -> None:
        self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
        self._ping_sent = trio.current_time()
        self._send_control(_pack(0, _PING, _SYN, 0, self._ping_id))

    def close_nowait(self, reason: str, code: int = _GO_AWAY_NORMAL) -> None:
        """End the connection now; what the socket takes without waiting still goes out."""
        if self.close_reason:
            return
        self.close_reason = reason
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.break_off(f"connection lost: {reason}")
        self._outbox.append(_pack(0, _GO_AWAY, 0, 0, code))
        with suppress(LinkClosedError):
            self._pump()
        self._link.close()
        self._scope.cancel()
        self._room.unpark_all()
        self.event_closed.set()
        self._on_close()

    async def close(self) -> None:
        """`close_nowait`, as the library calls it."""
        self.close_nowait("closed here")

    async def close_gracefully(self, reason: str, timeout_s: float) -> None:
        """Send what is queued, say goodbye, and give the peer *timeout_s* to hang up, so that it loses nothing.

        A socket closed while something unread is in its buffer makes the kernel reset the connection, and a reset
        drops what the peer has not read yet.
        """
        if self.close_reason:
            return
        self._going_away = True
        with trio.move_on_after(timeout_s):
            self._send_control(_pack(0, _GO_AWAY, 0, 0, _GO_AWAY_NORMAL))
            # What is queued stays queued once the connection has ended, and then there is nothing to wait for.
            while (self._outbox or self._unsent) and not self.close_reason:
                await self.wait_room()
            self._link.shutdown()
            await self.event_closed.wait()
        self.close_nowait(reason)

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.close_reason

    @property
    def is_closed(self) -> bool:
        return bool(self.close_reason)

    @property
    def usable(self) -> bool:
        """Whether new streams may be opened."""
        return not self.close_reason and not self._going_away

    @property
    def stream_count(self) -> int:
        """Streams open in either direction."""
        return len(self._streams)

    @property
    def buffered_bytes(self) -> int:
        """What this peer has sent and nobody has read."""
        return sum(stream.buffered_bytes for stream in self._streams.values())

    # Streams.

    def open(self) -> P2PStream:
        """Return a new stream; its first frame goes out with whatever is sent first.

        Raises:
            MuxedConnUnavailable: the connection is closed or closing.
        """
        if not self.usable or self._next_id > _MAX_STREAM_ID:
            raise MuxedConnUnavailable(self.close_reason or "the connection is closing")
        stream = P2PStream(self, self._next_id, opened_here=True)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self._queue(_pack(0, _WINDOW_UPDATE, _SYN, stream.stream_id, 0))
        self._wake_writer()
        return stream

    def _forget(self, stream: P2PStream) -> None:
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._lingering.pop(stream.stream_id, None)
        self._quota.growth_left += stream._window - INITIAL_WINDOW_BYTES
        stream._window = INITIAL_WINDOW_BYTES
        if not stream.opened_here:
            self._give_back(stream)

    def _refuse(self, stream: P2PStream) -> None:
        stream.reset_nowait()
        self.served(stream)

    def served(self, stream: P2PStream) -> None:
        """Take note that the handler of a stream of the peer's is done: the stream's place is free once it is too.

        A peer that resets what it opens would otherwise have handlers without number (HTTP/2's rapid reset).
        """
        self._give_back(stream)

    def _give_back(self, stream: P2PStream) -> None:
        if stream._half_free:
            self._quota.streams_left += 1
        stream._half_free = True

    def linger(self, stream: P2PStream) -> None:
        """Wait a little for the remote's end of a stream nobody reads any more."""
        stream._linger_until = trio.current_time() + self._limits.linger_s
        self._lingering[stream.stream_id] = stream

    def _end_lingering(self, now: float) -> None:
        for stream in [s for s in self._lingering.values() if s._linger_until <= now]:
            stream.break_off("closed here")
            self.send_reset(stream)

    def send_fin(self, stream: P2PStream) -> None:
        """Tell the remote that *stream* has sent everything."""
        self._send_control(_pack(0, _WINDOW_UPDATE, _FIN, stream.stream_id, 0))
        if stream._fin_received:
            self._forget(stream)

    def send_reset(self, stream: P2PStream) -> None:
        """Tell the remote that *stream* is abandoned, and forget it."""
        if stream.stream_id in self._streams:
            self._forget(stream)
            self._send_control(_pack(0, _WINDOW_UPDATE, _RST, stream.stream_id, 0))

    def grant(self, stream: P2PStream) -> None:
        """Give back as credit what was read, and more if the reader keeps ahead of the window.

        The window doubles when half of it lasted less than four round trips, as go-yamux does: then the sender
        stood waiting for credit, not the reader for data.
        """
        if stream.stream_id not in self._streams:
            return
        now = trio.current_time()
        delta = stream._since_grant
        if now - stream._grant_time < 4 * max(self.rtt_s or 0.0, _MIN_RTT_S):
            growth = min(stream._window, self._limits.stream_window_bytes - stream._window, self._quota.growth_left)
            if growth > 0:
                self._quota.growth_left -= growth
                stream._window += growth
                delta += growth
        stream._grant_time = now
        stream._since_grant = 0
        stream._receive_credit += delta
        self._send_control(_pack(0, _WINDOW_UPDATE, 0, stream.stream_id, delta))

    # Sending. Nothing here waits, except `wait_room` and the writer task.

    def send_data(self, stream_id: int, data: bytes | bytearray | memoryview) -> None:
        """Queue one data frame of at most `max_payload` bytes; the caller has the credit and saw `has_room`."""
        self._queue(b"".join((_pack(0, _DATA, 0, stream_id, len(data)), data)))
        if self._writer is not None:
            self._queued_s = monotonic()
            self._wake_writer()
        elif not self._unsent and monotonic() - self._queued_s > _HELD_S:
            try:
                self._pump()
            except LinkClosedError as error:
                self.close_nowait(str(error))
            self._queued_s = monotonic()

    def _send_control(self, frame: bytes) -> None:
        if self.close_reason:
            return
        self._queue(frame)
        if self._outbox_bytes > _MAX_QUEUE_BYTES:
            self.close_nowait("the peer does not read")
            return
        self._wake_writer()

    def _queue(self, frame: bytes) -> None:
        self._outbox.append(frame)
        self._outbox_bytes += len(frame)
        if self._outbox_bytes >= _ROOM_BYTES:
            self.has_room = False

    def _wake_writer(self) -> None:
        if self._writer is not None:
            task, self._writer = self._writer, None
            trio.lowlevel.reschedule(task)

    def _pump(self) -> bool:
        """Write what the socket takes at once. True if nothing is left."""
        if self._unsent:
            self._unsent = self._link.try_write(self._unsent)
            if self._unsent:
                return False
        while self._outbox:
            frames, self._outbox = self._outbox, []
            self._unsent = self._link.try_write(self._channel.seal(frames))
            if self._unsent:
                return False
        self._outbox_bytes = 0
        if not self.has_room:
            self.has_room = True
        if self._room:
            self._room.unpark_all()
        return True

    async def _write_loop(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._writer = None
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            while True:
                if not self._outbox and not self._unsent:
                    self._writer = trio.lowlevel.current_task()
                    await trio.lowlevel.wait_task_rescheduled(abort)
                while not self._pump():
                    self._unsent = await self._link.write_some(self._unsent)
        except LinkClosedError as error:
            self.close_nowait(str(error))

    async def wait_room(self) -> None:
        """Wait until less is queued, or the connection has ended."""
        if not self.close_reason:
            await self._room.park()

    # Receiving.

    def _feed(self, data: bytes) -> None:
        """Take the next plaintext of the connection, cut anywhere; what `_held_back` keeps is for the next call."""
        if self._partial or self._held_back:
            data = b"".join((self._held_back, self._partial, data))
            self._partial = self._held_back = b""
        at, end = 0, len(data)
        woken = 0
        while at < end:
            if self._body_left:
                size = min(self._body_left, end - at)
                self._body_left -= size
                if self._body_stream is not None:
                    woken += self._body_stream.deliver(data[at : at + size])
                at += size
                if not self._body_left and self._body_flags:
                    self._apply_flags(self._body_stream, self._body_flags)
                if woken >= _WOKEN_AT_ONCE and at < end:
                    self._held_back = data[at:]
                    return
                continue
            if end - at < _HEADER_BYTES:
                self._partial = data[at:]
                return
            version, kind, flags, stream_id, length = _unpack_from(data, at)
            at += _HEADER_BYTES
            if version:
                raise ProtocolViolationError(f"yamux version {version}")
            if kind == _DATA:
                stream = self._stream_for(stream_id, flags)
                if stream is not None:
                    if length > stream._receive_credit:
                        raise ProtocolViolationError("more data than the window allows")
                    if length and stream._fin_received:
                        raise ProtocolViolationError("data after the end of its stream")
                    stream._receive_credit -= length
                flags &= _FIN | _RST
                if length:
                    self._body_left, self._body_stream, self._body_flags = length, stream, flags
                elif flags:
                    self._apply_flags(stream, flags)
            elif kind == _WINDOW_UPDATE:
                stream = self._stream_for(stream_id, flags)
                if stream is not None:
                    if length:
                        stream.add_credit(length)
                    if flags & (_FIN | _RST):
                        self._apply_flags(stream, flags)
            elif kind == _PING:
                self._on_ping(flags, length)
            elif kind == _GO_AWAY:
                self._going_away = True  # streams already open may finish; the peer hangs up when it likes
            else:
                raise ProtocolViolationError(f"yamux frame of type {kind}")

    def _stream_for(self, stream_id: int, flags: int) -> P2PStream | None:
        """Return the stream a frame is for; None if it is one already forgotten here, or refused."""
        if not flags & _SYN:
            stream = self._streams.get(stream_id)
            if stream is None and stream_id >= (self._next_id if self._ours(stream_id) else self._last_remote_id + 1):
                raise ProtocolViolationError(f"stream {stream_id} was never opened")
            return stream
        if not stream_id or self._ours(stream_id):
            raise ProtocolViolationError(f"stream id {stream_id} is not the peer's to give")
        if stream_id in self._streams:
            raise ProtocolViolationError(f"stream {stream_id} is open already")
        # Not necessarily rising: rust-yamux gives ids when a stream is made and opens it when it is first written.
        self._last_remote_id = max(self._last_remote_id, stream_id)
        if self._going_away or self.close_reason or not self._quota.streams_left:
            self._send_control(_pack(0, _WINDOW_UPDATE, _RST, stream_id, 0))
            return None
        self._send_control(_pack(0, _WINDOW_UPDATE, _ACK, stream_id, 0))
        if self.close_reason:
            return None
        self._quota.streams_left -= 1
        stream = P2PStream(self, stream_id, opened_here=False)
        self._streams[stream_id] = stream
        self._accept(stream)
        return stream

    def _ours(self, stream_id: int) -> bool:
        return stream_id % 2 == self._initiator

    def _apply_flags(self, stream: P2PStream | None, flags: int) -> None:
        if stream is None or stream.stream_id not in self._streams:
            return
        if flags & _FIN:
            stream.end_received()
            if stream._fin_sent:
                self._forget(stream)
        if flags & _RST:
            self._forget(stream)
            stream.break_off("reset by the peer")

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & _SYN:
            self._send_control(_pack(0, _PING, _ACK, 0, value))
        elif value == self._ping_id:
            sample = trio.current_time() - self._ping_sent
            self.rtt_s = sample if self.rtt_s is None else (3 * self.rtt_s + sample) / 4

    # The library's side.

    async def open_stream(self) -> IMuxedStream:
        raise MuxedConnUnavailable("streams are opened with `open`")

    async def accept_stream(self) -> IMuxedStream:
        raise MuxedConnUnavailable("streams are handed out as they come")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._channel.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._channel.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._channel.get_connection_type()
