"""Commits in the loop's own turns: what goes together, what may wait, when the thread has to do it."""

from __future__ import annotations

from collections.abc import Callable

import trio
from trio.testing import MockClock

from ngpu_daemon.turn_commits import Pace, TurnCommits

LAZY_S = 5.0


def run(body: Callable[[TurnCommits[str], list[list[str]]], object], *, turn_s: float = 60.0) -> list[list[str]]:
    """Run the async *body* and return what was committed, the last of it by closing."""
    batches: list[list[str]] = []

    async def main() -> None:
        turns: TurnCommits[str] = TurnCommits(batches.append, lazy_s=LAZY_S, turn_s=turn_s)
        await trio.testing.wait_all_tasks_blocked()
        await body(turns, batches)  # type: ignore[misc]
        turns.close()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return batches


def test_what_one_turn_asks_for_is_one_commit() -> None:
    async def body(turns: TurnCommits[str], batches: list[list[str]]) -> None:
        async def ask(name: str) -> None:
            turns.add(name)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(ask, name)
        await trio.testing.wait_all_tasks_blocked()
        assert [sorted(batch) for batch in batches] == [["a", "b", "c"]]
        turns.add("d")
        await trio.testing.wait_all_tasks_blocked()

    assert len(run(body)) == 2


def test_a_long_turn_commits_before_its_end() -> None:
    async def body(turns: TurnCommits[str], batches: list[list[str]]) -> None:
        turns.add("first")
        turns.add("second")
        assert batches == [["first", "second"]]

    run(body, turn_s=0.0)


def test_lazy_jobs_ride_along_and_come_first() -> None:
    async def body(turns: TurnCommits[str], batches: list[list[str]]) -> None:
        turns.add_lazy("lazy")
        await trio.testing.wait_all_tasks_blocked()
        assert not batches
        turns.add("urgent")
        await trio.testing.wait_all_tasks_blocked()

    assert run(body) == [["lazy", "urgent"]]


def test_lazy_jobs_are_committed_in_time_without_company() -> None:
    async def body(turns: TurnCommits[str], batches: list[list[str]]) -> None:
        for name in "abc":
            turns.add_lazy(name)
            await trio.sleep(LAZY_S * 1.5)
            assert batches[-1] == [name]

    run(body)


def test_closing_commits_what_is_gathered_and_allows_no_more() -> None:
    async def body(turns: TurnCommits[str], batches: list[list[str]]) -> None:
        turns.add_lazy("lazy")
        turns.add("urgent")
        turns.close()
        assert batches == [["lazy", "urgent"]]
        assert not turns.allowed

    run(body)


def test_a_slow_disk_sends_the_work_to_the_thread_for_a_while() -> None:
    pace = Pace(limit_s=0.003, pause_s=5.0)
    now_s = 100.0
    assert pace.allows(now_s)
    pace.waited(0.010, now_s)  # one checkpoint
    assert pace.allows(now_s)
    while pace.allows(now_s):
        pace.waited(0.010, now_s)
        now_s += 0.01
    assert not pace.allows(now_s + 4.9)
    assert pace.allows(now_s + 5.0)


def test_a_fast_disk_stays_the_loops() -> None:
    pace = Pace(limit_s=0.003)
    for commit in range(10_000):
        pace.waited(0.008 if commit % 50 == 0 else 0.0003, commit * 0.01)
        assert pace.allows(commit * 0.01)


def test_a_pace_without_a_limit_allows_nothing() -> None:
    assert not Pace(limit_s=0).allows(1e9)
