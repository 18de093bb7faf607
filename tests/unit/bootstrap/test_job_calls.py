"""A client that waits for a job: what ends the job, and what does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import trio_test

from ngpu_bootstrap.front.job_calls import JobCalls
from ngpu_bootstrap.store.errors import StoreUnavailable


def calls_of(wait: Any, cancelled: list[str]) -> JobCalls:
    return JobCalls(
        detached=cast(Any, SimpleNamespace(cancel=cancelled.append)),
        promises=cast(Any, SimpleNamespace(answer=wait)),
        jobs=cast(Any, None),
        nodes=cast(Any, None),
        store=cast(Any, None),
        watch=cast(Any, None),
        now_ms=lambda: 0,
    )


CALL = cast(Any, SimpleNamespace(deadline_ms=1000, idempotency_key=None))
WITH_KEY = cast(Any, SimpleNamespace(deadline_ms=1000, idempotency_key="k"))
DECLARED = cast(Any, SimpleNamespace(duration_s=10.0, cancel=object()))


@trio_test
async def test_a_store_that_fails_for_a_moment_ends_no_job() -> None:
    async def broken(task_id: str, deadline_ms: int) -> None:
        raise StoreUnavailable("the database is restarted")

    cancelled: list[str] = []
    with pytest.raises(StoreUnavailable):
        await calls_of(broken, cancelled)._result(CALL, "1", DECLARED)
    assert cancelled == []


@trio_test
async def test_a_client_that_leaves_ends_the_job_it_waited_for_unless_it_can_come_again() -> None:
    async def waiting(task_id: str, deadline_ms: int) -> None:
        await trio.sleep_forever()

    cancelled: list[str] = []
    for call in (CALL, WITH_KEY):
        with trio.move_on_after(0.01):
            await calls_of(waiting, cancelled)._result(call, "1", DECLARED)
    assert cancelled == ["1"]
