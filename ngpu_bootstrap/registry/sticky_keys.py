"""Keys of clients whose calls belong on one node, kept: what has state there is found again after a restart, and from a
sibling.

In memory a key sticks as any `Ngpu-Affinity` does (`scheduling.affinity`); here is what makes that outlast the memory.
Only keys that a profile declares are kept, as hashes, and only where they stick; a write is made when a key is new, has
moved, or was written long ago, so that a call under a key usually costs no write. Keys of different clients never meet,
also where they share a workspace.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

REMEMBERED = 16_384
REWRITTEN_MS = 3_600_000
MISSED_MS = 3_600_000
"""So long after its last miss, or ten times what calls are refused, a node may have been back unseen."""


class StickyKeys:
    """Where declared keys stick.

    Args:
        kept_ms: how long after its last use a key is kept.
    """

    def __init__(self, store: Store, nodes: Nodes, *, kept_ms: int, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._nodes = nodes
        self._kept_ms = kept_ms
        self._now_ms = now_ms
        self._written: OrderedDict[bytes, tuple[Address, int]] = OrderedDict()
        # of nodes that are here and take no calls of a workspace: since when calls missed them, and when the last did;
        # what is seen of one that takes calls, or has left, ends it
        self._missed: OrderedDict[tuple[str, Address], tuple[int, int]] = OrderedDict()

    @staticmethod
    def of(workspace: str, caller: str, source: str, value: str) -> bytes:
        """Return the key of a client's *value* at *source* (a profile's place): what a call names as its affinity."""
        return job_rows.key_hash(workspace, caller, source, value).hex()[:48].encode()

    async def find(self, spec: WorkspaceSpec, key: bytes, *, refuse_s: float = 0) -> None:
        """Have calls under *key* go where those before it went, whoever took them.

        Args:
            refuse_s: for so long after its node left, or ceased to take calls, a call is refused rather than sent to
                another, which has nothing of what it is about.

        Raises:
            NotServed: the node is away, not longer than that.
        """
        node = self._nodes.stuck(spec, key)
        if node is None:
            stored, since_ms = _stored(key), self._now_ms() - self._kept_ms
            node = await self._store.look_up(lambda connection: job_rows.node_of_key(connection, stored, since_ms))
            if node is not None:
                self._nodes.stick(spec, key, node)
        if not refuse_s or node is None:
            return
        if self._nodes.takes_calls(spec, node):
            self._missed.pop((spec.id, node), None)
        elif self._now_ms() - self._away_since_ms(spec, node, refuse_s) < refuse_s * 1000:
            words = f"what this call is about is on node {node}, which is away; come again later"
            if not math.isinf(refuse_s):
                words += f"; after {refuse_s:g} s without it, calls go to another, to begin anew"
            raise NotServed(503, "state_node_away", words, retry_after_s=2)

    def _away_since_ms(self, spec: WorkspaceSpec, node: Address, refuse_s: float) -> int:
        left_at_ms = self._nodes.left_at_ms(node)
        if left_at_ms is not None:
            self._missed.pop((spec.id, node), None)
            return left_at_ms
        now_ms, known = self._now_ms(), self._missed.pop((spec.id, node), None)
        goes_on = known is not None and now_ms - known[1] < max(MISSED_MS, refuse_s * 10_000)
        since_ms = known[0] if known is not None and goes_on else now_ms
        self._missed[spec.id, node] = (since_ms, now_ms)
        if len(self._missed) > REMEMBERED:
            self._missed.popitem(last=False)
        return since_ms

    async def note(self, spec: WorkspaceSpec, key: bytes, node: Address) -> None:
        """Keep that a call under *key* was answered by *node*."""
        now_ms, stored = self._now_ms(), _stored(key)
        known = self._written.get(stored)
        if known is not None and known[0] == node and now_ms - known[1] < REWRITTEN_MS:
            self._written.move_to_end(stored)
            return
        await self._store.chore(lambda connection: job_rows.stick(connection, stored, spec.id, node, now_ms))
        self._written[stored] = (node, now_ms)
        self._written.move_to_end(stored)
        if len(self._written) > REMEMBERED:
            self._written.popitem(last=False)


def _stored(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
