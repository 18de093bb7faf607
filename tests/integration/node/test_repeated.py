"""Orders that are repeated on the workspace until its job is over: one order, one receipt, the last answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import trio
from trio.testing import trio_test

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.http1 import Exchange, Headers
from ngpu_protocol.job_answers import MAX_ANSWER_BYTES, MAX_BESIDE, PollUntil, Signs
from ngpu_protocol.receipts import Outcome
from tests.integration.node.rig import Answer, a_rig, eventually
from tests.unit.node.builders import task_id

SIGNS = Signs.model_validate({"state": ["/state"], "done": ["done"], "failed": ["failed"]})


def until(*, interval_ms: int = 20, hold_ms: int = 10_000, ask_ms: int | None = None) -> Headers:
    value = PollUntil(signs=SIGNS, job_id="7", interval_ms=interval_ms, hold_ms=hold_ms, ask_ms=ask_ms)
    return [(b"ngpu-until", value.encode())]


class Jobs:
    """A workspace that gives one answer after another."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[bytes] = []
        self.fields: list[Headers] = []

    async def __call__(self, exchange: Exchange) -> None:
        self.asked.append(await exchange.receive_all(1 << 20))
        self.fields.append(exchange.request.headers)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "cut":
            await exchange.abort()
        elif answer == "silence":
            await trio.sleep_forever()
        elif isinstance(answer, bytes):
            await exchange.respond(200, [(b"content-type", b"application/json")], answer)
        elif isinstance(answer, int):
            await exchange.respond(answer, [], b"no")
        else:
            await exchange.respond_json(200, answer)


def judged(answer: Answer) -> Any:
    assert answer.verdict is not None
    assert answer.receipt is not None
    assert answer.verdict.kind is VerdictKind.VERIFIED, answer.verdict
    return answer.receipt.receipt


@trio_test
async def test_only_the_final_answer_comes_back_and_its_receipt_lasts_as_long_as_the_job(tmp_path: Path) -> None:
    jobs = Jobs({"state": "queued"}, {"state": "running"}, {"state": "running"}, {"state": "done", "result": "/x"})
    async with a_rig(tmp_path, jobs) as rig:
        begun = time.monotonic()
        answer = await rig.ask("POST", "/status", b'{"id":7}', until(interval_ms=50))
        lasted_ms = (time.monotonic() - begun) * 1000
        receipt = judged(answer)
        assert json.loads(answer.body) == {"state": "done", "result": "/x"}
        assert jobs.asked == [b'{"id":7}'] * 4, "the same question each time"
        assert (receipt.request_bytes, receipt.response_bytes) == (8, len(answer.body)), "counted once"
        assert 150 <= receipt.duration_ms <= lasted_ms + 1
        assert not {name for fields in jobs.fields for name, _ in fields if name.startswith(b"ngpu-")}


@trio_test
async def test_what_is_no_state_goes_back_at_once(tmp_path: Path) -> None:
    answers: list[Any] = [404, 503, b"<html>", {"status": "done"}, {"state": "failed", "why": "x"}]
    for number, odd in enumerate(answers):
        jobs = Jobs(odd)
        async with a_rig(tmp_path / str(number), jobs) as rig:
            answer = await rig.ask("GET", "/status", b"", until())
            assert judged(answer).outcome == Outcome.COMPLETE
            assert answer.status == (odd if isinstance(odd, int) else 200)
            assert len(jobs.asked) == 1


@trio_test
async def test_a_job_that_outlasts_the_order_gets_the_last_answer_as_it_is(tmp_path: Path) -> None:
    jobs = Jobs({"state": "running"})
    async with a_rig(tmp_path, jobs) as rig:
        for hold_ms in (200, 3_000):  # longer, where the machine stood still
            jobs.asked.clear()
            answer = await rig.ask("GET", "/status", b"", until(interval_ms=40, hold_ms=hold_ms))
            assert judged(answer).outcome == Outcome.COMPLETE
            assert json.loads(answer.body) == {"state": "running"}
            assert len(jobs.asked) <= hold_ms / 40 + 1
            if len(jobs.asked) > 1:
                break
        assert len(jobs.asked) > 1


@trio_test
async def test_the_orders_deadline_ends_it(tmp_path: Path) -> None:
    jobs = Jobs({"state": "running"})
    async with a_rig(tmp_path, jobs) as rig:
        for given_ms in (300, 3_000, 20_000):  # more, where the machine had not begun by then
            late_ms = time.time_ns() // 1_000_000 + given_ms
            answer = await rig.ask("GET", "/status", b"", until(), deadline_ms=late_ms)
            if jobs.asked:
                break
        assert answer.status == 504
        assert answer.receipt is not None
        assert answer.receipt.receipt.outcome == Outcome.DEADLINE


