"""Calls back that cannot be made: each is a try that is counted."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.store.webhook_rows import DueWebhook, ToldWebhook
from ngpu_bootstrap.webhooks.caller import WebhookCaller
from ngpu_bootstrap.webhooks.rules import WebhookRules
from ngpu_daemon.addresses import IpAddress
from tests.unit.store.builders import a_task, task_id


class OneDue:
    """A store with one call due."""

    def __init__(self, url: str) -> None:
        self.due = [DueWebhook(task_id(1), url, "1", "1.1", 3)]
        self.told: list[ToldWebhook] = []
        self.noted = trio.Event()

    async def due_webhooks(self, now_ms: int, limit: int) -> list[DueWebhook]:
        due, self.due = self.due, []
        return due

    async def task_state(self, task_id: str) -> Any:
        return a_task(1)

    async def note_webhook(self, told: ToldWebhook) -> None:
        self.told.append(told)
        self.noted.set()


@trio_test
async def test_a_call_that_fails_by_a_bug_of_ours_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    async def broken(host: str, port: int) -> list[IpAddress]:
        raise ZeroDivisionError

    def now_ms() -> int:
        return 1_000_000

    store = OneDue("https://a.example/")
    caller = WebhookCaller(
        cast(Store, store), WebhookRules(), token_hash=lambda *_: bytes(32), now_ms=now_ms, resolve=broken
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller.run)
        with trio.fail_after(5):
            await store.noted.wait()
        nursery.cancel_scope.cancel()
    [told] = store.told
    assert (told.tries, told.status, told.done_at_ms) == (4, 0, None)
    assert told.next_at_ms > now_ms()
    assert told.problem
