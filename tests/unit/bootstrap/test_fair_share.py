"""Places that many use: none takes them all."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ngpu_bootstrap.fair_share import may_take
from ngpu_bootstrap.scheduling.waiting import Lines, Waiter


@given(st.integers(1, 300), st.integers(1, 20))
def test_however_many_take_all_they_may_another_finds_room(limit: int, greedy: int) -> None:
    own = [0] * greedy
    moved = True
    while moved:
        moved = False
        for one in range(greedy):
            if may_take(limit, sum(own), own[one]):
                own[one] += 1
                moved = True
    assert sum(own) <= limit
    if greedy < limit:
        assert may_take(limit, sum(own), 0)
        assert max(own) - min(own) <= 1
    assert sum(own) >= limit * greedy // (greedy + 1)  # and little lies idle


def test_a_workspaces_own_client_may_have_every_place_and_a_guest_what_it_leaves() -> None:
    def fill(caller: str) -> int:
        lines: Lines[str, int] = Lines()
        while lines.has_room(caller, 10):
            lines.join(Waiter(str(len(lines)), lambda slot: None, caller=caller))
        return len(lines)

    assert fill("") == 10
    assert fill("guest") == 5
