"""Jobs that clients ask for themselves, and keys that hold calls on one node: by a profile of the operator's own."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from ngpu_protocol.identity import Account
from tests.integration.bootstrap.rig import Answered, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account
from tests.support.postgres import new_database

PROFILE = """
name = "vendor"
dialect = "code_info_msg"
credentials = [{in = "json", pointer = "/token"}, {in = "header", name = "Authorization"}]

[[routes]]
path = "/vendor/task_submit"
mode = "job"
[routes.job]
name = "draw"
id = ["/task_id", "/info/task_id"]
poll = {method = "POST", target = "/vendor/task_result", body = {task_id = "{id}"}}
state = ["/state"]
done = ["done"]
failed = ["failed"]
wait = false
interval_s = 0.1
duration_s = 30
away_s = 3

[[routes]]
path = "/vendor/draw_now"
mode = "job"
target = "/vendor/task_submit"
[routes.job]
name = "now"
id = ["/task_id"]
poll = {method = "POST", target = "/vendor/task_result", body = {task_id = "{id}"}}
state = ["/state"]
done = ["done"]
interval_s = 0.05
duration_s = 30
cancel = {method = "POST", target = "/vendor/task_cancel", body = {task_id = "{id}"}}

[[routes]]
path = "/vendor/say"
mode = "wrapped"
envelope = {member = "data", beside = {code = 0}}

[[routes]]
path = "/vendor/task_result"
mode = "job"
job = {of = "draw", key = {in = "json", pointer = "/task_id"}}

[[routes]]
path = "/vendor/task_cancel"
mode = "job"
job = {of = "draw", key = {in = "json", pointer = "/task_id"}, ends = true}

[[routes]]
path = "/vendor/dataset"
affinity = [{in = "json", pointer = "/name"}]

[[routes]]
path = "/vendor/session"
affinity = [{in = "cookie", name = "sid"}, {in = "query", name = "sid"}]
affinity_away = "refuse"
"""
SPEC = {"name": "w", "service": "demo/echo", "ports": [8080], "concurrency": 8, "request_timeout_s": 20}


class Vendor:
    """A workspace of the vendor's on a scripted node; nodes of one test share nothing."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.ends_at_once = False
        self.asked: list[tuple[str, Any]] = []

    async def __call__(self, asked: Asked) -> None:
        body = await asked.read()
        document = json.loads(body) if body else {}
        path = asked.signed.order.target.partition("?")[0]
        self.asked.append((path, document))
        answer: Any
        status = 200
        if path.endswith("task_submit"):
            job_id = f"{id(self)}-{len(self.jobs)}"
            self.jobs[job_id] = "done" if self.ends_at_once else "pending"
            answer = {"task_id": job_id}
        elif path.endswith("task_result"):
            state = self.jobs.get(document["task_id"])
            status = 200 if state else 404
            answer = {"state": state, "images": ["/1.png"]} if state else {"code": 1}
        elif path.endswith("task_cancel"):
            answer = {"code": 0}
        else:
            answer = {"code": 0, "info": {"node": id(self)}}
        await asked.answer(status, json.dumps(answer).encode(), [(b"content-type", b"application/json")])


def scripted(account: Account, vendor: Vendor) -> ScriptedNode:
    return ScriptedNode(account, script=vendor)


def settings(tmp_path: Path, folder: str = "bootstrap", **changes: Any) -> Any:
    file = tmp_path / "vendor.toml"
    file.write_text(PROFILE)
    profiles = {"enabled": ["vendor"], "files": [file]}
    return settings_for(tmp_path / folder, profiles=profiles, **changes)


async def post(
    bootstrap: Bootstrap, path: str, document: Any, token: str = "", query: str = "", key: bytes = b""
) -> Answered:
    body = json.dumps({**document, "token": token or bootstrap.token}).encode()
    fields = [(b"content-type", b"application/json"), *([(b"idempotency-key", key)] if key else [])]
    return await bootstrap.call("POST", f"/vendor/{path}{query}", body, fields, token=None)


async def submit(bootstrap: Bootstrap) -> tuple[str, str]:
    answer = await post(bootstrap, "task_submit", {"prompt": "x"})
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["task_id"], (answer.header(b"ngpu-task-id") or b"").decode()


