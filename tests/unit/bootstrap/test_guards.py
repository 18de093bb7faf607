"""Failed credentials are slowed by address, calls by token, and both tables stay small."""

from __future__ import annotations

import pytest

from ngpu_bootstrap.errors import NotServed, Refusal, Unauthorized
from ngpu_bootstrap.front.guards import FailedTries, TokenLimits


def unknown() -> Refusal:
    return Unauthorized("token_unknown", "unknown")


def statuses(tries: FailedTries, address: str, count: int, now_s: float) -> list[int]:
    return [tries.answer(address, unknown(), now_s).status for _ in range(count)]


def test_an_address_that_fails_too_often_gets_429_until_time_has_passed() -> None:
    tries = FailedTries(burst=3, per_s=0.5)
    assert statuses(tries, "1.2.3.4", 5, 0.0) == [401, 401, 401, 429, 429]
    refused = tries.answer("1.2.3.4", unknown(), 0.0)
    assert refused.headers["Retry-After"] == "2"
    assert statuses(tries, "1.2.3.4", 2, 2.0) == [401, 429]
    assert statuses(tries, "1.2.3.5", 1, 2.0) == [401]


def test_a_call_without_a_credential_is_no_try() -> None:
    tries = FailedTries(burst=1)
    for _ in range(5):
        assert tries.answer("1.2.3.4", Unauthorized("token_missing", "x"), 0.0).status == 401
    assert len(tries) == 0


def test_an_ipv6_host_is_its_whole_prefix() -> None:
    tries = FailedTries(burst=2)
    assert [statuses(tries, f"2001:db8:0:1::{n:x}", 1, 0.0)[0] for n in range(4)] == [401, 401, 429, 429]
    assert statuses(tries, "2001:db8:0:2::1", 1, 0.0) == [401]
    assert statuses(tries, "::ffff:9.9.9.9", 2, 0.0) == [401, 401]
    assert statuses(tries, "9.9.9.9", 1, 0.0) == [429]


def test_the_table_is_bounded_and_forgets_whoever_was_quiet_longest() -> None:
    tries = FailedTries(burst=1, addresses=10)
    for n in range(100):
        statuses(tries, f"10.0.0.{n}", 2, 0.0)
    assert len(tries) == 10
    assert statuses(tries, "10.0.0.99", 1, 0.0) == [429]
    assert statuses(tries, "10.0.0.1", 1, 0.0) == [401]


def test_a_try_is_taken_before_a_password_is_looked_at_and_given_back_when_it_is_right() -> None:
    tries = FailedTries(burst=1, per_s=0.5)
    assert tries.take("a", 0.0) == 0.0
    assert tries.take("a", 1.0) == pytest.approx(1.0)
    tries.give_back("a")
    assert tries.take("a", 1.0) == 0.0
    tries.give_back("a")
    tries.give_back("a")
    assert tries.take("a", 1.0) == 0.0
    assert tries.take("a", 1.0) > 0


def test_a_token_has_a_rate_with_a_burst() -> None:
    limits = TokenLimits(per_s=2, burst=3, at_once=0)
    for _ in range(3):
        limits.enter("w.1", 0.0)
    with pytest.raises(NotServed) as refused:
        limits.enter("w.1", 0.0)
    assert (refused.value.status, refused.value.reason) == (429, "too_many_calls")
    assert refused.value.headers["Retry-After"] == "1"
    limits.enter("w.2", 0.0)
    limits.enter("w.1", 0.5)


def test_calls_at_once_are_counted_until_they_end() -> None:
    limits = TokenLimits(per_s=0, burst=1, at_once=2)
    limits.enter("w.1", 0.0)
    limits.enter("w.1", 0.0)
    with pytest.raises(NotServed, match="run already"):
        limits.enter("w.1", 100.0)
    limits.leave("w.1")
    limits.enter("w.1", 100.0)
