"""Many at one moment: what is bounded for one after the other is bounded for all at once."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.compat import passwords, rows
from ngpu_bootstrap.compat.cloud import BASE, Cloud, CloudRequest
from ngpu_bootstrap.compat.user_calls import UserCalls
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.front.extension import UserCall
from ngpu_bootstrap.front.guards import FailedTries


class Accounts:
    """A store with one account, and nothing else."""

    async def look_up(self, work: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return rows.User(1, "a@b.c", "stored", 0)


@trio_test
async def test_passwords_tried_at_one_moment_are_as_few_as_those_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def verify(stored: str, sent: str) -> bool:
        looked.append(sent)
        time.sleep(0.002)
        return False

    monkeypatch.setattr(passwords, "verify", verify)
    tries = FailedTries(burst=3, per_s=0.001)
    cloud = Cloud(
        store=cast(Any, Accounts()),
        workspaces=cast(Any, None),
        deployments=cast(Any, None),
        confided=cast(Any, None),
        failed_tries=tries,
        session_s=60,
        now_ms=lambda: 0,
    )
    reasons: list[str] = []

    async def log_in(number: int) -> None:
        async def body(limit: int) -> bytes:
            return b'{"email": "a@b.c", "password": "guess %d"}' % number

        request = CloudRequest("POST", f"{BASE}/user/login", None, [], "1.2.3.4")
        try:
            await cloud.answer(request, body, 1000)
        except Refusal as refusal:
            reasons.append(tries.answer("1.2.3.4", refusal, time.monotonic()).reason)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(log_in, number)
    assert len(looked) == 3
    assert sorted(set(reasons)) == ["login_failed", "too_many_tries"]
    assert reasons.count("login_failed") == 3


@trio_test
async def test_what_nodes_have_done_is_added_up_once_for_all_who_ask() -> None:
    sums = 0

    class Store:
        async def look_over(self, work: Any) -> Any:
            nonlocal sums
            sums += 1
            await trio.sleep(0.01)
            return []

        async def look_up(self, work: Any) -> Any:
            return {}

    calls = UserCalls(
        reads=cast(Any, None), nodes=cast(Any, []), store=cast(Any, Store()), chain_id=1, now_ms=lambda: 0
    )

    async def ask() -> None:
        async def no_body(limit: int) -> bytes:
            return b""

        answer = await calls.answer(UserCall("getNodes", "GET", None, [], None, "1.2.3.4"), no_body)
        assert answer.status == 200

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert sums == 1
