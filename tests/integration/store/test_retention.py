"""What is removed with time, what for room, and what stays."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from trio.testing import trio_test

from ngpu_bootstrap.store import tables
from ngpu_bootstrap.store.records import NodeRow, TaskFilter
from ngpu_bootstrap.store.webhook_rows import HOLD_MS, ToldWebhook
from ngpu_protocol.identity import Address
from tests.unit.store.builders import NODE, a_finish, a_receipt, a_start, a_store, a_task, task_id


@trio_test
async def test_old_final_tasks_go_with_their_bodies_and_their_receipts_stay_provable(directory: Path) -> None:
    long = b"x" * 100_000
    async with a_store(directory) as store:
        for number in (1, 2, 3):
            await store.accept_and_begin(a_task(number, accepted_at_ms=number * 100, request=long), a_start(number))
        await store.finish(a_finish(1, a_receipt(1), response=long))
        await store.finish(a_finish(2, a_receipt(2, 2), response=long))
        assert store.body_bytes == 5 * len(long)
        # the third is old as well, and not final
        assert await store.remove_old(before_ms=200, bodies_bytes=None) == 1
        assert await store.remove_old(before_ms=200, bodies_bytes=None) == 0
        assert await store.task(task_id(1)) is None
        assert await store.attempts(task_id(1)) == []
        assert store.body_bytes == 3 * len(long)
        kept = await store.receipt(task_id(1))
        assert kept is not None
        assert (kept.receipt, kept.order) == (a_receipt(1), b"order 1/1")
        assert await store.remove_old(before_ms=10_000, bodies_bytes=None) == 1
        assert [task.task_id for task in (await store.tasks(TaskFilter())).tasks] == [task_id(3)]


@trio_test
async def test_whose_a_task_was_that_another_workspace_ran_stays_known_with_its_receipt(directory: Path) -> None:
    async with a_store(directory) as store:
        for number, caller in ((1, "100000000000000009"), (2, "")):
            await store.accept_and_begin(a_task(number, accepted_at_ms=100, caller=caller), a_start(number))
            await store.finish(a_finish(number, a_receipt(number, number)))
        before = [await store.receipt(task_id(number)) for number in (1, 2)]
        assert [one.caller for one in before if one is not None] == ["", ""]  # the task says it
        assert await store.remove_old(before_ms=200, bodies_bytes=None) == 2
        after = [await store.receipt(task_id(number)) for number in (1, 2)]
        assert [one.caller for one in after if one is not None] == ["100000000000000009", ""]


@trio_test
async def test_two_that_sweep_at_once_leave_receipts_provable(directory: Path) -> None:
    def swept_by_a_sibling(connection: sa.Connection) -> None:
        # what a second sweep finds that chose its tasks before the first one committed, and goes on after
        connection.execute(sa.update(tables.receipts).values(signed_order=b"order 1/1"))
        connection.execute(sa.delete(tables.attempts))

    async with a_store(directory) as store:
        await store.accept_and_begin(a_task(1, accepted_at_ms=100), a_start(1))
        await store.finish(a_finish(1, a_receipt(1)))
        await store.chore(swept_by_a_sibling)
        assert await store.remove_old(before_ms=200, bodies_bytes=None) == 1
        kept = await store.receipt(task_id(1))
        assert kept is not None
        assert kept.order == b"order 1/1"


@trio_test
async def test_the_oldest_go_when_bodies_take_too_much_room(directory: Path) -> None:
    async with a_store(directory) as store:
        for number in range(1, 7):
            await store.accept_and_begin(a_task(number, request=b"x" * 1000), a_start(number))
            if number != 2:
                await store.finish(a_finish(number, response=None))
        assert await store.remove_old(before_ms=None, bodies_bytes=6000) == 0
        assert await store.remove_old(before_ms=None, bodies_bytes=3500) == 3
        left = [task.task_id for task in (await store.tasks(TaskFilter())).tasks]
        assert left == [task_id(number) for number in (6, 5, 2)]


@trio_test
async def test_a_webhook_is_due_once_its_task_is_final_and_is_held_while_it_is_made(directory: Path) -> None:
    async with a_store(directory) as store:
        await store.accept(a_task(1, accepted_at_ms=5, webhook="https://a.example/x", token_label="t.1"))
        await store.accept(a_task(2, accepted_at_ms=5))
        assert await store.due_webhooks(100, 10) == []
        await store.finish(a_finish(1, attempt=None))
        await store.finish(a_finish(2, attempt=None))
        [due] = await store.due_webhooks(100, 10)
        assert (due.task_id, due.url, due.token_label, due.tries) == (task_id(1), "https://a.example/x", "t.1", 0)
        assert await store.due_webhooks(101, 10) == []
        # whoever held it died: another makes the call
        assert len(await store.due_webhooks(101 + HOLD_MS, 10)) == 1
        await store.note_webhook(ToldWebhook(task_id(1), 1, 500, None, 503, "refused"))
        assert await store.due_webhooks(499, 10) == []
        [again] = await store.due_webhooks(500, 10)
        assert again.tries == 1
        await store.note_webhook(ToldWebhook(task_id(1), 2, 500, 600, 200, ""))
        assert await store.due_webhooks(10**9, 10) == []
        record = await store.webhook(task_id(1))
        assert record is not None
        assert (record.tries, record.status, record.done_at_ms) == (2, 200, 600)
        assert await store.webhook(task_id(2)) is None


@trio_test
async def test_what_strangers_offered_goes_with_age_but_for_their_last_session(directory: Path) -> None:
    first, last, worker = b"1" * 32, b"2" * 32, Address("0x" + "9" * 40)
    async with a_store(directory) as store:
        for session, at_ms in ((first, 100), (last, 150)):
            store.note_gpus(NODE, session, {session: "H200"}, at_ms)
        store.note_gpus(worker, first, {first: "H200"}, 100)
        await store.see_node(NodeRow(NODE, 100, 150, session=last))
        await store.forget_gpus(100)
        assert await store.session_gpus(NODE, first) == {first: "H200"}
        # what was ordered before the session's GPUs were kept is not told by them
        assert await store.session_gpus(NODE, first, since_ms=99) == {}
        assert await store.session_gpus(NODE, first, since_ms=100) == {first: "H200"}
        await store.forget_gpus(200)
        assert await store.session_gpus(NODE, first) == {}
        assert await store.session_gpus(NODE, last) == {last: "H200"}
        assert await store.session_gpus(worker, first) == {}
