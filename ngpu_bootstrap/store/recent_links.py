"""Hashes of the receipts seen last, by node: enough to judge the next one's chain link without asking the database.

Pure and bounded. It may name receipts whose commit is still under way or has failed: a link is judged against what
the node signed, not against what was stored.
"""

from __future__ import annotations

from collections import OrderedDict

from ngpu_bootstrap.store.records import NO_HASH
from ngpu_protocol.receipts import ReceiptLink

# a node has at most some hundred receipts under way; thousands of nodes at 100 bytes a link stay small
_PER_CHAIN = 256


class RecentLinks:
    """The last receipts of every chain."""

    def __init__(self, per_chain: int = _PER_CHAIN) -> None:
        self._per_chain = per_chain
        self._chains: dict[tuple[str, str], OrderedDict[int, bytes]] = {}

    def note(self, bootstrap: str, node: str, sequence: int, hash: bytes) -> None:
        """Remember a receipt; the first one noted at a sequence stands."""
        chain = self._chains.setdefault((bootstrap, node), OrderedDict())
        chain.setdefault(sequence, hash)
        if len(chain) > self._per_chain:
            chain.popitem(last=False)

    def before(self, bootstrap: str, node: str, sequence: int) -> ReceiptLink | None:
        """Return the receipt before *sequence* (all zero before the first), None when it is not remembered."""
        if sequence == 1:
            return ReceiptLink(0, NO_HASH)
        chain = self._chains.get((bootstrap, node))
        hash = chain.get(sequence - 1) if chain is not None else None
        return ReceiptLink(sequence - 1, hash) if hash is not None else None
