"""The candidates of one workspace, indexed, and the choice among them.

A decision must not look at every node: with ten thousand of them that alone would take milliseconds. So the index keeps
those that may run a task now (no exclusion, a slot believed free) in one bucket for each place in the client's order of
GPU models, and a decision looks at a few of the first bucket that is not empty:

    1. the best GPU model that has a free slot anywhere;
    2. of its bucket, `SAMPLE` candidates drawn by chance (all of them where there are no more);
    3. of those, the one expected to finish first, or the first drawn of the near-equals.

    expected finish = (round trip + typical time * speed * (1 + CROWDING * share in use)) / (1 - failures) / standing

Where other bootstraps use the same nodes, news of them is old by up to a heartbeat, and a slot said to be free may be
taken. How often that happens is measured (`Pool.contention`: refusals for want of a slot); the more often, the more a
node is preferred of which something is known since lately: it reported, or an attempt of ours ended there.

Drawing before choosing is what keeps several bootstraps with the same second-old news from all choosing the same node
(Mitzenmacher, *The power of two choices in randomized load balancing*, 2001, and *How useful is old information?*,
2000); two draws would nearly do, a few more see differences of speed. Where no candidate has a free slot the call waits
(`waiting`): a slot free anywhere goes before a queue, whatever the GPU model.

What a bucket says is believed until it is looked at: a candidate that turns out to be full or silent is taken out then,
and comes back when something is heard of it, or one of our attempts there ends. So the cost of a decision is that of
its sample, and each change costs the same however many candidates there are.

Where every candidate is set aside for failing, the one whose pause ends first is tried: if all fail it is more likely
the workspace than the nodes, and its client shall see its answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ngpu_bootstrap.scheduling.affinity import AffinityTable
from ngpu_bootstrap.scheduling.history import DeploymentHistory, NodeHistory, ServiceTimes
from ngpu_bootstrap.scheduling.load import Room
from ngpu_bootstrap.scheduling.reasons import (
    NOTHING,
    SILENCE_LIMIT_MS,
    DeploymentFacts,
    Exclusion,
    deployment_exclusion,
)
from ngpu_bootstrap.scheduling.waiting import Lines
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address

SAMPLE = 4
NEAR_EQUAL = 0.1
FIRST_FULL_PAUSE_S = 0.05
LAST_FULL_PAUSE_S = 2.5
DOUBTED = 2
"""After so many refusals in a row by a node that never said it was full, its word that a slot is free ends no pause."""
CONTENTION_WEIGHT = 1 / 64
CONTENDED = 0.01
"""From this share of refused attempts on the age of the news counts, and twice as many candidates are looked at."""
FREED = 256
"""Slots that our own attempts left kept in mind at most."""
STALENESS = 4.0
"""How much a second of not having heard weighs against a node where every choice is contended."""
CROWDING = 0.5
"""How much longer a task is expected to take on a node whose every other slot is taken: between 0, where tasks do not
feel each other, and 1, where two take twice as long. What is measured of a node holds its usual crowding already."""
PHOTOGRAPH_MS = 1_000
"""How long after one photograph of a pool the next is taken, if tasks were placed meanwhile."""
PHOTOGRAPHS = 1024
PHOTOGRAPHED = 64_000
"""Candidates in all photographs of a pool at most; of a pool of thousands they are taken ever more rarely."""
SLOTS_FRESH_MS = 1_000
_UNKNOWN_RTT_S = 0.0


Captured = tuple[Address, Exclusion | None, int, int, int, float]
"""A candidate at a moment: node, reason, rank, slots, slots in use, expected finish in seconds."""


class Load:
    """One run of a node as far as choosing goes: its room, and what it was last heard.

    Attributes:
        host: what stands for the node outside of this package.
        reason: why it gets no task of any workspace, None when nothing speaks against it.
        entries: its candidates, by workspace id.
    """

    __slots__ = ("entries", "heard_at_ms", "history", "host", "node", "reason", "room", "rtt_s", "score")

    def __init__(self, node: Address, host: Any, *, slots: int, heard_at_ms: int, history: NodeHistory) -> None:
        self.node = node
        self.host = host
        self.room = Room(slots)
        self.heard_at_ms = heard_at_ms
        self.history = history
        self.reason: Exclusion | None = None
        self.rtt_s = _UNKNOWN_RTT_S
        self.score = 1.0
        self.entries: dict[str, Entry] = {}


class Entry:
    """A candidate: one workspace on one run of a node.

    Attributes:
        reason: why it gets nothing, None when it may get tasks; never TRIED or NO_FREE_SLOT, which are of the moment.
        facts: what the node said of the deployment.
        full_until_ms: it refused for want of a slot, and is not asked before then.
        refusals: for want of a slot, since a task ended well there or the node said itself that it was full.
        known_ms: when it was last known how full it is: its node said so, or an attempt of ours ended there.
        place: where it stands in its bucket; -1 when it is in none.
    """

    __slots__ = (
        "facts", "full_until_ms", "handicap", "history", "known_ms", "load", "place", "pool", "rank", "reason",
        "refusals", "room",
    )  # fmt: skip

    def __init__(self, pool: Pool, load: Load, history: DeploymentHistory) -> None:
        self.pool = pool
        self.load = load
        self.history = history
        self.room = Room()
        self.facts: DeploymentFacts = NOTHING
        self.reason: Exclusion | None = Exclusion.NOT_DEPLOYED
        self.rank = 0
        self.full_until_ms = 0
        self.refusals = 0
        self.known_ms = load.heard_at_ms
        self.handicap = 1.0
        self.place = -1

    def free(self, now_ms: int) -> int:
        """Return how many slots are believed free now."""
        if self.full_until_ms > now_ms:
            return 0
        room, node = self.room, self.load.room
        free = room.slots - room.others - room.in_flight
        of_node = node.slots - node.others - node.in_flight
        if of_node < free:
            free = of_node
        if free > 0 and (self.history.trouble.probing or self.load.history.trouble.probing):
            return 1 - room.in_flight  # on probation: one at a time
        return free

    def in_use(self, now_ms: int) -> int:
        """Return how many of the deployment's slots are not to be had."""
        slots = self.room.slots
        return slots - max(0, min(slots, self.free(now_ms)))

    def reconsider(self) -> None:
        """Work out anew what failures and standing make of its expected finish."""
        own, node = self.history.trouble, self.load.history.trouble
        # On probation it gets its share of tasks, one at a time: passed over, it could never show that it is well.
        failures = 0.0 if own.probing or node.probing else max(own.rate, node.rate)
        self.handicap = 1.0 / ((1.0 - min(failures, 0.9)) * max(self.load.score, 0.1))

    def expected_s(self, typical_s: float, share: float) -> float:
        """Return the expected finish of a task begun now, as a handicapped time."""
        return (self.load.rtt_s + typical_s * self.history.speed * (1.0 + CROWDING * share)) * self.handicap


