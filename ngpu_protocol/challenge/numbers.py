"""The numbers that follow from a seed, in pure Python: what the verifier needs of them.

Provers compute the same with NumPy, PyTorch or CuPy; the golden vectors in `tests/vectors/challenge.json` hold both.

    mix(x)            32 bits to 32 bits (the "lowbias32" mixer of Christopher Wellons' hash prospector)
    keys              eight words of 32 bits: SHA-256 of the seed, big-endian
    word(key, i, w)   mix(mix(i + key[0]) + w * 0x9E3779B1 + key[1]), all sums modulo 2^32
    entry k of row i  bits 4(k mod 8) to 4(k mod 8) + 3 of word(key, i, k div 8), minus 8

Rows of A use keys 0 and 1, columns of B keys 2 and 3. The product has C[i][j] = sum over k of A[i][k] B[j][k].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B1

#: The two 4-bit entries of every byte, low one first.
_PAIRS = [((byte & 15) - 8, (byte >> 4) - 8) for byte in range(256)]


def mix(x: int) -> int:
    """Return the mixed word."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def keys(seed: bytes) -> tuple[int, ...]:
    """Return the eight keys of *seed*: 0 to 3 for the factors, 4 for digests, 5 to 7 for chains."""
    digest = hashlib.sha256(b"ngpu challenge" + seed).digest()
    return tuple(int.from_bytes(digest[at : at + 4], "big") for at in range(0, 32, 4))


def line(key: Sequence[int], number: int, depth: int) -> list[int]:
    """Return row *number* of A, or column *number* of B, for its two keys."""
    start = mix((number + key[0]) & MASK)
    packed = bytearray()
    step = (start + key[1]) & MASK
    for _ in range(depth // 8):
        x = step
        step = (step + GOLDEN) & MASK
        x ^= x >> 16
        x = x * 0x7FEB352D & MASK
        x ^= x >> 15
        x = x * 0x846CA68B & MASK
        packed += (x ^ x >> 16).to_bytes(4, "little")
    return [entry for byte in packed for entry in _PAIRS[byte]]


def tile_digest(key: int, entries: Sequence[int]) -> int:
    """Return the digest of a tile: sum over p of mix(entry p xor (p * golden + key)), modulo 2^32, row by row."""
    return sum(mix((entry & MASK) ^ ((place * GOLDEN + key) & MASK)) for place, entry in enumerate(entries)) & MASK


def chain_start(root: bytes, walker: int) -> int:
    """Return the first state of chain *walker*: it depends on the finished product."""
    return mix((int.from_bytes(root[:4], "big") + walker * GOLDEN) & MASK)


def chain_place(key: Sequence[int], state: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the row and column that *state* names."""
    return (mix(state ^ key[0]) >> 1) % rows, (mix(state ^ key[1]) >> 1) % columns


def chain_next(key: Sequence[int], state: int, entry: int) -> int:
    """Return the state after *entry* was read."""
    return mix((state + GOLDEN) & MASK ^ mix((entry & MASK) ^ key[2]))
