"""Calls under a kept key while the node that has what they are about is away."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.registry.sticky_keys import StickyKeys
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec
from tests.unit.store.builders import NODE

SPEC = cast(WorkspaceSpec, SimpleNamespace(id="w"))
KEY = StickyKeys.of("w", "w", "p token", "w")


class Seen:
    """What a bootstrap sees of the one node, to which every key sticks."""

    def __init__(self) -> None:
        self.takes, self.left_ms = True, cast(int | None, None)

    def stuck(self, spec: WorkspaceSpec, key: bytes) -> Address:
        return NODE

    def takes_calls(self, spec: WorkspaceSpec, node: Address) -> bool:
        return self.takes

    def left_at_ms(self, node: Address) -> int | None:
        return self.left_ms


class Asked:
    """Asks at times of the test's own."""

    def __init__(self) -> None:
        self.seen, self.now_ms = Seen(), 0
        nodes = cast(Any, self.seen)
        self._keys = StickyKeys(cast(Any, None), nodes, kept_ms=1, now_ms=lambda: self.now_ms)

    def goes_on(self, at_s: float, refuse_s: float = 60) -> bool:
        self.now_ms = int(at_s * 1000)
        try:
            trio.run(lambda: self._keys.find(SPEC, KEY, refuse_s=refuse_s))
        except NotServed as refused:
            return (refused.status, refused.reason, NODE in refused.message) != (503, "state_node_away", True)
        return True


def test_a_node_that_left_is_waited_for_from_when_it_left() -> None:
    asked = Asked()
    assert asked.goes_on(0)
    asked.seen.takes, asked.seen.left_ms = False, 10_000
    assert not asked.goes_on(69)
    assert asked.goes_on(70), "whoever asks first by then"
    asked.seen.takes, asked.seen.left_ms = True, None
    assert asked.goes_on(71)


def test_one_that_is_here_and_takes_no_calls_is_waited_for_from_when_it_was_missed() -> None:
    asked = Asked()
    asked.seen.takes = False
    assert not asked.goes_on(100)
    assert not asked.goes_on(159)
    assert asked.goes_on(160)
    # nobody asked for so long that it may have been back
    assert not asked.goes_on(10_000)
    asked.seen.takes = True
    assert asked.goes_on(10_001)
    asked.seen.takes = False
    assert not asked.goes_on(10_002)
    assert not asked.goes_on(10_061), "it was back at 10,001"
    asked.seen.left_ms = 10_062_000
    assert not asked.goes_on(10_063)
    asked.seen.left_ms = None
    assert not asked.goes_on(10_064), "it came anew"


def test_who_calls_seldom_is_not_refused_for_ever() -> None:
    asked = Asked()
    asked.seen.takes = False
    assert not asked.goes_on(0)
    assert [asked.goes_on(at_s) for at_s in range(120, 1200, 120)] == [True] * 9


@pytest.mark.parametrize(("refuse_s", "goes_on"), [(0, True), (math.inf, False)])
def test_calls_may_move_at_once_or_never(refuse_s: float, goes_on: bool) -> None:
    asked = Asked()
    asked.seen.takes, asked.seen.left_ms = False, 0
    assert asked.goes_on(10_000_000, refuse_s) is goes_on
