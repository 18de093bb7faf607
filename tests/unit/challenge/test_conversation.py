"""One challenge, question by question, with a prover that says what the test wants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.challenges.checking import Checking
from ngpu_bootstrap.challenges.conversation import Claim, OtherVersion, Reply, Told, challenge
from ngpu_protocol.challenge.puzzle import BLOCK, Puzzle, bound_seed
from ngpu_protocol.challenge.speeds import SPEEDS, Allowed, Speed, allowed, speed_of, too_large
from ngpu_protocol.challenge.verification import Commitment, Finding, Judgement, Spots
from ngpu_protocol.identity import Address

NODE = Address("0x" + "11" * 20)
GPU = bytes(range(32))
NONCE = bytes(32)
CLAIM = Claim(NODE, GPU, "Test Card", 1 << 24)
PUZZLE = Puzzle(bound_seed(NONCE, NODE, GPU), BLOCK, BLOCK, 8, walkers=40, steps=3)
LIMITS = Allowed(2.0, 1.0)
GOOD = Judgement(Finding.GOOD)
BEGAN = {"proof": "p1", "root": "aa" * 32, "version": 2}
WALKED = {"ends": "bb" * 32}


class Prover:
    """Answers with *says*, by path; what is not named answers as a prover would that is right."""

    def __init__(self, **says: Reply) -> None:
        self.says = says
        self.asked: list[tuple[str, str, Any]] = []

    async def __call__(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        value = json.loads(body) if body else None
        self.asked.append((method, path, value))
        name = "proof" if path == "/proof" else path.rsplit("/", 1)[1] if method == "POST" else "close"
        usual = {"proof": BEGAN, "walk": WALKED}.get(name, {})
        return self.says.get(name) or Reply(200, json.dumps(usual).encode(), 0.5, f"task {name}")


async def told(prover: Prover, verdict: Judgement = GOOD) -> Told:
    async def check(
        puzzle: Puzzle, committed: Commitment, spots: Spots, opened: bytes, vector: list[int], salt: bytes
    ) -> Judgement:
        assert prover.asked[1][2] == {"salt": salt.hex()}
        assert (committed.root.hex(), committed.ends.hex()) == ("aa" * 32, "bb" * 32)
        assert (len(spots.tiles), len(spots.walkers), len(vector)) == (4, 2, 32)
        return verdict

    return await challenge(CLAIM, PUZZLE, NONCE, LIMITS, prover, check)


@trio_test
async def test_the_questions_come_in_their_order_and_the_memory_is_given_back() -> None:
    prover = Prover()
    found = await told(prover)
    assert found.judgement.is_good
    assert (found.product_s, found.chains_s, found.task_id) == (0.5, 0.5, "task proof")
    asked = [(method, path) for method, path, _ in prover.asked]
    assert asked == [
        ("POST", "/proof"),
        ("POST", "/proof/p1/walk"),
        ("POST", "/proof/p1/open"),
        ("DELETE", "/proof/p1"),
    ]
    named = prover.asked[0][2]["for"]
    assert named == {"node": NODE, "gpu": GPU.hex(), "nonce": NONCE.hex()}
    assert prover.asked[0][2]["seed"] == bound_seed(NONCE, NODE, GPU).hex()


def reply(value: Any, seconds: float = 0.5, **others: Any) -> Reply:
    return Reply(**{"status": 200, "body": json.dumps(value).encode(), "seconds": seconds, "task_id": "t", **others})


@pytest.mark.parametrize(
    ("says", "finding"),
    [
        ({"proof": reply(BEGAN, seconds=2.1)}, Finding.LATE),
        ({"walk": reply(WALKED, seconds=1.1)}, Finding.LATE_CHAINS),
        ({"proof": reply(None, status=0, is_late=True, seconds=6)}, Finding.LATE),
        ({"walk": reply(None, status=0, is_late=True, seconds=6)}, Finding.LATE_CHAINS),
        ({"proof": reply(None, status=0, problem="the connection was lost")}, Finding.UNANSWERED),
        ({"walk": reply(None, status=0, problem="the connection was lost")}, Finding.UNANSWERED),
        ({"open": reply(None, status=0, problem="the connection was lost")}, Finding.UNANSWERED),
        ({"proof": reply({"message": "out of memory"}, status=500)}, Finding.UNANSWERED),
        ({"open": reply({"message": "I have forgotten"}, status=404)}, Finding.NOT_OPENED),
        ({"proof": reply([])}, Finding.NOT_OPENED),
        ({"proof": reply({**BEGAN, "proof": "../../x"})}, Finding.NOT_OPENED),
        ({"proof": reply({**BEGAN, "proof": "\u00e9"})}, Finding.NOT_OPENED),
        ({"proof": reply({"proof": "p1", "version": 2})}, Finding.NOT_OPENED),
        ({"proof": Reply(200, b"[" * 200_000, 0.1, "t")}, Finding.NOT_OPENED),
        ({"walk": Reply(200, b'{"ends":' * 100_000, 0.1, "t")}, Finding.NOT_OPENED),
        ({"walk": reply({"ends": "short"})}, Finding.NOT_OPENED),
        ({"proof": Reply(200, b"\xff{", 0.1, "t")}, Finding.NOT_OPENED),
    ],
)
def test_what_a_prover_says_becomes_a_finding(says: dict[str, Reply], finding: Finding) -> None:
    @trio_test
    async def run() -> None:
        prover = Prover(**says)
        found = await told(prover)
        assert found.judgement.finding is finding, found

    run()


@trio_test
async def test_a_prover_of_another_version_is_told_apart_from_a_cheat() -> None:
    prover = Prover(proof=reply({"proof": "p1", "root": "aa" * 32}))
    with pytest.raises(OtherVersion, match="of version 1, this bootstrap means 2: build"):
        await told(prover)
    assert prover.asked[-1][:2] == ("DELETE", "/proof/p1"), "its memory is given back"


@trio_test
async def test_a_wrong_answer_that_is_late_too_is_wrong() -> None:
    prover = Prover(proof=reply(BEGAN, seconds=2.5))
    assert (await told(prover, Judgement(Finding.WRONG_PRODUCT))).judgement.finding is Finding.WRONG_PRODUCT
    prover = Prover(proof=reply(BEGAN, seconds=2.5))
    assert (await told(prover)).judgement.finding is Finding.LATE


@pytest.mark.parametrize("opened", [b"{}", b"not json", b"[" * 100_000, b'{"tiles": [], "chains": []}', b"\xff\xfe"])
def test_hostile_openings_are_a_finding_and_the_checking_process_ends(opened: bytes) -> None:
    @trio_test
    async def run() -> None:
        committed = Commitment(bytes(32), bytes(32))
        found = await Checking()(PUZZLE, committed, Spots(((0, 0),), (0,)), opened, [1] * 32, bytes(32))
        assert found.finding is Finding.NOT_OPENED

    run()


def test_a_seed_is_of_one_nonce_one_node_and_one_gpu() -> None:
    seeds = {
        bound_seed(nonce, node, gpu)
        for nonce in (bytes(32), bytes([1]) * 32)
        for node in (NODE, Address("0x" + "22" * 20))
        for gpu in (GPU, bytes(32))
    }
    assert len(seeds) == 8
    with pytest.raises(ValueError, match="32 bytes"):
        bound_seed(b"short", NODE, GPU)


def test_an_operators_own_figures_win() -> None:
    own = {"H200": Speed(1e12, 1e12), "Voodoo 2": Speed(1e9, 1e9)}
    assert speed_of("NVIDIA H200", own) is own["H200"]
    assert speed_of("3dfx Voodoo 2", own) is own["Voodoo 2"]
    assert speed_of("Tesla T4", own) is SPEEDS["T4"]


def test_a_card_that_is_not_sold_so_large_is_too_large() -> None:
    h200 = 150_754_820_096  # as the driver says of one
    assert not too_large(h200, SPEEDS["H200"])
    assert not too_large(h200 - (8 << 30), SPEEDS["H200"]), "an owner may withhold memory"
    assert too_large(h200, SPEEDS["H100 SXM"])
    assert not too_large(1 << 60, Speed(1.0, 1.0))


def test_every_figure_has_a_source_and_a_size() -> None:
    assert all(speed.source and speed.memory_gib for speed in SPEEDS.values())


def test_limits_follow_the_claim() -> None:
    fast, slow = allowed(PUZZLE, SPEEDS["H200"]), allowed(PUZZLE, SPEEDS["T4"])
    assert fast.product_s < slow.product_s