async def submit_everywhere(bootstrap: Bootstrap, vendors: list[Vendor]) -> list[tuple[str, str]]:
    """Submit jobs until every node has some: which one gets the next is left to chance."""
    made = [await submit(bootstrap) for _ in range(4)]
    while not all(vendor.jobs for vendor in vendors):
        made.append(await submit(bootstrap))
    return made


Test = Callable[[Bootstrap, list[Vendor]], Awaitable[None]]


def run(tmp_path: Path, test: Test, *, nodes: int = 2) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            bootstrap = await stack.enter_async_context(running(settings(tmp_path), workspace=SPEC))
            vendors = [Vendor() for _ in range(nodes)]
            for vendor in vendors:
                await stack.enter_async_context(connected(scripted(new_account(), vendor), bootstrap.multiaddr))
            await wait_ready(bootstrap, nodes)
            with trio.fail_after(60):
                await test(bootstrap, vendors)

    trio.run(main)


def test_the_workspaces_own_answers_come_back_and_questions_reach_the_node_that_has_the_job(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, vendors: list[Vendor]) -> None:
        made = await submit_everywhere(bootstrap, vendors)
        for job_id, _ in made:
            answer = await post(bootstrap, "task_result", {"task_id": job_id})
            assert (answer.status, json.loads(answer.body)["state"]) == (200, "pending")
        job_id, task_id = made[0]
        pending = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}")).body)
        assert (pending["result_code"], pending["result_size"]) == (100, 0)
        for vendor in vendors:
            if job_id in vendor.jobs:
                vendor.jobs[job_id] = "done"
        await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        done = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={task_id}")).body)
        assert json.loads(done["data"]) == {"state": "done", "images": ["/1.png"]}
        answer = await post(bootstrap, "task_result", {"task_id": job_id})
        assert json.loads(answer.body)["state"] == "done"
        info = json.loads((await bootstrap.call("GET", f"/user/getDetailed?taskID={task_id}")).body)["taskInfo"]
        assert info["job"]["id"] == job_id
        assert len(info["job"]["calls"]) == 2, "the client's own questions are linked"
        question = info["job"]["calls"][0]
        await task_when(bootstrap, question, lambda view: view["verdict"] == "verified")
        assert (await bootstrap.call("GET", f"/api/v1/tasks/{question}/receipt")).status == 200
        assert {one["receipt"]["verdict"] for one in info["attempts"]} == {"verified"}
        # the token stood in the body: nodes saw the workspace's public id in its place
        seen = {document["token"] for vendor in vendors for _, document in vendor.asked if "token" in document}
        assert seen == {bootstrap.workspace}

    run(tmp_path, test)


def test_the_id_of_another_clients_job_is_as_unknown_as_one_that_never_was(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, vendors: list[Vendor]) -> None:
        job_id, _ = await submit(bootstrap)
        other = (await bootstrap.admin("POST", "/api/v1/workspaces", SPEC))["token"]
        asked = sum(path.endswith("task_result") for path, _ in vendors[0].asked)
        answers = [
            await post(bootstrap, "task_result", {"task_id": job_id}, token=other),
            await post(bootstrap, "task_result", {"task_id": "x" * len(job_id)}, token=other),
        ]
        documents = [json.loads(answer.body) for answer in answers]
        assert [answer.status for answer in answers] == [404, 404]
        assert documents[0]["msg"].replace(job_id, "") == documents[1]["msg"].replace("x" * len(job_id), "")
        assert set(documents[0]) == set(documents[1]) >= {"code", "info", "msg"}
        for odd in ("", "a" * 300, "a\x00b"):
            answer = await post(bootstrap, "task_result", {"task_id": odd})
            assert answer.status in (400, 404), answer.body
        assert (await post(bootstrap, "task_result", {})).status == 400
        assert asked <= sum(path.endswith("task_result") for path, _ in vendors[0].asked)

    run(tmp_path, test, nodes=1)


