"""Lists of several bootstraps on one database: an older one undoes no newer one, and none is kept away for good."""

from __future__ import annotations

from ngpu_node.wishes import POSTPONED_S, RECENT_S, WishOrder
from ngpu_protocol.identity import Address

ONE, OTHER = Address("0xOne"), Address("0xOther")


def test_a_list_that_knew_less_than_anothers_waits() -> None:
    order = WishOrder()
    assert order.wait_s("acme", ONE, 5_000, 0.0) == 0.0
    order.taken("acme", ONE, 5_000, 0.0)
    assert order.wait_s("acme", OTHER, 4_999, 1.0) == POSTPONED_S
    assert order.wait_s("acme", OTHER, 5_000, 1.0) == 0.0
    assert order.wait_s("other service", OTHER, 1, 1.0) == 0.0


def test_a_bootstrap_may_always_change_its_own_mind() -> None:
    order = WishOrder()
    order.taken("acme", ONE, 5_000, 0.0)
    assert order.wait_s("acme", ONE, 4_000, 1.0) == 0.0  # its database was restored, or its clock set back


def test_one_that_does_not_say_is_taken_at_once_as_before() -> None:
    order = WishOrder()
    order.taken("acme", ONE, 5_000, 0.0)
    assert order.wait_s("acme", OTHER, 0, 1.0) == 0.0
    order.taken("acme", OTHER, 0, 1.0)
    assert order.wait_s("acme", ONE, 1, 2.0) == 0.0


def test_what_is_long_ago_holds_up_nobody() -> None:
    order = WishOrder()
    order.taken("acme", ONE, 5_000, 0.0)
    assert order.wait_s("acme", OTHER, 1, RECENT_S) == 0.0
