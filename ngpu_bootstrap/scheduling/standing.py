"""What a node's receipts say about it: a number from 0 to 1, and why. Pure.

    standing = (good + PRIOR) / (good + PRIOR + DISPUTE_WEIGHT * bad)

*good* and *bad* count verified and disputed receipts with older ones fading: each receipt lets the counts before it
shrink by one in `MEMORY`, so that a long good past does not cover for a bad present, and *bad* halves every
`HALF_LIFE_MS`, since a node that gets no work can prove nothing. A new node has 1. One dispute brings it to 0.5, which
is still trusted; a second within the half-life does not (`TRUSTED_FROM`). Receipts that are right in all but their
times (`skew`) count neither way: a clock is not a lie. Challenges (`challenges/policy.py`) and tasks that were run
again count beside receipts, as so many good or disputed ones.

A ratio and not a sum, so that standing cannot be stored up; a prior, so that one dispute is not the end of a node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, replace

from ngpu_protocol.frozen import dataclass

PRIOR = 10.0
DISPUTE_WEIGHT = 10.0
MEMORY = 256.0
HALF_LIFE_MS = 24 * 3600 * 1000
TRUSTED_FROM = 0.5
RULES_KEPT = 32
"""Different rules counted by name; there are fewer."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a node's receipts.

    Attributes:
        good: verified receipts, faded.
        bad: disputed ones, faded, as of *at_ms*.
        at_ms: of the last receipt counted.
        verified, skewed, disputed: ever, not faded.
        rules: how many disputes broke which rule.
        last_rule, last_task, last_disputed_at_ms: of the last dispute; empty and 0 for none.
    """

    good: float = 0.0
    bad: float = 0.0
    at_ms: int = 0
    verified: int = 0
    skewed: int = 0
    disputed: int = 0
    rules: Mapping[str, int] = field(default_factory=dict)
    last_rule: str = ""
    last_task: str = ""
    last_disputed_at_ms: int = 0

    def bad_at(self, now_ms: int) -> float:
        """Return the faded count of disputes at *now_ms*."""
        return self.bad * 0.5 ** (max(0, now_ms - self.at_ms) / HALF_LIFE_MS) if self.bad else 0.0

    def score(self, now_ms: int) -> float:
        """Return the standing, 0 to 1."""
        good = self.good + PRIOR
        return good / (good + DISPUTE_WEIGHT * self.bad_at(now_ms))

    def is_trusted(self, now_ms: int) -> bool:
        """Return whether the node may get tasks."""
        return not self.bad or self.score(now_ms) >= TRUSTED_FROM

    def trusted_again_in_ms(self, now_ms: int) -> int:
        """Return how long a distrusted node gets nothing, if nothing else comes; 0 when it is trusted."""
        if self.is_trusted(now_ms):
            return 0
        allowed = (self.good + PRIOR) * (1 / TRUSTED_FROM - 1) / DISPUTE_WEIGHT
        return int(math.log2(self.bad_at(now_ms) / allowed) * HALF_LIFE_MS) + 1

    def explained(self, now_ms: int) -> str:
        """Return a sentence for people."""
        counts = f"{self.verified} receipts verified, {self.skewed} with a clock off, {self.disputed} disputed"
        if not self.disputed:
            return f"{counts}: standing {self.score(now_ms):.2f}"
        rules = ", ".join(f"{count} {rule}" for rule, count in sorted(self.rules.items(), key=lambda item: -item[1]))
        text = f"{counts} ({rules}; the last: rule {self.last_rule}, task {self.last_task})"
        text += f": standing {self.score(now_ms):.2f}"
        pause_ms = self.trusted_again_in_ms(now_ms)
        if pause_ms:
            text += f", below {TRUSTED_FROM}: no tasks for another {pause_ms / 3600_000:.1f} h"
        return text


def with_verified(standing: Standing, count: int, now_ms: int) -> Standing:
    """Return *standing* with *count* more verified receipts in it."""
    fading = (1.0 - 1.0 / MEMORY) ** count
    return replace(
        standing,
        good=standing.good * fading + (1.0 - fading) * MEMORY,
        bad=standing.bad_at(now_ms) * fading,
        at_ms=now_ms,
        verified=standing.verified + count,
    )


def with_good_word(standing: Standing, count: int, now_ms: int) -> Standing:
    """Return *standing* with something in it that was no receipt, and speaks for the node as *count* of them do."""
    return replace(with_verified(standing, count, now_ms), verified=standing.verified)


def with_skewed(standing: Standing, count: int) -> Standing:
    """Return *standing* with *count* more receipts in it whose times were off."""
    return replace(standing, skewed=standing.skewed + count)


def with_dispute(standing: Standing, *, rule: str, task_id: str, now_ms: int) -> Standing:
    """Return *standing* with one more disputed receipt in it, which broke *rule*."""
    fading = 1.0 - 1.0 / MEMORY
    rules = dict(standing.rules)
    if rule in rules or len(rules) < RULES_KEPT:
        rules[rule] = rules.get(rule, 0) + 1
    return replace(
        standing,
        good=standing.good * fading,
        bad=standing.bad_at(now_ms) * fading + 1.0,
        at_ms=now_ms,
        disputed=standing.disputed + 1,
        rules=rules,
        last_rule=rule,
        last_task=task_id,
        last_disputed_at_ms=now_ms,
    )


def joined(one: Standing, other: Standing) -> Standing:
    """Return what two bootstraps know of one node, together."""
    now_ms = max(one.at_ms, other.at_ms)
    later = one if one.last_disputed_at_ms >= other.last_disputed_at_ms else other
    rules = dict(one.rules)
    for rule, count in other.rules.items():
        rules[rule] = rules.get(rule, 0) + count
    return Standing(
        good=one.good + other.good,
        bad=one.bad_at(now_ms) + other.bad_at(now_ms),
        at_ms=now_ms,
        verified=one.verified + other.verified,
        skewed=one.skewed + other.skewed,
        disputed=one.disputed + other.disputed,
        rules=rules,
        last_rule=later.last_rule,
        last_task=later.last_task,
        last_disputed_at_ms=later.last_disputed_at_ms,
    )
