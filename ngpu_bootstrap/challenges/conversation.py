"""One challenge of one GPU: the puzzle, the commitment in time, the chains in time, the openings.

Owns the order of the questions and what each answer must be. What carries a request to the node is given, and so is
the check of what was opened. Nothing that a prover says raises: the finding says it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from ngpu_bootstrap.errors import BootstrapError
from ngpu_protocol.challenge.puzzle import BLOCK_TILES, Puzzle
from ngpu_protocol.challenge.speeds import Allowed
from ngpu_protocol.challenge.verification import (
    FREIVALDS_RANGE,
    Commitment,
    Finding,
    Judgement,
    Spots,
    judge_times,
)
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address

TILES_OPENED = 4
CHAINS_OPENED = 2
# Past its limit an answer is late whatever it says; a while longer it is waited for, so that people see how late.
WAITED = 1.5
WAITED_MORE_S = 3.0
OPENING_S = 60.0
CLOSING_S = 10.0
# Of what provers compute (`examples/challenge`): one that means another version is no cheat.
VERSION = 2


class OtherVersion(BootstrapError):
    """The prover there answers challenges of another version than this one's."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A GPU as its node claims it. *number* is its place among those that the prover has."""

    node: Address
    gpu: bytes
    model: str
    memory_bytes: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back of one request.

    Attributes:
        status: the prover's; 0 when there is none.
        seconds: from the moment the request went out to the end of its answer.
        is_late: the time for it was over.
        problem: for people, why there is no answer.
    """

    status: int
    body: bytes
    seconds: float
    task_id: str
    is_late: bool = False
    problem: str = ""


class Carrier(Protocol):
    """Takes a request to the claim's node and brings the answer back."""

    async def __call__(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply: ...


Check = Callable[[Puzzle, Commitment, Spots, bytes, list[int], bytes], Awaitable[Judgement]]


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a challenge. Seconds are 0 for parts that were not reached."""

    judgement: Judgement
    product_s: float = 0.0
    chains_s: float = 0.0
    task_id: str = ""


class _Ended(Exception):
    def __init__(self, judgement: Judgement) -> None:
        self.judgement = judgement


async def challenge(
    claim: Claim,
    puzzle: Puzzle,
    nonce: bytes,
    allowed: Allowed,
    ask: Carrier,
    check: Check,
    say: Callable[[str], None] = lambda phase: None,
) -> Told:
    """Challenge *claim* with *puzzle* and return what became of it.

    Args:
        nonce: what the seed was made of.
        say: told the name of each phase as it begins.

    Raises:
        OtherVersion: the prover there is not of this version; says nothing about the node.
    """
    product_s = chains_s = 0.0
    proof = task_id = ""
    try:
        say("product")
        named = {"node": claim.node, "gpu": claim.gpu.hex(), "nonce": nonce.hex()}
        began = await _ask(
            ask, "/proof", {**puzzle.to_json(), "gpu": claim.number, "for": named}, allowed.product_s, Finding.LATE
        )
        product_s, task_id = began.seconds, began.task_id
        proof = _text(began.value, "proof")
        if began.value.get("version") != VERSION:
            said = str(began.value.get("version", 1))[:16]
            raise OtherVersion(
                f"the prover there answers challenges of version {said}, this bootstrap means {VERSION}: build "
                "examples/challenge anew and have its workspace run that"
            )
        say("chains")
        # What leads to the chains is drawn now: known before, they could be followed while the product is made, by
        # whoever cannot keep it.
        salt = secrets.token_bytes(32)
        walked = await _ask(ask, f"/proof/{proof}/walk", {"salt": salt.hex()}, allowed.chains_s, Finding.LATE_CHAINS)
        chains_s = walked.seconds
        committed = Commitment.from_json({"root": began.value.get("root"), "ends": walked.value.get("ends")})
        # a late answer is late; what it says may still be looked at, and a wrong one weighs more
        timed = judge_times(product_s, chains_s, allowed)
        say("opening")
        spots = Spots(
            tuple(
                (secrets.randbelow(puzzle.blocks), secrets.randbelow(BLOCK_TILES * BLOCK_TILES))
                for _ in range(TILES_OPENED)
            ),
            tuple(secrets.randbelow(puzzle.walkers) for _ in range(CHAINS_OPENED)),
        )
        opened = await ask("POST", f"/proof/{proof}/open", _packed(spots.to_json()), OPENING_S)
        if opened.status != 200:
            raise _Ended(_silence(opened, Finding.NOT_OPENED))
        await _close(ask, proof)
        proof = ""
        say("checking")
        vector = [secrets.randbelow(FREIVALDS_RANGE) for _ in range(32)]
        judgement = await check(puzzle, committed, spots, opened.body, vector, salt)
        judgement = judgement if not judgement.is_good else timed
    except _Ended as ended:
        judgement = ended.judgement
    except MalformedError as error:
        judgement = Judgement(Finding.NOT_OPENED, str(error)[:200])
    finally:
        await _close(ask, proof)
    return Told(judgement, product_s, chains_s, task_id)


async def _close(ask: Carrier, proof: str) -> None:
    """Have the prover give its memory back, if it holds any."""
    if proof:
        await ask("DELETE", f"/proof/{proof}", b"", CLOSING_S)


@dataclass(frozen=True, slots=True)
class _Answer:
    value: dict[str, Any]
    seconds: float
    task_id: str


async def _ask(ask: Carrier, path: str, value: Any, limit_s: float, late: Finding) -> _Answer:
    reply = await ask("POST", path, _packed(value), limit_s * WAITED + WAITED_MORE_S)
    if reply.is_late:
        raise _Ended(Judgement(late, f"no answer within {reply.seconds:.2f} s, of which {limit_s:.2f} s were allowed"))
    if reply.status != 200:
        raise _Ended(_silence(reply, Finding.UNANSWERED))
    try:
        found = json.loads(reply.body)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:  # what is nested a thousand deep is the prover's doing
        raise MalformedError("proof", str(error)) from None
    return _Answer(found, reply.seconds, reply.task_id)


def _silence(reply: Reply, finding: Finding) -> Judgement:
    """Return the judgement on a request that was not answered with 200. What broke on the way is no answer."""
    if not reply.status:
        return Judgement(Finding.UNANSWERED, reply.problem[:200])
    said = reply.body[:200].decode("utf-8", "replace")
    return Judgement(finding, f"the prover answered {reply.status}: {said}")


def _packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not (found.isascii() and found.isalnum()) or len(found) > 64:
        raise MalformedError("proof", f"{name} is no name")
    return found