class Choice:
    """A candidate chosen, with what was looked at: enough to explain it later, and nothing that costs to note.

    Attributes:
        seen: (expected finish in seconds, candidate, share of its slots in use) of each that was compared.
        why: `ranked`, `affinity`, `only_one`, `all_set_aside`.
        photograph: number of the pool's last photograph then, from which the others are explained.
    """

    __slots__ = ("at_ms", "entry", "photograph", "seen", "tried", "why")

    def __init__(
        self,
        entry: Entry,
        at_ms: int,
        seen: Sequence[tuple[float, Entry, float]],
        why: str,
        tried: Collection[Any],
    ) -> None:
        self.entry = entry
        self.at_ms = at_ms
        self.seen = seen
        self.why = why
        self.tried = tuple(tried) if tried else ()
        pool = entry.pool
        pool.choices += 1
        self.photograph = pool.photographs_taken


@dataclass(frozen=True, slots=True)
class Terms:
    """What a workspace wants of its candidates.

    Attributes:
        revision: of its specification as it is now.
        concurrency: tasks at once on one node.
        gpu_types: preferred first; empty: any.
    """

    revision: int
    concurrency: int
    gpu_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Photograph:
    """Every candidate of a pool at a moment."""

    number: int
    at_ms: int
    candidates: Sequence[Captured]


