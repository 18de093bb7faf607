"""Computes the product, commits to it, follows the chains, opens what is asked.

The product stays in the device's memory until the proof is closed: the chains and the openings read it there. It is
kept modulo 2^16: in wider numbers most of that memory would say nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from .arrays import GOLDEN, Arrays, mix, signed

TILE = 32
BLOCK = 1024
ENDS_PER_LEAF = 1024
#: Working arrays take about this much beside the product.
CHUNK_BYTES = 1 << 30
WALKERS_AT_ONCE = 1 << 23
#: A part of the product this deep has entries within 16 bits: 2,048 on the average, with a standard deviation of 1,950.
DEPTH_AT_ONCE = 8192


class Proof:
    """One proof under way.

    Attributes:
        root: hash of the product, once `compute` has run.
        ends: hash of the chains' ends, once `walk` has run.
        seconds: what each part took.
    """

    def __init__(self, arrays: Arrays, puzzle: dict[str, Any]) -> None:
        """Take a puzzle as it was sent (`ngpu_protocol.challenge.puzzle`)."""
        self.root = b""
        self.ends = b""
        self.seconds: dict[str, float] = {}
        self._arrays = arrays
        self._rows, self._columns = int(puzzle["rows"]), int(puzzle["columns"])
        self._depth, self._walkers, self._steps = int(puzzle["depth"]), int(puzzle["walkers"]), int(puzzle["steps"])
        digest = hashlib.sha256(b"ngpu challenge" + bytes.fromhex(puzzle["seed"])).digest()
        self._keys = [signed(int.from_bytes(digest[at : at + 4], "big")) for at in range(0, 32, 4)]
        self._chain: list[int] = []
        self._product: Any = None
        self._digests: list[bytes] = []
        self._levels: list[list[bytes]] = []
        self._ends: list[bytes] = []
        self._end_levels: list[list[bytes]] = []

    # -- the product ---------------------------------------------------------------------------------------------------

    def compute(self) -> None:
        """Multiply, digest, and set `root`."""
        began = time.perf_counter()
        arrays = self._arrays
        self._product = arrays.empty(self._rows, self._columns)
        height = max(BLOCK, CHUNK_BYTES // (16 * DEPTH_AT_ONCE) // BLOCK * BLOCK)
        for begin in range(0, self._depth, DEPTH_AT_ONCE):
            end = min(self._depth, begin + DEPTH_AT_ONCE)
            columns = self._lines(self._keys[2], self._keys[3], 0, self._columns, begin, end)
            for first in range(0, self._rows, height):
                last = min(self._rows, first + height)
                rows = self._lines(self._keys[0], self._keys[1], first, last, begin, end)
                arrays.product(rows, columns, self._product[first:last], add=begin > 0)
                rows = None
            columns = None
        arrays.settle()
        self.seconds["product"] = time.perf_counter() - began
        began = time.perf_counter()
        self._digest()
        self.seconds["digest"] = time.perf_counter() - began

    def _lines(self, key: int, second_key: int, first: int, last: int, begin: int, end: int) -> Any:
        """Return entries *begin* to *end* of lines *first* to *last* of a factor, as 32-bit floating point."""
        arrays = self._arrays
        found = arrays.lines(last - first, end - begin)
        width = (end - begin) // 8
        height = max(1, CHUNK_BYTES // 64 // width)
        for start in range(first, last, height):
            stop = min(last, start + height)
            starts = mix(arrays.words(stop - start, start) + key)
            words = arrays.words(width, begin // 8)
            words *= signed(GOLDEN)
            words = mix((starts[:, None] + words[None, :]) + second_key)
            part = found[start - first : stop - first].reshape(stop - start, width, 8)
            for place in range(8):
                part[:, :, place] = ((words >> (4 * place)) & 15) - 8
        return found

    def _digest(self) -> None:
        arrays = self._arrays
        places = arrays.words(TILE * TILE)
        places *= signed(GOLDEN)
        places += self._keys[4]
        places = places.reshape(TILE, 1, TILE)
        across = self._columns // BLOCK
        height = max(BLOCK, CHUNK_BYTES // (4 * self._columns) // BLOCK * BLOCK)
        self._digests = []
        for first in range(0, self._rows, height):
            last = min(self._rows, first + height)
            words = arrays.int32(self._product[first:last])
            tiled = words.reshape((last - first) // TILE, TILE, self._columns // TILE, TILE)
            tiled ^= places
            mix(words)
            sums = arrays.tile_sums(words, TILE)
            side = BLOCK // TILE
            blocks = sums.reshape((last - first) // BLOCK, side, across, side)
            packed = arrays.to_bytes(_swapped(blocks))
            size = 4 * side * side
            self._digests += [packed[at : at + size] for at in range(0, len(packed), size)]
        self._levels = _tree([_leaf(number, content) for number, content in enumerate(self._digests)])
        self.root = self._levels[-1][0]

    # -- the chains ----------------------------------------------------------------------------------------------------

    def walk(self, salt: bytes = b"") -> None:
        """Follow the chains that *salt* and the product's root lead to, and set `ends`."""
        began = time.perf_counter()
        self._chain = [int.from_bytes(self.root[:4], "big"), *self._keys[5:8]]
        if salt:
            digest = hashlib.sha256(b"ngpu challenge chains" + self.root + salt).digest()
            self._chain = [int.from_bytes(digest[at : at + 4], "big") for at in range(0, 16, 4)]
        self._chain = [signed(word) for word in self._chain]
        packed = b""
        for first in range(0, self._walkers, WALKERS_AT_ONCE):
            packed += self._ends_of(first, min(self._walkers, first + WALKERS_AT_ONCE))
        size = 4 * ENDS_PER_LEAF
        self._ends = [packed[at : at + size] for at in range(0, len(packed), size)]
        self._end_levels = _tree([_leaf(number, content) for number, content in enumerate(self._ends)])
        self.ends = self._end_levels[-1][0]
        self.seconds["walk"] = time.perf_counter() - began

    def _ends_of(self, first: int, last: int) -> bytes:
        arrays = self._arrays
        states = arrays.words(last - first, first)
        states *= signed(GOLDEN)
        states += self._chain[0]
        mix(states)
        for _ in range(self._steps):
            rows = arrays.modulo(mix(states ^ self._chain[1]), self._rows)
            columns = arrays.modulo(mix(states ^ self._chain[2]), self._columns)
            entries = arrays.pick(self._product, rows, columns)
            entries ^= self._chain[3]
            states += signed(GOLDEN)
            states ^= mix(entries)
            mix(states)
        return arrays.to_bytes(states)

    # -- opening -------------------------------------------------------------------------------------------------------

    def open(self, tiles: Sequence[Sequence[int]], walkers: Sequence[int]) -> dict[str, Any]:
        """Return the openings of *tiles* (block, tile) and *walkers*, as they are sent.

        Raises:
            ValueError: there is no such tile or chain.
        """
        return {
            "tiles": [self._open_tile(int(block), int(tile)) for block, tile in tiles],
            "chains": [self._open_chain(int(walker)) for walker in walkers],
        }

    def _open_tile(self, block: int, tile: int) -> dict[str, Any]:
        side = BLOCK // TILE
        if not (0 <= block < len(self._digests) and 0 <= tile < side * side):
            raise ValueError(f"there is no tile {tile} in block {block}")
        across = self._columns // BLOCK
        row = block // across * BLOCK + tile // side * TILE
        column = block % across * BLOCK + tile % side * TILE
        entries = self._arrays.int32(self._product[row : row + TILE, column : column + TILE])
        packed = self._arrays.to_bytes(entries.reshape(TILE * TILE))
        return {
            "block": block,
            "tile": tile,
            "entries": [int.from_bytes(packed[at : at + 4], "little", signed=True) for at in range(0, len(packed), 4)],
            "digests": self._digests[block].hex(),
            "partners": [partner.hex() for partner in _path(self._levels, block)],
        }

    def _open_chain(self, walker: int) -> dict[str, Any]:
        if not 0 <= walker < self._walkers:
            raise ValueError(f"there is no chain {walker}")
        number = walker // ENDS_PER_LEAF
        return {
            "walker": walker,
            "states": self._ends[number].hex(),
            "partners": [partner.hex() for partner in _path(self._end_levels, number)],
        }

    def close(self) -> None:
        """Give the memory back."""
        self._product = None
        self._arrays.release()


def _swapped(blocks: Any) -> Any:
    """Return (block row, tile row, block column, tile column) as (block row, block column, tile row, tile column)."""
    if hasattr(blocks, "permute"):
        return blocks.permute(0, 2, 1, 3).contiguous()
    return blocks.transpose(0, 2, 1, 3).copy()


def _leaf(number: int, content: bytes) -> bytes:
    return hashlib.sha256(b"leaf" + number.to_bytes(4, "big") + content).digest()


def _tree(leaves: list[bytes]) -> list[list[bytes]]:
    levels = [leaves]
    while len(levels[-1]) > 1:
        level = levels[-1]
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        levels.append([p[0] if len(p) == 1 else hashlib.sha256(b"node" + p[0] + p[1]).digest() for p in pairs])
    return levels


def _path(levels: list[list[bytes]], number: int) -> list[bytes]:
    found = []
    for level in levels[:-1]:
        if number ^ 1 < len(level):
            found.append(level[number ^ 1])
        number >>= 1
    return found
