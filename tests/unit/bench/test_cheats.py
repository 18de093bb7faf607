"""The simulation of cheats that `docs/trust.md` quotes: what it must show, on a few runs."""

from __future__ import annotations

import pytest

from tests.bench.cheats import Case, line, play, table


@pytest.mark.parametrize("a_day", [20, 100, 1000])
@pytest.mark.parametrize("made_up", [0.1, 1.0])
def test_making_answers_up_earns_less_than_honest_work(a_day: int, made_up: float) -> None:
    found = line(Case(made_up, a_day, past=5000), days=20, runs=4)
    assert found.earns < 0.95
    assert found.found > 0


def test_an_honest_node_loses_nothing() -> None:
    found = line(Case(0.0, 200), days=10, runs=2)
    assert found.earns == pytest.approx(1.0)
    assert (found.found, found.delivered) == (0, 0)
    assert 0.02 < found.run_again < 0.2


def test_the_first_made_up_answers_of_a_new_node_are_found_soonest() -> None:
    new = line(Case(1.0, 1000), days=3, runs=20)
    trusted = line(Case(1.0, 1000, past=5000), days=3, runs=20)
    assert new.until_found < trusted.until_found < 100


def test_whoever_colludes_with_half_of_the_network_is_found_later_and_still_found() -> None:
    alone = line(Case(1.0, 1000, past=5000), days=3, runs=10)
    helped = line(Case(1.0, 1000, past=5000, colluding=0.5), days=3, runs=10)
    assert helped.delivered > alone.delivered
    assert helped.found > 0


def test_a_run_is_the_same_for_the_same_chance() -> None:
    import random

    case = Case(0.1, 100)
    assert play(case, 5, random.Random(7)) == play(case, 5, random.Random(7))
    assert "10%" in table([line(case, 2, 1)])
