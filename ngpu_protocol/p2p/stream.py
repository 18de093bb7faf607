"""One stream of a peer's connection, as a `trio.abc.HalfCloseableStream`.

Owns the stream's half of yamux: what was received and not yet read, the credit given and got, and which ends are
closed. Frames and the socket are the muxer's (`yamux.py`).

What a reader can rely on: ``b""`` means that the remote said it had sent everything. A reset, a lost connection or a
killed peer is `trio.BrokenResourceError`, after whatever had arrived before it. (The library answers all of them
alike with an end of stream, so that half an answer looks whole.)

What a writer can rely on: `send_all` waits for the remote to read, for as long as the caller lets it. (The library
resets the stream after 5 s, and does not tell the reader.)
"""

from __future__ import annotations

from collections import deque
from operator import index
from typing import TYPE_CHECKING

import trio

from ngpu_protocol.identity import Address, AddressError, address_of_peer_id
from ngpu_protocol.p2p.errors import NoAccountError

if TYPE_CHECKING:
    from ngpu_protocol.p2p.yamux import Muxer

__all__ = ["INITIAL_WINDOW_BYTES", "P2PStream"]

INITIAL_WINDOW_BYTES = 256 * 1024  # yamux specification: both directions of every stream begin with it
_READ_BYTES = 64 * 1024
_YIELD_BYTES = 64 * 1024
_SMALL_BYTES = 1024


