"""The choice of a node: every exclusion, the order of preference, that capacity holds and nobody starves."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpu_bootstrap.scheduling.affinity import AffinityTable
from ngpu_bootstrap.scheduling.history import FAILING, FIRST_PAUSE_MS, LAST_PAUSE_MS, NodeHistory, ServiceTimes, Trouble
from ngpu_bootstrap.scheduling.load import Room
from ngpu_bootstrap.scheduling.placement import (
    LASTING,
    PACKED_CANDIDATES,
    PASSING,
    PlacementLog,
    explained,
    pack,
    unpack,
)
from ngpu_bootstrap.scheduling.pool import SAMPLE, Entry, Load, Pool, Terms
from ngpu_bootstrap.scheduling.reasons import (
    SILENCE_LIMIT_MS,
    DeploymentFacts,
    Exclusion,
    NodeFacts,
    Policy,
    deployment_exclusion,
    gpu_rank,
    node_exclusion,
    version_of,
)
from ngpu_bootstrap.scheduling.waiting import Line, Lines, Waiter
from ngpu_protocol.identity import Address

NOW = 1_000_000
NODE = NodeFacts(admitted=True, software="ngpu-node/1.4.0", is_trusted=True, draining=False, round_trip_s=0.05)
READY = DeploymentFacts(1, "ready")


@dataclass(eq=False)
class Host:
    node: Address


def address(number: int) -> Address:
    return Address(f"0x{number:040x}")


def a_pool(**terms: object) -> Pool:
    values = {"revision": 1, "concurrency": 4, "gpu_types": ()} | terms
    return Pool("7", Terms(**values), AffinityTable(8, 1000))  # type: ignore[arg-type]


def enter(
    pool: Pool,
    number: int,
    *,
    slots: int = 4,
    free: int = 4,
    node_slots: int = 64,
    facts: DeploymentFacts = READY,
    reason: Exclusion | None = None,
    heard_at_ms: int = NOW,
) -> Entry:
    load = Load(
        address(number), Host(address(number)), slots=node_slots, heard_at_ms=heard_at_ms, history=NodeHistory()
    )
    load.reason = reason
    entry = pool.enter(load)
    entry.facts = facts
    entry.room.hear(slots, free)
    pool.judge(entry, NOW)
    return entry


def take(entry: Entry) -> None:
    entry.room.take()
    entry.load.room.take()


def give_back(entry: Entry) -> None:
    entry.room.give_back()
    entry.load.room.give_back()
    entry.pool.settle(entry, NOW)


# -- exclusions


@pytest.mark.parametrize(
    ("facts", "policy", "reason"),
    [
        (NODE, Policy(), None),
        (NodeFacts(False, "", True, False), Policy(), Exclusion.NOT_ADMITTED),
        (NODE, Policy(minimum_version=(1, 5)), Exclusion.VERSION_TOO_OLD),
        (NODE, Policy(minimum_version=(1, 4)), None),
        (NodeFacts(True, "something else", True, False), Policy(minimum_version=(0, 1)), Exclusion.VERSION_TOO_OLD),
        (NodeFacts(True, "", False, False), Policy(), Exclusion.DISTRUSTED),
        (NodeFacts(True, "", True, True), Policy(), Exclusion.DRAINING),
        (NODE, Policy(max_round_trip_s=0.04), Exclusion.TOO_FAR),
        (NODE, Policy(max_round_trip_s=0.05), None),
        (NodeFacts(True, "", True, False), Policy(max_round_trip_s=0.01), None),
    ],
)
def test_each_exclusion_of_a_node_has_its_reason(facts: NodeFacts, policy: Policy, reason: Exclusion | None) -> None:
    assert node_exclusion(facts, policy) is reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (READY, None),
        (DeploymentFacts(None), Exclusion.NOT_DEPLOYED),
        (DeploymentFacts(2, "ready", may_serve=False), Exclusion.WRONG_REVISION),
        (DeploymentFacts(1, "unhealthy"), Exclusion.UNHEALTHY),
        (DeploymentFacts(1, "ready", gpus_healthy=False), Exclusion.UNHEALTHY),
        (DeploymentFacts(1, "starting"), Exclusion.NOT_READY),
        (DeploymentFacts(1, "a later version's word"), Exclusion.NOT_READY),
        (DeploymentFacts(1, "ready", rank=None), Exclusion.WRONG_GPU),
    ],
)
def test_each_exclusion_of_a_deployment_has_its_reason(facts: DeploymentFacts, reason: Exclusion | None) -> None:
    assert deployment_exclusion(facts) is reason


def test_gpu_models_are_found_however_they_are_spelled_and_ranked_as_the_client_lists_them() -> None:
    machine = [("NVIDIA A100-SXM4-80GB", 80 << 30), ("NVIDIA GeForce RTX 4090", 24 << 30)]
    assert gpu_rank(["RTX4090", "A100"], machine) == 0
    assert gpu_rank(["H100", "A100"], machine) == 1
    assert gpu_rank(["H100", "a100-80g"], machine) == 1
    assert gpu_rank(["A100-40G"], machine) is None
    assert gpu_rank([], []) == 0


def test_versions_are_numbers() -> None:
    assert version_of("ngpu-node/1.10.2+x") == (1, 10, 2)
    assert version_of("ngpu-node/1.10.2") > version_of("ngpu-node/1.9")
    assert version_of("scripted") == ()


def test_a_silent_node_is_passed_over_and_comes_back_when_it_is_heard() -> None:
    pool = a_pool()
    entry = enter(pool, 1)
    later = NOW + SILENCE_LIMIT_MS + 1
    assert pool.choose(NOW + SILENCE_LIMIT_MS, random.random) is not None
    assert pool.choose(later, random.random) is None
    assert entry.reason is Exclusion.SILENT
    assert not pool.may_serve(())
    entry.load.heard_at_ms = later
    pool.judge(entry, later)
    assert pool.choose(later, random.random) is not None


def test_a_node_tried_before_is_passed_over() -> None:
    pool = a_pool()
    first, second = enter(pool, 1), enter(pool, 2)
    for _ in range(20):
        choice = pool.choose(NOW, random.random, [first.load.host])
        assert choice is not None
        assert choice.entry is second
    assert pool.choose(NOW, random.random, [first.load.host, second.load.host]) is None
    assert not pool.may_serve([first.load.host, second.load.host])
    assert pool.may_serve([first.load.host])


def test_all_of_a_large_pool_but_those_tried_are_found() -> None:
    pool = a_pool()
    entries = [enter(pool, number) for number in range(8)]
    tried = [entry.load.host for entry in entries[:-1]]
    for _ in range(20):
        choice = pool.choose(NOW, random.random, tried)
        assert choice is not None
        assert choice.entry is entries[-1]


# -- the order of preference


def test_the_first_gpu_model_with_a_free_slot_is_taken_before_any_other() -> None:
    pool = a_pool(gpu_types=("H100", "A100"))
    fast = enter(pool, 1, slots=1, free=1, facts=DeploymentFacts(1, "ready", rank=0))
    slow = [enter(pool, number, facts=DeploymentFacts(1, "ready", rank=1)) for number in range(2, 20)]
    choice = pool.choose(NOW, random.random)
    assert choice is not None
    assert choice.entry is fast
    take(fast)
    choice = pool.choose(NOW, random.random)
    assert choice is not None
    assert choice.entry in slow  # a free slot goes before a queue


def test_the_node_expected_to_finish_first_is_taken() -> None:
    pool = a_pool()
    slow, fast = enter(pool, 1), enter(pool, 2)
    for _ in range(100):
        pool.took(slow, 4.0)
        pool.took(fast, 1.0)
    assert {_chosen(pool) for _ in range(30)} == {fast}
    # three quarters of it in use, it is still the faster one; far away it is not
    fast.load.rtt_s = 10.0
    assert {_chosen(pool) for _ in range(30)} == {slow}


def test_the_less_loaded_of_two_alike_is_taken() -> None:
    pool = a_pool()
    busy, idle = enter(pool, 1, free=1), enter(pool, 2)
    assert busy.in_use(NOW) == 3
    assert {_chosen(pool) for _ in range(30)} == {idle}


def test_failures_and_a_low_standing_make_a_node_less_wanted() -> None:
    pool = a_pool()
    failing, good = enter(pool, 1), enter(pool, 2)
    failing.history.trouble.failed(NOW, 0.0)
    failing.reconsider()
    assert {_chosen(pool) for _ in range(30)} == {good}
    good.load.score = 0.6
    good.reconsider()
    assert {_chosen(pool) for _ in range(30)} == {failing}


def test_chance_decides_among_near_equals() -> None:
    pool = a_pool()
    for number in range(6):
        enter(pool, number)
    counts = Counter(_chosen(pool) for _ in range(600))
    assert len(counts) == 6
    assert max(counts.values()) < 200


def test_a_choice_looks_at_a_sample_and_every_candidate_has_its_chance() -> None:
    pool = a_pool()
    for number in range(50):
        enter(pool, number)
    seen: set[Entry] = set()
    for _ in range(1200):
        choice = pool.choose(NOW, random.random)
        assert choice is not None
        assert len(choice.seen) == SAMPLE
        assert len({entry for _, entry, _ in choice.seen}) == SAMPLE
        seen.add(choice.entry)
    assert len(seen) == 50


def _chosen(pool: Pool) -> Entry:
    choice = pool.choose(NOW, random.random)
    assert choice is not None
    return choice.entry


# -- properties

_facts = st.builds(
    DeploymentFacts,
    revision=st.sampled_from([None, 1, 2]),
    state=st.sampled_from(["ready", "ready", "ready", "starting", "unhealthy"]),
    rank=st.sampled_from([0, 0, 1, 2, None]),
    gpus_healthy=st.sampled_from([True, True, False]),
    may_serve=st.sampled_from([True, True, False]),
)
_candidates = st.lists(
    st.tuples(
        _facts,
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(0, 6),
        st.sampled_from([None, None, None, Exclusion.DRAINING, Exclusion.NOT_ADMITTED]),
        st.sampled_from([NOW, NOW, NOW - SILENCE_LIMIT_MS - 1]),
    ),
    max_size=24,
)


@settings(deadline=None)
@given(_candidates, st.integers(0, 2**32))
def test_taking_until_none_is_left_fills_every_slot_and_no_more_the_preferred_first(
    candidates: list[tuple[DeploymentFacts, int, int, int, Exclusion | None, int]], seed: int
) -> None:
    chance = random.Random(seed).random
    pool = a_pool()
    entries = [
        enter(
            pool,
            number,
            slots=slots,
            free=free,
            node_slots=node_slots,
            facts=facts,
            reason=reason,
            heard_at_ms=at,
        )
        for number, (facts, slots, free, node_slots, reason, at) in enumerate(candidates)
    ]
    room = {entry: max(0, entry.free(NOW)) for entry in entries if entry.reason is None}
    assert pool.ready == len(room)
    ranks = []
    for _ in range(sum(room.values())):
        choice = pool.choose(NOW, chance)
        assert choice is not None  # nobody is passed over without a reason
        assert room.get(choice.entry, 0) > 0
        room[choice.entry] -= 1
        take(choice.entry)
        assert choice.entry.room.in_flight <= choice.entry.room.slots
        assert choice.entry.load.room.in_flight <= choice.entry.load.room.slots
        ranks.append(choice.entry.rank)
    assert ranks == sorted(ranks)
    assert pool.choose(NOW, chance) is None
    for entry in entries:
        while entry.room.in_flight:
            give_back(entry)
    assert (pool.choose(NOW, chance) is not None) == bool(ranks)


@settings(deadline=None)
@given(_candidates)
def test_every_candidate_that_is_not_free_is_excluded_with_a_reason(
    candidates: list[tuple[DeploymentFacts, int, int, int, Exclusion | None, int]],
) -> None:
    pool = a_pool()
    for number, (facts, slots, free, node_slots, reason, at) in enumerate(candidates):
        enter(
            pool,
            number,
            slots=slots,
            free=free,
            node_slots=node_slots,
            facts=facts,
            reason=reason,
            heard_at_ms=at,
        )
    choice = pool.choose(NOW, random.random)
    pool.photograph(NOW)
    if choice is None:
        assert all(entry.reason is not None or entry.free(NOW) <= 0 for entry in pool)
        return
    pool.photograph(NOW)
    placement = explained(1, choice)
    assert {one.node for one in placement.candidates} == {entry.load.node for entry in pool}
    assert placement.candidates[0].node == choice.entry.load.node
    for one in placement.candidates:
        entry = pool.entries[one.node]
        assert one.compared or one.excluded is not None or entry.free(NOW) > 0
        assert (one.excluded is None) == (entry.reason is None and entry.free(NOW) > 0)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["take", "end", "hear", "drain", "back", "silent"]), max_size=60), st.integers(0, 2**32)
)
def test_the_index_says_what_looking_at_everyone_would_say(events: list[str], seed: int) -> None:
    chance = random.Random(seed)
    pool = a_pool()
    entries = [enter(pool, number, slots=2, free=2) for number in range(6)]
    running: list[Entry] = []
    for event in events:
        entry = chance.choice(entries)
        if event == "take":
            choice = pool.choose(NOW, chance.random)
            free = [one for one in entries if one.reason is None and one.free(NOW) > 0]
            if choice is None:
                assert all(NOW - one.load.heard_at_ms > SILENCE_LIMIT_MS for one in free)
            else:
                assert choice.entry in free
                take(choice.entry)
                running.append(choice.entry)
        elif event == "end" and running:
            give_back(running.pop(chance.randrange(len(running))))
        elif event == "hear":
            entry.load.heard_at_ms = NOW
            entry.room.hear(2, max(0, 2 - entry.room.in_flight))
            pool.judge(entry, NOW)
        elif event in ("drain", "back"):
            entry.load.reason = Exclusion.DRAINING if event == "drain" else None
            pool.judge(entry, NOW)
        elif event == "silent":
            entry.load.heard_at_ms = NOW - SILENCE_LIMIT_MS - 1
        assert all(0 <= one.room.in_flight <= 2 for one in entries)
        assert pool.ready == sum(one.reason is None for one in entries)


# -- room


def test_a_packed_placement_names_what_was_compared_and_counts_the_rest_however_many_there_were() -> None:
    pool = a_pool()
    for number in range(300):
        enter(pool, number, reason=Exclusion.DRAINING if number % 3 == 0 else None)
    choice = pool.choose(NOW, random.Random(1).random)
    assert choice is not None
    pool.photograph(NOW)
    placement = explained(2, choice)
    assert len(placement.candidates) == 300
    kept = unpack(2, pack(placement))
    assert len(pack(placement)) < 10_000
    assert (kept.node, kept.why, kept.at_ms, kept.attempt) == (placement.node, placement.why, NOW, 2)
    assert list(kept.candidates) == list(placement.candidates[:PACKED_CANDIDATES])
    assert sum(one.compared for one in kept.candidates) == SAMPLE
    assert sum(kept.left_out.values()) + len(kept.candidates) == 300
    assert kept.left_out["draining"] > 0
    assert unpack(2, pack(kept)) == kept


def test_of_more_placements_than_can_be_written_the_lasting_ones_are_kept_and_each_is_due_once() -> None:
    pool, log = a_pool(), PlacementLog()
    enter(pool, 1)
    for number in range(PASSING + 10):
        choice = pool.choose(NOW + number, lambda: 0.0)
        assert choice is not None
        log.note(f"passing{number}", 1, choice, lasting=False)
        log.note(f"lasting{number}", 2, choice, lasting=True)
    assert [task for task, _ in log.due(NOW + 1)] == ["lasting0", "passing0"]
    due = [task for task, _ in log.due(NOW + 1000)]
    assert [task for task in due if "lasting" in task] == [f"lasting{n}" for n in range(1, PASSING + 10)]
    assert [task for task in due if "passing" in task] == [f"passing{n}" for n in range(1, PASSING)]
    assert not list(log.due(NOW + 1000))
    assert LASTING > PASSING


def test_a_heartbeat_counts_our_own_attempts_and_not_twice() -> None:
    room = Room(4)
    room.hear(4, 4)
    room.take()
    room.hear(4, 3)  # ours
    assert (room.others, room.free) == (0, 3)
    room.hear(4, 1)  # two of others' came
    assert (room.others, room.free) == (2, 1)
    room.give_back()
    assert room.free == 2
    room.hear(4, 2)
    assert (room.others, room.free) == (1, 3)  # one of ours may still have been counted
    room.hear(4, 2)
    assert (room.others, room.free) == (2, 2)


# -- history


def test_a_failing_node_is_set_aside_for_growing_intervals_and_probed_back() -> None:
    trouble = Trouble()
    now = NOW
    pauses = []
    while not trouble.failed(now, 0.0):
        assert trouble.rate <= FAILING
    for _ in range(12):
        pauses.append(trouble.until_ms - now)
        assert not trouble.comes_back(trouble.until_ms - 1)
        now = trouble.until_ms
        assert trouble.comes_back(now)
        assert trouble.probing
        assert trouble.failed(now, 0.0)  # on probation one failure is enough
    assert pauses[:4] == [FIRST_PAUSE_MS, 2 * FIRST_PAUSE_MS, 4 * FIRST_PAUSE_MS, 8 * FIRST_PAUSE_MS]
    assert pauses[-1] == LAST_PAUSE_MS
    now = trouble.until_ms
    trouble.comes_back(now)
    assert trouble.succeeded()
    assert not trouble.probing
    assert trouble.rate <= FAILING / 2
    for _ in range(16):
        trouble.succeeded()
    while not trouble.failed(now, 0.0):
        pass
    assert trouble.until_ms - now == FIRST_PAUSE_MS  # forgiven


def test_failures_and_speed_fade_so_that_a_node_passed_over_has_another_chance() -> None:
    pool = a_pool()
    bad, good = enter(pool, 1), enter(pool, 2)
    bad.history.fade(NOW)
    bad.history.trouble.failed(NOW, 0.0)
    for _ in range(40):
        pool.took(bad, 5.0)
        pool.took(good, 1.0)
    bad.reconsider()
    assert {_chosen(pool) for _ in range(30)} == {good}
    for entry in (bad, good):
        entry.history.fade(NOW + 3_600_000)
        entry.reconsider()
    assert {_chosen(pool) for _ in range(60)} == {bad, good}


def test_a_node_that_fails_now_and_then_is_kept() -> None:
    trouble = Trouble()
    assert not any(trouble.failed(NOW, 0.0) or any(trouble.succeeded() for _ in range(4)) for _ in range(100))


def test_what_is_set_aside_gets_nothing_and_on_probation_one_task_at_a_time() -> None:
    pool = a_pool()
    bad, good = enter(pool, 1), enter(pool, 2)
    while not bad.history.trouble.failed(NOW, 0.0):
        pass
    pool.judge(bad, NOW)
    assert bad.reason is Exclusion.SET_ASIDE
    assert {_chosen(pool) for _ in range(30)} == {good}
    later = bad.history.trouble.until_ms
    bad.history.trouble.comes_back(later)
    pool.judge(bad, later)
    assert bad.reason is None
    assert bad.free(later) == 1
    take(bad)
    assert bad.free(later) == 0


def test_where_all_are_set_aside_the_first_to_come_back_is_tried() -> None:
    pool = a_pool()
    for number, pause in ((1, 0.9), (2, 0.1)):
        entry = enter(pool, number)
        while not entry.history.trouble.failed(NOW, pause):
            pass
        pool.judge(entry, NOW)
    assert pool.may_serve(())
    choice = pool.choose(NOW, random.random)
    assert choice is not None
    assert choice.entry.load.node == address(2)
    assert choice.why == "all_set_aside"


def test_speed_is_relative_to_the_workspace_and_drawn_towards_it_while_little_is_known() -> None:
    times = ServiceTimes()
    fast, slow = NodeHistory().of("7"), NodeHistory().of("7")
    fast.took(1.0, times)
    slow.took(100.0, times)
    assert 1.0 < slow.speed < 1.5  # one long task says little
    for _ in range(300):
        fast.took(1.0, times)
        slow.took(4.0, times)
    assert slow.speed / fast.speed == pytest.approx(2.5, rel=0.3)
    assert 1.0 < times.typical_s < 4.0


# -- affinity


def test_keys_stick_within_a_bound_and_rest_for_a_while() -> None:
    table = AffinityTable(2, idle_ms=1000)
    table.stick(b"a", address(1), NOW)
    table.stick(b"b", address(2), NOW)
    table.stick(b"a", address(1), NOW + 1)
    table.stick(b"c", address(3), NOW + 2)
    assert table.node_of(b"b", NOW + 3) is None  # used longest ago
    assert table.node_of(b"a", NOW + 3) == address(1)
    assert table.node_of(b"a", NOW + 1002) is None
    assert len(table) == 1


# -- the line


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("join"), st.booleans(), st.sampled_from(["any", "picky"]), st.sampled_from([0, 0, 0, 5, 9])
            ),
            st.tuples(st.just("serve"), st.booleans(), st.just(""), st.just(0)),
            st.tuples(st.just("leave"), st.booleans(), st.just(""), st.just(0)),
        ),
        max_size=60,
    ),
    st.integers(0, 2**32),
)
def test_nobody_is_overtaken_by_who_came_later_without_a_higher_priority_and_could_take_the_same_slot(
    events: list[tuple[str, bool, str, int]], seed: int
) -> None:
    chance = random.Random(seed)
    lines: Lines[str, int] = Lines()
    waiting: list[Waiter[str, int]] = []
    for number, (event, promised, kind, priority) in enumerate(events):
        if event == "join":
            waiter: Waiter[str, int] = Waiter(str(number), lambda slot: None, ("x",) if kind == "picky" else ())
            waiter.promised, waiter.priority = promised, priority
            lines.join(waiter)
            waiting.append(waiter)
            waiting.sort(key=lambda one: (-one.priority, one.number))
        elif event == "leave" and waiting:
            lines.leave(waiting.pop(chance.randrange(len(waiting))))
        elif event == "serve":
            line = next(lines.in_turn(), Line())
            head = line.head(promised=promised)
            able = [one for one in waiting if not one.tried and (promised or not one.promised)]
            assert head is (able[0] if able else None)
            assert lines.has_head(promised=promised) == bool(able)
            picky = [one for one in waiting if one.tried and (promised or not one.promised)]
            before = [one for one in picky if head is None or one.place < head.place]
            assert list(line.picky_before(head, promised=promised)) == before
            if head is not None:
                lines.serve(head)
                waiting.remove(head)
        assert len(lines) == len(waiting)
        assert lines.clients_waiting == sum(not one.promised for one in waiting)
    places = [lines.place_of(one.key, NOW) for one in waiting]
    assert places == list(range(len(waiting)))
    assert lines.place_of("nobody", NOW) is None


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["join", "join", "serve", "leave"]), st.sampled_from("abcd")), max_size=120),
    st.integers(0, 2**32),
)
def test_between_two_slots_of_a_caller_that_waits_no_other_gets_more_than_one(
    events: list[tuple[str, str]], seed: int
) -> None:
    chance = random.Random(seed)
    lines: Lines[str, int] = Lines()
    waiting: list[Waiter[str, int]] = []
    since: dict[str, Counter[str]] = {}  # by caller that waits: who got slots since it last got one, or came
    for number, (event, caller) in enumerate(events):
        if event == "join":
            waiter: Waiter[str, int] = Waiter(str(number), lambda slot: None, caller=caller)
            lines.join(waiter)
            waiting.append(waiter)
            since.setdefault(caller, Counter())
        elif event == "leave" and waiting:
            gone = waiting.pop(chance.randrange(len(waiting)))
            lines.leave(gone)
            lines.leave(gone)  # leaving twice takes nobody else along
        elif event == "serve" and waiting:
            first = {one.caller: one for one in reversed(waiting)}
            expected = min(waiting, key=lambda one: lines.place_of(one.key, number * 1000) or 0)
            head = next(lines.in_turn()).head(promised=True)
            assert head is expected is first[expected.caller]  # of a caller's own the earliest
            lines.serve(expected)
            waiting.remove(expected)
            for others in since.values():
                others[expected.caller] += 1
            since[expected.caller] = Counter()
        since = {one: counted for one, counted in since.items() if any(w.caller == one for w in waiting)}
        assert all(max(counted.values(), default=0) <= 1 for counted in since.values()), since
        assert len(lines) == len(waiting)


def test_who_stuck_to_a_node_that_is_gone_takes_any_slot_at_its_old_place() -> None:
    lines: Lines[str, int] = Lines()
    waiters = [
        Waiter[str, int](str(number), lambda slot: None, only="gone" if number in (1, 3) else None)
        for number in range(5)
    ]
    for waiter in waiters:
        lines.join(waiter)
    lines.unstick("gone")
    served = []
    while (line := next(lines.in_turn(), None)) is not None:
        head = line.head(promised=True)
        assert head is not None
        served.append(head.key)
        lines.serve(head)
    assert served == ["0", "1", "2", "3", "4"]
