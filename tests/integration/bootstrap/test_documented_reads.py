"""The documented reads over HTTP: lists, nodes, one task in detail, in every spelling clients use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trio

from ngpu_bootstrap.config import BootstrapSettings
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.settings import load_settings
from tests.integration.bootstrap.rig import WORKSPACE, Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account

JSON = [(b"content-type", b"application/json")]
WRAPPED = json.dumps({"btc_address": "bc1qtest", "data": '{"n": 1}'}).encode()


def run(tmp_path: Path, test: Any, **changes: Any) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        async with (
            running(settings_for(tmp_path / "bootstrap", **changes)) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            await test(bootstrap, node)

    trio.run(main)


async def asked(bootstrap: Bootstrap, target: str, *, token: str | None = "", status: int = 200) -> dict[str, Any]:
    answer = await bootstrap.call("GET", target, token=token)
    document: dict[str, Any] = json.loads(answer.body)
    assert answer.status == status, document
    return document


async def submitted(bootstrap: Bootstrap, count: int = 1) -> list[str]:
    """Submit *count* asynchronous tasks one after the other; return their ids once they are done, newest first."""
    ids = []
    for _ in range(count):
        answer = await bootstrap.call("POST", "/user/schedulingTask?paramUrl=draw", WRAPPED, JSON)
        document = json.loads(answer.body)
        assert document["result_code"] == 200
        assert document["taskID"] == document["taskId"] == document["task_id"]
        ids.insert(0, document["taskID"])
        await task_when(bootstrap, ids[0], lambda view: view["state"] == 3)
    return ids


def test_lists_come_newest_first_in_pages_and_by_range_and_node(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        ids = await submitted(bootstrap, 5)
        whole = await asked(bootstrap, "/user/queryTaskList")
        assert whole == {"result_code": 200, "msg": "success", "result_size": 5, "taskIds": ids}
        seen, cursor = [], ""
        while True:
            page = await asked(bootstrap, f"/user/queryTaskList?limit=2&cursor={cursor}")
            seen += page["taskIds"]
            if not (cursor := page.get("cursor", "")):
                break
        assert seen == ids
        # the id's own date is the wire zone's: the whole day is in the range that names it
        day = re.sub(r"(\d{4})(\d{2})(\d{2})_.*", r"\1-\2-\3", ids[0])
        assert (await asked(bootstrap, f"/user/queryTaskList?startTime={day}&endTime={day}"))["result_size"] in (4, 5)
        assert (await asked(bootstrap, "/user/queryTaskList?endTime=2024-04-20"))["result_size"] == 0
        address = node.account.address
        for spelling in (address, address[2:], address.lower(), address[2:].upper()):
            assert (await asked(bootstrap, f"/user/getTasksFromNode?nodeAddr={spelling}"))["taskIds"] == ids
        other = "0x" + "1" * 40
        assert (await asked(bootstrap, f"/user/getTasksFromNode?nodeAddr={other}"))["taskIds"] == []
        nodes = await asked(bootstrap, "/user/queryNodes")
        assert (nodes["result_size"], nodes["nodes"][0]["nodeAddr"]) == (1, address)
        assert (nodes["nodes"][0]["progress"], nodes["nodes"][0]["status"]) == (100, 1)
        assert [nodes["nodes"][0][name] for name in ("standing", "trusted", "lastChallenge", "lastChallengedAtMs")] == [
            1.0, True, "", 0,
        ]  # fmt: skip
        assert (await asked(bootstrap, "/user/queryNodes?endTime=2024-04-20%2010:00:00"))["nodes"] == []

    run(tmp_path, test)


def test_a_list_needs_a_token_and_shows_its_workspace_only(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        (task_id,) = await submitted(bootstrap)
        made = await bootstrap.admin("POST", "/api/v1/workspaces", WORKSPACE)
        foreign = made["token"]
        node_query = f"/user/getTasksFromNode?nodeAddr={node.account.address}"
        for target in ("/user/queryTaskList", node_query):
            assert (await asked(bootstrap, target, token=None, status=401))["result_code"] == 401
            assert (await asked(bootstrap, target, token=foreign))["taskIds"] == []
        assert (await asked(bootstrap, "/user/queryNodes", token=None, status=401))["reason"] == "token_missing"
        for name in ("queryTask", "getDetailed"):
            refused = await asked(bootstrap, f"/user/{name}?taskID={task_id}", token=foreign, status=403)
            assert (refused["result_code"], refused["reason"]) == (403, "token_foreign")

    run(tmp_path, test)


def test_a_task_in_detail_has_every_documented_field(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        answer = await bootstrap.call(
            "POST", "/user/schedulingTask?paramUrl=draw", WRAPPED, [*JSON, (b"x-forwarded-for", b"94.74.66.215")]
        )
        task_id = json.loads(answer.body)["taskId"]
        await task_when(bootstrap, task_id, lambda view: view["state"] == 3 and view["verdict"])
        found = await asked(bootstrap, f"/user/getDetailed?taskID={task_id}", token=None)
        info = found["taskInfo"]
        assert (found["result_code"], found["msg"]) == (200, "success")
        documented = {
            "id": 1,
            "userkey": f"{bootstrap.workspace}.1",
            "btcaddress": "bc1qtest",
            "workspaceid": bootstrap.workspace,
            "taskid": task_id,
            "requrl": "/user/schedulingTask?paramUrl=draw",
            "method": "schedulingTask",
            "userip": "94.74.66.215",
            "nodeip": "127.0.0.1",
            "nodeaddr": node.account.address,
            "request": '{"n": 1}',
            "state": 3,
            "videodursion": 0,
            "gpudursion": 0,
            "watermarktime": "",
            "watermarkres": "",
        }
        assert {key: info[key] for key in documented} == documented
        for key in ("requesttime", "responsetime"):
            assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", info[key])
        # the id and the times are written in one zone
        assert info["requesttime"][:10].replace("-", "") == task_id[:8]
        assert type(info["recordDursion"]) is int
        assert info["verdict"] == info["receipt"]["verdict"] == "verified"
        assert [attempt["outcome"] for attempt in info["attempts"]] == ["complete"]
        # the scripted node echoes bytes of no type: base64, and it says so
        assert info["response_encoding"] == "base64"
        assert (bootstrap.token.partition("-")[2]) not in json.dumps(found)

    run(tmp_path, test, trusted_proxies=("127.0.0.1",))


def test_where_nodes_connect_from_can_be_hidden(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        (task_id,) = await submitted(bootstrap)
        info = (await asked(bootstrap, f"/user/getDetailed?taskID={task_id}"))["taskInfo"]
        assert (info["nodeip"], info["attempts"][0]["nodeip"]) == ("", "")

    run(tmp_path, test, show_node_ip=False)


def test_a_task_can_be_asked_for_in_every_spelling(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        (task_id,) = await submitted(bootstrap)
        for target in (
            f"/user/queryTask?taskID={task_id}",
            f"/user/queryTask&taskID={task_id}",
            f"/user/queryTask?taskId={task_id}",
            f"/user/queryTask?task_id={task_id}",
            f"/user/draw?taskID={task_id}",
        ):
            found = await asked(bootstrap, target, token=None)
            assert (found["result_code"], found["result_size"], found["task_id"]) == (200, 1, task_id), target
        slipped = await asked(bootstrap, f"/user/getDetailed&taskID={task_id}", token=None)
        assert slipped["taskInfo"]["taskid"] == task_id
        # a token in a slipped query is taken out like any other
        assert (await asked(bootstrap, f"/user/queryTaskList&ngpu_token={bootstrap.token}", token=None))["taskIds"]

    run(tmp_path, test)


def test_a_wire_zone_and_a_submission_code_are_the_operators_choice(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        answer = await bootstrap.call("POST", "/user/schedulingTask?paramUrl=draw", WRAPPED, JSON)
        document = json.loads(answer.body)
        assert (answer.status, document["result_code"]) == (200, 100)
        view = await task_when(bootstrap, document["taskID"], lambda view: view["state"] == 3)
        info = (await asked(bootstrap, f"/user/getDetailed?taskID={document['taskID']}"))["taskInfo"]
        from datetime import UTC, datetime, timedelta

        local = datetime.fromtimestamp(view["accepted_at_ms"] / 1000, UTC) - timedelta(hours=3, minutes=30)
        assert info["requesttime"] == f"{local:%Y-%m-%d %H:%M:%S}"

    run(tmp_path, test, wire_timezone="UTC-03:30", submit_result_code=100)


def test_a_zone_that_is_none_ends_the_start() -> None:
    with pytest.raises(OperatorError, match="wire_timezone"):
        load_settings(BootstrapSettings, None, "", {"wire_timezone": "Mars"})


def test_every_answer_has_the_fields_that_the_openapi_document_says_and_no_other(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        paths = (await asked(bootstrap, "/openapi.json", token=None))["paths"]

        def check(document: dict[str, Any], path: str, method: str = "get") -> None:
            schema = paths[path][method]["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema.validate(document, closed(schema))

        async def posted(target: str, content_type: bytes) -> dict[str, Any]:
            answer = await bootstrap.call("POST", target, b"\0\xff", [(b"content-type", content_type)])
            document: dict[str, Any] = json.loads(answer.body)
            return document

        task_id = (await submitted(bootstrap, 2))[0]
        check(await posted("/user/draw", b"application/octet-stream"), "/user/{api}", "post")
        started = await posted("/user/schedulingTask?paramUrl=draw", b"application/octet-stream")
        check(started, "/user/schedulingTask", "post")
        check(await asked(bootstrap, f"/user/draw?taskID={started['taskID']}"), "/user/{api}")
        await task_when(bootstrap, started["taskID"], lambda view: view["state"] == 3)
        for one in (task_id, started["taskID"]):
            check(await asked(bootstrap, f"/user/queryTask?taskID={one}"), "/user/queryTask")
            check(await asked(bootstrap, f"/user/getDetailed?taskID={one}"), "/user/getDetailed")
        check(await asked(bootstrap, "/user/queryTaskList?limit=1"), "/user/queryTaskList")
        by_node = f"/user/getTasksFromNode?nodeAddr={node.account.address}"
        check(await asked(bootstrap, by_node), "/user/getTasksFromNode")
        check(await asked(bootstrap, "/user/queryNodes"), "/user/queryNodes")

    run(tmp_path, test)


def closed(schema: Any) -> Any:
    """Return a schema that takes no field it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return inner | ({"additionalProperties": False} if "properties" in schema else {})
