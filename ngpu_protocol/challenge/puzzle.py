"""The puzzle of a challenge, and how large one fits a claim."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ngpu_protocol.errors import MalformedError

#: A tile has 32x32 entries and a digest; a block has 32x32 tiles and is a leaf of the tree.
TILE = 32
BLOCK_TILES = 32
BLOCK = TILE * BLOCK_TILES
#: Entries of the factors are -8 to 7: 64 x depth must stay below 2^24.
MAX_DEPTH = 1 << 17
DEPTH = 1 << 14
STEPS = 256
MAX_SIDE = 1 << 20
#: The product is kept modulo 2^16: an entry has some 14 bits of information, and were it kept as 32, half of the memory
#: would do.
ENTRY_BYTES = 2
#: For each line of a factor: 8,192 entries of it at a time, in floating point, and what unpacking them takes.
_WORKING_BYTES = 8192 * 6


@dataclass(frozen=True, slots=True)
class Puzzle:
    """What is to be computed.

    Attributes:
        seed: 32 bytes, secret until sent; fresh for every challenge.
        rows, columns: of the product, multiples of `BLOCK`.
        depth: the length of the scalar products, a multiple of 8.
        walkers: how many chains.
        steps: how many entries each chain reads.
    """

    seed: bytes
    rows: int
    columns: int
    depth: int
    walkers: int = 1 << 20
    steps: int = STEPS

    def __post_init__(self) -> None:
        if len(self.seed) != 32:
            raise ValueError(f"a seed has 32 bytes, not {len(self.seed)}")
        for name, value, unit, most in (
            ("rows", self.rows, BLOCK, MAX_SIDE),
            ("columns", self.columns, BLOCK, MAX_SIDE),
            ("depth", self.depth, 8, MAX_DEPTH),
            ("walkers", self.walkers, 1, 1 << 26),
            ("steps", self.steps, 1, 1 << 16),
        ):
            if not 0 < value <= most or value % unit:
                raise ValueError(f"{name} must be a multiple of {unit} up to {most}, not {value}")

    @property
    def entries(self) -> int:
        """Entries of the product."""
        return self.rows * self.columns

    @property
    def product_bytes(self) -> int:
        """Memory the product fills."""
        return self.entries * ENTRY_BYTES

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.rows * self.columns * self.depth

    @property
    def blocks(self) -> int:
        """Leaves of the tree, row by row."""
        return (self.rows // BLOCK) * (self.columns // BLOCK)

    def to_json(self) -> dict[str, Any]:
        """Return what is sent."""
        return {**asdict(self), "seed": self.seed.hex()}

    @classmethod
    def from_json(cls, value: Any) -> Puzzle:
        """Return what was sent.

        Raises:
            MalformedError: it is no puzzle.
        """
        if not isinstance(value, Mapping):
            raise MalformedError("puzzle", "not an object")
        try:
            numbers = {name: value[name] for name in ("rows", "columns", "depth", "walkers", "steps")}
            if any(type(number) is not int for number in numbers.values()):
                raise MalformedError("puzzle", "its sizes are whole numbers")
            return cls(seed=bytes.fromhex(value["seed"]), **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedError("puzzle", str(error)) from None


def bound_seed(nonce: bytes, node: str, gpu: bytes) -> bytes:
    """Return the seed of a challenge of one GPU of one node: SHA-256 of a prefix, the nonce and both names.

    So an answer made for one claim is no answer for another, though they be asked at the same moment, and whoever
    is handed a puzzle with its nonce can see whom it is for.

    Args:
        nonce: 32 bytes, secret until sent; fresh for every challenge.
        node: its address.
        gpu: 32 bytes, the GPU's name in records and receipts.
    """
    if len(nonce) != 32 or len(gpu) != 32:
        raise ValueError("a nonce and a GPU's name have 32 bytes")
    named = bytes.fromhex(node.removeprefix("0x"))
    return hashlib.sha256(b"ngpu challenge of" + nonce + named + gpu).digest()


def sized(seed: bytes, memory_bytes: int, *, part: float = 0.85, depth: int = DEPTH, steps: int = STEPS) -> Puzzle:
    """Return a puzzle whose product fills *part* of *memory_bytes*, less what working on it takes.

    The rest is for the driver, the framework and the factors. A chain for every 4 KiB of the product: together they
    read enough that what is not in memory shows.

    Raises:
        ValueError: the memory does not hold a single block.
    """
    budget = memory_bytes * part
    per_row = _WORKING_BYTES * min(depth, 8192) / 8192
    side = (math.sqrt(per_row * per_row + 4 * ENTRY_BYTES * budget) - per_row) / (2 * ENTRY_BYTES)
    side = min(MAX_SIDE, int(side) // BLOCK * BLOCK)
    if side < BLOCK:
        raise ValueError(f"{memory_bytes} bytes do not hold a block of {BLOCK}x{BLOCK} and its factors")
    walkers = min(1 << 25, max(64, side * side * ENTRY_BYTES >> 12))
    return Puzzle(seed, side, side, depth, walkers, steps)
