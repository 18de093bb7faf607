from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ngpu_protocol.p2p import BackOff


def test_waits_double_up_to_the_longest() -> None:
    policy = BackOff(initial_s=0.25, factor=2, max_s=15)
    assert [policy.delay_s(n, 0.0) for n in range(1, 9)] == [0.25, 0.5, 1, 2, 4, 8, 15, 15]


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_jitter_only_shortens_and_only_by_its_share(failures: int, chance: float) -> None:
    policy = BackOff(jitter=0.5)
    longest = policy.delay_s(failures, 0.0)
    assert longest / 2 <= policy.delay_s(failures, chance) <= longest <= policy.max_s


def test_full_jitter_spreads_over_the_whole_wait() -> None:
    assert BackOff(initial_s=1, jitter=1).delay_s(1, 0.75) == 0.25