@trio_test
async def test_a_bootstrap_that_leaves_ends_it_and_it_is_receipted(tmp_path: Path) -> None:
    jobs = Jobs({"state": "running"})
    async with a_rig(tmp_path, jobs) as rig:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                await rig.ask("GET", "/status", b"", until())

            nursery.start_soon(ask)
            await eventually(lambda: len(jobs.asked) >= 2)
            nursery.cancel_scope.cancel()
        await eventually(lambda: bool(rig.undelivered))
        assert rig.undelivered[0].signed.receipt.outcome == Outcome.CLIENT_GONE
        asked = len(jobs.asked)
        await trio.sleep(0.1)
        assert len(jobs.asked) <= asked + 1


@trio_test
async def test_a_workspace_that_breaks_off_now_and_then_is_asked_again(tmp_path: Path) -> None:
    jobs = Jobs("cut", {"state": "running"}, "cut", "cut", {"state": "done"})
    async with a_rig(tmp_path, jobs) as rig:
        answer = await rig.ask("GET", "/status", b"", until())
        assert json.loads(answer.body) == {"state": "done"}
    jobs = Jobs("cut")
    async with a_rig(tmp_path / "b", jobs) as rig:
        answer = await rig.ask("GET", "/status", b"", until())
        assert answer.status == 502
        assert answer.receipt is not None
        assert answer.receipt.receipt.outcome == Outcome.WORKSPACE_BROKE


@trio_test
async def test_a_question_that_is_not_answered_in_time_is_asked_again(tmp_path: Path) -> None:
    jobs = Jobs({"state": "running"}, "silence", {"state": "running"}, {"state": "done"})
    async with a_rig(tmp_path, jobs) as rig:
        answer = await rig.ask("GET", "/status", b"", until(ask_ms=1_000))
        assert json.loads(answer.body) == {"state": "done"}
        assert len(jobs.asked) == 4
    jobs = Jobs("silence")
    async with a_rig(tmp_path / "b", jobs) as rig:
        for ask_ms in (50, 1_000):  # more, where not even the question came through in it
            jobs.asked.clear()
            answer = await rig.ask("GET", "/status", b"", until(ask_ms=ask_ms))
            if len(jobs.asked) == 3:
                break
        assert answer.status == 502
        assert answer.receipt is not None
        assert answer.receipt.receipt.outcome == Outcome.WORKSPACE_BROKE
        assert len(jobs.asked) == 3


@trio_test
async def test_an_answer_too_long_to_hold_a_state_passes_through(tmp_path: Path) -> None:
    jobs = Jobs(b'{"state":"running","x":"' + b"a" * (MAX_ANSWER_BYTES + 100_000) + b'"}')
    async with a_rig(tmp_path, jobs) as rig:
        answer = await rig.ask("GET", "/status", b"", until())
        assert judged(answer).response_bytes == len(answer.body) == len(jobs.answers[0])


@trio_test
async def test_questions_about_a_job_run_beside_the_one_that_is_held_and_a_bound_of_them(tmp_path: Path) -> None:
    free = trio.Event()

    async def workspace(exchange: Exchange) -> None:
        if exchange.request.target == "/slow":
            await free.wait()
        await exchange.respond_json(200, {"state": "done" if free.is_set() else "running"})

    async with a_rig(tmp_path, workspace, concurrency=1) as rig:
        job, statuses = task_id(900_001), []

        async def held() -> None:
            statuses.append((await rig.ask("GET", "/status", b"", until(), task_id=job)).status)

        async def beside(target: str, of: str = job) -> int:
            answer = await rig.ask("GET", target, b"", [(b"ngpu-beside", of.encode())])
            if answer.status == 200:
                assert judged(answer).outcome == Outcome.COMPLETE
            return answer.status

        async def slow() -> None:
            statuses.append(await beside("/slow"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(held)
            await eventually(lambda: len(rig.attempts.running) == 1)
            assert (await rig.ask("GET", "/x")).status == 429, "the job has the only slot"
            assert await beside("/x") == 200
            assert await beside("/x", task_id(900_002)) == 429, "of no task that holds one"
            assert await beside("/x", "") == 429
            for _ in range(MAX_BESIDE):
                nursery.start_soon(slow)
            await eventually(lambda: len(rig.attempts.running) == 1 + MAX_BESIDE)
            assert await beside("/x") == 429, "no more than a few at once"
            free.set()
        assert statuses == [200] * (MAX_BESIDE + 1)
        assert rig.deployment.running == 0
        assert not rig.attempts.state.held
        assert (await rig.ask("GET", "/x")).status == 200


@trio_test
async def test_what_cannot_be_understood_is_asked_once(tmp_path: Path) -> None:
    jobs = Jobs({"state": "running"})
    async with a_rig(tmp_path, jobs) as rig:
        answer = await rig.ask("GET", "/status", b"", [(b"ngpu-until", b"!")])
        assert json.loads(answer.body) == {"state": "running"}
        assert len(jobs.asked) == 1
