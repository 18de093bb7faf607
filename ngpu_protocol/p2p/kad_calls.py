"""Asking peers of the DHT: one call, bounded, over a connection and a stream that are kept a while.

A lookup talks to a dozen peers and the next to many of the same, so a stream stays open for `IDLE_S` after a call, and
so does a connection that was dialled for one; then both are closed, because an idle connection is not free (a sign
of life every two seconds, both ways). A connection that carries any other stream is somebody else's, and left alone.

A peer that cannot be dialled is not tried again for a while: every lookup after an outage would otherwise meet the
same dead in everybody's answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import trio

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.errors import BadMultiaddrError, DialError, P2PError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.kad_messages import (
    KadMessage,
    KadPeer,
    MessageReader,
    encode_message,
    multiaddr_text,
    peer_id_text,
)
from ngpu_protocol.p2p.kad_store import PROVIDERS_PER_KEY
from ngpu_protocol.p2p.kad_walk import CallFailed
from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["KadCalls"]

IDLE_S = 20.0
MAX_ANSWER_BYTES = 512 * 1024
MAX_DIALS_PER_PEER = 3
UNREACHABLE_S = 15.0
MAX_REMEMBERED = 4096
_LINES_PER_PEER = 4
_REAP_S = 5.0


@dataclass(slots=True)
class _Line:
    """A stream between two calls."""

    stream: P2PStream
    reader: MessageReader
    idle_since_s: float


class KadCalls:
    """The calling side of one host's DHT."""

    def __init__(self, host: Host, protocol: str, *, call_timeout_s: float = 2.0, dial_timeout_s: float = 1.5) -> None:
        self._host = host
        self._protocol = protocol
        self._call_timeout_s = call_timeout_s
        self._dial_timeout_s = dial_timeout_s
        self._lines: dict[bytes, list[_Line]] = {}
        self._dialled_s: dict[bytes, float] = {}
        self._unreachable_until_s: dict[bytes, float] = {}
        self._dialling: dict[bytes, trio.Event] = {}
        self.sent = 0

    async def call(self, peer: KadPeer, message: KadMessage) -> KadMessage:
        """Return *peer*'s answer to *message*, dialling it if need be.

        Raises:
            CallFailed: it cannot be reached, does not speak the protocol, or did not answer this in time.
        """
        line = self._kept(peer.id)
        if line is not None:
            try:
                return await self._exchange(peer, line, message)
            except _LineLost:
                pass  # the peer closed the stream while it was idle; every call may be made twice
        line = await self._open(peer)
        try:
            return await self._exchange(peer, line, message)
        except _LineLost as error:
            raise CallFailed(f"{peer_id_text(peer.id)}: {error}") from error

    async def _exchange(self, peer: KadPeer, line: _Line, message: KadMessage) -> KadMessage:
        self.sent += 1
        done = False
        try:
            with trio.fail_after(self._call_timeout_s):
                await line.stream.send_all(encode_message(message))
                answer = await line.reader.next()
            if answer is None:
                raise _LineLost("it closed the stream")
            if answer.kind is not message.kind:
                raise CallFailed(f"{peer_id_text(peer.id)}: asked {message.kind.name}, got {answer.kind.name}")
            done = line.reader.empty
        except trio.TooSlowError as error:
            raise CallFailed(f"{peer_id_text(peer.id)}: no answer within {self._call_timeout_s:g} s") from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _LineLost(str(error)) from error
        except MalformedError as error:
            raise CallFailed(f"{peer_id_text(peer.id)}: {error}") from error
        finally:
            # Also when cancelled, as walks do to questions they no longer need.
            if not done:
                line.stream.reset_nowait()
        if done:  # else something came unasked, and the stream is not used again
            self._keep(peer.id, line)
        return answer

    def _keep(self, peer_id: bytes, line: _Line) -> None:
        lines = self._lines.setdefault(peer_id, [])
        if len(lines) < _LINES_PER_PEER:
            line.idle_since_s = trio.current_time()
            lines.append(line)
        else:
            line.stream.close_nowait()

    def _kept(self, peer_id: bytes) -> _Line | None:
        lines = self._lines.get(peer_id)
        if not lines:
            return None
        line = lines.pop()
        if not lines:
            del self._lines[peer_id]
        return line

    async def _open(self, peer: KadPeer) -> _Line:
        peer_text = peer_id_text(peer.id)
        try:
            await self._reach(peer, peer_text)
            stream = await self._host.open_stream(peer_text, self._protocol, timeout_s=self._call_timeout_s)
        except P2PError as error:
            raise CallFailed(str(error)) from error
        reader = MessageReader(stream, max_bytes=MAX_ANSWER_BYTES, max_providers=PROVIDERS_PER_KEY)
        return _Line(stream, reader, trio.current_time())

    async def _reach(self, peer: KadPeer, peer_text: str) -> None:
        """Return once *peer* is connected; one task dials, others that want the same peer wait for it."""
        while not self._host.is_connected(peer_text):
            now_s = trio.current_time()
            if self._unreachable_until_s.get(peer.id, 0.0) > now_s:
                raise CallFailed(f"{peer_text} could not be dialled a moment ago")
            under_way = self._dialling.get(peer.id)
            if under_way is not None:
                await under_way.wait()
                continue
            self._dialling[peer.id] = trio.Event()
            try:
                await self._dial(peer, peer_text)
            finally:
                self._dialling.pop(peer.id).set()

    async def _dial(self, peer: KadPeer, peer_text: str) -> None:
        for address in peer.addresses[:MAX_DIALS_PER_PEER]:
            text = multiaddr_text(address)
            if text is None:
                continue
            try:
                await self._host.connect(f"{text}/p2p/{peer_text}", timeout_s=self._dial_timeout_s)
            except (DialError, BadMultiaddrError):
                continue
            self._dialled_s[peer.id] = trio.current_time()
            self._unreachable_until_s.pop(peer.id, None)
            return
        self._give_up(peer.id, peer_text)

    def _give_up(self, peer_id: bytes, peer_text: str) -> NoReturn:
        if len(self._unreachable_until_s) >= MAX_REMEMBERED:
            self._unreachable_until_s.clear()
        self._unreachable_until_s[peer_id] = trio.current_time() + UNREACHABLE_S
        raise CallFailed(f"{peer_text} cannot be dialled")

    async def run(self) -> NoReturn:
        """Close what has been idle too long, until cancelled."""
        try:
            while True:
                await trio.sleep(_REAP_S)
                await self._reap(trio.current_time() - IDLE_S)
        finally:
            for lines in self._lines.values():
                for line in lines:
                    line.stream.close_nowait()

    async def _reap(self, idle_since_s: float) -> None:
        for peer_id, lines in list(self._lines.items()):
            for line in [line for line in lines if line.idle_since_s <= idle_since_s]:
                lines.remove(line)
                line.stream.close_nowait()
            if not lines:
                del self._lines[peer_id]
        for peer_id, dialled_s in list(self._dialled_s.items()):
            peer_text = peer_id_text(peer_id)
            if not self._host.is_connected(peer_text):
                del self._dialled_s[peer_id]
            elif dialled_s <= idle_since_s and not self._host.stream_count(peer_text):
                del self._dialled_s[peer_id]
                await self._host.disconnect(peer_text)
        now_s = trio.current_time()
        for peer_id in [peer_id for peer_id, until_s in self._unreachable_until_s.items() if until_s <= now_s]:
            del self._unreachable_until_s[peer_id]


class _LineLost(Exception):
    """The stream ended or was reset before an answer."""
