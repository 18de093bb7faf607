"""What a bootstrap checks of a prover's answer: pure, without a GPU, a few seconds of one core.

The caller draws what is asked (`Spots`) and the vector of Freivalds' check from a secret source after the commitment
is complete, and measures the times: from sending the puzzle to its root, from asking to go on to the root of ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import mul
from typing import Any

from ngpu_protocol.challenge import commitment, numbers
from ngpu_protocol.challenge.puzzle import BLOCK, BLOCK_TILES, TILE, Puzzle
from ngpu_protocol.challenge.speeds import Allowed
from ngpu_protocol.errors import MalformedError

#: Components of the vector of Freivalds' check are drawn from 0 to this, exclusive.
FREIVALDS_RANGE = 1 << 31


@dataclass(frozen=True, slots=True)
class Commitment:
    """What a prover bound itself to: the product's root, and then that of the chains' ends."""

    root: bytes
    ends: bytes

    def to_json(self) -> dict[str, str]:
        """Return what is sent."""
        return {"root": self.root.hex(), "ends": self.ends.hex()}

    @classmethod
    def from_json(cls, value: Any) -> Commitment:
        """Return what was sent.

        Raises:
            MalformedError: it is none.
        """
        return cls(_hash(value, "root"), _hash(value, "ends"))


@dataclass(frozen=True, slots=True)
class Spots:
    """What is to be opened: tiles as (block, tile in it), chains by their numbers."""

    tiles: tuple[tuple[int, int], ...]
    walkers: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what is sent."""
        return {"tiles": [list(tile) for tile in self.tiles], "walkers": list(self.walkers)}

    @classmethod
    def from_json(cls, value: Any) -> Spots:
        """Return what was sent.

        Raises:
            MalformedError: it is none.
        """
        try:
            tiles = tuple((int(block), int(tile)) for block, tile in value["tiles"])
            return cls(tiles, tuple(int(walker) for walker in value["walkers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedError("spots", str(error)) from None


@dataclass(frozen=True, slots=True)
class OpenedTile:
    """A tile and the way from it to the root.

    Attributes:
        entries: 1,024 numbers, row by row.
        digests: of the block's 1,024 tiles, 4 bytes little-endian each.
        partners: of the block's leaf on the way to the root.
    """

    block: int
    tile: int
    entries: tuple[int, ...]
    digests: bytes
    partners: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class OpenedChain:
    """The end of a chain and its way to the root: *states* are those of its leaf, 4 bytes little-endian each."""

    walker: int
    states: bytes
    partners: tuple[bytes, ...]


class Finding(StrEnum):
    """What is wrong with an answer; GOOD if nothing is."""

    GOOD = "good"
    LATE = "late"
    """The product took longer than the claimed model needs: a slower card, a shared one, or one far away."""
    LATE_CHAINS = "late_chains"
    """The chains took longer than memory allows: the product is not in it."""
    NOT_OPENED = "not_opened"
    """Something that was asked for is missing or malformed."""
    NOT_COMMITTED = "not_committed"
    """What was opened is not what was committed to; an answer to another seed ends here or below."""
    WRONG_DIGEST = "wrong_digest"
    """A tile does not have the digest that was committed to."""
    WRONG_PRODUCT = "wrong_product"
    """Freivalds' check fails: the tile is not part of the product."""
    WRONG_CHAIN = "wrong_chain"
    """A chain does not end where the product leads."""
    TOO_LARGE = "too_large"
    """No card of the claimed model has the claimed memory: nothing was sent."""
    UNANSWERED = "unanswered"
    """No answer came: a fault, or a way out. How often it is forgiven is the bootstrap's to say."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a challenge; *detail* is for people."""

    finding: Finding
    detail: str = ""

    @property
    def is_good(self) -> bool:
        return self.finding is Finding.GOOD


def judge_times(product_s: float, chains_s: float, allowed: Allowed) -> Judgement:
    """Judge how long the two parts of the commitment took."""
    for what, took_s, limit_s, finding in (
        ("the product", product_s, allowed.product_s, Finding.LATE),
        ("the chains", chains_s, allowed.chains_s, Finding.LATE_CHAINS),
    ):
        if took_s > limit_s:
            detail = f"{what} took {took_s:.2f} s, the claimed GPU needs no more than {limit_s:.2f} s"
            return Judgement(finding, detail)
    return Judgement(Finding.GOOD)


def judge_openings(
    puzzle: Puzzle,
    committed: Commitment,
    spots: Spots,
    tiles: Sequence[OpenedTile],
    chains: Sequence[OpenedChain],
    vector: Sequence[int],
    salt: bytes = b"",
) -> Judgement:
    """Judge what was opened; the first thing wrong decides.

    Args:
        salt: what was sent when the chains were asked for; empty where nothing was.
        vector: 32 secret numbers below `FREIVALDS_RANGE`, fresh for every answer.
    """
    if [(tile.block, tile.tile) for tile in tiles] != list(spots.tiles):
        return Judgement(Finding.NOT_OPENED, "other tiles than those asked for")
    if [chain.walker for chain in chains] != list(spots.walkers):
        return Judgement(Finding.NOT_OPENED, "other chains than those asked for")
    keys = numbers.keys(puzzle.seed)
    for tile in tiles:
        judgement = _judge_tile(puzzle, committed.root, tile, keys, vector)
        if not judgement.is_good:
            return judgement
    chain_keys = numbers.chain_keys(keys, committed.root, salt)
    for chain in chains:
        judgement = _judge_chain(puzzle, committed, chain, keys, chain_keys)
        if not judgement.is_good:
            return judgement
    return Judgement(Finding.GOOD)


def _judge_tile(
    puzzle: Puzzle, root: bytes, opened: OpenedTile, keys: Sequence[int], vector: Sequence[int]
) -> Judgement:
    where = f"tile {opened.tile} of block {opened.block}"
    if len(opened.entries) != TILE * TILE or len(opened.digests) != 4 * BLOCK_TILES * BLOCK_TILES:
        return Judgement(Finding.NOT_OPENED, f"{where} has not the size of a tile")
    leaf = commitment.leaf(opened.block, opened.digests)
    if commitment.root_of(opened.block, puzzle.blocks, leaf, opened.partners) != root:
        return Judgement(Finding.NOT_COMMITTED, f"{where} does not lead to the root")
    stated = int.from_bytes(opened.digests[4 * opened.tile : 4 * opened.tile + 4], "little")
    if numbers.tile_digest(keys[4], opened.entries) != stated:
        return Judgement(Finding.WRONG_DIGEST, where)
    blocks_across = puzzle.columns // BLOCK
    first_row = opened.block // blocks_across * BLOCK + opened.tile // BLOCK_TILES * TILE
    first_column = opened.block % blocks_across * BLOCK + opened.tile % BLOCK_TILES * TILE
    # B r, then A (B r), against C r: modulo 2^16, as C is kept
    weighted = [0] * puzzle.depth
    for place in range(TILE):
        weight = vector[place]
        column = numbers.line(keys[2:4], first_column + place, puzzle.depth)
        weighted = [total + weight * entry for total, entry in zip(weighted, column, strict=True)]
    for place in range(TILE):
        row = numbers.line(keys[0:2], first_row + place, puzzle.depth)
        stated_row = opened.entries[TILE * place : TILE * place + TILE]
        if (sum(map(mul, row, weighted)) - sum(map(mul, stated_row, vector))) & 0xFFFF:
            return Judgement(Finding.WRONG_PRODUCT, f"row {first_row + place} in {where}")
    return Judgement(Finding.GOOD)


def _judge_chain(
    puzzle: Puzzle, committed: Commitment, opened: OpenedChain, keys: Sequence[int], chain: Sequence[int]
) -> Judgement:
    where = f"chain {opened.walker}"
    number, place = divmod(opened.walker, commitment.ENDS_PER_LEAF)
    leaves = -(-puzzle.walkers // commitment.ENDS_PER_LEAF)
    size = min(commitment.ENDS_PER_LEAF, puzzle.walkers - number * commitment.ENDS_PER_LEAF)
    if len(opened.states) != 4 * size:
        return Judgement(Finding.NOT_OPENED, f"{where} comes with {len(opened.states)} bytes of ends")
    leaf = commitment.leaf(number, opened.states)
    if commitment.root_of(number, leaves, leaf, opened.partners) != committed.ends:
        return Judgement(Finding.NOT_COMMITTED, f"{where} does not lead to the root of ends")
    state = numbers.chain_start(chain, opened.walker)
    for _ in range(puzzle.steps):
        row, column = numbers.chain_place(chain, state, puzzle.rows, puzzle.columns)
        entry = sum(map(mul, numbers.line(keys[0:2], row, puzzle.depth), numbers.line(keys[2:4], column, puzzle.depth)))
        state = numbers.chain_next(chain, state, numbers.kept(entry))
    if int.from_bytes(opened.states[4 * place : 4 * place + 4], "little") != state:
        return Judgement(Finding.WRONG_CHAIN, where)
    return Judgement(Finding.GOOD)


# -- the openings on the wire ------------------------------------------------------------------------------------------


def openings_to_json(tiles: Sequence[OpenedTile], chains: Sequence[OpenedChain]) -> dict[str, Any]:
    """Return what is sent."""
    return {
        "tiles": [
            {
                "block": tile.block,
                "tile": tile.tile,
                "entries": list(tile.entries),
                "digests": tile.digests.hex(),
                "partners": [partner.hex() for partner in tile.partners],
            }
            for tile in tiles
        ],
        "chains": [
            {
                "walker": chain.walker,
                "states": chain.states.hex(),
                "partners": [partner.hex() for partner in chain.partners],
            }
            for chain in chains
        ],
    }


def openings_from_json(value: Any) -> tuple[list[OpenedTile], list[OpenedChain]]:
    """Return what was sent.

    Raises:
        MalformedError: it is something else.
    """
    try:
        tiles = [
            OpenedTile(
                _number(each["block"]),
                _number(each["tile"]),
                tuple(_entry(entry) for entry in each["entries"]),
                bytes.fromhex(each["digests"]),
                tuple(bytes.fromhex(partner) for partner in each["partners"]),
            )
            for each in value["tiles"]
        ]
        chains = [
            OpenedChain(
                _number(each["walker"]),
                bytes.fromhex(each["states"]),
                tuple(bytes.fromhex(partner) for partner in each["partners"]),
            )
            for each in value["chains"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError("openings", str(error)) from None
    return tiles, chains


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a number of something")
    return value


def _entry(value: Any) -> int:
    if type(value) is not int or not -(1 << 15) <= value < 1 << 15:
        raise ValueError("an entry has 16 bits")
    return value


def _hash(value: Any, name: str) -> bytes:
    try:
        found = bytes.fromhex(value[name]) if isinstance(value, Mapping) else b""
    except (KeyError, TypeError, ValueError):
        found = b""
    if len(found) != 32:
        raise MalformedError("commitment", f"{name} is no hash of 32 bytes")
    return found
