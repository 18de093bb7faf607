"""What a bootstrap believes of a prover, held against cheats. The prover here is pure Python on a tiny product."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from functools import cache
from operator import mul
from pathlib import Path

import pytest

from ngpu_protocol.challenge import commitment, numbers
from ngpu_protocol.challenge.puzzle import BLOCK, BLOCK_TILES, DEPTH, ENTRY_BYTES, TILE, Puzzle, sized
from ngpu_protocol.challenge.speeds import SPEEDS, Allowed, Speed, allowed, depth_for, speed_of, too_small
from ngpu_protocol.challenge.verification import (
    Commitment,
    Finding,
    Judgement,
    OpenedChain,
    OpenedTile,
    Spots,
    judge_openings,
    judge_times,
    openings_from_json,
    openings_to_json,
)
from ngpu_protocol.errors import MalformedError

SEED = bytes(range(32))
SALT = bytes(range(64, 96))
PUZZLE = Puzzle(SEED, BLOCK, BLOCK, 8, walkers=40, steps=3)
VECTOR = [1_000_003 * (n + 1) % (1 << 31) for n in range(TILE)]
VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "challenge.json").read_text())
GIB = 2**30
KEYS = numbers.keys(SEED)


class SmallProver:
    """Proves as the definition says, for one block; *cheat* changes an entry before anything is committed."""

    def __init__(self, puzzle: Puzzle, cheat: int = 0, salt: bytes = SALT) -> None:
        self.puzzle = puzzle
        self.keys = numbers.keys(puzzle.seed)
        depth = puzzle.depth
        rows = [numbers.line(self.keys[0:2], n, depth) for n in range(puzzle.rows)]
        columns = [numbers.line(self.keys[2:4], n, depth) for n in range(puzzle.columns)]
        self.product = [[numbers.kept(sum(map(mul, row, column))) for column in columns] for row in rows]
        for row in self.product:
            row[5] += cheat
        self.digests = b"".join(
            numbers.tile_digest(self.keys[4], self.tile(number)).to_bytes(4, "little")
            for number in range(BLOCK_TILES * BLOCK_TILES)
        )
        self.root = commitment.tree([commitment.leaf(0, self.digests)])[-1][0]
        self.chain = numbers.chain_keys(self.keys, self.root, salt)
        self.states = b"".join(self.end(walker).to_bytes(4, "little") for walker in range(puzzle.walkers))
        self.ends = commitment.tree([commitment.leaf(0, self.states)])[-1][0]

    def tile(self, number: int) -> list[int]:
        top, left = number // BLOCK_TILES * TILE, number % BLOCK_TILES * TILE
        return [entry for row in self.product[top : top + TILE] for entry in row[left : left + TILE]]

    def end(self, walker: int) -> int:
        state = numbers.chain_start(self.chain, walker)
        for _ in range(self.puzzle.steps):
            row, column = numbers.chain_place(self.chain, state, self.puzzle.rows, self.puzzle.columns)
            state = numbers.chain_next(self.chain, state, self.product[row][column])
        return state

    @property
    def commitment(self) -> Commitment:
        return Commitment(self.root, self.ends)

    def open(self, spots: Spots) -> tuple[list[OpenedTile], list[OpenedChain]]:
        tiles = [OpenedTile(block, tile, tuple(self.tile(tile)), self.digests, ()) for block, tile in spots.tiles]
        return tiles, [OpenedChain(walker, self.states, ()) for walker in spots.walkers]


@cache
def honest() -> SmallProver:
    return SmallProver(PUZZLE)


SPOTS = Spots(((0, 0), (0, 1023)), (0, 39))


def judged(prover: SmallProver, spots: Spots = SPOTS, puzzle: Puzzle = PUZZLE) -> Judgement:
    return judge_openings(puzzle, prover.commitment, spots, *prover.open(spots), VECTOR, SALT)


def test_an_honest_prover_is_believed() -> None:
    assert judged(honest()) == Judgement(Finding.GOOD)


def test_a_wrong_product_fails_freivalds_check() -> None:
    assert judged(SmallProver(PUZZLE, cheat=1)).finding is Finding.WRONG_PRODUCT


def test_an_answer_to_another_seed_fails() -> None:
    replayed = SmallProver(replace(PUZZLE, seed=bytes(32)))
    assert not judged(replayed).is_good
    assert judged(replayed).finding in (Finding.WRONG_DIGEST, Finding.WRONG_PRODUCT)


def test_a_tile_made_up_after_the_commitment_fails() -> None:
    tiles, chains = honest().open(SPOTS)
    entries = list(tiles[0].entries)
    entries[0] += 1
    forged = replace(tiles[0], entries=tuple(entries))
    found = judge_openings(PUZZLE, honest().commitment, SPOTS, [forged, tiles[1]], chains, VECTOR, SALT)
    assert found.finding is Finding.WRONG_DIGEST
    digest = numbers.tile_digest(honest().keys[4], entries).to_bytes(4, "little")
    forged = replace(forged, digests=digest + forged.digests[4:])
    found = judge_openings(PUZZLE, honest().commitment, SPOTS, [forged, tiles[1]], chains, VECTOR, SALT)
    assert found.finding is Finding.NOT_COMMITTED


def test_a_chain_that_was_not_followed_fails() -> None:
    lazy = SmallProver(PUZZLE)
    lazy.states = bytes(len(lazy.states))
    lazy.ends = commitment.tree([commitment.leaf(0, lazy.states)])[-1][0]
    assert judged(lazy).finding is Finding.WRONG_CHAIN


def test_ends_that_were_not_committed_to_fail() -> None:
    tiles, chains = honest().open(SPOTS)
    forged = replace(chains[0], states=bytes(len(chains[0].states)))
    found = judge_openings(PUZZLE, honest().commitment, SPOTS, tiles, [forged, chains[1]], VECTOR, SALT)
    assert found.finding is Finding.NOT_COMMITTED


def test_other_spots_than_those_asked_for_are_no_answer() -> None:
    tiles, chains = honest().open(SPOTS)
    for given in (([], chains), (tiles[:1], chains), (tiles[::-1], chains), (tiles, []), (tiles, chains[::-1])):
        assert judge_openings(PUZZLE, honest().commitment, SPOTS, *given, VECTOR, SALT).finding is Finding.NOT_OPENED
    short = replace(tiles[0], entries=tiles[0].entries[:-1])
    found = judge_openings(PUZZLE, honest().commitment, SPOTS, [short, tiles[1]], chains, VECTOR, SALT)
    assert found.finding is Finding.NOT_OPENED


# -- time --------------------------------------------------------------------------------------------------------------


def full(memory_gib: int) -> Puzzle:
    return sized(SEED, memory_gib * GIB)


def test_times_within_the_claim_are_good_and_others_name_what_was_late() -> None:
    limits = Allowed(4.0, 1.0)
    assert judge_times(3.9, 0.9, limits).is_good
    assert judge_times(4.1, 0.9, limits).finding is Finding.LATE
    assert judge_times(3.9, 1.1, limits).finding is Finding.LATE_CHAINS


@pytest.mark.parametrize(
    ("claimed", "gib", "really"),
    [
        ("NVIDIA H200", 141, "A100"),
        ("NVIDIA H100 80GB HBM3", 80, "A100"),
        ("RTX 4090", 24, "RTX 3080"),
        ("A100", 80, "V100"),
    ],
)
def test_a_slower_card_cannot_be_in_time(claimed: str, gib: int, really: str) -> None:
    puzzle, claim = full(gib), speed_of(claimed)
    assert claim is not None
    # better than any card does: nine tenths of the datasheet, no digests, no network
    best_s = puzzle.operations / (SPEEDS[really].products_per_s * 0.9)
    best_s += puzzle.entries * 48 / SPEEDS[really].bytes_per_s
    assert best_s > allowed(puzzle, claim).product_s


def test_two_claims_on_one_card_cannot_both_be_in_time() -> None:
    puzzle, claim = full(141), SPEEDS["H200"]
    # one alone, at what an H200 was measured to do: 332 T/s, 1.3 s of digests for half as many entries
    alone_s = puzzle.operations / 332e12 + 2.6
    assert alone_s < 0.8 * allowed(puzzle, claim).product_s
    assert 2 * alone_s > 1.2 * allowed(puzzle, claim).product_s


@pytest.mark.parametrize(
    ("model", "gib"), [("H200", 141), ("H100 SXM", 80), ("A100", 80), ("A100", 40), ("RTX 4090", 24)]
)
def test_a_product_that_is_not_all_in_memory_makes_the_chains_late(model: str, gib: int) -> None:
    claim = SPEEDS[model]
    puzzle = sized(SEED, gib * GIB, depth=depth_for(DEPTH, gib * GIB, claim))
    # at the very best each missing entry reads one packed line, its other line being at hand, at the full bandwidth
    all_missing_s = puzzle.walkers * puzzle.steps * puzzle.depth / 2 / claim.bytes_per_s
    assert all_missing_s / 2 > 1.5 * allowed(puzzle, claim).chains_s
    assert all_missing_s / 3 > allowed(puzzle, claim).chains_s


@pytest.mark.parametrize(
    ("model", "gib", "product_s", "chains_s"), [("H200", 140.4, 8.25, 2.71), ("H100 80GB HBM3", 79.6, 5.43, 1.23)]
)
def test_a_real_card_has_time_to_spare(model: str, gib: float, product_s: float, chains_s: float) -> None:
    # the most that real ones took, docs/gpu-check.md
    claim = speed_of(model)
    assert claim is not None
    limits = allowed(sized(SEED, int(gib * GIB)), claim)
    assert limits.product_s > 1.35 * product_s
    assert limits.chains_s > 1.35 * chains_s


def test_no_table_of_the_steps_can_be_made_before_the_salt_is_known() -> None:
    keys = numbers.keys(SEED)
    one, other = (numbers.chain_keys(keys, bytes(32), salt) for salt in (bytes(32), bytes(31) + b"\1"))
    assert not set(one) & {*other, *keys}, "where a state leads changes with the salt, not only where chains begin"


def test_what_memory_is_filled_with_cannot_be_kept_in_much_less() -> None:
    rows, columns = ([numbers.line(key, n, DEPTH) for n in range(24)] for key in (KEYS[0:2], KEYS[2:4]))
    entries = [sum(map(mul, row, column)) for row in rows for column in columns]
    deviation = statistics.pstdev(entries)
    bits = math.log2(deviation * math.sqrt(2 * math.pi * math.e))  # of a normal distribution
    assert bits > 0.8 * 8 * ENTRY_BYTES


def test_a_claim_of_less_memory_gets_a_deeper_product_of_the_same_cost() -> None:
    claim = SPEEDS["H100 SXM"]
    whole = sized(SEED, 80 * GIB).operations
    for gib, depth in ((80, DEPTH), (60, DEPTH), (40, 2 * DEPTH), (20, 4 * DEPTH), (8, 4 * DEPTH)):
        assert depth_for(DEPTH, gib * GIB, claim) == depth
    for gib in (40, 20):
        assert sized(SEED, gib * GIB, depth=depth_for(DEPTH, gib * GIB, claim)).operations > 0.8 * whole
    assert depth_for(DEPTH, 8 * GIB, Speed(1.0, 1.0)) == DEPTH, "of a model whose memory nobody named"
    assert too_small(4 * GIB, claim)
    assert not too_small(8 * GIB, claim)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_models_are_found_by_either_spelling(model: str, name: str) -> None:
    assert speed_of(model) is SPEEDS[name]


@pytest.mark.parametrize("model", ["Voodoo 2", "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA L40", "Quadro T400", ""])
def test_an_unknown_model_has_no_limit_be_a_known_ones_name_in_it(model: str) -> None:
    assert speed_of(model) is None


def test_a_name_that_holds_two_models_is_held_to_the_faster_one() -> None:
    assert speed_of("NVIDIA H100 80GB HBM3 T4") is SPEEDS["H100 SXM"]
    assert speed_of("T4 H100 PCIe") is SPEEDS["H100 PCIe"]
    own = {"A100 40GB": Speed(1e14, 1e12), "Slow": Speed(1.0, 1.0)}
    assert speed_of("NVIDIA A100 40GB", own) is own["A100 40GB"], "an operator's narrower row is meant"
    assert speed_of("NVIDIA A100 Slow", own) is SPEEDS["A100"]


# -- the puzzle and the wire -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [1, 8, 24, 80, 141])
def test_a_puzzle_fills_most_of_the_memory_and_not_more(gib: int) -> None:
    puzzle = sized(SEED, gib * GIB, depth=1024)
    used = puzzle.product_bytes + puzzle.columns * puzzle.depth * 4
    assert 0.6 * gib * GIB < used < 0.9 * gib * GIB


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="do not hold a block"):
        sized(SEED, 1 << 20)


def test_what_is_sent_comes_back() -> None:
    assert Puzzle.from_json(json.loads(json.dumps(PUZZLE.to_json()))) == PUZZLE
    assert Spots.from_json(json.loads(json.dumps(SPOTS.to_json()))) == SPOTS
    sent = honest().open(SPOTS)
    assert openings_from_json(json.loads(json.dumps(openings_to_json(*sent)))) == sent
    assert Commitment.from_json(honest().commitment.to_json()) == honest().commitment


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"seed": "00"}, {**PUZZLE.to_json(), "rows": 1000}, {**PUZZLE.to_json(), "depth": True},
     {**PUZZLE.to_json(), "steps": 1.5}, {**PUZZLE.to_json(), "rows": 1 << 40}, {**PUZZLE.to_json(), "seed": "zz"}],
)  # fmt: skip
def test_hostile_puzzles_are_malformed(value: object) -> None:
    with pytest.raises(MalformedError):
        Puzzle.from_json(value)


@pytest.mark.parametrize(
    "value",
    [None, 3, {}, {"tiles": 1, "chains": []}, {"tiles": [{}], "chains": []}, {"tiles": [], "chains": [{"walker": -1}]},
     {"tiles": [{"block": 0, "tile": 0, "entries": ["x"], "digests": "", "partners": []}], "chains": []},
     {"tiles": [{"block": 0, "tile": 0, "entries": [1 << 15], "digests": "", "partners": []}], "chains": []}],
)  # fmt: skip
def test_hostile_openings_are_malformed(value: object) -> None:
    with pytest.raises(MalformedError):
        openings_from_json(value)
    with pytest.raises(MalformedError):
        Commitment.from_json(value)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_every_leaf_leads_to_the_root_and_no_other_does(count: int) -> None:
    leaves = [commitment.leaf(n, b"x") for n in range(count)]
    levels = commitment.tree(leaves)
    for number, leaf in enumerate(leaves):
        partners = commitment.path(levels, number)
        assert commitment.root_of(number, count, leaf, partners) == levels[-1][0]
        assert commitment.root_of(number, count, leaf, [*partners, leaf]) is None
        if count > 1:
            assert commitment.root_of(number, count, leaves[number - 1], partners) != levels[-1][0]
            assert commitment.root_of(number, count, leaf, partners[:-1]) != levels[-1][0]


# -- golden vectors ----------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_vectors() -> None:
    keys = numbers.keys(bytes.fromhex(VECTORS["puzzle"]["seed"]))
    assert list(keys) == VECTORS["keys"]
    for x, mixed in VECTORS["mix"]:
        assert numbers.mix(x) == mixed
    assert numbers.line(keys[0:2], 7, 64) == VECTORS["row_of_a"]["entries"]
    assert numbers.line(keys[2:4], 1999, 64) == VECTORS["column_of_b"]["entries"]


def test_a_tile_another_prover_opened_is_part_of_the_product() -> None:
    keys = numbers.keys(bytes.fromhex(VECTORS["puzzle"]["seed"]))
    tile, depth = VECTORS["tile"], VECTORS["puzzle"]["depth"]
    assert (tile["block"], tile["tile"]) == (1, 33)
    top, left = TILE, BLOCK + TILE
    for place, entry in enumerate(tile["entries"]):
        row = numbers.line(keys[0:2], top + place // TILE, depth)
        column = numbers.line(keys[2:4], left + place % TILE, depth)
        assert entry == sum(map(mul, row, column))