def test_a_question_for_a_job_whose_node_is_gone_says_so_and_offers_resubmission(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(settings(tmp_path), workspace=SPEC) as bootstrap:
            vendor, account = Vendor(), new_account()
            async with connected(scripted(account, vendor), bootstrap.multiaddr):
                await wait_ready(bootstrap)
                job_id, task_id = await submit(bootstrap)
                done_id, done_task = await submit(bootstrap)
                vendor.jobs[done_id] = "done"
                await task_when(bootstrap, done_task, lambda view: view["state"] == 3)
            async with connected(scripted(new_account(), Vendor()), bootstrap.multiaddr):
                answer = await post(bootstrap, "task_result", {"task_id": job_id})
                document = json.loads(answer.body)
                assert (answer.status, document["reason"]) in ((503, "job_node_away"), (410, "job_node_gone"))
                view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
                assert view["reason"] == "job_node_gone"
                answer = await post(bootstrap, "task_result", {"task_id": job_id})
                document = json.loads(answer.body)
                assert answer.status == 410
                assert account.address in document["msg"]
                assert "submit it again" in document["msg"]
                assert document["task_id"] == task_id
                # what was done before its node left is still known
                answer = await post(bootstrap, "task_result", {"task_id": done_id})
                assert (answer.status, json.loads(answer.body)["state"]) == (200, "done")

    trio.run(main)


def test_a_job_whose_workspace_is_gone_is_no_loss_of_its_node(tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Vendor()
        node = scripted(new_account(), vendor)
        async with (
            running(settings(tmp_path), workspace=SPEC) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            job_id, task_id = await submit(bootstrap)
            node.services = ()
            with trio.fail_after(20):
                while (answer := await post(bootstrap, "task_result", {"task_id": job_id})).status == 200:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            document = json.loads(answer.body)
            assert (answer.status, document["reason"]) == (503, "job_workspace_away")
            assert f"the workspace on node {node.account.address}" in document["msg"]
            view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
            assert view["reason"] == "job_workspace_gone"
            document = json.loads((await post(bootstrap, "task_result", {"task_id": job_id})).body)
            assert (document["code"], document["reason"]) == (410, "job_workspace_gone")
            assert "submit it again" in document["msg"]
            assert (await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/loss")).status == 404

    trio.run(main)


def test_a_job_whose_node_was_restarted_is_lost_with_the_node_though_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        account = new_account()
        async with running(settings(tmp_path), workspace=SPEC) as bootstrap:
            async with connected(scripted(account, Vendor()), bootstrap.multiaddr):
                await wait_ready(bootstrap)
                _, task_id = await submit(bootstrap)
            back = scripted(account, Vendor())
            back.services = ()
            async with connected(back, bootstrap.multiaddr):
                view = await task_when(bootstrap, task_id, lambda view: view["state"] == 4)
                assert view["reason"] == "job_node_gone"
                assert (await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/loss")).status == 200

    trio.run(main)


def test_a_client_that_ends_its_job_ends_its_task(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, vendors: list[Vendor]) -> None:
        job_id, task_id = await submit(bootstrap)
        assert (await post(bootstrap, "task_cancel", {"task_id": job_id})).status == 200
        await task_when(bootstrap, task_id, lambda view: view["state"] == 5)

    run(tmp_path, test, nodes=1)


def test_jobs_and_keys_are_found_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        vendors = [Vendor(), Vendor()]
        # the same nodes before and after: their chains of receipts go on
        nodes = [scripted(new_account(), vendor) for vendor in vendors]
        async with running(settings(tmp_path), workspace=SPEC) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with (
                connected(nodes[0], bootstrap.multiaddr),
                connected(nodes[1], bootstrap.multiaddr),
            ):
                await wait_ready(bootstrap, 2)
                made = [await submit(bootstrap) for _ in range(4)]
                homes: dict[str, int] = {}

                async def begin(name: str) -> None:
                    answer = await post(bootstrap, "dataset", {"name": name})
                    homes[name] = json.loads(answer.body)["info"]["node"]

                async with trio.open_nursery() as nursery:  # at once, so that they are spread
                    for number in range(12):
                        nursery.start_soon(begin, f"d{number}")
        assert len(set(homes.values())) == 2
        async with (
            running(settings(tmp_path), known=known) as bootstrap,
            connected(nodes[1], bootstrap.multiaddr),
            connected(nodes[0], bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap, 2)
            for job_id, _ in made:
                answer = await post(bootstrap, "task_result", {"task_id": job_id})
                assert (answer.status, json.loads(answer.body)["state"]) == (200, "pending"), answer.body
            for name, home in homes.items():
                answer = await post(bootstrap, "dataset", {"name": name})
                assert json.loads(answer.body)["info"]["node"] == home

    trio.run(main)


def test_who_waits_for_a_job_is_told_that_its_bootstrap_stops_and_the_job_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Vendor()
        node = scripted(new_account(), vendor)
        answers: list[Answered] = []
        async with running(settings(tmp_path, drain_s=0.2), workspace=SPEC) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(node, bootstrap.multiaddr), trio.open_nursery() as nursery:
                await wait_ready(bootstrap)

                async def draw() -> None:
                    answers.append(await post(bootstrap, "draw_now", {"prompt": "x"}))

                nursery.start_soon(draw)
                await node.until(lambda: any(path.endswith("task_result") for path, _ in vendor.asked))
                signal.raise_signal(signal.SIGTERM)
        document = json.loads(answers[0].body)
        assert (answers[0].status, document["code"], document["reason"]) == (503, 503, "bootstrap_stopping")
        assert document["task_id"] in document["msg"]
        assert answers[0].header(b"retry-after")
        vendor.jobs = dict.fromkeys(vendor.jobs, "done")
        async with running(settings(tmp_path), known=known) as bootstrap, connected(node, bootstrap.multiaddr):
            await task_when(bootstrap, document["task_id"], lambda view: view["state"] == 3)
            done = json.loads((await bootstrap.call("GET", f"/user/queryTask?taskID={document['task_id']}")).body)
            assert json.loads(done["data"])["state"] == "done"
        assert not any(path.endswith("task_cancel") for path, _ in vendor.asked), "its client did not leave"

    trio.run(main)


CALLS = {"task_submit": {"prompt": "sea"}, "draw_now": {"prompt": "sky"}, "say": {"words": "hello"}}


def task_of(answer: Answered) -> bytes:
    return answer.header(b"ngpu-task-id") or b""


def test_a_call_that_comes_again_under_its_key_is_the_first_one_after_a_restart_too(tmp_path: Path) -> None:
    async def main() -> None:
        vendor = Vendor()
        vendor.ends_at_once = True
        node = scripted(new_account(), vendor)
        async with running(settings(tmp_path), workspace=SPEC) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                first = {
                    path: await post(bootstrap, path, body, key=b"k-" + path.encode()) for path, body in CALLS.items()
                }
                assert {answer.status for answer in first.values()} == {200}
                assert json.loads(first["say"].body)["data"]["info"]["node"] == id(vendor)
                await task_when(bootstrap, task_of(first["task_submit"]).decode(), lambda view: view["state"] == 3)
                asked = list(vendor.asked)
                other = (await bootstrap.admin("POST", "/api/v1/workspaces", SPEC))["token"]
                for path, body in CALLS.items():
                    again = await post(bootstrap, path, body, key=b"k-" + path.encode())
                    assert (again.status, again.body, task_of(again)) == (200, first[path].body, task_of(first[path]))
                    changed = await post(bootstrap, path, {**body, "more": 1}, key=b"k-" + path.encode())
                    document = json.loads(changed.body)
                    assert (changed.status, document["reason"]) == (422, "idempotency_key_reused")
                    assert set(document) >= {"code", "info", "msg"}
                    assert task_of(changed) == b""
                assert vendor.asked == asked, "nothing ran again"
        # no node is here now, and what was answered before still is
        async with running(settings(tmp_path), known=known) as bootstrap:
            for path, body in CALLS.items():
                again = await post(bootstrap, path, body, key=b"k-" + path.encode())
                assert (again.status, again.body, task_of(again)) == (200, first[path].body, task_of(first[path]))
            assert (await post(bootstrap, "say", {}, key=b"new")).status == 503
            assert (await post(bootstrap, "say", {}, key=b"k" * 300)).status == 400
            # a key is its client's own
            foreign = await post(bootstrap, "say", CALLS["say"], token=other, key=b"k-say")
            assert foreign.status == 503
        assert vendor.asked == asked

    trio.run(main)


def test_two_calls_under_one_key_at_once_are_one_task(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, vendors: list[Vendor]) -> None:
        for vendor in vendors:
            vendor.ends_at_once = True
        for path, body in CALLS.items():
            answers: list[Answered] = []

            async def call(path: str = path, body: Any = body, answers: list[Answered] = answers) -> None:
                answers.append(await post(bootstrap, path, body, key=b"once-" + path.encode()))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(call)
            assert {(one.status, one.body, task_of(one)) for one in answers} == {
                (200, answers[0].body, task_of(answers[0]))
            }
        asked = [path for vendor in vendors for path, _ in vendor.asked if not path.endswith("task_result")]
        assert sorted(asked) == ["/vendor/say", "/vendor/task_submit", "/vendor/task_submit"]

    run(tmp_path, test)


@pytest.mark.needs_postgres
def test_jobs_and_keys_are_found_from_a_sibling_on_one_postgresql(tmp_path: Path) -> None:
    async def main(url: str) -> None:
        accounts = [new_account(), new_account()]
        vendors = [Vendor(), Vendor()]
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(running(settings(tmp_path, "a", store=url), workspace=SPEC))
            known = (first.workspace, first.token)
            second = await stack.enter_async_context(running(settings(tmp_path, "b", store=url), known=known))
            for bootstrap in (first, second):
                for account, vendor in zip(accounts, vendors, strict=True):
                    await stack.enter_async_context(connected(scripted(account, vendor), bootstrap.multiaddr))
                await wait_ready(bootstrap, 2)
            made = await submit_everywhere(first, vendors)
            for job_id, _ in made:
                answer = await post(second, "task_result", {"task_id": job_id})
                assert (answer.status, json.loads(answer.body)["state"]) == (200, "pending"), answer.body
            for number in range(4):
                homes = [
                    json.loads((await post(one, "dataset", {"name": f"d{number}"})).body)["info"]["node"]
                    for one in (first, second, first)
                ]
                assert len(set(homes)) == 1
            job_id, task_id = made[0]
            for vendor in vendors:
                if job_id in vendor.jobs:
                    vendor.jobs[job_id] = "done"
            await task_when(second, task_id, lambda view: view["state"] == 3)
            # a node that one of them has is shown by the other as it is
            alone = new_account()
            await stack.enter_async_context(connected(scripted(alone, Vendor()), first.multiaddr))
            shown: dict[str, Any] = {}
            with trio.fail_after(20):
                while shown.get(alone.address) != (1, 100, "ready"):
                    await trio.sleep(0.1)
                    nodes = json.loads((await second.call("GET", "/user/queryNodes")).body)["nodes"]
                    shown = {one["nodeAddr"]: (one["status"], one["progress"], one["state"]) for one in nodes}
            assert shown == {account.address: (1, 100, "ready") for account in (*accounts, alone)}

    with new_database() as url:
        trio.run(main, url)


def test_state_that_is_nowhere_else_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(settings(tmp_path), workspace=SPEC) as bootstrap:
            first = new_account()
            async with connected(scripted(first, Vendor()), bootstrap.multiaddr):
                await wait_ready(bootstrap)
                assert (await post(bootstrap, "session", {}, query="?sid=a")).status == 200
                assert (await post(bootstrap, "dataset", {"name": "d"})).status == 200
            async with connected(scripted(new_account(), Vendor()), bootstrap.multiaddr):
                with trio.fail_after(60):
                    while (await post(bootstrap, "session", {}, query="?sid=b")).status != 200:  # noqa: ASYNC110
                        await trio.sleep(0.02)
                refused = await post(bootstrap, "session", {}, query="?sid=a")
                assert (refused.status, json.loads(refused.body)["reason"]) == (503, "state_node_away")
                assert first.address in json.loads(refused.body)["msg"]
                assert (await post(bootstrap, "dataset", {"name": "d"})).status == 200, "this one may move"

    trio.run(main)
