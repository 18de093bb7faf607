"""The challenge workspace with NumPy at small size: over HTTP, against the verifier, and against cheats."""

from __future__ import annotations

import json
import secrets
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from operator import ne
from pathlib import Path
from typing import Any

import pytest

from ngpu_protocol.challenge import commitment, numbers
from ngpu_protocol.challenge import verification as ver
from ngpu_protocol.challenge.puzzle import BLOCK, Puzzle

ROOT = Path(__file__).parents[3]
SALT = bytes(range(64, 96))
VECTORS = json.loads((ROOT / "tests" / "vectors" / "challenge.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def workspace_on_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "examples" / "challenge"))
    yield
    sys.path.remove(str(ROOT / "examples" / "challenge"))


def proof_of(puzzle: Puzzle) -> Any:
    from gpu_challenge.arrays import choose
    from gpu_challenge.prover import Proof

    proof = Proof(choose("numpy"), puzzle.to_json())
    proof.compute()
    proof.walk(SALT)
    return proof


def a_puzzle(**changes: Any) -> Puzzle:
    values = {"seed": secrets.token_bytes(32), "rows": 2 * BLOCK, "columns": BLOCK, "depth": 256, **changes}
    return Puzzle(**{"walkers": 3000, "steps": 4, **values})


def some_spots(puzzle: Puzzle) -> ver.Spots:
    tiles = tuple((secrets.randbelow(puzzle.blocks), secrets.randbelow(1024)) for _ in range(3))
    return ver.Spots(tiles, (0, 1024, 2999, secrets.randbelow(puzzle.walkers)))


def a_vector() -> list[int]:
    return [secrets.randbelow(ver.FREIVALDS_RANGE) for _ in range(32)]


def judged(puzzle: Puzzle, proof: Any) -> ver.Judgement:
    spots = some_spots(puzzle)
    opened = ver.openings_from_json(proof.open(spots.tiles, spots.walkers))
    return ver.judge_openings(puzzle, ver.Commitment(proof.root, proof.ends), spots, *opened, a_vector(), SALT)


def test_what_numpy_computes_is_what_the_verifier_expects() -> None:
    puzzle = a_puzzle()
    assert judged(puzzle, proof_of(puzzle)).is_good


def test_the_proof_is_that_of_the_vectors_however_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    puzzle = Puzzle.from_json(VECTORS["puzzle"])
    for depth_at_once, chunk_bytes, walkers_at_once in ((8192, 1 << 30, 1 << 23), (24, 1 << 20, 700)):
        monkeypatch.setattr("gpu_challenge.prover.DEPTH_AT_ONCE", depth_at_once)
        monkeypatch.setattr("gpu_challenge.prover.CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr("gpu_challenge.prover.WALKERS_AT_ONCE", walkers_at_once)
        proof = proof_of(puzzle)
        assert (proof.root.hex(), proof.ends.hex()) == (VECTORS["root"], VECTORS["salted"]["ends"])
        proof.walk()
        assert proof.ends.hex() == VECTORS["ends"]


def test_a_product_is_kept_modulo_two_to_the_sixteenth() -> None:
    import numpy
    from gpu_challenge.arrays import choose

    arrays = choose("numpy")
    out, left, right = arrays.empty(1, 1), arrays.lines(1, 1), arrays.lines(1, 1)
    left[:], right[:] = 100, 200
    for times in range(4):
        arrays.product(left, right, out, add=times > 0)
        assert (out.dtype, out[0, 0]) == ("int16", numbers.kept(20_000 * (times + 1)))
    # so deep that its entries do not fit: about 32,768, as often more as less
    puzzle = Puzzle(bytes(32), BLOCK, BLOCK, 1 << 17, walkers=1)
    keys = numbers.keys(puzzle.seed)
    rows, columns = (
        numpy.array([numbers.line(key, n, puzzle.depth) for n in range(32)]) for key in (keys[:2], keys[2:4])
    )
    exact = [int(entry) for entry in (rows.astype(float) @ columns.astype(float).T).reshape(-1)]
    entries = tuple(numbers.kept(entry) for entry in exact)
    assert 100 < sum(map(ne, exact, entries)) < 900

    def found(entries: tuple[int, ...]) -> ver.Finding:
        digests = numbers.tile_digest(keys[4], entries).to_bytes(4, "little") + bytes(4 * 1023)
        root = commitment.leaf(0, digests)
        tile = ver.OpenedTile(0, 0, entries, digests, ())
        return ver.judge_openings(
            puzzle, ver.Commitment(root, bytes(32)), ver.Spots(((0, 0),), ()), [tile], [], a_vector()
        ).finding

    assert found(entries) is ver.Finding.GOOD
    assert found((*entries[:-1], entries[-1] ^ 1)) is ver.Finding.WRONG_PRODUCT


def test_chains_that_are_followed_without_the_salt_are_found() -> None:
    puzzle = a_puzzle()
    proof = proof_of(puzzle)
    proof.walk()
    assert judged(puzzle, proof).finding is ver.Finding.WRONG_CHAIN


def cheat_on_entries(proof: Any) -> None:
    """Rounds each entry to a multiple of 4: what a cheaper arithmetic gives."""
    proof._product -= proof._product % 4


def cheat_by_leaving_out(proof: Any) -> None:
    """Computes the first half of the rows only."""
    proof._product[BLOCK:] = 0


@pytest.mark.parametrize("cheat", [cheat_on_entries, cheat_by_leaving_out])
def test_a_product_that_is_not_the_product_is_found(cheat: Callable[[Any], None]) -> None:
    puzzle = a_puzzle()
    proof = proof_of(puzzle)
    cheat(proof)
    proof._digest()
    proof.walk(SALT)
    spots = ver.Spots(((1, 7), (1, 500)), (0,))
    opened = ver.openings_from_json(proof.open(spots.tiles, spots.walkers))
    found = ver.judge_openings(puzzle, ver.Commitment(proof.root, proof.ends), spots, *opened, a_vector(), SALT)
    assert found.finding is ver.Finding.WRONG_PRODUCT


def test_a_tile_computed_only_when_asked_for_is_found() -> None:
    puzzle = a_puzzle()
    proof, honest = proof_of(puzzle), proof_of(puzzle)
    cheat_by_leaving_out(proof)
    proof._digest()
    proof.walk(SALT)
    spots = ver.Spots(((1, 7),), ())
    tiles, _ = ver.openings_from_json(proof.open(spots.tiles, []))
    true_tiles, _ = ver.openings_from_json(honest.open(spots.tiles, []))
    patched = ver.OpenedTile(1, 7, true_tiles[0].entries, tiles[0].digests, tiles[0].partners)
    found = ver.judge_openings(puzzle, ver.Commitment(proof.root, proof.ends), spots, [patched], [], a_vector(), SALT)
    assert found.finding is ver.Finding.WRONG_DIGEST


def test_a_replayed_answer_is_found() -> None:
    proof = proof_of(a_puzzle())
    assert not judged(a_puzzle(), proof).is_good


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Client:
    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, value: Any = None) -> tuple[int, Any]:
        data = None if value is None else json.dumps(value).encode() if not isinstance(value, bytes) else value
        request = urllib.request.Request(self.base + path, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture
def client() -> Iterator[Client]:
    from gpu_challenge.arrays import choose
    from gpu_challenge.http_server import Provers, serve

    server = serve("127.0.0.1", 0, Provers([choose("numpy")]))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Client(int(server.server_address[1]))
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_challenge_over_http(client: Client) -> None:
    assert client.ask("GET", "/health") == (200, {"status": "ok", "arrays": "numpy"})
    puzzle = a_puzzle()
    status, began = client.ask("POST", "/proof", puzzle.to_json())
    assert status == 200
    at = f"/proof/{began['proof']}"
    _, walked = client.ask("POST", f"{at}/walk", {"salt": SALT.hex()})
    committed = ver.Commitment.from_json({**began, **walked})
    spots = some_spots(puzzle)
    _, opened = client.ask("POST", f"{at}/open", spots.to_json())
    openings = ver.openings_from_json(opened)
    assert ver.judge_openings(puzzle, committed, spots, *openings, a_vector(), SALT).is_good
    assert client.ask("POST", "/proof", a_puzzle().to_json())[0] == 409, "one at a time"
    assert client.ask("DELETE", at)[0] == 200
    assert client.ask("POST", f"{at}/walk", {"salt": SALT.hex()})[0] == 404
    assert client.ask("POST", "/proof", puzzle.to_json())[0] == 200


@pytest.mark.parametrize("value", [{}, {"seed": "00"}, [], b"not json", {"seed": "00", "rows": "x"}])
def test_what_is_no_puzzle_is_refused(client: Client, value: Any) -> None:
    status, answer = client.ask("POST", "/proof", value)
    assert status == 400, answer
    assert client.ask("GET", "/health")[0] == 200


def test_what_is_not_there_is_not_opened(client: Client) -> None:
    _, began = client.ask("POST", "/proof", a_puzzle(rows=BLOCK, depth=8).to_json())
    at = f"/proof/{began['proof']}"
    client.ask("POST", f"{at}/walk", {"salt": SALT.hex()})
    for spots in (
        {"tiles": [[5, 0]], "walkers": []},
        {"tiles": [], "walkers": [10**9]},
        {"tiles": [[0, 1024]], "walkers": []},
        {},
    ):
        assert client.ask("POST", f"{at}/open", spots)[0] == 400
    assert client.ask("GET", "/nothing")[0] == 404
    assert client.ask("POST", "/proof/x/y/z", {})[0] == 404
