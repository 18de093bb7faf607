"""Tests on a clock that jumps: a wait of a minute takes no time, and "within a second" is exact."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from trio.testing import MockClock


def virtual_clock(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a synchronous test of an asynchronous one, run on a clock that jumps when every task waits."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        clock = MockClock(autojump_threshold=0)
        trio.run(functools.partial(test, *args, **kwargs), clock=clock)

    return run
