"""Detached attempts: losing the stream, the bootstrap or the node's own process costs no answer that was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from ngpu_node.execution.spool import KEEP_ACKNOWLEDGED_S, KEEP_S, SpoolLimits, to_drop
from ngpu_node.ledger import StoredAnswer
from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.http1 import Exchange, Headers, header
from ngpu_protocol.receipts import Outcome, SignedReceipt
from tests.integration.node.rig import Rig, a_rig, echo, eventually
from tests.unit.node.builders import SIBLING, STRANGER


async def fetch(rig: Rig, task: str, attempt: int = 1, method: str = "GET") -> tuple[int, Headers, bytes]:
    async with rig.client.request(method, f"/ngpu/v1/attempts/{task}/{attempt}") as response:
        body = b"".join([piece async for piece in response.body()])
        return response.status, [*response.headers, *response.trailers], body


@pytest.mark.parametrize("size", [0, 11, 70_000, 3_000_000])
def test_a_detached_answer_comes_on_its_stream_and_again_when_asked_for(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        async with a_rig(tmp_path, echo) as rig:
            signed = rig.order(detach=True)
            body = os.urandom(size)
            answer = await rig.send(signed, body=body)
            assert answer.receipt is not None
            assert answer.verdict is not None
            assert answer.body == body
            assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
            for peer in (rig.peer, SIBLING.address):
                rig.peer = peer
                status, fields, again = await fetch(rig, signed.order.task_id)
                assert (status, again) == (200, body)
                assert header(fields, b"content-type") == b"application/octet-stream"
                assert header(fields, b"ngpu-receipt") == answer.receipt.encode().encode()
            assert rig.attempts.state.running == 0

    trio.run(main)


@trio_test
async def test_a_bootstrap_that_leaves_finds_the_answer_when_it_comes_back(tmp_path: Path) -> None:
    release = trio.Event()
    started = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        body = await exchange.receive_all(100)
        started.set()
        await release.wait()
        await exchange.respond(200, [(b"x-made", b"late")], body * 2)

    async with a_rig(tmp_path, workspace) as rig:
        signed = rig.order(detach=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.send, signed, None, b"work")
            await started.wait()
            nursery.cancel_scope.cancel()
        status, _, body = await fetch(rig, signed.order.task_id)
        assert (status, b'"running"' in body) == (202, True)
        release.set()
        await rig.settled()
        status, fields, body = await fetch(rig, signed.order.task_id)
        assert (status, body, header(fields, b"x-made")) == (200, b"workwork", b"late")
        (receipt,) = await rig.receipts()
        assert receipt.receipt.outcome == Outcome.COMPLETE


@trio_test
async def test_answers_survive_a_restart_of_the_node(tmp_path: Path) -> None:
    tasks: dict[str, bytes] = {}
    async with a_rig(tmp_path, echo) as rig:
        for size in (5, 500_000):
            signed = rig.order(detach=True)
            tasks[signed.order.task_id] = os.urandom(size)
            await rig.send(signed, body=tasks[signed.order.task_id])
    async with a_rig(tmp_path, echo, session=b"\x66" * 32) as rig:
        await rig.spool.sweep()
        for task, body in tasks.items():
            status, fields, found = await fetch(rig, task)
            assert (status, found) == (200, body)
            assert SignedReceipt.decode(header(fields, b"ngpu-receipt") or b"").receipt.response_bytes == len(body)


@trio_test
async def test_an_unknown_attempt_says_in_which_session_it_is_unknown(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo) as rig:
        status, _, body = await fetch(rig, "20261120_18_00_00_00000000000000000000")
        assert status == 404
        assert b"unknown_attempt" in body
        assert rig.attempts.state.session.hex().encode() in body
        for path in ("x", "x/y", "x/-1", "x/99999999999"):
            async with rig.client.request("GET", f"/ngpu/v1/attempts/{path}") as response:
                assert response.status == 400


@trio_test
async def test_a_stranger_cannot_ask_for_an_answer(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo) as rig:
        rig.peer = STRANGER.address
        status, _, body = await fetch(rig, "20261120_18_00_00_00000000000000000000")
        assert (status, b"unknown_bootstrap" in body) == (403, True)


@trio_test
async def test_a_detached_attempt_can_be_cancelled_and_is_receipted(tmp_path: Path) -> None:
    started = trio.Event()
    gone = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            gone.set()

    async with a_rig(tmp_path, workspace) as rig, trio.open_nursery() as nursery:
        signed = rig.order(detach=True)
        nursery.start_soon(rig.send, signed)
        await started.wait()
        assert (await fetch(rig, signed.order.task_id, method="DELETE"))[0] == 202
        with trio.fail_after(60):
            await gone.wait()
        await rig.settled()
        status, fields, _ = await fetch(rig, signed.order.task_id)
        assert (status, header(fields, b"ngpu-error")) == (503, b"cancelled")
        assert (await rig.receipts())[0].receipt.outcome == Outcome.CANCELLED


@trio_test
async def test_a_detached_request_that_never_came_whole_does_not_run(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        raise AssertionError("half a request must not run")

    async with a_rig(tmp_path, workspace) as rig:
        signed = rig.order(detach=True)
        sent = trio.Event()

        async def half() -> object:
            yield b"x" * 1000
            sent.set()
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                async with rig.request(signed, [(b"content-length", b"200000")], half()):
                    pass

            nursery.start_soon(ask)
            await sent.wait()
            await eventually(lambda: bool(rig.attempts.running))
            nursery.cancel_scope.cancel()
        await rig.settled()
        (receipt,) = await rig.receipts()
        assert (receipt.receipt.outcome, receipt.receipt.status) == (Outcome.CLIENT_GONE, 0)
        await rig.spool.sweep()
        assert list(rig.spool.directory.iterdir()) == []


@trio_test
async def test_an_answer_larger_than_is_kept_ends_with_limit(tmp_path: Path) -> None:
    async def workspace(exchange: Exchange) -> None:
        await exchange.send_head(200, [])
        for _ in range(40):
            await exchange.send(b"x" * 10_000)
        await exchange.end()

    async with a_rig(tmp_path, workspace, spool_limits=SpoolLimits(answer_bytes=100_000)) as rig:
        answer = await rig.ask(detach=True)
        assert answer.receipt is not None
        assert answer.receipt.receipt.outcome == Outcome.LIMIT
        assert len(answer.body) <= 100_000


@trio_test
async def test_older_answers_make_room_for_new_ones(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo, spool_limits=SpoolLimits(total_bytes=250_000)) as rig:
        tasks = []
        for _ in range(4):
            signed = rig.order(detach=True)
            tasks.append(signed.order.task_id)
            answer = await rig.send(signed, body=b"x" * 70_000)
            assert answer.receipt is not None
            assert answer.receipt.receipt.outcome == Outcome.COMPLETE
        statuses = [(await fetch(rig, task))[0] for task in tasks]
        assert statuses[0] == 404
        assert statuses[-1] == 200
        await rig.spool.sweep()
        kept = sum(path.stat().st_size for path in rig.spool.directory.iterdir())
        assert kept <= 250_000


@trio_test
async def test_files_that_no_row_names_are_removed(tmp_path: Path) -> None:
    async with a_rig(tmp_path, echo) as rig:
        (rig.spool.directory / "left-by-a-crash").write_bytes(b"x")
        signed = rig.order(detach=True)
        await rig.send(signed, body=b"x" * 100_000)
        await rig.spool.sweep()
        assert len(list(rig.spool.directory.iterdir())) == 1
        assert (await fetch(rig, signed.order.task_id))[0] == 200


def stored(number: int, size: int, ended_at_ms: int, acknowledged_at_ms: int | None = None) -> StoredAnswer:
    return StoredAnswer("acme", str(number), 1, 200, b"", None, None, size, b"", b"", ended_at_ms, acknowledged_at_ms)


def test_what_is_dropped_first() -> None:
    now = 10**12
    old = stored(1, 10, now - KEEP_S * 1000 - 1)
    done = stored(2, 10, now - 10**6, now - KEEP_ACKNOWLEDGED_S * 1000 - 1)
    fresh = stored(3, 10, now - 2)
    seen = stored(4, 10, now - 1, now - 1)
    limits = SpoolLimits(total_bytes=1000)
    assert to_drop([old, done, fresh, seen], limits, now) == [done, old]
    assert to_drop([fresh, seen], limits, now) == []
    assert to_drop([fresh, seen], limits, now, room_for=985) == [seen]
    assert to_drop([fresh, seen], limits, now, room_for=1000) == [seen, fresh]
