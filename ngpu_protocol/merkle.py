"""Merkle trees over a list of byte strings: one root for all, and a short proof that one of them is among them.

The tree of RFC 6962 (section 2.1), which RFC 9162 keeps, with SHA-256::

    hash of a leaf   SHA-256(00 | data)
    hash of a node   SHA-256(01 | left | right)
    n leaves         left: the largest power of two below n; right: the rest
    no leaf          SHA-256 of nothing

The two prefixes keep a node from being shown as a leaf. SHA-256 rather than keccak, since both an EVM (a precompile)
and every auditor's library has it.

Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_sha256 = hashlib.sha256

LEAF = b"\x00"
"""What a leaf's data is hashed behind."""

MAX_PATH = 64
"""Hashes a proof may have: trees of up to 2**64 leaves."""


def leaf_hash(data: bytes) -> bytes:
    """Return the 32-byte hash of the leaf that holds *data*."""
    return _sha256(LEAF + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the 32-byte hash of the node above two others."""
    return _sha256(b"\x01" + left + right).digest()


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """Return the 32-byte root over leaf hashes, in their order."""
    if not leaves:
        return _sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        level = _level_above(level)
    return level[0]


def inclusion_path(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Return the hashes that lead from the leaf at *index* to the root, the lowest first (RFC 9162, 2.1.3.1).

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    path = []
    level = list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        level = _level_above(level)
        index //= 2
    return tuple(path)


def root_by_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """Return the root that *path* leads to, or None when it cannot be one (RFC 9162, 2.1.3.2).

    Args:
        leaf: the leaf's hash.
        index: its place, from 0.
        size: leaves in the tree.
    """
    if not 0 <= index < size or len(path) > MAX_PATH:
        return None
    place, last, root = index, size - 1, leaf
    for hash in path:
        if last == 0:
            return None
        if place & 1 or place == last:
            root = node_hash(hash, root)
            while not place & 1 and place:
                place >>= 1
                last >>= 1
        else:
            root = node_hash(root, hash)
        place >>= 1
        last >>= 1
    return root if last == 0 else None


def _level_above(level: list[bytes]) -> list[bytes]:
    pairs = iter(level)
    above = [_sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
    if len(level) % 2:
        above.append(level[-1])  # a node without a sibling rises as it is, which gives the RFC's shape
    return above
