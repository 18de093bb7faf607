"""Whom to challenge next, when, and what a finding means for a node's standing. Pure.

When. A GPU that was never challenged is due at once. After a good answer the next challenge is due after

    interval = (suspect + (trusted - suspect) * score^2 * passes / (passes + 2)) * (0.25 + 1.5 * chance)

where *score* is the node's standing and *passes* counts good answers in a row: often while a node is new or disputed,
rarely once it is trusted. *chance* is the bootstrap's own secret draw, so that nobody can rent a card for the day. A
failed one is challenged again after *suspect*; one that did not answer after `RETRY_MS`, doubled each time.

Whom. The GPU that has been due longest, and at the same moment nodes from the same place or for the same wallet, due or
not and whatever they claim, then every other due node that claims the same model, then those that claim it and are due
next, then whoever else is due: one card can answer for one claim.

What follows. A wrong answer cannot happen by accident, so it weighs as two disputes and a node without a good past gets
no tasks from then on; a late one may be a bad day and weighs as one. No answer is forgiven `FORGIVEN` times: who never
answers has nothing to show. A good answer takes one such time back only where the one before was good too: when the
challenge after a silent one comes can be foreseen, and were silence forgotten for it, a card could be had for those
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ngpu_bootstrap.kinship import same_place, same_wallet
from ngpu_protocol.challenge.verification import Finding
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address

RETRY_MS = 600_000
RETRY_DOUBLED = 6
FORGIVEN = 2
PASSES_HALF = 2
SOON_AFTER = 0.75
GOOD_WORTH = 3
"""Verified receipts that a good answer is worth: a good word, and not one that washes disputes away."""

_WEIGHTS = {
    Finding.LATE: 1,
    Finding.LATE_CHAINS: 1,
    Finding.NOT_OPENED: 2,
    Finding.NOT_COMMITTED: 2,
    Finding.WRONG_DIGEST: 2,
    Finding.WRONG_PRODUCT: 2,
    Finding.WRONG_CHAIN: 2,
    Finding.TOO_LARGE: 1,
}


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator wants.

    Attributes:
        trusted_ms, suspect_ms: the longest and the shortest interval.
        at_once: nodes challenged at one moment at most.
    """

    trusted_ms: int
    suspect_ms: int
    at_once: int


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of one GPU's challenges.

    Attributes:
        finding: of the last one; empty when there was none.
        passes: good answers in a row, up to now.
        silences: times without an answer that are not taken back yet.
    """

    at_ms: int = 0
    finding: str = ""
    passes: int = 0
    silences: int = 0

    def after(self, finding: Finding, at_ms: int) -> Past:
        """Return it with one more challenge."""
        if finding is Finding.UNANSWERED:
            return Past(at_ms, finding.value, 0, self.silences + 1)
        if finding is Finding.GOOD:
            settled = self.silences - 1 if self.finding == Finding.GOOD and self.silences else self.silences
            return Past(at_ms, finding.value, self.passes + 1, settled)
        return Past(at_ms, finding.value, 0, self.silences)


NOTHING = Past()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A connected node that may be challenged.

    Attributes:
        gpus: each with the canonical name of the model it claims.
        pasts: of those that were challenged, by GPU.
        score: the node's standing, 0 to 1.
        ip, wallet: where it connects from and who is paid; empty where unknown.
        not_before_ms: a challenge that could not even begin is not tried again before.
    """

    node: Address
    gpus: Sequence[tuple[bytes, str]]
    pasts: Mapping[bytes, Past]
    score: float
    ip: str = ""
    wallet: str = ""
    not_before_ms: int = 0


@dataclass(frozen=True, slots=True)
class Consequence:
    """What a finding does to a standing: *good* verified receipts' worth, or so many *disputes*."""

    good: int = 0
    disputes: int = 0


