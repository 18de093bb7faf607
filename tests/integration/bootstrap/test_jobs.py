"""Jobs that workspaces run by themselves, through a whole bootstrap and scripted nodes."""

from __future__ import annotations

import base64
import json
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_protocol.http1 import header
from ngpu_protocol.job_answers import PollUntil
from ngpu_protocol.losses import LossFile, check_loss_file
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

ROOT = Path(__file__).resolve().parents[3]
FOREIGN = "1-" + "0" * 48
JOB: dict[str, Any] = {
    "id": ["/job_id"],
    "poll": {"target": "/api/status?ids={id}"},
    "state": ["/0/status"],
    "done": ["succeeded"],
    "failed": ["failed"],
    "error": ["/0/error"],
    "result": ["/0/result"],
    "fetch": True,
    "interval_s": 0.05,
    "duration_s": 20,
    "away_s": 0.6,
    "cancel": {"method": "DELETE", "target": "/api/jobs/{id}"},
}


def workspace(**changes: Any) -> dict[str, Any]:
    job = {**JOB, **changes}
    return {
        "name": "jobs",
        "service": "demo/echo",
        "ports": [8080],
        "concurrency": 8,
        "request_timeout_s": 20,
        "apis": [
            {"name": "draw", "mode": "sync", "port": 8080, "path": "/api/generate", "job": job},
            {"name": "film", "mode": "async", "port": 8080, "path": "/api/generate", "job": job},
        ],
    }


PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


class Painter:
    """A workspace with jobs, on a scripted node: each needs *polls* questions; *says* is in its last answer."""

    def __init__(self, node: ScriptedNode, *, polls: int = 3, says: dict[str, Any] | None = None) -> None:
        self.node = node
        self.polls = polls
        self.says = says or {"status": "succeeded", "result": "/api/images/1.png"}
        self.jobs: dict[str, int] = {}
        self.asked: list[str] = []
        self.heard = trio.Event()
        self.untils: list[PollUntil | None] = []
        self.bodies: list[bytes] = []
        self.questions: list[bytes] = []
        self.ranges: list[bytes | None] = []
        self.hangs_at = 0
        self.hung: Asked | None = None
        self.hold_submission: trio.Event | None = None
        self.change: dict[str, object] | None = None
        node.script = self

    async def was_asked(self, calls: int) -> None:
        """Return once the workspace was called so often."""
        with trio.fail_after(60):
            while len(self.asked) < calls:
                await self.heard.wait()

    async def __call__(self, asked: Asked) -> None:
        body = await asked.read()
        order = asked.signed.order
        self.asked.append(f"{order.method} {order.target}")
        self.ranges.append(header(asked.exchange.request.headers, b"range"))
        self.heard.set()
        self.heard = trio.Event()
        path, _, query = order.target.partition("?")
        if path == "/api/generate":
            if self.hold_submission is not None:
                await self.hold_submission.wait()
            self.bodies.append(body)
            if b"bad" in body:
                await asked.answer(422, b'{"detail":"no"}', [(b"content-type", b"application/json")])
                return
            job_id = f"{self.node.account.address[-4:]}-{len(self.jobs)}"
            self.jobs[job_id] = 0
            await self.json(asked, {"job_id": job_id})
        elif path == "/api/status":
            until = header(asked.exchange.request.headers, b"ngpu-until")
            self.untils.append(PollUntil.decode(until) if until else None)
            self.questions.append(body)
            if len(self.questions) == self.hangs_at:
                self.hung = asked
                await trio.sleep_forever()
            job_id = query.removeprefix("ids=")
            if job_id not in self.jobs:
                await asked.answer(404, b"[]")
                return
            self.jobs[job_id] += 1
            done = self.jobs[job_id] >= self.polls
            await self.json(asked, [self.says if done else {"status": "processing"}], change=self.change)
        elif path == "/api/images/1.png":
            await asked.answer(200, PICTURE, [(b"content-type", b"image/png")])
        elif order.method == "DELETE":
            await self.json(asked, {})
        else:
            await asked.answer(404, b"")

    async def json(self, asked: Asked, document: Any, change: dict[str, object] | None = None) -> None:
        await asked.answer(200, json.dumps(document).encode(), [(b"content-type", b"application/json")], change=change)


Test = Callable[[Bootstrap, list[Painter]], Awaitable[None]]


