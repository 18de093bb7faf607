"""Answering the DHT's questions, and keeping what others put there.

What a peer can make this one do is bounded at the edge: the size of a message, streams of one peer and of all, calls
of one peer by a token bucket. What is stored is only what `KadStore` accepts: node records that hold, by their owner's
signature, whoever brings them; and provider entries of the very peer that speaks. Anything else, a foreign namespace
above all, resets the stream, as the kad-dht specification says, and is counted by its reason.

A question never puts the asker into the routing table: who opens a stream may be a client, or anybody. `met` tells
the DHT of it, which looks for itself (`dht`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.node_records import MAX_RECORD_BYTES, RecordRefused, RecordRule, node_of_key
from ngpu_protocol.p2p.kad_messages import (
    KadKind,
    KadMessage,
    KadPeer,
    MessageReader,
    encode_message,
    kad_position,
    peer_id_bytes,
)
from ngpu_protocol.p2p.kad_store import KadStore
from ngpu_protocol.p2p.kad_table import KadTable
from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["KadServer", "KadServerLimits"]

_log = structlog.get_logger(__name__)

_MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 4096
_MAX_PROVIDERS_IN_REQUEST = 8
_ADDRESSES_PER_PROVIDER = 3


@dataclass(frozen=True, slots=True)
class KadServerLimits:
    """What others may ask of this peer.

    Attributes:
        streams: inbound DHT streams in all; one more is reset. (The library allows 12, which two lookups fill.)
        streams_per_peer: the same of one peer.
        idle_s: how long a stream may be silent between two messages.
        calls_per_s: of one peer, in the long run.
        calls_burst: of one peer, at once.
    """

    streams: int = 1024
    streams_per_peer: int = 16
    idle_s: float = 60.0
    calls_per_s: float = 50.0
    calls_burst: float = 500.0


class _Refused(Exception):
    """The remote broke a rule; its stream is reset."""


class KadServer:
    """The answering side of one host's DHT.

    Attributes:
        refused: how often what was refused, by reason.
        answered: calls answered.
    """

    def __init__(
        self,
        own_id: bytes,
        own: Callable[[], KadPeer],
        table: KadTable,
        store: KadStore,
        *,
        now_ms: Callable[[], int],
        met: Callable[[str], None],
        limits: KadServerLimits | None = None,
    ) -> None:
        self._own_id = own_id
        self._own = own
        self._table = table
        self._store = store
        self._now_ms = now_ms
        self._met = met
        self._limits = limits or KadServerLimits()
        self._streams: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens left, and when that was
        self.refused: Counter[str] = Counter()
        self.answered = 0

    async def serve(self, stream: P2PStream) -> None:
        """Answer on *stream* until it ends."""
        peer = stream.remote_peer
        limits = self._limits
        if self._streams.total() >= limits.streams or self._streams[peer] >= limits.streams_per_peer:
            self._refuse(stream, "too_many_streams")
            return
        self._streams[peer] += 1
        try:
            await self._converse(stream, peer)
        except RecordRefused as error:
            self._refuse(stream, error.rule)
        except (_Refused, MalformedError) as error:
            self._refuse(stream, str(error) if isinstance(error, _Refused) else "malformed_message")
        except trio.TooSlowError:
            pass  # idle: closed, not reset
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def _refuse(self, stream: P2PStream, reason: str) -> None:
        self.refused[reason] += 1
        _log.debug("dht_refused", peer=stream.remote_peer, reason=reason)
        stream.reset_nowait()

    async def _converse(self, stream: P2PStream, peer: str) -> None:
        reader = MessageReader(stream, max_bytes=_MAX_REQUEST_BYTES, max_providers=_MAX_PROVIDERS_IN_REQUEST)
        while True:
            with trio.fail_after(self._limits.idle_s):
                message = await reader.next()
            if message is None:
                return
            self._pay(peer)
            answer = self.answer(peer, message)
            self._met(peer)
            if answer is None:
                return  # a page that is full: the end without an echo says so
            self.answered += 1
            with trio.fail_after(self._limits.idle_s):
                await stream.send_all(encode_message(answer))

    def _pay(self, peer: str) -> None:
        """Take one call off what *peer* may make."""
        now_s = trio.current_time()
        limits = self._limits
        left, then_s = self._buckets.get(peer, (limits.calls_burst, now_s))
        left = min(limits.calls_burst, left + (now_s - then_s) * limits.calls_per_s) - 1
        if len(self._buckets) >= 8192 and peer not in self._buckets:
            full_s = limits.calls_burst / limits.calls_per_s
            self._buckets = {p: b for p, b in self._buckets.items() if now_s - b[1] < full_s}
        self._buckets[peer] = (max(left, 0.0), now_s)
        if left < 0:
            raise _Refused("too_many_calls")

    def answer(self, peer: str, message: KadMessage) -> KadMessage | None:
        """Return the answer to *message* of *peer*; None for a provider there is no room for.

        Raises:
            RecordRefused: the record that is put breaks a rule.
            MalformedError: the message lacks what its kind needs.
        """
        now_ms = self._now_ms()
        kind, key = message.kind, message.key
        if kind is KadKind.PING:
            return message
        if not key:
            raise MalformedError("DHT message", "no key")
        match kind:
            case KadKind.PUT_VALUE:
                if message.value is None:
                    raise MalformedError("DHT message", "no record to put")
                self._store.put_record(key, message.value, now_ms)
                return KadMessage(kind, key, message.value)
            case KadKind.ADD_PROVIDER:
                return self._add_provider(peer, message, now_ms)
            case KadKind.GET_VALUE:
                held = self._store.record(key, now_ms)
                return KadMessage(kind, key, None if held is None else held.encode(), closer=self._closer(key))
            case KadKind.GET_PROVIDERS:
                providers = tuple(self._store.providers(key, now_ms))
                return KadMessage(kind, key, closer=self._closer(key), providers=providers)
            case _:
                return KadMessage(kind, key, closer=self._closer(key))

    def _add_provider(self, peer: str, message: KadMessage, now_ms: int) -> KadMessage | None:
        if node_of_key(message.key) is not None:
            raise RecordRefused(RecordRule.FOREIGN_KEY, "a node's key has a record, not providers")
        sender = peer_id_bytes(peer)
        own_entries = [entry for entry in message.providers if entry.id == sender]
        if not own_entries:
            raise _Refused("provider_is_not_sender")
        entry = KadPeer(sender, own_entries[0].addresses[:_ADDRESSES_PER_PROVIDER])
        if not self._store.add_provider(message.key, entry, now_ms):
            return None
        return KadMessage(message.kind, message.key, providers=(entry,))

    def _closer(self, key: bytes) -> tuple[KadPeer, ...]:
        peers = tuple(self._table.closest(kad_position(key)))
        # Specification: a peer asked for itself names itself.
        return (self._own(), *peers[:-1]) if key == self._own_id else peers