class P2PStream(trio.abc.HalfCloseableStream):
    """A reliable, ordered, two-way byte stream to one peer, closed by its holder.

    Sending and receiving may go on at the same time, each by one task. A call that can finish at once checks for
    cancellation but does not give up the processor: reads are bounded by the window, and writes yield every 64 KiB.
    """

    __slots__ = (
        "_broken",
        "_buffered",
        "_chunks",
        "_closed",
        "_fin_received",
        "_fin_sent",
        "_grant_time",
        "_half_free",
        "_linger_until",
        "_muxer",
        "_receive_credit",
        "_receiver",
        "_send_credit",
        "_sender",
        "_sending",
        "_since_grant",
        "_since_yield",
        "_window",
        "opened_here",
        "protocol",
        "stream_id",
    )

    def __init__(self, muxer: Muxer, stream_id: int, *, opened_here: bool) -> None:
        self._muxer = muxer
        self.stream_id = stream_id
        self.opened_here = opened_here
        self.protocol = ""  # what was negotiated on it
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._receive_credit = INITIAL_WINDOW_BYTES  # what the remote may still send
        self._window = INITIAL_WINDOW_BYTES  # what it may have in flight and unread in all; grows when it is short
        self._since_grant = 0  # read here, not given back as credit yet
        self._grant_time = 0.0
        self._send_credit = INITIAL_WINDOW_BYTES
        self._since_yield = 0
        self._receiver: trio.lowlevel.Task | None = None
        self._sender: trio.lowlevel.Task | None = None
        self._sending = False
        self._fin_sent = False
        self._fin_received = False
        self._broken = ""  # why nothing more will come or go, unless an end was sent before
        self._closed = False
        self._half_free = False  # of the stream and its handler one has ended (streams of the remote's)
        self._linger_until = 0.0

    @property
    def remote_peer(self) -> str:
        """The PeerId the handshake proved."""
        return self._muxer.peer_text

    @property
    def remote_address(self) -> Address:
        """The account address of the remote.

        Raises:
            NoAccountError: its key is not secp256k1: a foreign libp2p peer.
        """
        try:
            return address_of_peer_id(self._muxer.peer_text)
        except AddressError as error:
            raise NoAccountError(str(error)) from error

    @property
    def remote_ip(self) -> str:
        """The IP address its connection comes from; empty where the transport has none (a relay)."""
        endpoint = self._muxer.get_remote_address()
        return str(endpoint[0]).partition("%")[0] if endpoint else ""

    @property
    def remote_endpoint(self) -> tuple[str, int] | None:
        """IP address and port the connection comes from or goes to; None for one that is relayed."""
        return self._muxer.get_remote_address()

    @property
    def buffered_bytes(self) -> int:
        """What has been received and not been read; never above the stream's window."""
        return self._buffered

    def __repr__(self) -> str:
        return f"<P2PStream {self.stream_id} {self.protocol or 'unnegotiated'} with {self._muxer.peer_text}>"

    # Sending.

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand all of *data* to the connection, waiting for the remote to make room for as long as it takes.

        Bound the wait with a cancel scope. Once cancelled, or after an error, how much went out is unknown, and the
        stream can only be reset.

        Raises:
            trio.BrokenResourceError: the remote reset the stream or the connection is gone.
            trio.ClosedResourceError: the stream was closed here, or its sending end with `send_eof`.
            trio.BusyResourceError: another task is sending.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_sendable()
        if isinstance(data, memoryview):
            data = data.cast("B")
        size = len(data)
        muxer = self._muxer
        if size <= muxer.max_payload and size <= self._send_credit and muxer.has_room:
            if not size:
                return
            self._send_credit -= size
            muxer.send_data(self.stream_id, data)
            self._since_yield += size
            if self._since_yield >= _YIELD_BYTES:
                self._since_yield = 0
                await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._sending = True
        try:
            await self._send_pieces(memoryview(data))
        finally:
            self._sending = False

    async def _send_pieces(self, view: memoryview) -> None:
        muxer = self._muxer
        sent = 0
        while sent < len(view):
            if not muxer.has_room:
                await muxer.wait_room()
            elif not self._send_credit:
                await self._wait_credit()
            else:
                size = min(len(view) - sent, self._send_credit, muxer.max_payload)
                self._send_credit -= size
                muxer.send_data(self.stream_id, view[sent : sent + size])
                sent += size
                self._since_yield += size
                if self._since_yield >= _YIELD_BYTES:
                    self._since_yield = 0
                    await trio.lowlevel.checkpoint()
            self._check_sendable()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until at least one byte could be sent without waiting."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_sendable()
        self._sending = True
        try:
            while not (self._send_credit and self._muxer.has_room):
                await (self._wait_credit() if not self._send_credit else self._muxer.wait_room())
                self._check_sendable()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Tell the remote that everything has been sent; receiving goes on. Twice is the same as once.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError: as `send_all`.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint()
        if self._fin_sent and not self._closed:
            return
        self._check_sendable()
        self._fin_sent = True
        self._muxer.send_fin(self)

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        if self._broken:
            raise trio.BrokenResourceError(self._broken)
        if self._fin_sent:
            raise trio.ClosedResourceError("this stream's sending end was closed here")

    async def _wait_credit(self) -> None:
        self._sender = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sender = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    # Receiving.

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has arrived, at most *max_bytes* (64 KiB unless told), waiting if that is nothing yet.

        ``b""`` is the remote's own end of stream, and stays so.

        Raises:
            trio.BrokenResourceError: the remote reset the stream, or the connection was lost, before that end.
            trio.ClosedResourceError: the stream was closed here.
            trio.BusyResourceError: another task is receiving.
        """
        if max_bytes is None:
            max_bytes = _READ_BYTES
        elif index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiver is not None:
            raise trio.BusyResourceError("another task is receiving on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks:
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed here")
            if self._fin_received:
                return b""
            if self._broken:
                raise trio.BrokenResourceError(self._broken)
            await self._wait_data()
        data = self._take(max_bytes)
        size = len(data)
        self._buffered -= size
        self._since_grant += size
        # Credit goes back in halves of a window, so that small messages cost no frame of their own.
        if self._since_grant * 2 >= self._window and not self._fin_received and not self._broken:
            self._muxer.grant(self)
        return data

    def _take(self, max_bytes: int) -> bytes:
        chunks = self._chunks
        head = chunks[0]
        if len(head) > max_bytes:
            chunks[0] = head[max_bytes:]
            return head[:max_bytes]
        chunks.popleft()
        if not chunks or len(head) + len(chunks[0]) > max_bytes:
            return head
        gathered = [head]
        size = len(head)
        while chunks and size + len(chunks[0]) <= max_bytes:
            size += len(chunks[0])
            gathered.append(chunks.popleft())
        return b"".join(gathered)

    async def _wait_data(self) -> None:
        self._receiver = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._receiver = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def is_readable(self) -> bool:
        """Return whether `receive_some` would return, or raise, without waiting. An idle stream that is was ended."""
        return bool(self._chunks or self._fin_received or self._broken or self._closed)

    def unread(self, data: bytes) -> None:
        """Put *data*, just received, back in front of what is still to be read."""
        if data:
            self._chunks.appendleft(data)
            self._buffered += len(data)
            self._since_grant -= len(data)

    # Ending.

    async def aclose(self) -> None:
        """End both directions: a clean end of what was sent, and no more interest in what is to come.

        Should the remote not end its own direction within `HostLimits.linger_s`, the stream is reset under it. Use
        `reset` where what was sent is not complete.
        """
        self.close_nowait()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Abandon the stream: the remote gets an error, never an end of stream, unless it had one already."""
        self.reset_nowait()
        await trio.lowlevel.checkpoint()

    def close_nowait(self) -> None:
        """`aclose` without the checkpoint, for clean-up that must not be interrupted."""
        if self._closed:
            return
        self._closed = True
        self._drop_buffer()
        if not self._broken:
            if not self._fin_sent:
                self._fin_sent = True
                self._muxer.send_fin(self)
            if not self._fin_received:
                self._muxer.linger(self)
        self._wake()

    def reset_nowait(self) -> None:
        """`reset` without the checkpoint."""
        if not self._broken and not (self._fin_sent and self._fin_received):
            self._broken = "reset here"
            self._muxer.send_reset(self)
        self._closed = True
        self._drop_buffer()
        self._wake()

    # The muxer's side: none of these wait.

    def deliver(self, data: bytes) -> bool:
        """Take bytes within the credit, already accounted for; return whether that woke a reader."""
        if self._closed:
            return False
        chunks = self._chunks
        if chunks and len(data) < _SMALL_BYTES and len(chunks[-1]) < _SMALL_BYTES:
            # A window full of one-byte frames must not become 256 Ki objects of 34 bytes.
            chunks[-1] += data
        else:
            chunks.append(data)
        self._buffered += len(data)
        if self._receiver is not None:
            task, self._receiver = self._receiver, None
            trio.lowlevel.reschedule(task)
            return True
        return False

    def add_credit(self, count: int) -> None:
        """Allow *count* more bytes to be sent."""
        self._send_credit += count
        if self._sender is not None:
            task, self._sender = self._sender, None
            trio.lowlevel.reschedule(task)

    def end_received(self) -> None:
        """The remote has sent everything."""
        self._fin_received = True
        self._wake()

    def break_off(self, reason: str) -> None:
        """Nothing more will come or go: the remote reset the stream or the connection is lost."""
        if not self._broken:
            self._broken = reason
        self._wake()

    def _drop_buffer(self) -> None:
        self._chunks.clear()
        self._buffered = 0

    def _wake(self) -> None:
        if self._receiver is not None:
            task, self._receiver = self._receiver, None
            trio.lowlevel.reschedule(task)
        if self._sender is not None:
            task, self._sender = self._sender, None
            trio.lowlevel.reschedule(task)
