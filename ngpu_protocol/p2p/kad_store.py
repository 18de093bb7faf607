"""What a peer keeps for the DHT: node records and provider entries, bounded and expiring.

Records live as long as they say themselves (`node_records`), so a node that dies is gone from every answer within its
record's lifetime; the library keeps a value 24 h from its arrival, whatever it says. Provider entries live 2 hours,
which covers an epoch of capability keys, and 512 fit a key; the library keeps 20, for 48 hours.

When a store is full, what lies farthest from our own position goes: flooding the network with made-up records or keys
cannot drive out what this peer is responsible for. Pure: the caller brings the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection

from ngpu_protocol.networks import Network
from ngpu_protocol.node_records import RecordRefused, RecordRule, SignedNodeRecord, better, check_record
from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position

__all__ = ["PROVIDERS_PER_KEY", "KadStore"]

MAX_RECORDS = 16384
MAX_RECORD_BYTES_HELD = 32 << 20
MAX_PROVIDER_KEYS = 32768
MAX_PROVIDERS = 131072
PROVIDERS_PER_KEY = 512
PROVIDER_LIFETIME_MS = 2 * 60 * 60 * 1000
_EVICTED_SHARE = 16  # a sixteenth goes at once, so that making room is rare


class KadStore:
    """Records and providers held by one peer."""

    def __init__(self, own_id: bytes, network: Network) -> None:
        self._own = kad_position(own_id)
        self._network = network
        self._records: dict[bytes, SignedNodeRecord] = {}
        self._record_bytes = 0
        self._providers: dict[bytes, dict[bytes, tuple[KadPeer, int]]] = {}
        self._provider_count = 0

    @property
    def record_count(self) -> int:
        """Records held, those just expired included."""
        return len(self._records)

    @property
    def provider_count(self) -> int:
        """Provider entries held over all keys."""
        return self._provider_count

    # Records.

    def put_record(self, key: bytes, value: bytes, now_ms: int) -> SignedNodeRecord:
        """Keep the record in *value* and return it. The very one held already is accepted again.

        Raises:
            RecordRefused: it breaks a rule, or a better one is held.
        """
        known = self.record(key, now_ms)
        if known is not None and known.encode() == value:
            return known
        signed = check_record(key, value, network=self._network, now_ms=now_ms)
        if known is not None and not better(signed, known):
            raise RecordRefused(RecordRule.STALE, f"sequence {signed.record.sequence}, {known.record.sequence} is held")
        self._drop_record(key)
        self._records[key] = signed
        self._record_bytes += len(value)
        if len(self._records) > MAX_RECORDS or self._record_bytes > MAX_RECORD_BYTES_HELD:
            self.expire(now_ms)
            if len(self._records) > MAX_RECORDS or self._record_bytes > MAX_RECORD_BYTES_HELD:
                for far in self._farthest(self._records):
                    self._drop_record(far)
        return signed

    def record(self, key: bytes, now_ms: int) -> SignedNodeRecord | None:
        """Return the record at *key*, None when there is none or it has expired."""
        signed = self._records.get(key)
        if signed is not None and signed.record.expires_at_ms <= now_ms:
            self._drop_record(key)
            return None
        return signed

    def _drop_record(self, key: bytes) -> None:
        dropped = self._records.pop(key, None)
        if dropped is not None:
            self._record_bytes -= len(dropped.encode())

    # Providers.

    def add_provider(self, key: bytes, provider: KadPeer, now_ms: int) -> bool:
        """Keep *provider* at *key*, anew if it was there; False when the key is full."""
        page = self._providers.setdefault(key, {})
        if provider.id not in page:
            if len(page) >= PROVIDERS_PER_KEY:
                self._expire_page(key, now_ms)
                page = self._providers.setdefault(key, {})
                if len(page) >= PROVIDERS_PER_KEY:
                    return False
            self._provider_count += 1
        page[provider.id] = (provider, now_ms + PROVIDER_LIFETIME_MS)
        if len(self._providers) > MAX_PROVIDER_KEYS or self._provider_count > MAX_PROVIDERS:
            self.expire(now_ms)
            if len(self._providers) > MAX_PROVIDER_KEYS or self._provider_count > MAX_PROVIDERS:
                for far in self._farthest(self._providers):
                    self._provider_count -= len(self._providers.pop(far))
        return provider.id in self._providers.get(key, {})

    def providers(self, key: bytes, now_ms: int) -> list[KadPeer]:
        """Return who provides *key*."""
        return [peer for peer, expires_ms in self._providers.get(key, {}).values() if expires_ms > now_ms]

    def _expire_page(self, key: bytes, now_ms: int) -> None:
        page = self._providers[key]
        for peer_id in [peer_id for peer_id, (_, expires_ms) in page.items() if expires_ms <= now_ms]:
            del page[peer_id]
            self._provider_count -= 1
        if not page:
            del self._providers[key]

    # Both.

    def expire(self, now_ms: int) -> None:
        """Drop everything whose time has come."""
        for key in [key for key, signed in self._records.items() if signed.record.expires_at_ms <= now_ms]:
            self._drop_record(key)
        for key in list(self._providers):
            self._expire_page(key, now_ms)

    def _farthest(self, keys: Collection[bytes]) -> list[bytes]:
        count = max(1, len(keys) // _EVICTED_SHARE)
        return heapq.nlargest(count, keys, key=lambda key: kad_position(key) ^ self._own)
