"""How a prover binds itself to a product before it knows what will be asked of it.

    leaf of block b   SHA-256("leaf", b as 4 bytes big-endian, the digests of its 1,024 tiles as 4 bytes little-endian)
    node              SHA-256("node", left, right); a last one without a partner goes up as it is
    ends              SHA-256 tree of the same form over the chains' last states, 1,024 to a leaf

Blocks are counted row by row, tiles within a block too, entries within a tile too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

ENDS_PER_LEAF = 1024


def leaf(number: int, content: bytes) -> bytes:
    """Return the hash of leaf *number*."""
    return hashlib.sha256(b"leaf" + number.to_bytes(4, "big") + content).digest()


def tree(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """Return all levels of the tree over *leaves*, the leaves first, the root last."""
    if not leaves:
        raise ValueError("a tree has at least one leaf")
    levels = [list(leaves)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append([_node(below[at : at + 2]) for at in range(0, len(below), 2)])
    return levels


def path(levels: Sequence[Sequence[bytes]], number: int) -> list[bytes]:
    """Return the partners of leaf *number* on the way to the root; levels where it has none are left out."""
    found: list[bytes] = []
    for level in levels[:-1]:
        if (number ^ 1) < len(level):
            found.append(level[number ^ 1])
        number >>= 1
    return found


def root_of(number: int, count: int, leaf_hash: bytes, partners: Sequence[bytes]) -> bytes | None:
    """Return the root that leaf *number* of *count* leads to, None where *partners* do not fit."""
    waiting = list(partners)
    while count > 1:
        if (number ^ 1) < count:
            if not waiting:
                return None
            partner = waiting.pop(0)
            leaf_hash = _node([partner, leaf_hash] if number & 1 else [leaf_hash, partner])
        number, count = number >> 1, (count + 1) >> 1
    return leaf_hash if not waiting else None


def _node(pair: Sequence[bytes]) -> bytes:
    return pair[0] if len(pair) == 1 else hashlib.sha256(b"node" + pair[0] + pair[1]).digest()
