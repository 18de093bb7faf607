"""The numbers that follow from a seed, in pure Python: what the verifier needs of them.

Provers compute the same with NumPy, PyTorch or CuPy; the golden vectors in `tests/vectors/challenge.json` hold both.

    mix(x)            32 bits to 32 bits (the "lowbias32" mixer of Christopher Wellons' hash prospector)
    keys              eight words of 32 bits: SHA-256 of the seed, big-endian
    word(key, i, w)   mix(mix(i + key[0]) + w * 0x9E3779B1 + key[1]), all sums modulo 2^32
    entry k of row i  bits 4(k mod 8) to 4(k mod 8) + 3 of word(key, i, k div 8), minus 8

Rows of A use keys 0 and 1, columns of B keys 2 and 3. The product has C[i][j] = sum over k of A[i][k] B[j][k], kept as
`kept` says. Chains have keys of their own, which nobody can know before the bootstrap sends its salt:

    chain keys        four words of 32 bits: SHA-256 of a prefix, the product's root and the salt, big-endian
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
    """Return the eight keys of *seed*: 0 to 3 for the factors, 4 for digests, 5 to 7 for chains without a salt."""
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


def chain_keys(seed_keys: Sequence[int], root: bytes, salt: bytes) -> tuple[int, ...]:
    """Return the four keys of chains: where they start, and how they go on.

    Args:
        salt: what the bootstrap drew after it had the root; empty for chains that follow from seed and root alone.
    """
    if not salt:
        return (int.from_bytes(root[:4], "big"), *seed_keys[5:8])
    digest = hashlib.sha256(b"ngpu challenge chains" + root + salt).digest()
    return tuple(int.from_bytes(digest[at : at + 4], "big") for at in range(0, 16, 4))


def kept(entry: int) -> int:
    """Return an entry of the product as it is kept: modulo 2^16, from -2^15 to 2^15 - 1."""
    return (entry + 0x8000 & 0xFFFF) - 0x8000


def tile_digest(key: int, entries: Sequence[int]) -> int:
    """Return the digest of a tile: sum over p of mix(entry p xor (p * golden + key)), modulo 2^32, row by row."""
    return sum(mix((entry & MASK) ^ ((place * GOLDEN + key) & MASK)) for place, entry in enumerate(entries)) & MASK


def chain_start(chain: Sequence[int], walker: int) -> int:
    """Return the first state of chain *walker*: it depends on the finished product, and on the salt."""
    return mix((chain[0] + walker * GOLDEN) & MASK)


def chain_place(chain: Sequence[int], state: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the row and column that *state* names."""
    return (mix(state ^ chain[1]) >> 1) % rows, (mix(state ^ chain[2]) >> 1) % columns


def chain_next(chain: Sequence[int], state: int, entry: int) -> int:
    """Return the state after *entry*, as it is kept, was read."""
    return mix((state + GOLDEN) & MASK ^ mix((entry & MASK) ^ chain[3]))
