"""Which tasks are run again, by whom, and what different answers mean: plain values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.rechecks.deciding import Answer, Outcome, Peer, decide, may_judge
from ngpu_bootstrap.rechecks.sampling import Rates, is_drawn, rate
from ngpu_bootstrap.scheduling.standing import Standing, with_dispute, with_verified
from ngpu_protocol.identity import Address

NOW_MS = 1_800_000_000_000
DAY_MS = 24 * 3600_000
RATES = Rates(often=0.2, rare=0.02, disputed=0.5)
NEW = Standing()
TRUSTED = with_verified(NEW, 5000, NOW_MS)
DISPUTED = with_dispute(TRUSTED, rule="recheck", task_id="", now_ms=NOW_MS)


def test_the_rate_follows_the_standing() -> None:
    assert rate(NEW, RATES, NOW_MS) == 0.2
    known = rate(with_verified(NEW, 32, NOW_MS), RATES, NOW_MS)
    assert 0.1 < known < 0.13
    assert 0.02 < rate(TRUSTED, RATES, NOW_MS) < 0.05
    assert rate(DISPUTED, RATES, NOW_MS) == 0.5
    assert rate(TRUSTED, RATES, NOW_MS, suspected=True) == 0.5


def test_a_dispute_is_looked_at_ever_less_as_days_go_by() -> None:
    shares = [rate(DISPUTED, RATES, NOW_MS + days * DAY_MS) for days in range(8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 0.5
    assert shares[1] == pytest.approx(0.25)
    assert shares[7] == pytest.approx(rate(TRUSTED, RATES, NOW_MS), rel=0.01)


def test_of_a_node_with_few_tasks_about_so_many_a_day_are_run_again() -> None:
    rates = Rates(often=0.2, rare=0.02, disputed=0.5, least_a_day=4.0)
    for a_day in (2, 8, 20, 50):
        gaps = [DAY_MS * part // (50 * a_day) for part in (10, 90)] * 500  # uneven ones, a day's on the average
        shares = [rate(TRUSTED, rates, NOW_MS, gap_ms=gap_ms) for gap_ms in gaps]
        assert sum(shares) / len(shares) * a_day == pytest.approx(min(4.0, a_day), rel=0.35)
    assert rate(TRUSTED, rates, NOW_MS, gap_ms=DAY_MS // 1000) == rate(TRUSTED, RATES, NOW_MS)
    assert rate(TRUSTED, rates, NOW_MS, gap_ms=30 * DAY_MS) == 1.0


@given(st.floats(0, 300), st.floats(0, 50), st.booleans())
def test_no_rate_is_beyond_its_bounds(good: float, bad: float, suspected: bool) -> None:
    share = rate(Standing(good=good, bad=bad, at_ms=NOW_MS), RATES, NOW_MS, suspected=suspected)
    assert 0.02 <= share <= 0.5


def test_what_is_drawn_is_that_share_and_only_the_secret_tells_which() -> None:
    tasks = [f"20261127_04_{number:017d}" for number in range(4000)]
    drawn = {task for task in tasks if is_drawn(b"a" * 32, task, 0.1)}
    assert 320 < len(drawn) < 480
    assert drawn == {task for task in tasks if is_drawn(b"a" * 32, task, 0.1)}, "a restart draws the same"
    other = {task for task in tasks if is_drawn(b"b" * 32, task, 0.1)}
    assert len(drawn & other) < 100
    assert drawn < {task for task in tasks if is_drawn(b"a" * 32, task, 0.2)}
    assert not any(is_drawn(b"a" * 32, task, 0.0) for task in tasks)
    assert all(is_drawn(b"a" * 32, task, 1.0) for task in tasks)


def peer(number: int, ip: str = "", wallet: str = "", models: str = "H200", revision: int = 1) -> Peer:
    return Peer(Address(f"0x{number:040x}"), ip, wallet, frozenset(models.split()), revision)


FIRST = peer(1, "8.8.8.8", "0xaa")


@pytest.mark.parametrize(
    ("other", "may"),
    [
        (peer(2, "8.8.4.4", "0xbb"), True),
        (peer(1, "8.8.4.4", "0xbb"), False),
        (peer(2, "8.8.8.8", "0xbb"), False),
        (peer(2, "8.8.4.4", "0xaa"), False),
        (peer(2), True),
        (peer(2, models="T4"), False),
        (peer(2, models="H200 T4"), False),
        (peer(2, revision=2), False),
    ],
)
def test_only_a_stranger_that_can_may_judge(other: Peer, may: bool) -> None:
    assert may_judge([other], [FIRST]) == ([other] if may else [])


def test_a_private_address_says_nothing_about_its_owner() -> None:
    for ip in ("127.0.0.1", "10.0.0.1", "fd00::1", "not an address"):
        assert may_judge([peer(2, ip)], [peer(1, ip)])


def test_a_third_is_a_stranger_to_both() -> None:
    second = peer(2, "8.8.4.4", "0xbb")
    assert may_judge([peer(3, "1.1.1.1", "0xbb"), peer(4, "1.1.1.1", "0xcc")], [FIRST, second]) == [
        peer(4, "1.1.1.1", "0xcc")
    ]


A, B, C = (Answer(200, bytes([number]) * 32) for number in range(3))


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ((A, A, None), Outcome.AGREED),
        ((A, B, None), Outcome.UNDECIDED),
        ((A, B, A), Outcome.SECOND_LOST),
        ((A, B, B), Outcome.FIRST_LOST),
        ((A, B, C), Outcome.NOT_DETERMINISTIC),
        ((A, Answer(500, A.hash), Answer(500, A.hash)), Outcome.FIRST_LOST),
    ],
)
def test_what_answers_mean(answers: tuple[Answer, Answer, Answer | None], outcome: Outcome) -> None:
    assert decide(*answers) is outcome