def run(tmp_path: Path, test: Test, *, nodes: int = 1, polls: int = 3, says: Any = None, **changes: Any) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            bootstrap = await stack.enter_async_context(
                running(settings_for(tmp_path / "bootstrap"), workspace=workspace(**changes))
            )
            painters = []
            for _ in range(nodes):
                node = ScriptedNode(new_account())
                painters.append(Painter(node, polls=polls, says=says))
                await stack.enter_async_context(connected(node, bootstrap.multiaddr))
            await wait_ready(bootstrap, nodes)
            with trio.fail_after(60):
                await test(bootstrap, painters)

    trio.run(main)


async def detailed(bootstrap: Bootstrap, task_id: str) -> dict[str, Any]:
    answer = await bootstrap.call("GET", f"/user/getDetailed?taskID={task_id}")
    info: dict[str, Any] = json.loads(answer.body)["taskInfo"]
    return info


async def film(bootstrap: Bootstrap, body: bytes = b'{"prompt":"sea"}') -> str:
    answer = await bootstrap.call("POST", "/user/film", body, [(b"content-type", b"application/json")])
    assert answer.status == 200, answer.body
    return str(json.loads(answer.body)["taskId"])


def test_one_call_is_answered_with_the_jobs_file_and_every_call_made_for_it_is_receipted(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        (painter,) = painters
        answer = await bootstrap.call("POST", "/user/draw", b'{"prompt":"sea"}', [(b"range", b"bytes=0-9")])
        document = json.loads(answer.body)
        assert (answer.status, document["result_code"]) == (200, 200)
        # what the client asked of its own call is not asked of the questions
        assert painter.ranges == [b"bytes=0-9", None, None, None, None]
        assert base64.b64decode(document["data"]) == PICTURE
        assert document["content_type"] == "image/png"
        (job_id,) = painter.jobs
        calls = [
            "POST /api/generate",
            *[f"GET /api/status?ids={job_id}"] * 3,
            "GET /api/images/1.png",
        ]
        assert painter.asked == calls
        assert painter.bodies == [b'{"prompt":"sea"}']
        info = await detailed(bootstrap, document["taskID"])
        assert [one["call"] for one in info["attempts"]] == calls
        assert {one["receipt"]["verdict"] for one in info["attempts"]} == {"verified"}
        assert {one["outcome"] for one in info["attempts"]} == {"complete"}
        assert (info["job"]["id"], info["job"]["phase"], info["job"]["nodeaddr"]) == (
            job_id,
            "done",
            painter.node.account.address,
        )
        for number in range(1, 6):
            receipt = await bootstrap.call("GET", f"/api/v1/tasks/{document['taskID']}/receipt?attempt={number}")
            assert receipt.status == 200
        listed = json.loads((await bootstrap.call("GET", "/user/queryTaskList")).body)["taskIds"]
        assert listed == [document["taskID"]], "one job is one task"
        # every question told the node how to go on by itself; this one does not know how, and was asked again
        assert [until is not None and until.job_id for until in painter.untils] == [job_id] * 3
        await painter.node.until(lambda: len(painter.node.acknowledged) == 5)

    run(tmp_path, test)


def test_an_asynchronous_job_is_pending_until_its_result_is_here(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        painters[0].polls = 10**9
        task_id = await film(bootstrap)
        view = await task_when(bootstrap, task_id, lambda view: view["state"] == 2)
        assert view["state_name"] == "running"
        polled = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}")).body)
        assert (polled["result_code"], polled["result_size"]) == (100, 0)
        painters[0].polls = 0
        await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        polled = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}")).body)
        assert (polled["result_code"], polled["result_size"], base64.b64decode(polled["data"])) == (200, 1, PICTURE)

    run(tmp_path, test)