class Pool:
    """The candidates of one workspace.

    Attributes:
        entries: by node; of each node its newest run.
        ready: how many of them have no exclusion, full ones included.
        lines: the calls that wait.
        choices: made so far.
        contention: the share of attempts of late that a node refused for want of a slot: others were there first.
        photographs: the last ones, oldest first.
    """

    def __init__(self, workspace: str, terms: Terms, affinity: AffinityTable, *, sample: int = SAMPLE) -> None:
        self.workspace = workspace
        self.terms = terms
        self.times = ServiceTimes()
        self.typical_s = self.times.typical_s
        self.affinity = affinity
        self.lines: Lines[Any, Any] = Lines()
        self.entries: dict[Address, Entry] = {}
        self.ready = 0
        self.challenged = 0
        self.contention = 0.0
        self.choices = 0
        self.photographs: deque[Photograph] = deque()
        self.photographs_taken = 0
        self._choices_photographed = 0
        self._slots = 0
        self._slots_at_ms = -SLOTS_FRESH_MS
        self._sample = sample
        self._buckets: list[list[Entry]] = [[]]
        self._freed: deque[Entry] = deque(maxlen=FREED)
        self._aside: set[Entry] = set()

    # -- what is known of candidates

    def enter(self, load: Load) -> Entry:
        """Return the candidate on *load*, which replaces an earlier run of its node; nothing is known of it yet."""
        found = load.entries.get(self.workspace)
        if found is None:
            found = load.entries[self.workspace] = Entry(self, load, load.history.of(self.workspace))
            found.reconsider()
        before = self.entries.get(load.node)
        if before is not found:
            if before is not None:
                self._forget(before)
            self.entries[load.node] = found
        return found

    def remove(self, load: Load) -> None:
        """Forget the candidate on *load*: the node is gone."""
        entry = load.entries.get(self.workspace)
        if entry is not None and self.entries.get(load.node) is entry:
            del self.entries[load.node]
            self._forget(entry)

    def judge(self, entry: Entry, now_ms: int) -> None:
        """Work out anew whether *entry* may get tasks, and where it stands."""
        reason = entry.load.reason or deployment_exclusion(entry.facts)
        if reason is None and (entry.history.trouble.until_ms or entry.load.history.trouble.until_ms):
            reason = Exclusion.SET_ASIDE
        if reason is None and now_ms - entry.load.heard_at_ms > SILENCE_LIMIT_MS:
            reason = Exclusion.SILENT
        self._set_reason(entry, reason)
        rank = entry.facts.rank or 0
        if rank != entry.rank:
            self._leave(entry)
            entry.rank = rank
        self.settle(entry, now_ms)

    def settle(self, entry: Entry, now_ms: int) -> None:
        """Put *entry* into its bucket if it may take a task now, out of it if not."""
        if entry.reason is None and entry.free(now_ms) > 0:
            if entry.place < 0:
                while len(self._buckets) <= entry.rank:
                    self._buckets.append([])
                bucket = self._buckets[entry.rank]
                entry.place = len(bucket)
                bucket.append(entry)
        elif entry.place >= 0:
            self._leave(entry)

    def full_after_all(self, entry: Entry, now_ms: int) -> None:
        """Take in that the node had no slot: it is not asked before one should have become free, or it says so."""
        self.contention += (1.0 - self.contention) * CONTENTION_WEIGHT
        first_s = max(FIRST_FULL_PAUSE_S, self.typical_s / max(1, entry.room.slots))
        pause_s = min(LAST_FULL_PAUSE_S, first_s * 2.0 ** min(entry.refusals, 16))
        entry.refusals += 1
        entry.full_until_ms = now_ms + int(pause_s * 1000)
        self.settle(entry, now_ms)

    def freed(self, entry: Entry, now_ms: int) -> None:
        """Take in that an attempt of ours ended there: where others take what is free, that slot only we know of."""
        entry.known_ms = now_ms
        self._freed.append(entry)

    def heard(self, entry: Entry, now_ms: int, slots_free: int, ours: int | None) -> None:
        """Take in what the node says of its slots: how many are free, and how many run attempts of ours."""
        if not slots_free:
            entry.refusals = 0
        if entry.refusals < DOUBTED:
            entry.full_until_ms = 0
        entry.known_ms = now_ms
        entry.room.hear(self.terms.concurrency, slots_free, ours)

    def took(self, entry: Entry, seconds: float) -> None:
        """Take in how long a task took there that was answered."""
        entry.refusals = 0
        self.contention -= self.contention * CONTENTION_WEIGHT
        entry.history.took(seconds, self.times)
        self.typical_s = self.times.typical_s

    def slots(self, now_ms: int) -> int:
        """Return how many tasks its candidates can run at once, as of a moment ago."""
        if now_ms - self._slots_at_ms >= SLOTS_FRESH_MS:
            self._slots_at_ms = now_ms
            self._slots = sum(min(e.room.slots, e.load.room.slots) for e in self.entries.values() if e.reason is None)
        return self._slots

    @property
    def is_open(self) -> bool:
        """Whether any candidate may have a free slot."""
        return any(self._buckets) or (not self.ready and bool(self._aside))

    def may_serve(self, tried: Collection[Any]) -> bool:
        """Return whether waiting may help: some candidate outside *tried* lacks but a slot."""
        usable = self.ready or len(self._aside) or self.challenged
        if usable > len(tried):
            return True
        return usable > 0 and any(
            entry.load.host not in tried for entry in self.entries.values() if entry.reason in _USABLE
        )

    # -- the choice

    def choose(self, now_ms: int, draw: Callable[[], float], tried: Collection[Any] = ()) -> Choice | None:
        """Return the candidate for one attempt now, or None when none has a free slot.

        Args:
            draw: chance: numbers in [0, 1).
            tried: hosts that refused or failed the task before.
        """
        for bucket in self._buckets:
            if bucket:
                choice = self._choose_in(bucket, now_ms, draw, tried)
                if choice is not None:
                    return choice
        if not self.ready and self._aside:
            return self._choose_aside(now_ms, tried)
        return None

    def choose_only(self, host: Any, node: Address, now_ms: int) -> Choice | None:
        """Return the candidate on *host* if it may take a task now."""
        entry = self.entries.get(node)
        if entry is None or entry.load.host is not host or entry.reason is not None or entry.free(now_ms) <= 0:
            return None
        return Choice(entry, now_ms, (), "affinity", ())

    def choose_to_check(self, host: Any, node: Address, now_ms: int) -> Choice | None:
        """Return the candidate on *host* for a task of the bootstrap's own, with which it looks into the node: though
        that gets no clients' tasks for now, if it could run one."""
        entry = self.entries.get(node)
        if entry is None or entry.load.host is not host or entry.reason not in _CHECKED_ALL_THE_SAME:
            return None
        if deployment_exclusion(entry.facts) is not None or entry.room.slots <= entry.room.in_flight:
            return None
        return Choice(entry, now_ms, (), "checked", ())

    def _choose_in(
        self, bucket: list[Entry], now_ms: int, draw: Callable[[], float], tried: Collection[Any]
    ) -> Choice | None:
        seen: list[tuple[float, Entry, float]] = []
        typical_s, contention = self.typical_s, self.contention
        if contention > CONTENDED and self._freed:
            choice = self._choose_freed(bucket, now_ms, tried)
            if choice is not None:
                return choice
        best = -1.0
        place = 0
        sample = self._sample * 2 if contention > CONTENDED else self._sample
        while place < len(bucket) and len(seen) < sample:
            rest = len(bucket) - place
            if rest > 1:
                drawn = place + int(draw() * rest)
                entry = bucket[drawn]
                if drawn != place:  # a Fisher-Yates step: those looked at stand in front
                    other = bucket[place]
                    bucket[place], bucket[drawn] = entry, other
                    entry.place, other.place = place, drawn
            else:
                entry = bucket[place]
            if now_ms - entry.load.heard_at_ms > SILENCE_LIMIT_MS:
                self._set_reason(entry, Exclusion.SILENT)
                self._leave(entry)
                continue
            free = entry.free(now_ms)
            if free <= 0:
                self._leave(entry)
                continue
            place += 1
            if tried and entry.load.host in tried:
                continue
            slots = entry.room.slots
            share = 1.0 - free / slots if free < slots else 0.0
            expected_s = entry.expected_s(typical_s, share)
            if contention > CONTENDED and now_ms > entry.known_ms:
                expected_s *= 1.0 + contention * STALENESS * (now_ms - entry.known_ms) / 1000
            if best < 0.0 or expected_s < best:
                best = expected_s
            seen.append((expected_s, entry, share))
        if not seen:
            return None
        if len(seen) == 1:
            return Choice(seen[0][1], now_ms, seen, "only_one", tried)
        limit = best * (1.0 + NEAR_EQUAL)
        for expected_s, entry, _share in seen:
            if expected_s <= limit:
                return Choice(entry, now_ms, seen, "ranked", tried)
        raise AssertionError("the least is within its own limit")

    def _choose_freed(self, bucket: list[Entry], now_ms: int, tried: Collection[Any]) -> Choice | None:
        """Return the best of the slots in *bucket* that our attempts left last; None when there is none."""
        seen: list[tuple[float, Entry, float]] = []
        kept: list[Entry] = []
        while self._freed and len(seen) < self._sample:
            entry = self._freed.pop()
            free = entry.free(now_ms)
            if entry.place < 0 or free <= 0 or now_ms - entry.load.heard_at_ms > SILENCE_LIMIT_MS:
                continue
            kept.append(entry)
            if self._buckets[entry.rank] is not bucket or (tried and entry.load.host in tried):
                continue
            slots = entry.room.slots
            share = 1.0 - free / slots if free < slots else 0.0
            seen.append((entry.expected_s(self.typical_s, share), entry, share))
        self._freed.extend(reversed(kept))
        if not seen:
            return None
        best = min(seen, key=_expected)
        return Choice(best[1], now_ms, seen, "ranked" if len(seen) > 1 else "only_one", tried)

    def _choose_aside(self, now_ms: int, tried: Collection[Any]) -> Choice | None:
        usable = [
            entry
            for entry in self._aside
            if entry.load.host not in tried
            and entry.free(now_ms) > 0
            and now_ms - entry.load.heard_at_ms <= SILENCE_LIMIT_MS
        ]
        if not usable:
            return None
        first = min(usable, key=lambda entry: (_until_ms(entry), entry.load.node))
        return Choice(first, now_ms, (), "all_set_aside", tried)

    # -- explaining

    def photograph(self, now_ms: int) -> None:
        """Note the state of every candidate, if a choice was made since the last time and that is not too recent."""
        count = len(self.entries)
        if self.choices == self._choices_photographed or not count:
            return
        if self.photographs and now_ms - self.photographs[-1].at_ms < PHOTOGRAPH_MS * max(1, count // 500):
            return
        self._choices_photographed = self.choices
        self.photographs_taken += 1
        candidates = [self._captured(entry, now_ms) for entry in self.entries.values()]
        self.photographs.append(Photograph(self.photographs_taken, now_ms, candidates))
        while len(self.photographs) > min(PHOTOGRAPHS, max(2, PHOTOGRAPHED // count)):
            self.photographs.popleft()

    def _captured(self, entry: Entry, now_ms: int) -> Captured:
        slots = entry.room.slots
        in_use = entry.in_use(now_ms)
        expected_s = entry.expected_s(self.typical_s, in_use / slots if slots else 1.0)
        return (entry.load.node, entry.reason, entry.rank, slots, in_use, expected_s)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    # -- the index

    def _set_reason(self, entry: Entry, reason: Exclusion | None) -> None:
        before = entry.reason
        if before is reason:
            return
        self.ready += (reason is None) - (before is None)
        self.challenged += (reason is Exclusion.CHALLENGED) - (before is Exclusion.CHALLENGED)
        if before is Exclusion.SET_ASIDE:
            self._aside.discard(entry)
        elif reason is Exclusion.SET_ASIDE:
            self._aside.add(entry)
        entry.reason = reason
        if before is None:
            self.lines.unstick(entry.load.host)

    def _leave(self, entry: Entry) -> None:
        place = entry.place
        if place < 0:
            return
        bucket = self._buckets[entry.rank]
        last = bucket.pop()
        if last is not entry:
            bucket[place] = last
            last.place = place
        entry.place = -1

    def _forget(self, entry: Entry) -> None:
        self._leave(entry)
        self._set_reason(entry, Exclusion.NOT_DEPLOYED)


def _expected(seen: tuple[float, Entry, float]) -> float:
    return seen[0]


_USABLE = frozenset({None, Exclusion.SET_ASIDE, Exclusion.CHALLENGED})
# What keeps clients' tasks from a node and not the ones that look into it.
_CHECKED_ALL_THE_SAME = frozenset({None, Exclusion.DISTRUSTED, Exclusion.SET_ASIDE, Exclusion.CHALLENGED})


def _until_ms(entry: Entry) -> int:
    return max(entry.history.trouble.until_ms, entry.load.history.trouble.until_ms)
