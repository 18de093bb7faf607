"""Keys that stick to a node: calls that say the same key go where the first one went, while that node is there.

A bounded table for one workspace: the key used longest ago is forgotten first, and one that rests for `idle_ms` is
forgotten at its next use. Sticking overrides the ranking, never the exclusions: a full node is waited for, one that is
gone, draining or failing is replaced by whatever the ranking says, which the key then sticks to. Pure.
"""

from __future__ import annotations

from collections import OrderedDict

from ngpu_protocol.identity import Address

MAX_KEY_BYTES = 128


class AffinityTable:
    """The keys of one workspace's clients.

    Args:
        limit: keys kept at most.
        idle_ms: a key rests no longer.
    """

    __slots__ = ("_idle_ms", "_limit", "_nodes")

    def __init__(self, limit: int, idle_ms: int) -> None:
        self._limit = limit
        self._idle_ms = idle_ms
        self._nodes: OrderedDict[bytes, tuple[Address, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def node_of(self, key: bytes, now_ms: int) -> Address | None:
        """Return where *key* sticks, None when it sticks nowhere (any more)."""
        found = self._nodes.get(key)
        if found is None:
            return None
        node, used_at_ms = found
        if now_ms - used_at_ms > self._idle_ms:
            del self._nodes[key]
            return None
        return node

    def stick(self, key: bytes, node: Address, now_ms: int) -> None:
        """Have *key* stick to *node* from now on."""
        if self._limit <= 0:
            return
        self._nodes[key] = (node, now_ms)
        self._nodes.move_to_end(key)
        if len(self._nodes) > self._limit:
            self._nodes.popitem(last=False)