def test_a_job_whose_result_is_in_the_last_answer_is_answered_with_that(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        answer = await bootstrap.call("POST", "/user/draw", b"{}")
        document = json.loads(answer.body)
        assert json.loads(document["data"]) == [{"status": "succeeded", "images": ["a"]}]
        # a job that holds no slot is asked now and then, and each question has a receipt of its own
        assert painters[0].untils == [None] * 3
        info = await detailed(bootstrap, document["taskID"])
        assert [one["receipt"]["verdict"] for one in info["attempts"]] == ["verified"] * 4

    run(tmp_path, test, says={"status": "succeeded", "images": ["a"]}, fetch=False, result=[], hold=False)


def test_what_the_workspace_refuses_itself_is_passed_on(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        answer = await bootstrap.call("POST", "/user/draw", b'{"x":"bad"}')
        document = json.loads(answer.body)
        assert (answer.status, document["result_code"], document["data"]) == (422, 422, '{"detail":"no"}')
        assert painters[0].asked == ["POST /api/generate"]
        info = await detailed(bootstrap, document["taskID"])
        assert info["job"]["phase"] == "failed"

    run(tmp_path, test)


def test_a_job_that_fails_says_so_in_the_workspaces_words(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        answer = await bootstrap.call("POST", "/user/draw", b"{}")
        document = json.loads(answer.body)
        assert (answer.status, document["reason"]) == (502, "job_failed")
        assert "out of memory" in document["msg"]

    run(tmp_path, test, says={"status": "failed", "error": "out of memory"})


def test_a_job_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        answer = await bootstrap.call("POST", "/user/draw", b"{}")
        document = json.loads(answer.body)
        assert (answer.status, document["reason"]) == (504, "job_timed_out")
        assert json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={document['taskID']}")).body)[
            "state"
        ] not in (0, 1, 2, 3)

    run(tmp_path, test, polls=10**9, duration_s=0.5)


def test_questions_go_to_the_node_that_took_the_job_and_to_no_other(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(bootstrap.call, "POST", "/user/draw", b"{}")
        assert all(painter.jobs for painter in painters), "both nodes took jobs"
        for painter in painters:
            asked = {one.rpartition("=")[2] for one in painter.asked if "status" in one}
            assert asked == set(painter.jobs)

    run(tmp_path, test, nodes=2)


def test_a_job_whose_node_is_gone_is_recorded_as_failed_and_resubmission_is_offered(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap"), workspace=workspace()) as bootstrap:
            node = ScriptedNode(new_account())
            async with connected(node, bootstrap.multiaddr):
                painter = Painter(node, polls=10**9)
                painter.hangs_at = 2
                await wait_ready(bootstrap)
                task_id = await film(bootstrap)
                await painter.was_asked(3)
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
            assert view["reason"] == "job_node_gone"
            assert node.account.address in view["message"]
            assert "submit it again" in view["message"]
            polled = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}")).body)
            assert (polled["result_code"], polled["result_size"]) == (502, 1)
            info = await detailed(bootstrap, task_id)
            assert info["job"]["phase"] == "lost"
            assert info["attempts"][0]["receipt"]["verdict"] == "verified", "what the node did is receipted"
            (job_id,) = painter.jobs
            answer = await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/loss")
            assert answer.status == 200
            assert {rule.rule for rule in check_loss_file(LossFile.from_json(answer.body)) if not rule.holds} == set()
            document = json.loads(answer.body)
            loss = document["loss"]
            assert (loss["taskId"], loss["jobId"], loss["reason"]) == (task_id, job_id, "job_node_gone")
            assert (loss["node"], loss["bootstrap"]) == (node.account.address, bootstrap.where["address"])
            assert loss["atMs"] - loss["awaySinceMs"] >= 600, "as long as its declaration lets a node be away"
            assert document["receipt"]["orderHash"] == loss["orderHash"]
            assert polled["loss"] == info["job"]["loss"] == loss
            script = [sys.executable, "scripts/verify_receipt.py", "-", "--json"]
            judged = await trio.run_process(script, stdin=answer.body, capture_stdout=True, cwd=ROOT)
            assert json.loads(judged.stdout)["lost"] == "job_node_gone"
            assert (await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/loss", token=FOREIGN)).status in (401, 403)
            # the node is back, with the receipt of the question that was cut: it is judged, and the task stays as it is
            heads = len(node.heads)
            async with connected(node, bootstrap.multiaddr):
                hung = painter.hung
                assert hung is not None
                assert hung.signed.order.attempt == len(info["attempts"])
                await node.until(lambda: len(node.heads) > heads)  # its stream for receipts is there
                await node.offer(hung.signed, hung.receipt(0, b"", outcome="client_gone"))
                await node.until(lambda: node.acknowledged[-1].acknowledgement.sequence == len(node.orders))
            after = await detailed(bootstrap, task_id)
            assert after["attempts"][-1]["receipt"]["verdict"] == "verified"
            assert (after["state"], after["reason"], after["job"]["loss"]) == (4, "job_node_gone", loss)

    trio.run(main)


def test_a_node_that_is_away_for_a_moment_keeps_its_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(settings_for(tmp_path / "bootstrap"), workspace=workspace(away_s=30)) as bootstrap:
            node = ScriptedNode(new_account())
            async with connected(node, bootstrap.multiaddr):
                painter = Painter(node, polls=10**9)
                await wait_ready(bootstrap)
                task_id = await film(bootstrap)
                await painter.was_asked(3)
            await trio.sleep(0.2)
            painter.polls = 0
            async with connected(node, bootstrap.multiaddr):
                await task_when(bootstrap, task_id, lambda view: view["state"] == 3)

    trio.run(main)


def test_a_workspace_that_forgot_the_job_is_believed_at_once(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        painters[0].polls = 10**9
        task_id = await film(bootstrap)
        await painters[0].was_asked(2)
        painters[0].jobs.clear()  # its container was restarted
        view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
        assert view["reason"] == "job_unknown_there"
        last = (await detailed(bootstrap, task_id))["attempts"][-1]
        assert (last["status"], last["receipt"]["verdict"]) == (404, "verified")

    run(tmp_path, test)


def test_a_receipt_that_does_not_fit_releases_nothing(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        painters[0].change = {"response_hash": b"\x01" * 32}
        answer = await bootstrap.call("POST", "/user/draw", b"{}")
        assert (answer.status, json.loads(answer.body)["reason"]) == (502, "receipt_disputed")

    run(tmp_path, test)


def test_a_job_outlives_its_bootstrap_and_is_asked_for_where_it_was(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap")

    async def main() -> None:
        nodes = [ScriptedNode(new_account()) for _ in range(2)]
        painters = [Painter(node, polls=10**9) for node in nodes]
        async with running(settings, workspace=workspace(away_s=30)) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(nodes[0], bootstrap.multiaddr), connected(nodes[1], bootstrap.multiaddr):
                await wait_ready(bootstrap, 2)
                task_ids = [await film(bootstrap) for _ in range(4)]
                for task_id in task_ids:
                    await task_when(bootstrap, task_id, lambda view: view["state"] == 2)
        took = [set(painter.jobs) for painter in painters]
        for painter in painters:
            painter.asked.clear()
            painter.polls = 0
        async with (
            running(settings, known=known) as bootstrap,
            connected(nodes[0], bootstrap.multiaddr),
            connected(nodes[1], bootstrap.multiaddr),
        ):
            for task_id in task_ids:
                view = await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
                assert view["reason"] == ""
            for painter, jobs in zip(painters, took, strict=True):
                assert set(painter.jobs) == jobs, "nothing was submitted again"
                asked = {one.rpartition("=")[2] for one in painter.asked if "status" in one}
                assert asked == jobs
            info = await detailed(bootstrap, task_ids[0])
            assert info["job"]["phase"] == "done"

    trio.run(main)


def test_a_submission_that_was_lost_on_its_way_is_collected_after_a_restart(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap")

    async def main() -> None:
        node = ScriptedNode(new_account())
        painter = Painter(node)
        painter.hold_submission = trio.Event()
        async with running(settings, workspace=workspace(away_s=30)) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                task_id = await film(bootstrap)
                await painter.was_asked(1)
        order = node.orders[0].order
        assert order.detach, "the node finishes it without its bootstrap"

        async def kept(asked: Asked) -> None:
            asked.body = b'{"prompt":"sea"}'
            painter.jobs["k-0"] = 0
            await painter.json(asked, {"job_id": "k-0"})

        node.kept[f"{task_id}/1"] = kept
        async with running(settings, known=known) as bootstrap, connected(node, bootstrap.multiaddr):
            await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
            assert [one for one in painter.asked if "generate" in one] == ["POST /api/generate"]
            assert (await detailed(bootstrap, task_id))["job"]["id"] == "k-0"

    trio.run(main)


@pytest.mark.parametrize(
    ("outcome", "runs_again"), [("refused", True), ("not_sent", True), ("complete", False), ("lost", False)]
)
def test_a_submission_that_may_have_been_taken_is_not_made_again_after_a_crash(
    tmp_path: Path, outcome: str, runs_again: bool
) -> None:
    """What a bootstrap leaves that dies between the end of a submission and the word on what came of it."""
    settings = settings_for(tmp_path / "bootstrap")

    async def main() -> None:
        node = ScriptedNode(new_account())
        painter = Painter(node)
        painter.hold_submission = trio.Event()
        async with running(settings, workspace=workspace(away_s=30)) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                task_id = await film(bootstrap)
                await painter.was_asked(1)
        with sqlite3.connect(tmp_path / "bootstrap" / "bootstrap.db") as database:
            ended = database.execute(
                "UPDATE attempts SET ended_at_ms = began_at_ms, outcome = ? WHERE task_id = ?", (outcome, task_id)
            )
            assert ended.rowcount == 1
            (phase,) = database.execute("SELECT phase FROM jobs").fetchone()
            assert phase == "submitting"
        database.close()
        painter.hold_submission = None
        painter.asked.clear()
        async with running(settings, known=known) as bootstrap, connected(node, bootstrap.multiaddr):
            view = await task_when(bootstrap, task_id, lambda view: view["state"] in (3, 4))
            assert ("POST /api/generate" in painter.asked) is runs_again
            assert (view["state"], view["reason"]) == ((3, "") if runs_again else (4, "bootstrap_lost"))

    trio.run(main)


def test_how_a_job_ended_is_kept_with_the_end_of_its_task_and_not_before(tmp_path: Path) -> None:
    """A bootstrap that dies in between finds a job that goes on, and ends it anew."""
    settings = settings_for(tmp_path / "bootstrap")

    async def main() -> None:
        node = ScriptedNode(new_account())
        async with running(settings, workspace=workspace(fetch=False, result=[], away_s=30)) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(node, bootstrap.multiaddr):
                Painter(node, says={"status": "failed", "error": "out of memory"})
                await wait_ready(bootstrap)
                with sqlite3.connect(tmp_path / "bootstrap" / "bootstrap.db") as database:
                    # the end of the task cannot be written, as where the disk is full just then
                    database.execute(
                        "CREATE TRIGGER full BEFORE UPDATE OF finished_at_ms ON tasks "
                        "BEGIN SELECT RAISE(ABORT, 'full'); END"
                    )
                task_id = await film(bootstrap)
                attempts = 0
                while attempts < 4:  # submitted, and asked for three times: the last says that it failed
                    attempts = len((await detailed(bootstrap, task_id))["attempts"])
                    await trio.sleep(0.02)
                await node.until(lambda: len(node.acknowledged) == 4)
        with sqlite3.connect(tmp_path / "bootstrap" / "bootstrap.db") as database:
            assert database.execute("SELECT phase FROM jobs").fetchone() == ("polling",)
            database.execute("DROP TRIGGER full")
        database.close()
        async with running(settings, known=known) as bootstrap, connected(node, bootstrap.multiaddr):
            view = await task_when(bootstrap, task_id, lambda view: view["state"] in (3, 4))
            assert (view["state"], view["reason"]) == (4, "job_failed")
            assert (await detailed(bootstrap, task_id))["job"]["phase"] == "failed"

    trio.run(main)


def test_what_stood_in_the_submission_goes_along_with_its_questions(tmp_path: Path) -> None:
    poll = {"method": "POST", "target": "/api/status?ids={id}", "body": {"of": "{request:/user}", "no": "{request:/x}"}}

    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        task_id = await film(bootstrap, b'{"user":"42","prompt":"sea"}')
        await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        assert set(painters[0].questions) == {b'{"of": "42"}'}

    run(tmp_path, test, poll=poll)


def test_a_cancelled_job_is_ended_at_its_workspace(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        task_id = await film(bootstrap)
        await painters[0].was_asked(3)
        answer = await bootstrap.call("DELETE", f"/api/v1/tasks/{task_id}")
        assert (answer.status, json.loads(answer.body)["state"]) == (200, 5)
        (job_id,) = painters[0].jobs
        assert painters[0].asked[-1] == f"DELETE /api/jobs/{job_id}"
        assert (await detailed(bootstrap, task_id))["job"]["phase"] == "cancelled"

    run(tmp_path, test, polls=10**9)


def test_a_submission_under_way_is_ended_at_its_node_when_its_client_cancels(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        (painter,) = painters
        painter.hold_submission = trio.Event()
        told: list[str] = []

        async def stop(asked: Asked) -> None:
            told.append(asked.exchange.request.method)
            await asked.exchange.respond_json(202, {"state": "cancelling", "session": painter.node.session.hex()})

        task_id = await film(bootstrap)
        painter.node.kept[f"{task_id}/1"] = stop
        await painter.was_asked(1)
        answer = await bootstrap.call("DELETE", f"/api/v1/tasks/{task_id}")
        assert json.loads(answer.body)["state"] == 5
        assert "DELETE" in told
        assert painter.asked == ["POST /api/generate"]

    run(tmp_path, test)


def test_a_client_that_comes_again_with_its_key_gets_the_same_job(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, painters: list[Painter]) -> None:
        key = [(b"idempotency-key", b"k1")]
        first = await bootstrap.call("POST", "/user/draw", b"{}", key)
        second = await bootstrap.call("POST", "/user/draw", b"{}", key)
        assert json.loads(first.body)["taskID"] == json.loads(second.body)["taskID"]
        assert len(painters[0].jobs) == 1

    run(tmp_path, test)