def consequence(finding: Finding, before: Past) -> Consequence:
    """Return what follows from *finding* for the node, whose GPU had the past *before*."""
    if finding is Finding.GOOD:
        return Consequence(good=GOOD_WORTH)
    if finding is Finding.UNANSWERED:
        return Consequence(disputes=1 if before.silences >= FORGIVEN else 0)
    return Consequence(disputes=_WEIGHTS[finding])


def due_at_ms(past: Past, score: float, rules: Rules, chance: float) -> int:
    """Return when the next challenge of a GPU is due.

    Args:
        chance: in [0, 1), the same for the same GPU and past for as long as they are the same.
    """
    if not past.finding:
        return 0
    if past.finding == Finding.UNANSWERED:
        return past.at_ms + (RETRY_MS << min(past.silences - 1, RETRY_DOUBLED))
    if past.finding != Finding.GOOD:
        return past.at_ms + rules.suspect_ms
    confidence = score * score * past.passes / (past.passes + PASSES_HALF)
    interval_ms = rules.suspect_ms + (rules.trusted_ms - rules.suspect_ms) * confidence
    return past.at_ms + int(interval_ms * (0.25 + 1.5 * chance))


def is_due(candidate: Candidate, rules: Rules, now_ms: int, chance: Callable[[bytes, Past], float]) -> bool:
    """Whether a GPU of *candidate* is due, were it possible to begin now."""
    pasts = [(gpu, candidate.pasts.get(gpu, NOTHING)) for gpu, _ in candidate.gpus]
    return any(due_at_ms(past, candidate.score, rules, chance(gpu, past)) <= now_ms for gpu, past in pasts)


def next_round(
    candidates: Sequence[Candidate], rules: Rules, now_ms: int, chance: Callable[[bytes, Past], float]
) -> list[Address]:
    """Return the nodes to challenge now, at one moment; empty when none is due."""
    due: list[tuple[int, str, str, Candidate]] = []
    for candidate in candidates:
        if now_ms < candidate.not_before_ms:
            continue
        for gpu, model in candidate.gpus:
            past = candidate.pasts.get(gpu, NOTHING)
            at_ms = due_at_ms(past, candidate.score, rules, chance(gpu, past))
            if at_ms <= now_ms:
                due.append((at_ms, candidate.node, model, candidate))
    if not due:
        return []
    due.sort(key=lambda one: one[:3])
    _, _, model, first = due[0]
    # those that may share a machine with the first, whatever each says that it is
    chosen = {first.node: first}
    for candidate in candidates:
        if now_ms >= candidate.not_before_ms and _akin(candidate, first):
            chosen.setdefault(candidate.node, candidate)
    for of_model in (True, False):
        for _, _, claimed, candidate in due:
            if (claimed == model) is of_model:
                chosen.setdefault(candidate.node, candidate)
        if of_model:
            for candidate in _soon(candidates, model, now_ms, rules, chance):
                chosen.setdefault(candidate.node, candidate)
    return list(chosen)[: rules.at_once]


def _soon(
    candidates: Sequence[Candidate], model: str, now_ms: int, rules: Rules, chance: Callable[[bytes, Past], float]
) -> list[Candidate]:
    """Return those that claim *model* and have waited most of their time, the next to be due first.

    Two claims on one card are found when both are asked at once, and each has a day of its own.
    """
    found: list[tuple[int, str, Candidate]] = []
    for candidate in candidates:
        for gpu, claimed in candidate.gpus:
            past = candidate.pasts.get(gpu, NOTHING)
            if claimed != model or now_ms < candidate.not_before_ms or past.finding != Finding.GOOD:
                continue
            at_ms = due_at_ms(past, candidate.score, rules, chance(gpu, past))
            if now_ms - past.at_ms >= SOON_AFTER * (at_ms - past.at_ms):
                found.append((at_ms, candidate.node, candidate))
    return [candidate for _, _, candidate in sorted(found, key=lambda one: one[:2])]


def _akin(one: Candidate, other: Candidate) -> bool:
    return same_place(one.ip, other.ip) or same_wallet(one.wallet, other.wallet)
