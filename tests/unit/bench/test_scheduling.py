"""A slice of the scheduling simulation: the real scheduler in virtual time keeps what docs/scheduling.md says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import structlog

from tests.bench.scheduling import Figures, Setup, decision_us, mean_service_s, quantile, run_policies, table

# Deaths and lies more frequent than in the full runs, so that some happen in the short time.
SETUP = Setup(nodes=120, load=0.8, seconds=60.0, warm_up_s=30.0, seed=3, deaths_per_hour=2.0, liars=0.05)


@pytest.fixture(scope="module")
def figures() -> dict[str, Figures]:
    with structlog.testing.capture_logs():
        return {one.policy: one for one in run_policies(SETUP)}


def test_no_task_is_lost_though_nodes_die_and_lie(figures: dict[str, Figures]) -> None:
    assert len({one.tasks for one in figures.values()}) == 1
    assert figures["ours"].again > 0
    for policy in ("ours", "ours x3"):
        assert figures[policy].lost == 0


def test_one_bootstrap_is_as_good_as_full_knowledge_and_three_are_close(figures: dict[str, Figures]) -> None:
    best = figures["full knowledge"].system_p99_s
    assert figures["ours"].system_p99_s <= 1.1 * best
    assert figures["ours x3"].system_p99_s <= 1.3 * best


def test_waiting_is_far_below_that_of_choices_made_blindly(figures: dict[str, Figures]) -> None:
    for policy in ("random", "round robin", "two choices"):
        assert figures["ours"].wait_p99_s < figures[policy].wait_p99_s / 5
        assert figures["ours x3"].wait_p99_s < figures[policy].wait_p99_s / 5


def test_near_capacity_bootstraps_that_share_nodes_lose_nothing_and_are_seldom_refused() -> None:
    with structlog.testing.capture_logs():
        (shared,) = run_policies(replace(SETUP, load=0.95), ["ours x3"])
    assert shared.lost == 0
    assert shared.refused < 0.3 * shared.tasks


@pytest.mark.parametrize(
    ("nodes", "contended", "limit_us"), [(1_000, False, 100.0), (1_000, True, 100.0), (10_000, False, 500.0)]
)
def test_a_decision_takes_microseconds_however_many_candidates_there_are(
    nodes: int, contended: bool, limit_us: float
) -> None:
    with structlog.testing.capture_logs():
        assert decision_us(nodes, contended=contended) < limit_us


def test_the_same_seed_gives_the_same_figures() -> None:
    setup = replace(SETUP, nodes=40, seconds=10.0, warm_up_s=5.0)
    with structlog.testing.capture_logs():
        first, second = (run_policies(setup, ["ours x3"])[0] for _ in range(2))
    assert replace(first, wall_s=0.0) == replace(second, wall_s=0.0)


def test_the_load_is_what_was_asked_for(figures: dict[str, Figures]) -> None:
    assert figures["ours"].utilisation == pytest.approx(0.8, abs=0.08)
    assert 2.0 < mean_service_s() < 3.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert "| 120 | 80% | ours x3 |" in table(list(figures.values()))
